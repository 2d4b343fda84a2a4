"""Name -> train, valid and test batches, and what a data set is (channels, size, classes).

To add a data set: write a function that returns its splits and give it a row in `DATASETS` at the end of this file.
"""
import argparse
import csv
import hashlib
import io
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from harness import cli, distributed
from harness.batches import Batches
from harness.checkpoint import write_atomic
from harness.images import ImageFiles, decode_or_skip, find_images, is_grey

IN_MEMORY_BYTES = 2 ** 32  # a data set that needs more, as uint8, streams from disk
MANY_FILES = 1024  # from here on, decoding is worth several processes
SPLITS = ("train", "valid", "test")
CARVED = 0.1  # share of train that becomes a split the data set does not bring
SPLIT_SEED = 0  # splits never depend on --seed


def add_arguments(parser):
    """Flags of the data set, for scripts that are told which."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, default="photos", help="(default %(default)s)")
    group.add_argument("--image-size", type=cli.image_size, metavar="N|HxW", help="resize and center-crop the images")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False,
                       help="mirror half of the training images")
    add_folder_arguments(group)


def add_folder_arguments(group, folder="data"):
    """Flags of where a data set is and how it is read."""
    group.add_argument("--data-folder", default=folder, help="where the data set is, or is downloaded to")
    group.add_argument("--no-download", action="store_true", help="fail where the data set is not on disk")
    group.add_argument("--skip-broken", action="store_true", help="go on without images that do not decode")
    group.add_argument("--limit", type=cli.positive_int, metavar="N", help="use N training images, for quick looks")
    cores = (os.cpu_count() or 2) // distributed.local_world_size()
    group.add_argument("--num-workers", type=cli.whole, default=max(1, cores - 1),
                       help="processes that decode images where a data set streams from disk (default %(default)s)")


def source_of(args):
    """The `Source` that the flags of a script name."""
    return Source(args.data_folder, args.image_size, not args.no_download, args.skip_broken)


@dataclass
class Source:
    """Where images come from: one flag of the command line each."""
    folder: str = "data"
    image_size: tuple = None  # (H, W); None keeps the files' own
    download: bool = True
    skip_broken: bool = False

    @classmethod
    def of(cls, checkpoint, folder=None, download=True):
        """Where the images of a checkpoint's contents came from, or the same images in another folder."""
        args = checkpoint["args"]
        return cls(folder or args["data_folder"], tuple(checkpoint["data"]["size"]), download, args["skip_broken"])


@dataclass
class Data:
    """A data set, ready to train on. `classes` are sorted names; empty where there are none."""
    name: str
    train: "Batches"
    valid: "Batches"
    test: "Batches"
    channels: int
    size: tuple  # (H, W)
    classes: list

    def shard(self, rank, world):
        """Leave this process its share of every batch of every split."""
        for split in SPLITS:
            getattr(self, split).shard(rank, world)

    def facts(self):
        """What a checkpoint keeps of it: plain values."""
        return {"name": self.name, "channels": self.channels, "size": list(self.size), "classes": self.classes,
                "images": {split: len(getattr(self, split).labels) for split in SPLITS}}


def fingerprint(name, source):
    """What a data set's images depend on, as text: changes when a file in its folder does."""
    description = [name, str(source.image_size), str(source.skip_broken)]
    if name != "photos":
        for root, _, names in sorted(os.walk(source.folder, followlinks=True)):
            for file in sorted(names):
                status = os.stat(os.path.join(root, file))
                description.append(f"{root}/{file} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(description).encode()).hexdigest()


def load(name, source, batch_size, device="cpu", flip=False, seed=0, limit=None, workers=0):
    """Open a data set by name.

    Args:
        name: a key of `DATASETS`. source: `Source`. flip: mirror half of the training images, anew each epoch.
        seed: of the training order. limit: use the first so many training images. workers: processes that decode
            where images stream.
    Raises:
        FileNotFoundError, ValueError, OSError: missing or empty folder, broken image, sizes that differ, no download.
    """
    splits, classes = DATASETS[name](source)  # split -> (images, labels)
    splits = _complete(splits)
    if limit:
        images, labels = splits["train"]
        splits["train"] = (_subset(images, slice(0, limit)), labels[:limit])
    images = splits["train"][0]
    size, channels = (images.size, images.channels) if isinstance(images, ImageFiles) \
        else (tuple(images.shape[1:3]), images.shape[3])
    train, valid, test = (Batches(*splits[split], batch_size, device, shuffle=split == "train",
                                  flip=flip and split == "train", seed=seed, workers=workers) for split in SPLITS)
    return Data(name, train, valid, test, channels, size, classes)


def _complete(splits):
    """Carve the splits that are missing from train, and put train in a fixed random order."""
    images, labels = splits["train"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    missing = [split for split in SPLITS if split not in splits]
    carved = max(1, int(len(labels) * CARVED))
    if len(labels) <= carved * len(missing):
        raise ValueError(f"{len(labels)} training images are too few to carve {' and '.join(missing)} from: add images")
    for split in missing:
        splits[split] = (_subset(images, order[:carved]), labels[order[:carved]])
        order = order[carved:]
    splits["train"] = (_subset(images, order), labels[order])
    return splits


def _subset(images, index):
    if not isinstance(images, ImageFiles):
        return images[index]
    paths = images.paths[index] if isinstance(index, slice) else [images.paths[i] for i in index]
    return ImageFiles(paths, images.size, images.channels, images.skip_broken)


# --- photographs that ship with scikit-image

PHOTOS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
PHOTO_STRIPS = {"train": (0., 0.6), "valid": (0.6, 0.8), "test": (0.8, 1.)}  # of the longer side
PHOTO_CROPS = {"train": 4096, "valid": 512, "test": 512}


def _photos(source):
    from skimage import data
    height, width = source.image_size or (64, 64)
    photos = [torch.from_numpy(getattr(data, name)()[..., :3].copy()) for name in PHOTOS]
    generator, splits = torch.Generator().manual_seed(SPLIT_SEED), {}
    for split, (start, stop) in PHOTO_STRIPS.items():
        strips = []
        for photo in photos:
            axis = int(photo.shape[1] > photo.shape[0])
            side = photo.shape[axis]
            strips.append(photo.narrow(axis, int(start * side), int(stop * side) - int(start * side)))
        strips = [strip for strip in strips if strip.shape[0] >= height and strip.shape[1] >= width]
        if not strips:
            raise ValueError(f"no photograph has a {split} strip of {height}x{width} pixels: pass a smaller "
                             "--image-size")
        crops = []
        for i in range(PHOTO_CROPS[split]):
            strip = strips[i % len(strips)]
            top, left = (int(torch.randint(side - crop + 1, (), generator=generator))
                         for side, crop in zip(strip.shape, (height, width)))
            crops.append(strip[top:top + height, left:left + width])
        splits[split] = (torch.stack(crops), torch.zeros(len(crops), dtype=torch.int64))
    return splits, []


# --- torchvision's own

def _torchvision(class_name):
    def open_splits(source):
        from torchvision import datasets as tv
        dataset_class, splits = getattr(tv, class_name), {}
        for split in ("train", "test"):
            try:
                dataset = dataset_class(source.folder, train=split == "train", download=False)
            except RuntimeError as missing:
                if not source.download:
                    raise FileNotFoundError(f"{class_name} is not in {source.folder} and --no-download forbids to "
                                            "fetch it") from missing
                try:
                    dataset = dataset_class(source.folder, train=split == "train", download=True)
                except (RuntimeError, OSError) as error:
                    raise OSError(f"{class_name} is not in {source.folder} and cannot be downloaded ({error}): "
                                  "download it elsewhere and pass its --data-folder") from error
            images = torch.as_tensor(dataset.data)
            images = images if images.ndim == 4 else images.unsqueeze(3)  # (N, H, W, C)
            splits[split] = (_resized(images, source.image_size), torch.as_tensor(dataset.targets))
        return splits, list(dataset.classes)
    return open_splits


def _resized(images, size):
    if not size or tuple(images.shape[1:3]) == tuple(size):
        return images
    height, width = images.shape[1:3]
    scale = max(size[0] / height, size[1] / width)
    covering = [max(side, round(old * scale)) for side, old in zip(size, (height, width))]
    top, left = ((old - side) // 2 for side, old in zip(size, covering))
    resized = []
    for batch in images.split(1024):  # as float32, four times the memory
        batch = F.interpolate(batch.permute(0, 3, 1, 2).float(), covering, mode="bicubic", antialias=True)
        batch = batch.round().clamp(0, 255).byte().permute(0, 2, 3, 1)
        resized.append(batch[:, top:top + size[0], left:left + size[1]])
    return torch.cat(resized).contiguous()


# --- folders of image files

def _existing(folder):
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data-folder {folder} does not exist or is no folder")
    return folder


def _folder(source):
    root, files, names = _existing(source.folder), {}, set()
    folders = {split: next((root / alias for alias in (split, *{"valid": ("val", "validation")}.get(split, ()))
                            if (root / alias).is_dir()), None) for split in SPLITS}
    if not folders["train"]:
        folders = {"train": root}
    for split, folder in folders.items():
        if folder:
            paths = find_images(folder)
            if not paths:
                raise ValueError(f"no images under {folder}: put image files there, or name another --data-folder")
            # The class is the first folder below the split; with files outside any, there are no classes.
            files[split] = [(path, path.relative_to(folder).parts[0] if path.parent != folder else None)
                            for path in paths]
            names |= {label for _, label in files[split]}
    classes = [] if None in names else sorted(names)
    return _open_files(files, classes, source), classes


def _miniimagenet(source):
    root, files = _existing(source.folder), {}
    for split, name in zip(SPLITS, ("train.csv", "val.csv", "test.csv")):
        if not (root / name).is_file():
            raise FileNotFoundError(f"no {name} in {root}: Mini-ImageNet is images/, train.csv, val.csv and test.csv")
        with open(root / name, newline="") as file:
            reader = csv.DictReader(file)
            if not {"filename", "label"} <= set(reader.fieldnames or ()):
                raise ValueError(f"{root / name} must have the columns filename,label")
            files[split] = [(root / "images" / row["filename"], row["label"]) for row in reader]
        if not files[split]:
            raise ValueError(f"{root / name} lists no images")
    classes = sorted({label for rows in files.values() for _, label in rows})
    source.image_size = source.image_size or (128, 128)
    return _open_files(files, classes, source), classes


def _open_files(files, classes, source):
    """Split -> (path, class) rows becomes split -> (images, labels), in memory where all of them fit."""
    sample = [path for rows in files.values() for path, _ in rows[::max(1, len(rows) // 100)]]
    channels, size = _channels_and_size(sample, source)
    total = sum(len(rows) for rows in files.values()) * size[0] * size[1] * channels
    index, splits = {name: i for i, name in enumerate(classes)}, {}
    for split, rows in files.items():
        images = ImageFiles([path for path, _ in rows], source.image_size, channels, source.skip_broken)
        labels = torch.tensor([index.get(label, 0) for _, label in rows])
        if total > IN_MEMORY_BYTES:
            images.size = size
            splits[split] = (images, labels)
        else:
            splits[split] = _decode_all(images, labels)
    return splits


def _channels_and_size(paths, source):
    grey, size = True, source.image_size
    for path in paths:
        try:
            with Image.open(path) as image:
                grey, size = grey and is_grey(image), size or (image.height, image.width)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is listed but does not exist") from None
        except (OSError, SyntaxError, ValueError):
            continue  # decoding names it
    return 1 if grey and size else 3, size or (0, 0)


def _decode_all(files, labels):
    read = partial(decode_or_skip, size=files.size, channels=files.channels, skip_broken=files.skip_broken)
    if len(files) < MANY_FILES:
        images = [read(path) for path in files.paths]
    else:
        with ProcessPoolExecutor() as pool:
            images = list(pool.map(read, files.paths, chunksize=MANY_FILES // 8))
    kept = [i for i, image in enumerate(images) if image is not None]
    if not kept:
        raise ValueError(f"none of the {len(files)} images decodes, the first is {files.paths[0]}")
    if len(kept) < len(images):
        print(f"skipped {len(images) - len(kept)} broken images of {len(images)}")
    first = images[kept[0]]
    for i in kept:
        if images[i].shape != first.shape:
            raise ValueError(f"{files.paths[i]} is {_size_text(images[i])} but {files.paths[kept[0]]} is "
                             f"{_size_text(first)}: pass --image-size to bring all images to one size")
    return torch.from_numpy(np.stack([images[i] for i in kept])), labels[kept]


def _size_text(image):
    return f"{image.shape[0]}x{image.shape[1]}"


# --- Atari frames

BOXING_FRAMES = {"train": 8000, "valid": 1000, "test": 1000}
BOXING_SIZE, BOXING_SKIP = 84, 4  # pixels a side; emulator frames between two that are kept


def _boxing(source):
    cache = Path(source.folder) / f"boxing-{BOXING_SIZE}.npz"
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **{split: _render_boxing(count, seed)
                                       for seed, (split, count) in enumerate(BOXING_FRAMES.items())})
        write_atomic(cache, buffer.getbuffer())
    try:
        with np.load(cache) as frames:
            images = {split: torch.from_numpy(frames[split]) for split in SPLITS}
    except Exception as error:
        raise ValueError(f"{cache} is damaged ({error}): delete it, and it is rendered anew") from error
    return {split: (_resized(x, source.image_size), torch.zeros(len(x), dtype=torch.int64))
            for split, x in images.items()}, []


def _render_boxing(count, seed):
    """(count, 84, 84, 3) uint8 frames of Atari Boxing under a random policy; each seed plays episodes of its own."""
    try:
        from ale_py import ALEInterface, LoggerMode, roms
    except ImportError as error:
        raise ValueError("the boxing data set needs the package ale-py: pip install ale-py") from error
    ALEInterface.setLoggerMode(LoggerMode.Error)
    ale, policy, frames = ALEInterface(), np.random.default_rng(seed), []
    ale.setInt("random_seed", seed)
    ale.loadROM(roms.get_rom_path("boxing"))
    actions = ale.getMinimalActionSet()
    while len(frames) < count:
        action = actions[policy.integers(len(actions))]
        for _ in range(BOXING_SKIP):
            ale.act(action)
        if ale.game_over():
            ale.reset_game()
        frame = Image.fromarray(ale.getScreenRGB())
        frames.append(np.asarray(frame.resize((BOXING_SIZE, BOXING_SIZE), Image.Resampling.BOX)))
    return np.stack(frames)


DATASETS = {
    "photos": _photos,
    "mnist": _torchvision("MNIST"),
    "fashion-mnist": _torchvision("FashionMNIST"),
    "cifar10": _torchvision("CIFAR10"),
    "miniimagenet": _miniimagenet,
    "boxing": _boxing,
    "folder": _folder,
}
