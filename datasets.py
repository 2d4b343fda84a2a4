"""Name -> train, valid and test batches, and what a data set is (channels, size, classes).

To add a data set: write a function that returns its splits and give it a row in `DATASETS` at the end of this file.
"""
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
from PIL import Image, ImageOps

from checkpoint import write_atomic

IN_MEMORY_BYTES = 2 ** 32  # a data set that needs more, as uint8, streams from disk
MANY_FILES = 1024  # from here on, decoding is worth several processes
SPLITS = ("train", "valid", "test")
CARVED = 0.1  # share of train that becomes a split the data set does not bring
SPLIT_SEED = 0  # splits never depend on --seed


class BrokenImage(ValueError):
    """An image file that does not decode."""


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


class Batches:
    """Batches x (B, C, H, W) float32 in [-1, 1], channels_last on `device`, and labels (B,) int64.

    Images are a (N, H, W, C) uint8 tensor, which moves to the device as a whole, or `ImageFiles`, which stream.
    The order and the flips of an epoch depend on the seed and the epoch alone, so that a run can go on anywhere.
    Of many processes, each yields its share of batches `world` times as large; `batch_size` is that of all together.
    """

    rank, world = 0, 1

    def __init__(self, images, labels, batch_size, device="cpu", shuffle=False, flip=False, seed=0, workers=0):
        self.streams = isinstance(images, ImageFiles)
        self.images, self.labels = images if self.streams else images.to(device), labels.to(device)
        self.batch_size, self.device, self.workers = batch_size, torch.device(device), workers
        self.shuffle, self.flip, self.seed = shuffle, flip, seed
        self.skipped, self._ahead = 0, None

    def shard(self, rank, world):
        """Yield the share of process `rank` of `world` alone: whoever goes through all shares sees each image once."""
        self.rank, self.world = rank, world
        self.batch_size *= world

    def sizes(self):
        """Number of images in each batch, all processes together; too few for each to have one join those before."""
        whole, rest = divmod(len(self.labels), self.batch_size)
        if whole and rest and rest < self.world:
            return [self.batch_size] * (whole - 1) + [self.batch_size + rest]
        return [self.batch_size] * whole + [rest] * bool(rest)

    def __len__(self):
        return len(self.sizes())

    def __iter__(self):
        return self.epoch(0)

    def epoch(self, epoch, start=0):
        """The batches of an epoch from batch number `start` on."""
        plan, read = self._plan(epoch)[start:], self._stream if self.streams else self._pick
        for (images, labels), (_, flip) in zip(read(plan, epoch, start), plan):
            if labels is None:
                continue
            x = self._to_input(images)
            if flip is not None:
                flip = flip[:len(x)].to(self.device).view(-1, 1, 1, 1)
                x = torch.where(flip, x.flip(3), x).contiguous(memory_format=torch.channels_last)
            yield x, labels

    def examples(self, count):
        """Batch of at most `count` images spread evenly over the split, unflipped."""
        index = torch.linspace(0, len(self.labels) - 1, min(count, len(self.labels))).long()
        images = _stack_decoded([self.images[i] for i in index])[0] if self.streams else self.images[index]
        return self._to_input(images)

    def _plan(self, epoch):
        """[(indices, flips or None)] of this process's batches of an epoch."""
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2 ** 63)
        count = len(self.labels)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        flips = torch.rand(count, generator=generator) < 0.5 if self.flip else None
        batches, flips = ([part.tensor_split(self.world)[self.rank] for part in column.split(self.sizes())]
                          if column is not None else None for column in (order, flips))
        return list(zip(batches, flips or [None] * len(batches)))

    def _to_input(self, images):
        return images.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

    def _pick(self, plan, epoch, start):
        for batch, _ in plan:
            batch = batch.to(self.device)
            yield self.images[batch], self.labels[batch]

    def _stream(self, plan, epoch, start):
        """Decoded batches. Where epochs follow one another, the workers go on into the next while others compute."""
        if not self._ahead or self._ahead[0] != (epoch, start):
            # A generator of its own: the loader seeds its workers from it, and training's must not notice.
            loader = torch.utils.data.DataLoader(
                self.images, batch_sampler=self._endless(epoch, start), collate_fn=_stack_decoded,
                num_workers=self.workers, pin_memory=self.device.type == "cuda", generator=torch.Generator())
            self._ahead = None, iter(loader)
        decoded, self._ahead, skipped = self._ahead[1], None, 0
        for batch, _ in plan:
            images, kept = next(decoded)
            skipped += len(batch) - len(kept)
            if not len(kept) and self.world > 1:
                raise ValueError(f"all {len(batch)} images of a process's share of a batch are broken: repair them")
            yield (images, self.labels[batch[kept].to(self.device)]) if len(kept) else (None, None)
        if self.shuffle:
            self._ahead = (epoch + 1, 0), decoded
        if skipped > self.skipped:  # once, not every epoch
            print(f"skipped {skipped} broken images of {len(self.labels)}")
            self.skipped = skipped

    def _endless(self, epoch, start):
        """Lists of indices: the batches of an epoch and, in training, of those after it."""
        while True:
            yield from (batch.tolist() for batch, _ in self._plan(epoch)[start:])
            if not self.shuffle:
                return
            epoch, start = epoch + 1, 0


class ImageFiles(torch.utils.data.Dataset):
    """Image files decoded one by one to (H, W, C) uint8; a broken one raises, or is None where it may be skipped."""

    def __init__(self, paths, size, channels, skip_broken=False):
        self.paths, self.size, self.channels, self.skip_broken = paths, size, channels, skip_broken

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return _decode_or_skip(self.paths[index], self.size, self.channels, self.skip_broken)


def _decode_or_skip(path, size, channels, skip_broken):
    try:
        return decode(path, size, channels)
    except BrokenImage:
        if not skip_broken:
            raise
        return None


class LatentBatches(Batches):
    """Batches of latents (B, h, w) int64 and labels, from integers (N, h, w) of any kind."""

    def _to_input(self, latents):
        return latents.long()


def _stack_decoded(images):
    kept = torch.tensor([i for i, image in enumerate(images) if image is not None], dtype=torch.int64)
    return torch.from_numpy(np.stack([images[i] for i in kept])) if len(kept) else None, kept


def decode(path, size=None, channels=3):
    """Read an image file as an array (H, W, C) uint8, resized and center-cropped to size (H, W) where one is given.

    Raises:
        BrokenImage: it does not decode. ValueError: it is colour where channels is 1.
    """
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BrokenImage(f"{path} does not decode as an image ({error}): repair or remove it, or pass --skip-broken"
                          ) from error
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits a pixel, which Pillow would clip rather than scale
        image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).clip(0, 255).astype(np.uint8))
    if channels == 1 and not _is_grey(image):
        raise ValueError(f"{path} is a colour image among greyscale ones: keep one kind in a folder")
    image = image.convert("L" if channels == 1 else "RGB")
    if size and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image).reshape(image.height, image.width, channels)


def _is_grey(image):
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I") or image.mode == "F"


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

def find_images(folder):
    """Sorted paths of the image files under a folder, judged by their endings."""
    endings = Image.registered_extensions()
    return sorted(Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names
                  if Path(name).suffix.lower() in endings and not name.startswith("."))


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
                grey, size = grey and _is_grey(image), size or (image.height, image.width)
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is listed but does not exist") from None
        except (OSError, SyntaxError, ValueError):
            continue  # decoding names it
    return 1 if grey and size else 3, size or (0, 0)


def _decode_all(files, labels):
    read = partial(_decode_or_skip, size=files.size, channels=files.channels, skip_broken=files.skip_broken)
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
