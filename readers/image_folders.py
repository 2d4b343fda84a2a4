"""Data sets that are image files in a folder: rows of file and class by split, and what all of them are opened as."""
import csv
import hashlib
import io
import os
from pathlib import Path

import torch

from harness.errors import UserError
from harness.images import BrokenImage, ImageFiles, find_images, identity, probe

ALIASES = {"train": ("train", "training"), "valid": ("valid", "val", "validation"), "test": ("test", "testing")}
SPLITS = tuple(ALIASES)
CSV_FILES = {"train": "train.csv", "valid": "val.csv", "test": "test.csv"}
MINIIMAGENET_SIZE = (128, 128)
SHOWN = 80  # characters of a listed name that a message repeats
PROBED = 100  # files of a split whose header tells size and channels of all


def existing(folder):
    """The folder as a path. FileNotFoundError where there is none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data-folder {folder} does not exist or is no folder")
    return folder


# --- a folder of images, with or without splits and classes

def split_folders(root):
    """{split: its folder under root}, whatever the case of its name; empty where there is none.

    Raises:
        UserError: two folders are one split, or there are others but no train.
    """
    found = {}
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        for split, names in ALIASES.items():
            if folder.name.lower() in names:
                if split in found:
                    raise UserError(f"{found[split]} and {folder} are both the {split} split: keep one of them")
                found[split] = folder
    if found and "train" not in found:
        raise UserError(f"{' and '.join(map(str, found.values()))} without a folder train beside: add it or rename")
    return found


def image_folder(source):
    root, rows = existing(source.folder), {}
    folders = split_folders(root)
    beside = [path for path in root.iterdir()
              if path.is_dir() and path not in folders.values() and not path.name.startswith(".")]
    if folders and beside:
        print(f"left out what lies beside the folders of splits, such as {min(beside)}")
    folders = folders or {"train": root}
    for (split, folder), paths in zip(folders.items(), find_images(*folders.values())):
        if not paths:
            raise UserError(f"no images under {folder}: put image files there, or name another --data-folder")
        # The class is the first folder below the split; with files outside any, there are no classes.
        rows[split] = [(path, path.relative_to(folder).parts[0] if path.parent != folder else None) for path in paths]
    classes = {label for part in rows.values() for _, label in part}
    splits, classes = open_files(rows, [] if None in classes else sorted(classes), source)
    if source.in_order:
        splits = {split: _in_order(files, labels) for split, (files, labels) in splits.items()}
    return splits, classes


def _in_order(files, labels):
    """Frames `clip/000001.png` ... clip by clip, with rows (N, 4): label, clip, number, action 0.

    Raises:
        UserError: a file is not named by a number.
    """
    wrong = next((path for path in files.paths if not path.stem.isdecimal()), None)
    if wrong:
        raise UserError(f"{wrong} has no number for a name, so that the folder has no sequences of frames: name them "
                        "such as clip/000001.png")
    order = sorted(range(len(files)), key=lambda i: (files.paths[i].parent, int(files.paths[i].stem)))
    clips = {parent: i for i, parent in enumerate(sorted({path.parent for path in files.paths}))}
    rows = [(int(labels[i]), clips[files.paths[i].parent], int(files.paths[i].stem), 0) for i in order]
    return files.subset(torch.tensor(order)), torch.tensor(rows)


# --- Mini-ImageNet: images/ and three lists of them

def miniimagenet(source):
    root, rows, listed = existing(source.folder), {}, {}
    for name in CSV_FILES.values():
        if not (root / name).is_file():
            raise FileNotFoundError(f"no {name} in {root}: Mini-ImageNet is images/, train.csv, val.csv and test.csv, "
                                    "in small letters; --dataset folder reads images without these lists")
    for split, name in CSV_FILES.items():
        rows[split] = []
        for where, file, label in _listed_files(root / name):
            path, shown = root / "images" / file, file[:SHOWN] + "..." * (len(file) > SHOWN)
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise UserError(f"{where} lists {shown}, which is outside {root / 'images'}: put the file there")
            if not os.path.isfile(path):  # which is False for what can be no name as well
                raise FileNotFoundError(f"{where} lists {root / 'images' / shown}, which does not exist")
            before = listed.setdefault(identity(path), where)
            if before != where:
                raise UserError(f"{where} lists {shown} again, the file of {before}: remove one of them")
            rows[split].append((path, label))
    source.image_size = source.image_size or MINIIMAGENET_SIZE
    return open_files(rows, sorted({label for part in rows.values() for _, label in part}), source)


def _is_miniimagenet(root):
    names = {path.name.lower() for path in root.iterdir()}  # a list that is named amiss is told, not left unread
    return "images" in names and not names.isdisjoint(CSV_FILES.values())


miniimagenet.is_in = _is_miniimagenet


def _listed_files(path):
    """[("<file> row <number>", filename, label)] of a CSV file. UserError names the row that is wrong."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} row {row} is not UTF-8 ({error.reason}): save the file as UTF-8") from error
    reader, rows = csv.DictReader(io.StringIO(text, newline="")), []
    try:
        if not {"filename", "label"} <= set(reader.fieldnames or ()):
            raise UserError(f"{path} must have the columns filename,label, has {str(reader.fieldnames)[:80]}")
        for row in reader:
            if not row["filename"] or not row["label"] or None in row:
                raise UserError(f"{path} row {reader.line_num} has a cell missing or too many: write filename,label")
            rows.append((f"{path} row {reader.line_num}", row["filename"], row["label"]))
    except csv.Error as error:
        raise UserError(f"{path} row {reader.line_num + 1} cannot be read ({error}): write filename,label") from error
    if not rows:
        raise UserError(f"{path} lists no images")
    return rows


# --- both

def open_files(rows, classes, source):
    """{split: [(path, class)]} -> {split: (`ImageFiles`, labels)} and the classes.

    They have the size that the source asks for, else that of the first file; one channel where all are grey.

    Raises:
        UserError: colour images where the source asks for grey ones.
    """
    facts = [fact for part in rows.values() for fact in _probe(part, source.skip_broken)]
    size = source.image_size or facts[0][0]
    channels = source.channels or (1 if all(grey for _, grey in facts) else 3)
    index = {name: i for i, name in enumerate(classes)}
    return {split: (ImageFiles([path for path, _ in part], tuple(size), channels, source.skip_broken,
                               resize=bool(source.image_size)),
                    torch.tensor([index.get(label, 0) for _, label in part])) for split, part in rows.items()}, classes


def _probe(rows, skip_broken):
    """[((H, W), grey)] of files spread over a split."""
    facts, paths = [], [path for path, _ in rows[::max(1, len(rows) // PROBED)]]
    for path in paths:
        try:
            facts.append(probe(path))
        except BrokenImage:
            if not skip_broken:
                raise
    if not facts:
        raise UserError(f"none of {len(paths)} images decodes, the first is {paths[0]}")
    return facts


def digest(parts, folder):
    """Which files of a folder the parts hold, as a digest; empty where they hold none."""
    names = [[os.path.relpath(path, folder) for path in part.paths] for part in parts if isinstance(part, ImageFiles)]
    return hashlib.sha256(repr(names).encode()).hexdigest() if names else ""
