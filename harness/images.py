"""Image files: finding them, and reading many of them."""
import os
import signal
import threading
from collections import Counter, deque
from functools import partial
from pathlib import Path

import numpy as np
import torch

from harness.decoding import HEIC_NEEDS, UNREAD, BrokenImage, OtherImage, decode, is_image, probe
from harness.errors import UserError
from harness.progress import Progress

MANY_FILES = 1024  # from here on, decoding is worth several processes
RUN_FOLDERS = ("models", "logs")  # in the working directory: where runs keep what they make
MADE_FOLDERS = (*RUN_FOLDERS, "evaluation", "reconstructions")  # and where evaluate.py and reconstruct.py write
THUMBNAILS = {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN"}  # folders that a NAS or a system fills
NAMED = 5  # endings and folders that a message names


# --- finding

def find_files(*folders):
    """Sorted paths of the regular files under each folder, without what is hidden, a run's or a thumbnail.

    Links are followed, but no directory is read twice, and none that holds one of the folders: a link to it would bring
    in what lies next to them. Where a directory can be reached in two ways, the one without a link counts.
    """
    found = [[] for _ in folders]
    for number, kind, path in _walk(folders):
        if kind == "file":
            found[number].append(Path(path))
    return [sorted(paths) for paths in found]


def find_images(*folders):
    """Those files of `find_files` whose names end like an image's; says in one line what else there is."""
    found, others, odd, passed = [[] for _ in folders], [], [], []
    for number, kind, path in _walk(folders):
        if kind == "folder":
            passed.append(path)
        elif kind == "file":
            found[number].append(Path(path)) if is_image(path) else others.append(path)
        elif is_image(path):
            odd.append(path)
    parts = []
    if others:
        endings = Counter(os.path.splitext(path)[1].lower()[:10] or "without an ending" for path in others)
        needs = f": {HEIC_NEEDS}" * (not UNREAD.isdisjoint(endings))
        parts.append(f"{len(others)} files that are no images by their names ({_some(endings)}), such as {min(others)}"
                     + needs)
    if odd:
        parts.append(f"{len(odd)} that are no regular files, such as {min(odd)}")
    if passed:
        parts.append(f"the folders of results or thumbnails {', '.join(sorted(passed)[:NAMED])}"
                     + f" and {len(passed) - NAMED} more" * (len(passed) > NAMED))
    if parts:
        print(f"left out {'; '.join(parts)}")
    return [sorted(paths) for paths in found]


def holds_image(folder, deep=True):
    """Whether there is an image file in a folder, or `deep` in the folders in it."""
    return any(kind == "file" and is_image(path) for _, kind, path in _walk([folder], deep))


def _some(counts):
    return ", ".join(f"{count} {name}" for name, count in counts.most_common(NAMED)) + ", ..." * (len(counts) > NAMED)


def _walk(folders, deep=True):
    """(number of the folder, kind, path) of what is in each folder, where kind is a "file", "odd" or a "folder".

    What is "odd" is no regular file: a link that leads nowhere, a pipe, a device. A "folder" is passed over.
    """
    seen = {identity(parent) for folder in map(Path, folders)
            for path in (folder.resolve(), Path(os.path.abspath(folder))) for parent in path.parents}
    asked, real, linked = set(map(str, folders)), deque(enumerate(map(str, folders))), deque()
    while real or linked:
        number, folder = (real or linked).popleft()
        if identity(folder) in seen:
            continue
        seen.add(identity(folder))
        if folder not in asked and is_passed_over(folder):
            yield number, "folder", folder
            continue
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            link = entry.is_symlink()  # of which an entry's own is_dir raises errors
            if os.path.isdir(entry.path) if link else entry.is_dir():
                if deep:
                    (linked if link else real).append((number, entry.path))
            else:
                regular = os.path.isfile(entry.path) if link else entry.is_file()
                yield number, "file" if regular else "odd", entry.path


def is_passed_over(folder):
    """Whether a folder holds what the scripts wrote in this working directory, or thumbnails."""
    return os.path.basename(folder) in THUMBNAILS or any(
        os.path.isdir(name) and os.path.samefile(name, folder) for name in MADE_FOLDERS)


def identity(path):
    """What a file or folder has in common with itself alone, by whatever name or link it is reached."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


# --- reading

def probe_all(paths):
    """`Header` of each image file in turn, or the BrokenImage or OtherImage that it is."""
    for part in _loaded(_Headers(paths), _workers(paths), collate_fn=list, batch_size=MANY_FILES // 8):
        yield from part


class _Headers(torch.utils.data.Dataset):
    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return probe(self.paths[index])
        except (BrokenImage, OtherImage) as error:
            return error


class ImageFiles(torch.utils.data.Dataset):
    """Image files decoded one by one to (H, W, C) uint8; a broken one raises, or is None where it may be skipped.

    `size` is the (H, W) of all of them: where `resize` is set they are brought to it, else another size is an error.
    """

    def __init__(self, paths, size, channels, skip_broken=False, resize=True):
        self.paths, self.size, self.channels, self.skip_broken, self.resize = paths, size, channels, skip_broken, resize

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        try:
            return decode(self.paths[index], self.size, self.channels, self.resize)
        except BrokenImage:
            if not self.skip_broken:
                raise
            return None

    def nbytes(self):
        """Memory that all of them need, decoded."""
        return len(self) * self.size[0] * self.size[1] * self.channels

    def subset(self, index):
        """The files at `index`, a slice or whole numbers."""
        paths = self.paths[index] if isinstance(index, slice) else [self.paths[i] for i in index]
        return ImageFiles(paths, self.size, self.channels, self.skip_broken, self.resize)

    def batches(self, workers, **how):
        """What `stack` makes of the batches of a DataLoader with so many processes, which end when this one does.

        An error comes without the traceback of its process.
        """
        try:
            yield from _loaded(self, workers, collate_fn=stack, **how)
        except (UserError, OSError) as error:
            if not workers:
                raise
            raise UserError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error

    def decode_all(self):
        """All that decode as one tensor (N, H, W, C) uint8, their numbers, and the paths of those that are broken.

        Raises:
            UserError: none of them decodes, or one does not that may not be skipped.
        """
        batch_size, kept = MANY_FILES // 8, []
        images = torch.empty(len(self), *self.size, self.channels, dtype=torch.uint8)
        with Progress("reading", len(self)) as progress:
            for number, (part, found) in enumerate(self.batches(_workers(self), batch_size=batch_size)):
                if len(found):
                    images[len(kept):len(kept) + len(found)] = part
                kept += (found + number * batch_size).tolist()
                progress.add(min(batch_size, len(self) - progress.done))
        if not kept:
            raise UserError(f"none of {len(self)} images decodes, the first is {self.paths[0]}")
        broken = [self.paths[i] for i in sorted(set(range(len(self))) - set(kept))]
        return images[:len(kept)], kept, broken


def stack(images):
    """(images that are not None as one tensor, None where there are none, and their numbers)."""
    kept = torch.tensor([i for i, image in enumerate(images) if image is not None], dtype=torch.int64)
    return torch.from_numpy(np.stack([images[i] for i in kept])) if len(kept) else None, kept


def _workers(files):
    return torch.get_num_threads() if len(files) >= MANY_FILES else 0


def _loaded(dataset, workers, **how):
    """A DataLoader with so many processes, which end when this one does."""
    # A generator of its own: the loader seeds its workers from it, and training's must not notice.
    return torch.utils.data.DataLoader(dataset, num_workers=workers, generator=torch.Generator(),
                                       worker_init_fn=partial(_end_with, os.getpid()), **how)


def _end_with(parent, _):
    """Let a loader's process end when its parent does or says so, and never because a signal came to all at once.

    The parent answers that signal: it saves, and needs the batches that are under way to get there.
    """
    if os.getppid() != parent:  # dead already: the loader would not notice
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # elsewhere nothing tells who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, args=(parent,), daemon=True).start()


def _end_when_told(parent):
    sent = None
    while os.getppid() == parent and not (sent and sent.si_pid == parent):  # the loader looks for the former too late
        sent = signal.sigtimedwait({signal.SIGTERM}, 1)
    os._exit(0)
