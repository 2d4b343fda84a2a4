"""Name -> train, valid and test batches, and what a data set is (channels, size, classes).

To add a data set: write a function that returns its splits and give it a row in `DATASETS` at the end of this file.
"""
import argparse
import hashlib
import os
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from harness import checkpoint, cli, distributed, fields
from harness.batches import Batches
from harness.errors import UserError
from harness.images import ImageFiles, find_files, holds_image
from readers import image_folders
from readers.boxing import open_boxing
from readers.image_folders import existing
from readers.photos import photos
from readers.splits import SPLITS, split_folders
from readers.torchvision_sets import imagenette, near, torchvision_set

GB = 2 ** 30
IN_MEMORY_BYTES = 4 * GB  # a data set that needs more, as uint8, streams from disk where nothing else is asked for
MAY_CHANGE_ON_RESUME = {"data_folder", "no_download", "num_workers", "memory"}  # where images lie, and how they come
CARVED = 0.1  # share of train that becomes a split the data set does not bring
SPLIT_SEED = 0  # splits never depend on --seed

BUILT_IN = "photos"  # the data set that reads no folder
CROP_SCALE = 1.15  # of --random-crop alone
SHOWN = 300  # characters of what differs


def add_arguments(parser):
    """Flags of the data set, for scripts that read one of the user's choice."""
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=DATASETS, help="name of the data set (default what "
                       f"--data-folder holds; {BUILT_IN} without a folder)")
    group.add_argument("--image-size", type=cli.image_size, metavar="N|HxW", help="resize and centre-crop the "
                       "images to this size")
    group.add_argument("--flip", action=argparse.BooleanOptionalAction, default=False,
                       help="mirror half of the training images")
    group.add_argument("--random-crop", type=_crop_scale, nargs="?", const=CROP_SCALE, metavar="SCALE",
                       help="resize training images to SCALE times --image-size, and crop them to it at a random "
                       f"place, anew each epoch (SCALE is {CROP_SCALE} where it is left out)")
    group.add_argument("--memory", type=cli.not_negative, metavar="GB", help="decode the images once and keep them if "
                       "they take at most GB as bytes; more are decoded anew each epoch "
                       f"(default {IN_MEMORY_BYTES // GB})")
    add_folder_arguments(group)


def add_folder_arguments(group):
    """Flags of where a data set is and how it is read."""
    group.add_argument("--data-folder", type=cli.path, help="folder that the data set is in, or is downloaded to "
                       "(default data, or the folder that the VQ-VAE was trained with)")
    group.add_argument("--no-download", action="store_true", help="fail where the data set is not on disk")
    group.add_argument("--skip-broken", action="store_true", help="go on without images that do not decode")
    group.add_argument("--limit", type=cli.positive_int, metavar="N", help="use at most N images of each split, for a "
                       "quick look; evaluate.py and compare.py measure whole splits all the same")
    cores = (os.cpu_count() or 2) // distributed.local_world_size()
    group.add_argument("--num-workers", type=cli.at_most(cli.MOST_WORKERS, 0), default=max(1, cores - 1),
                       help="processes that decode images where a data set streams from disk")


def _crop_scale(text):
    value = cli.not_negative(text, low=1.)
    if value > 8:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 8, got {text}")
    return value


def find(name, folder):
    """(name, folder) of a data set where one or both are left open, None: what the folder holds, or the built-in one.

    Raises:
        FileNotFoundError, UserError: as `detect`, or the built-in data set is given a folder.
    """
    name = name or (detect(folder) if folder else BUILT_IN)
    _refuse_folder(name, folder)
    return name, folder or "data"


def source_of(args):
    """The `Source` that the flags of a script name."""
    if args.random_crop and not args.image_size:
        raise UserError("--random-crop needs --image-size, the size of a crop")
    return Source(args.data_folder, args.image_size, not args.no_download, args.skip_broken, args.random_crop or 1.,
                  limit=args.limit, memory=args.memory)


def _known(name):
    """What opens a data set. UserError where nothing does."""
    if name not in DATASETS:
        raise UserError(f"the data set {name!r} is not known, only {', '.join(DATASETS)} are")
    return DATASETS[name]


def _refuse_folder(name, folder):
    if folder and name == BUILT_IN:
        raise UserError(f"the data set {BUILT_IN} is built in and reads no folder: leave out --data-folder {folder}, "
                        "or name another --dataset")


def detect(folder):
    """Name of the data set that a folder holds: the one whose marks are in it, else "folder", any image files.

    Raises:
        FileNotFoundError: there is no such folder. UserError: it holds several.
    """
    root = existing(folder)
    held = [name for name, open_splits in DATASETS.items() if hasattr(open_splits, "is_in") and open_splits.is_in(root)]
    if not held and not holds_image(root):
        for name, open_splits in DATASETS.items():
            found = near(root, open_splits.is_in) if hasattr(open_splits, "is_in") else None
            if found:
                raise UserError(f"no images under {folder}, but {name} in {found}: pass --data-folder {found}")
    if not held or split_folders(root):
        held.append("folder")
    if len(held) > 1:
        raise UserError(f"--data-folder {folder} holds {' and '.join(held)}: say which with --dataset")
    return held[0]


@dataclass(frozen=True)
class Source:
    """Where images come from: one flag of the command line each."""
    folder: str = "data"
    image_size: tuple = None  # (H, W); None keeps the files' own
    download: bool = True
    skip_broken: bool = False
    crop_scale: float = 1.  # sides of a training image over those of the crop that an epoch sees
    channels: int = None  # None: as many as the files have
    in_order: bool = False  # frames of clips one after another, none shuffled; see `load`
    carved: str = ""  # `Data.carved` as it must be; empty: as it is
    limit: int = None  # images of each split at most
    memory: float = None  # GB that decoded images may take; None: `IN_MEMORY_BYTES`

    @classmethod
    def of(cls, contents, folder=None, download=True):
        """Where the images came from that a model was trained on, or the same in another folder.

        Args:
            contents: of its checkpoint, as `fields.VQVAE`.
        Raises:
            UserError: nothing says where they are.
        """
        facts, known = contents["data"], _folder_of(contents)
        _known(facts["name"])
        _refuse_folder(facts["name"], folder)
        if not (folder or known or facts["name"] == BUILT_IN):
            raise UserError(f"nothing next to {contents['path']} says where its images are: pass --data-folder")
        same = not folder or known and os.path.realpath(folder) == os.path.realpath(known)
        return cls(folder or known or "data", tuple(facts["size"]), download, contents["args"]["skip_broken"],
                   channels=facts["channels"], carved=facts["carved"] if same else "")

    def train_size(self):
        """(H, W) to which training images are brought, of which `image_size` is cropped."""
        return self.image_size and tuple(round(side * self.crop_scale) for side in self.image_size)


def _folder_of(contents):
    """The folder of the images of a checkpoint, None where nothing says so: best.pt leaves that to args.json."""
    args, path = contents["args"], contents.get("path")
    if path and "data_folder" not in args and Path(path).with_name("args.json").exists():
        args = checkpoint.load_json(Path(path).with_name("args.json"), {"data_folder": fields.path})
    return args.get("data_folder")


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
    carved: str = ""  # which files the splits have that were carved from train, as a digest; empty where none were

    def shard(self, rank, world):
        """Leave this process its share of every batch of every split."""
        for split in SPLITS:
            getattr(self, split).shard(rank, world, split)

    def facts(self):
        """What a checkpoint keeps of it: plain values."""
        return {"name": self.name, "channels": self.channels, "size": list(self.size), "classes": self.classes,
                "images": {split: len(getattr(self, split).labels) for split in SPLITS}, "carved": self.carved}

    def __str__(self):
        """One line of what was found."""
        images = ", ".join(f"{len(getattr(self, split).labels)} {split}" for split in SPLITS)
        return (f"data: {self.name}, images: {images}, size: {self.size[0]}x{self.size[1]}, channels: {self.channels}, "
                f"classes: {len(self.classes) or 'none'}" + ", streamed from disk" * self.train.streams)


def is_rendered(name):
    """Whether a data set makes its images, and so need not make more of them than --limit asks for."""
    return hasattr(DATASETS[name], "version")


def fingerprint(name, source):
    """What a data set's images depend on, as text: changes when a file in its folder does."""
    description = [name, str(source.image_size), str(source.skip_broken)]
    description += [f"limit {source.limit}"] * bool(source.limit)
    description += [f"version {DATASETS[name].version}"] if hasattr(DATASETS[name], "version") else []
    place = Path(source.folder) / getattr(DATASETS[name], "mark", "")  # not what other data sets keep next to it
    if place.exists() and name != BUILT_IN:  # a data set may make its images without one
        for path in find_files(place)[0] if place.is_dir() else [place]:
            status = os.stat(path)
            description.append(f"{os.path.relpath(path, source.folder)} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(description).encode(errors="surrogateescape")).hexdigest()


def load(name, source, batch_size, device="cpu", flip=False, seed=0, workers=0):
    """Open a data set by name.

    Args:
        name: a key of `DATASETS`. source: `Source`. flip: mirror half of the training images, anew each epoch.
        seed: of the training order. workers: processes that decode where images stream.
    Returns:
        `Data`. Where the source is `in_order`, labels are rows (N, 4): label, clip, number of the frame within it and
        action that led to it; clips are in one split as a whole, and train is in their order.
    Raises:
        FileNotFoundError, UserError, OSError: no frames in order, missing or empty folder, broken image, sizes or
            channels that differ, other carved splits than the source is to have, no download.
    """
    open_splits = _known(name)
    source = replace(source, image_size=source.image_size or getattr(open_splits, "image_size", None))
    splits, classes = open_splits(source)  # split -> (images, labels)
    if source.in_order and any(labels.ndim == 1 for _, labels in splits.values()):
        raise UserError(f"{name} has no sequences of frames: boxing has, and a folder of numbered frames such as "
                        "clip/000001.png")
    missing = [split for split in SPLITS if split not in splits]
    splits = _complete_clips(splits, missing) if source.in_order else complete(splits, missing)
    carved = image_folders.digest([splits[split][0] for split in missing], source.folder)
    if source.carved and not source.in_order and source.carved != carved:  # in order, whole clips are carved
        raise UserError(f"files of {source.folder} were added, removed or renamed since the model was trained (or it "
                        "is older than the rule on copies), so that others are held out, some of which it has learned: "
                        "put them back as they were, or train anew (from folders train, valid and test, which stay)")
    if source.limit:
        splits = limited(splits, source.limit, source.in_order)
    splits = {split: (_sized(images, source.train_size() if split == "train" else source.image_size), labels)
              for split, (images, labels) in splits.items()}
    files = [images for images, _ in splits.values() if isinstance(images, ImageFiles)]
    most = IN_MEMORY_BYTES if source.memory is None else source.memory * GB
    if files and sum(images.nbytes() for images in files) <= most:
        splits = _in_memory(splits)
    images = splits["test"][0]
    size, channels = (images.size, images.channels) if isinstance(images, ImageFiles) \
        else (tuple(images.shape[1:3]), images.shape[3])
    if source.channels not in (None, channels):
        raise UserError(f"{name} in {source.folder} has {channels} channels, the model {source.channels}")
    train, valid, test = (Batches(*splits[split], batch_size, device, shuffle=split == "train",
                                  flip=flip and split == "train", seed=seed, workers=workers, size=size)
                          for split in SPLITS)
    return Data(name, train, valid, test, channels, size, classes, carved)


def complete(splits, missing):
    """{split: (images or latents, labels)}: those missing carved from train, and train in a fixed random order.

    Raises:
        UserError: train has too few.
    """
    images, labels = splits["train"]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    carved = max(1, int(len(labels) * CARVED))
    if len(labels) <= carved * len(missing):
        raise UserError(f"{len(labels)} training images are too few to carve {' and '.join(missing)} from: add images")
    for split in missing:
        splits[split] = (_subset(images, order[:carved]), labels[order[:carved]])
        order = order[carved:]
    splits["train"] = (_subset(images, order), labels[order])
    return splits


def _complete_clips(splits, missing):
    """Carve the splits that are missing from the last clips of train."""
    images, rows = splits["train"]
    clips = rows[:, 1].unique(sorted=True)
    carved = max(1, int(len(clips) * CARVED))
    if len(clips) <= carved * len(missing):
        raise UserError(f"{len(clips)} clips are too few to carve {' and '.join(missing)} from: add clips, or folders "
                        "valid and test")
    if missing:
        print(f"{' and '.join(missing)}: the last clips of train. A VQ-VAE that learned from the same folder has seen "
              "frames of them: folders train, valid and test keep them apart")
    for split in missing:
        clips, last = clips[:-carved], clips[-carved:]
        chosen = torch.isin(rows[:, 1], last).nonzero().squeeze(1)
        splits[split] = (_subset(images, chosen), rows[chosen])
    kept = torch.isin(rows[:, 1], clips).nonzero().squeeze(1)
    splits["train"] = (_subset(images, kept), rows[kept])
    return splits


def limited(splits, limit, in_order=False):
    """{split: at most so many of its (images or latents, labels)}: of train the first, in random order if of images.

    Of valid and test, which may be sorted by class, some that are spread evenly; or the first, where they are in order.
    """
    def few(split, images, labels):
        count, first = min(limit, len(labels)), in_order or split == "train"
        index = torch.arange(count) if first else torch.linspace(0, len(labels) - 1, count).long()
        return _subset(images, index), labels[index]
    return {split: few(split, *part) for split, part in splits.items()}


def _subset(images, index):
    return images.subset(index) if isinstance(images, ImageFiles) else images[index]


def _sized(images, size):
    """Images (N, H, W, C) resized to cover a size (H, W) and center-cropped to it; files will be when they are read."""
    if not size:
        return images
    if isinstance(images, ImageFiles):
        images.size = size
        return images
    return _resized(images, size)


def _resized(images, size):
    if tuple(images.shape[1:3]) == tuple(size):
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


def _in_memory(splits):
    """{split: (`ImageFiles`, labels)} decoded; says how many are broken."""
    decoded, broken = {}, []
    for split, (files, labels) in splits.items():
        images, kept, bad = files.decode_all()
        decoded[split], broken = (images, labels[kept]), broken + bad
    if broken:
        total = sum(len(files) for files, _ in splits.values())
        print(f"skipped {len(broken)} broken images of {total}, such as {min(broken)}")
    return decoded


# --- what a trained model asks of the data that it meets again

def check_same(path, known, now):
    """UserError where a run, of which a checkpoint lies at `path`, was trained on other images than there are now.

    known, now: `Data.facts`, or some of them.
    """
    differ = [f"{name} {known[name]} (now {now[name]})" for name in now
              if name != "carved" and known[name] != now[name]]
    if differ:
        raise UserError(f"{path} was trained on other images: {textwrap.shorten('; '.join(differ), SHOWN)}: put them "
                        "back as they were (with --skip-broken also the same --memory), or train anew (--overwrite)")


def check_alike(models):
    """UserError where one of the models has learned what is held out for another: splits were carved from other files.

    Args:
        models: {name: contents of a checkpoint}.
    """
    carved = {contents["data"]["carved"]: name for name, contents in models.items() if contents["data"]["carved"]}
    if len(carved) > 1:
        first, second, *_ = carved.values()
        raise UserError(f"{first} and {second} were trained on other files and hold out other images, some of "
                        "which the other may have learned: train both on one folder")


def held_out(models, folder):
    """What models, which are alike, hold out of a folder, as `Data.carved`: empty where none says so of this folder."""
    check_alike(models)
    carved = (Source.of(contents, folder).carved for contents in models.values() if contents["data"]["carved"])
    return next(filter(None, carved), "")


# --- the table

DATASETS = {
    "photos": photos,
    "mnist": torchvision_set("MNIST", "MNIST/raw"),
    "fashion-mnist": torchvision_set("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": torchvision_set("CIFAR10", "cifar-10-batches-py"),
    "imagenette": imagenette,
    "miniimagenet": image_folders.miniimagenet,
    "boxing": open_boxing,
    "folder": image_folders.image_folder,
}
