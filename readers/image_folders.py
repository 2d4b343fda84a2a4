"""Data sets that are image files in a folder: rows of file and class by split, and what all of them are opened as."""
import csv
import hashlib
import io
import os
from pathlib import Path

import torch

from harness.errors import UserError
from harness.images import ImageFiles, find_images, identity
from readers.splits import SPLITS, find_splits, refuse_splits_within, with_classes
from readers.survey import Survey

CSV_FILES = {"train": "train.csv", "valid": "val.csv", "test": "test.csv"}
MINIIMAGENET_SIZE = (128, 128)
MOST_DIGITS = 18  # of a frame's number, which fits 64 bits
SHOWN = 80  # characters of a listed name that a message repeats


def existing(folder):
    """The folder as a path. FileNotFoundError where there is none."""
    if not os.path.isdir(folder):  # which is False for what can be no name as well
        raise FileNotFoundError(f"--data-folder {_short(folder)} does not exist or is no folder")
    return Path(folder)


def _short(name):
    return str(name)[:SHOWN] + "..." * (len(str(name)) > SHOWN)


# --- a folder of images, with or without splits and classes

def image_folder(source):
    folders, others = find_splits(existing(source.folder))
    if others:
        print(f"left out what lies next to the folders of splits, such as {min(others)}")
    splits = dict(zip(folders, zip(folders.values(), find_images(*folders.values()))))
    for folder, paths in splits.values():
        if not paths:
            raise UserError(f"no images under {folder}: put image files there, or name another --data-folder")
    refuse_splits_within(splits)
    rows, classes = with_classes(splits)
    splits, classes = open_files(rows, classes, source, carve=len(rows) < len(SPLITS) and not source.in_order)
    if source.in_order:
        splits = {split: _in_order(files, labels) for split, (files, labels) in splits.items()}
    return splits, classes


def _in_order(files, labels):
    """Frames `clip/000001.png` ... clip by clip, with rows (N, 4): label, clip, number, action 0.

    Raises:
        UserError: a file is not named by a number, or by one too large.
    """
    wrong = next((path for path in files.paths if not (path.stem.isdecimal() and len(path.stem) <= MOST_DIGITS)), None)
    if wrong:
        raise UserError(f"{wrong} has no number of at most {MOST_DIGITS} digits for a name, so that the folder has no "
                        "sequences of frames: name them such as clip/000001.png")
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
            path, shown = root / "images" / file, _short(file)
            if Path(file).is_absolute() or ".." in Path(file).parts:
                raise UserError(f"{where} lists {shown}, which is outside {root / 'images'}: put the file there")
            if not os.path.isfile(path):  # which is False for what can be no name as well
                raise FileNotFoundError(f"{where} lists {root / 'images' / shown}, which does not exist")
            before = listed.setdefault(identity(path), where)
            if before != where:
                raise UserError(f"{where} lists {shown} again, the file of {before}: remove one of them")
            rows[split].append((path, label))
    return open_files(rows, sorted({label for part in rows.values() for _, label in part}), source)


def _is_miniimagenet(root):
    names = {path.name.lower() for path in root.iterdir()}  # a list that has a wrong name is reported
    return "images" in names and not names.isdisjoint(CSV_FILES.values())


miniimagenet.is_in, miniimagenet.image_size = _is_miniimagenet, MINIIMAGENET_SIZE  # where no size is asked for


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
        names = reader.fieldnames or ()
        if names.count("filename") != 1 or names.count("label") != 1:
            raise UserError(f"{path} must have the columns filename,label once, has {str(reader.fieldnames)[:80]}")
        for row in reader:
            if not row["filename"] or not (row["label"] or "").strip() or None in row:
                raise UserError(f"{path} row {reader.line_num} has a cell missing or too many: write filename,label")
            rows.append((f"{path} row {reader.line_num}", row["filename"], row["label"].strip()))
    except csv.Error as error:
        raise UserError(f"{path} row {reader.line_num + 1} cannot be read ({error}): write filename,label") from error
    if not rows:
        raise UserError(f"{path} lists no images")
    return rows


# --- both

def open_files(rows, classes, source, carve=False):
    """{split: [(path, class)]} -> {split: (`ImageFiles`, labels)} and the classes.

    They have the size and the channels that the source asks for, else those of the files: see `Survey`. Where other
    splits are to be carved from train, it comes without copies, which might end up on both sides.
    """
    paths = {split: [path for path, _ in part] for split, part in rows.items()}
    survey = Survey(paths, source.skip_broken)
    size, channels = survey.size(source.image_size), survey.channels(source.channels)
    survey.say()
    copies = survey.copies("train") if carve else ()
    if copies:
        print(f"left out {len(copies)} copies of other images, such as {min(copies)}")
        rows = rows | {"train": [(path, label) for path, label in rows["train"] if path not in copies]}
        paths = {split: [path for path, _ in part] for split, part in rows.items()}
    index = {name: i for i, name in enumerate(classes)}
    return {split: (ImageFiles(paths[split], size, channels, source.skip_broken, resize=bool(source.image_size)),
                    torch.tensor([index.get(label, 0) for _, label in part])) for split, part in rows.items()}, classes


def digest(parts, folder):
    """Which files of a folder the parts hold, as a digest; empty where they hold none."""
    names = [[os.path.relpath(path, folder) for path in part.paths] for part in parts if isinstance(part, ImageFiles)]
    return hashlib.sha256(repr(names).encode()).hexdigest() if names else ""
