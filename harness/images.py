"""Image files: finding and decoding them."""
import os
import signal
import threading
import warnings
from collections import deque
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from harness.errors import UserError

MANY_FILES = 1024  # from here on, decoding is worth several processes
SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")  # formats whose mode I is 16 bits a pixel
ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


class BrokenImage(UserError):
    """An image file that does not decode."""


# --- finding

def find_files(*folders):
    """Sorted paths of the files under each folder, hidden ones left out.

    Links are followed, but no directory is read twice, and none that holds one of the folders: a link to it would bring
    in what lies beside them. Where a directory can be reached in two ways, the one without a link counts. What is no
    regular file (a link that leads nowhere, a pipe, a device) is left out, and said where its name is an image's.
    """
    seen = {identity(parent) for folder in map(Path, folders)
            for path in (folder.resolve(), Path(os.path.abspath(folder))) for parent in path.parents}
    found, odd = [[] for _ in folders], []
    real, linked = deque(enumerate(map(str, folders))), deque()
    while real or linked:
        number, folder = (real or linked).popleft()
        if identity(folder) in seen:
            continue
        seen.add(identity(folder))
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path):
                (linked if entry.is_symlink() else real).append((number, entry.path))
            elif os.path.isfile(entry.path):
                found[number].append(Path(entry.path))
            elif _is_image(entry.name):
                odd.append(entry.path)
    if odd:
        print(f"left out {len(odd)} that are no regular files, such as {min(odd)}")
    return [sorted(paths) for paths in found]


def find_images(*folders):
    """Sorted paths of the image files under each folder, judged by their endings; links as in `find_files`."""
    return [[path for path in paths if _is_image(path.name)] for paths in find_files(*folders)]


def identity(path):
    """What a file or folder has in common with itself alone, by whatever name or link it is reached."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_image(name):
    return Path(name).suffix.lower() in Image.registered_extensions()


# --- decoding

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
        # A generator of its own: the loader seeds its workers from it, and training's must not notice.
        loader = torch.utils.data.DataLoader(self, num_workers=workers, collate_fn=stack, generator=torch.Generator(),
                                             worker_init_fn=partial(_end_with, os.getpid()), **how)
        try:
            yield from loader
        except (UserError, OSError) as error:
            if not workers:
                raise
            raise UserError(str(error).strip().splitlines()[-1].partition(": ")[2]) from error

    def decode_all(self):
        """All that decode as one tensor (N, H, W, C) uint8, their numbers, and the paths of those that are broken.

        Raises:
            UserError: none of them decodes, or one does not that may not be skipped.
        """
        workers, batch_size = torch.get_num_threads() if len(self) >= MANY_FILES else 0, MANY_FILES // 8
        parts, kept = [], []
        for number, (part, found) in enumerate(self.batches(workers, batch_size=batch_size)):
            parts += [] if part is None else [part.clone()]  # out of shared memory, which is a file each
            kept += (found + number * batch_size).tolist()
        if not kept:
            raise UserError(f"none of {len(self)} images decodes, the first is {self.paths[0]}")
        broken = [self.paths[i] for i in sorted(set(range(len(self))) - set(kept))]
        return torch.cat(parts), kept, broken


def stack(images):
    """(images that are not None as one tensor, None where there are none, and their numbers)."""
    kept = torch.tensor([i for i, image in enumerate(images) if image is not None], dtype=torch.int64)
    return torch.from_numpy(np.stack([images[i] for i in kept])) if len(kept) else None, kept


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
    told = None
    while os.getppid() == parent and not (told and told.si_pid == parent):  # the loader looks for the former too late
        told = signal.sigtimedwait({signal.SIGTERM}, 1)
    os._exit(0)


def probe(path):
    """(H, W) of an image file and whether it is grey, from its header alone. BrokenImage where it has none."""
    with _opened(path) as image:
        height, width = image.height, image.width
        rotated = image.getexif().get(0x0112) in ROTATED
        return (width, height) if rotated else (height, width), is_grey(image)


def decode(path, size=None, channels=3, resize=True):
    """Read an image file as an array (H, W, C) uint8, resized to cover and center-cropped to size (H, W) if given.

    Grey images of 16 bits, and floats in [0, 1], are scaled to 8 bits.

    Raises:
        BrokenImage: it does not decode. UserError: it is colour where channels is 1, its range is not known, or its
            size differs where `resize` is not set.
    """
    with _opened(path) as file:
        kind = file.format
        image = ImageOps.exif_transpose(file)
        image.load()
    image = _eight_bits(path, image, kind)
    if channels == 1 and not is_grey(image):
        raise UserError(f"{path} is a colour image among greyscale ones: keep one kind in a folder")
    image = image.convert("L" if channels == 1 else "RGB")
    if size and image.size != (size[1], size[0]):
        if not resize:
            raise UserError(f"{path} is {image.height}x{image.width} but others are {size[0]}x{size[1]}: pass "
                            "--image-size to bring all images to one size")
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image).reshape(image.height, image.width, channels)


@contextmanager
def _opened(path):
    """An open image file; whatever goes wrong with it is a BrokenImage, since decoders raise errors of every kind."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and odd metadata: they decode or they do not
            with Image.open(path) as file:
                yield file
    except Exception as error:
        raise BrokenImage(f"{path} does not decode as an image ({error}): repair or remove it, or pass --skip-broken"
                          ) from error


def _eight_bits(path, image, kind):
    """What Pillow would clip, scaled: 16 bits a pixel, and floats in [0, 1]."""
    if image.mode == "F":
        values, top = np.asarray(image, dtype=np.float64), 1
    elif image.mode.startswith("I;16") or (image.mode == "I" and kind in SIXTEEN_BITS):
        values, top = np.asarray(image, dtype=np.float64), 2 ** 16 - 1
    elif image.mode == "I":
        raise UserError(f"{path} has 32-bit integers, whose range is not known: convert it to 8 or 16 bits")
    else:
        return image
    if not (values.min() >= 0 and values.max() <= top):
        raise UserError(f"{path} has values from {values.min():.4g} to {values.max():.4g}, whose range is not known: "
                        f"scale them to 0...{top}, or convert it to 8 bits")
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8))


def is_grey(image):
    return image.mode in ("1", "L", "LA", "F") or image.mode.startswith("I")
