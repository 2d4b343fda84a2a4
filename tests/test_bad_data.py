"""Folders, files, lists and flags that are no good as data, reported as bad_input.py says."""
# ruff: noqa: F401, F811 (fixtures)
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from bad_input import IMAGES, check, empty, folder, ids, nothing, trained, vqvae
from conftest import call
from PIL import Image
from test_datasets import mnist, pictures

import datasets

# --- what is done to the folder

def broken(content, name="7.png"):
    return lambda folder: (folder / "images" / name).write_bytes(content)


def image(array, name):
    return lambda folder: Image.fromarray(array).save(folder / "images" / name)


def truncated(folder):
    path = folder / "images" / "7.png"
    path.write_bytes(path.read_bytes()[:-40])


def bomb(folder):
    """A PNG whose header says 20,000 x 20,000 pixels."""
    path = folder / "images" / "7.png"
    data = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 20000, 20000) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


def all_bombs(folder):
    bomb(folder)
    for i in range(24):
        if i != 7:
            shutil.copy(folder / "images" / "7.png", folder / "images" / f"{i}.png")


def pipes(folder):
    empty(folder)
    os.mkfifo(folder / "data" / "a.png")


def dangling(folder):
    empty(folder)
    (folder / "data" / "a.png").symlink_to("nowhere.png")


def loop(folder):
    empty(folder)
    (folder / "data" / "up").symlink_to(folder, target_is_directory=True)


def splits(*names):
    def make(folder):
        for i, name in enumerate(names):
            pictures(folder / "data" / name, 12, (16, 16), seed=i)
    return make


def few(folder):
    pictures(folder / "data", 2, (16, 16))


def empty_test(folder):
    splits("train")(folder)
    (folder / "data" / "test").mkdir()


def sizes(folder):
    pictures(folder / "data" / "a", 8, (16, 16))
    pictures(folder / "data" / "b", 8, (20, 16))


def odd(folder):
    pictures(folder / "data", 12, (18, 18))


def two_kinds(folder):
    splits("train", "test")(folder)
    mnist(folder / "data")


def mnist_cut(folder):
    mnist(folder / "data")
    path = folder / "data/MNIST/raw/train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:100])


def boxing_cut(folder):
    empty(folder)
    (folder / "data" / "boxing-84.npz").write_bytes(b"PK\3\4 cut short")


def mini(text=None, encoding="utf-8", rows=()):
    """Mini-ImageNet of 24 images, whose train.csv has further rows or is `text`."""
    def make(folder):
        pictures(folder / "data" / "images", 24, (16, 16))
        for split, numbers in (("train", range(16)), ("val", range(16, 20)), ("test", range(20, 24))):
            lines = ["filename,label", *(f"{i:03d}.png,cat" for i in numbers), *(rows if split == "train" else ())]
            (folder / "data" / f"{split}.csv").write_bytes("\n".join(lines).encode(encoding))
        if text is not None:
            (folder / "data" / "train.csv").write_bytes(text)
    return make


def mini_but(name):
    def make(folder):
        mini()(folder)
        (folder / "data" / name).unlink()
    return make


def listed_by_a_link(folder):
    mini(rows=("link.png,cat",))(folder)
    (folder / "data" / "images" / "link.png").symlink_to("023.png")


def capital_list(folder):
    mini()(folder)
    (folder / "data" / "train.csv").rename(folder / "data" / "Train.csv")


def file_data(folder):
    (folder / "data").write_text("no folder")


# --- the tables

FOLDERS = [
    ("no folder", nothing, vqvae(data="nowhere"), "nowhere does not exist"),
    ("no folder, named data set", nothing, vqvae("--dataset", "folder", data="nowhere"), "nowhere does not exist"),
    ("a file for a folder", file_data, vqvae(), "data does not exist or is no folder"),
    ("empty folder", empty, vqvae(), "no images under data"),
    ("photos with a folder", nothing, (*IMAGES, "--dataset", "photos"), "--data-folder images"),
    ("several data sets", two_kinds, vqvae(), "holds mnist and folder"),
    ("a split twice, by case", splits("train", "Train"), vqvae(), "are both the train split"),
    ("a split twice, by alias", splits("train", "val", "Validation"), vqvae(), "are both the valid split"),
    ("splits without train", splits("TEST", "cat"), vqvae(), "TEST without a folder train"),
    ("a split without images", empty_test, vqvae(), "no images under data/test"),
    ("too few to carve from", few, vqvae(), "2 training images are too few"),
    ("pipes alone", pipes, vqvae(), "no images under data"),
    ("links to nowhere alone", dangling, vqvae(), "no images under data"),
    ("a link to a parent alone", loop, vqvae(), "no images under data"),
    ("sizes that differ", sizes, vqvae(), "--image-size"),
    ("sides that do not divide", odd, vqvae(), "--image-size 16x16"),
    ("mnist that is not there", empty, vqvae("--dataset", "mnist"), "MNIST is not in data"),
    ("cifar10 in another's folder", nothing, (*IMAGES, "--dataset", "cifar10"), "CIFAR10 is not in images"),
    ("mnist cut short", mnist_cut, vqvae(), "data/MNIST/raw is damaged"),
    ("boxing cut short", boxing_cut, vqvae(), "boxing-84.npz is damaged"),
]

FILES = [
    ("text named png", broken(b"not an image"), IMAGES, "images/7.png does not decode"),
    ("empty file", broken(b""), IMAGES, "images/7.png does not decode"),
    ("truncated", truncated, IMAGES, "images/7.png does not decode"),
    ("20,000 x 20,000 pixels", bomb, IMAGES, "images/7.png does not decode"),
    ("20,000 x 20,000 pixels, all skipped", all_bombs, (*IMAGES, "--skip-broken"), "none of 24 images decodes"),
    ("a broken one of another kind", broken(b"II*\0" + bytes(range(60)), "z.tif"), IMAGES, "images/z.tif does not"),
    ("floats above 1", image(np.full((16, 16), 7, np.float32), "z.tif"), IMAGES, "images/z.tif has values from 7 to 7"),
    ("floats that are not finite", image(np.full((16, 16), np.nan, np.float32), "z.tif"), IMAGES, "images/z.tif"),
    ("integers of 32 bits", image(np.full((16, 16), 7, np.int32), "z.tif"), IMAGES, "images/z.tif has 32-bit integers"),
]

LISTS = [
    ("no val.csv", mini_but("val.csv"), vqvae(), "no val.csv in data"),
    ("first image gone", mini_but("images/000.png"), vqvae(), "train.csv row 2 lists data/images/000.png, which does"),
    ("last image gone", mini_but("images/023.png"), vqvae(), "test.csv row 5 lists data/images/023.png, which does"),
    ("last image gone, skipping", mini_but("images/023.png"), vqvae("--skip-broken"), "test.csv row 5 lists"),
    ("a folder is listed", mini(rows=(".,cat",)), vqvae(), "train.csv row 18"),
    ("outside", mini(rows=("../../grey/000.png,cat",)), vqvae(), "train.csv row 18 lists ../../grey/000.png"),
    ("absolute", mini(rows=("/etc/hosts,cat",)), vqvae(), "train.csv row 18 lists /etc/hosts"),
    ("twice in a split", mini(rows=("003.png,cat",)), vqvae(), "train.csv row 18 lists 003.png again"),
    ("in two splits", mini(rows=("023.png,cat",)), vqvae(), "test.csv row 5 lists 023.png again"),
    ("twice, by another path", mini(rows=("./003.png,cat",)), vqvae(), "train.csv row 18 lists ./003.png again"),
    ("in two splits, by another path", mini(rows=("./023.png,cat",)), vqvae(), "test.csv row 5 lists 023.png again"),
    ("in two splits, by a link", listed_by_a_link, vqvae(), "test.csv row 5 lists 023.png again"),
    ("a name too long for a file", mini(rows=(f"{'x' * 100000},cat",)), vqvae(), "train.csv row 18 lists"),
    ("a list in capitals", capital_list, vqvae(), "no train.csv in data"),
    ("no label", mini(rows=("003.png",)), vqvae(), "train.csv row 18 has a cell missing"),
    ("empty label", mini(rows=("003.png,",)), vqvae(), "train.csv row 18 has a cell missing"),
    ("a comma in a name", mini(rows=("0,03.png,cat",)), vqvae(), "train.csv row 18 has a cell missing or too many"),
    ("an endless field", mini(rows=(f'"{"x" * 200000}",cat',)), vqvae(), "train.csv row 18 cannot be read"),
    ("empty list", mini(b""), vqvae(), "train.csv must have the columns"),
    ("heading alone", mini(b"filename,label\n"), vqvae(), "train.csv lists no images"),
    ("other columns", mini(b"file,class\n000.png,cat\n"), vqvae(), "train.csv must have the columns"),
    ("Latin-1", mini(b"filename,label\n000.png,K\xe4tzchen\n"), vqvae(), "train.csv row 2 is not UTF-8"),
    ("UTF-16", mini(encoding="utf-16"), vqvae(), "train.csv row 1 is not UTF-8"),
    ("zero bytes", mini(b"filename,label\n0\0.png,cat\n"), vqvae(), "train.csv row 2"),
    ("binary", mini(bytes(range(256))), vqvae(), "train.csv"),
]

DATA_FLAGS = [
    ("an empty path", nothing, vqvae(data=""), "--data-folder: must be a path"),
    ("unknown data set", nothing, vqvae("--dataset", "imagenet"), "--dataset"),
    ("no pixels", nothing, (*IMAGES, "--image-size", "0"), "--image-size"),
    ("three sides", nothing, (*IMAGES, "--image-size", "8x8x8"), "--image-size"),
    ("no number of pixels", nothing, (*IMAGES, "--image-size", "big"), "--image-size"),
    ("no images", nothing, (*IMAGES, "--limit", "0"), "--limit"),
    ("fewer than no workers", nothing, (*IMAGES, "--num-workers", "-1"), "--num-workers"),
    ("crops of no size", nothing, (*IMAGES, "--random-crop"), "--random-crop needs --image-size"),
    ("crops of more than there is", nothing, (*IMAGES, "--image-size", "16", "--random-crop", "0.5"), "--random-crop"),
    ("crops of no number", nothing, (*IMAGES, "--image-size", "16", "--random-crop", "x"), "--random-crop"),
]

CASES = FOLDERS + FILES + LISTS + DATA_FLAGS


@pytest.mark.parametrize("spoil, command, culprit", [case[1:] for case in CASES], ids=ids(CASES))
def test_bad_input_is_one_line(folder, spoil, command, culprit):
    spoil(folder)
    check(folder, command, culprit)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_that_stream_are_named_in_one_line(folder, monkeypatch, workers):
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    truncated(folder)
    script, *flags = (*IMAGES, "--num-workers", workers)
    code, _, err = call(folder, script, *flags)
    assert code == 2 and err.startswith("vqvae.py: error: images/7.png does not decode") and err.count("\n") == 1
