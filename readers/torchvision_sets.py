"""Data sets that torchvision reads and downloads."""
import hashlib
from dataclasses import replace
from pathlib import Path

import torch

from harness.errors import UserError
from readers.image_folders import image_folder

IMAGENETTE_FOLDER, IMAGENETTE_SIZE = "imagenette2-160", (128, 128)


def torchvision_set(class_name, mark):
    def open_splits(source):
        from torchvision import datasets as tv
        dataset_class, splits = getattr(tv, class_name), {}
        for split in ("train", "test"):
            dataset = _open(dataset_class, source, mark, train=split == "train")
            images, labels = torch.as_tensor(dataset.data), torch.as_tensor(dataset.targets)
            _check(Path(source.folder) / mark, class_name, split, len(images), labels, len(dataset.classes))
            splits[split] = (images if images.ndim == 4 else images.unsqueeze(3), labels)  # (N, H, W, C)
        return splits, list(dataset.classes)
    open_splits.is_in, open_splits.mark = lambda root: (root / mark).exists(), mark
    return open_splits


def imagenette(source):
    """Ten classes of ImageNet, JPEG files whose shorter side is 160 pixels; its split val is the test split here."""
    from torchvision import datasets as tv
    dataset = _open(tv.Imagenette, source, IMAGENETTE_FOLDER, split="train", size="160px")
    splits, classes = image_folder(replace(source, folder=str(Path(source.folder) / IMAGENETTE_FOLDER)))
    names = {wnid: words[0] for wnid, words in zip(dataset.wnids, dataset.classes)}
    return {"train": splits["train"], "test": splits["valid"]}, [names[wnid] for wnid in classes]


imagenette.image_size = IMAGENETTE_SIZE  # where none is asked for
imagenette.is_in, imagenette.mark = lambda root: (root / IMAGENETTE_FOLDER).is_dir(), IMAGENETTE_FOLDER


def _check(folder, name, split, images, labels, classes):
    """UserError where the labels of a split are not one of the classes for each of so many images."""
    if not images or images != len(labels):
        raise _damaged(folder, f"{images} images and {len(labels)} labels of {split}", name)
    if not 0 <= labels.min() <= labels.max() < classes:
        raise _damaged(folder, f"labels of {split} from {labels.min()} to {labels.max()}", name)


def near(root, is_in):
    """The folder one or two levels above root, or one below, that holds a data set; None where none does."""
    around = [root.parent, root.parent.parent, *(root.iterdir() if root.is_dir() else ())]
    return next((path for path in around if path.is_dir() and is_in(path)), None)


def _open(dataset_class, source, mark, **options):
    """A data set of torchvision, downloaded where it is missing and that is allowed."""
    name, root = dataset_class.__name__, Path(source.folder)
    try:
        return dataset_class(source.folder, download=False, **options)
    except Exception as error:
        if not (isinstance(error, RuntimeError) and "not found" in str(error)):
            raise _damaged(root / mark, _one_line(error), name) from error
        changed = [file for file, digest in _files(dataset_class).items() if _differs(root / mark / file, digest)]
        if changed:
            raise _damaged(root / mark, f"{changed[0]} is not as it was published", name) from error
        elsewhere = near(root, lambda path: (path / mark).exists())
        if elsewhere and not (root / mark).exists():
            raise UserError(f"{name} is not in {root} but in {elsewhere}: pass --data-folder {elsewhere}") from error
        missing = f"{name} is not in {root}{_what_is_there(dataset_class, root, mark)}"
        if not source.download:
            raise FileNotFoundError(f"{missing}, and --no-download forbids to fetch it") from error
    try:
        return dataset_class(source.folder, download=True, **options)
    except Exception as error:
        raise OSError(f"{missing} and cannot be downloaded ({_one_line(error)}): let this command download it on a "
                      "machine with a connection, then copy that folder and pass it as --data-folder") from error


def _damaged(folder, reason, name):
    return UserError(f"{folder} is damaged ({reason}): delete it, and {name} is downloaded anew")


def _files(dataset_class):
    """{name of each file that a data set consists of: its MD5 where that is known}; empty where it is folders."""
    if hasattr(dataset_class, "resources"):  # MNIST
        return {Path(packed).stem: None for packed, _ in dataset_class.resources}
    if not hasattr(dataset_class, "meta"):
        return {}
    meta = dataset_class.meta  # CIFAR
    return dict(map(tuple, (*dataset_class.train_list, *dataset_class.test_list, (meta["filename"], meta["md5"]))))


def _differs(path, digest):
    return path.is_file() and digest is not None and hashlib.md5(path.read_bytes()).hexdigest() != digest


def _what_is_there(dataset_class, root, mark):
    """What a message adds where a data set is packed, or lacks some of its files."""
    files = [packed for packed, _ in getattr(dataset_class, "resources", ())]
    tar = [] if files else [getattr(dataset_class, "filename", f"{mark}.tgz")]  # with the folder in it
    packed = [path for name in files + tar for path in (root / name, root / mark / name) if path.is_file()]
    lacking = [name for name in _files(dataset_class) if not (root / mark / name).is_file()]
    if packed:
        return f" (unpack {packed[0]} into {root if tar else root / mark})"
    return f" ({root / mark} lacks {lacking[0]})" if lacking and (root / mark).is_dir() else ""


def _one_line(error):
    """What went wrong, without line breaks: torchvision lists each address it tried on lines of its own."""
    return " ".join(str(error).split()) or type(error).__name__
