"""Bad input to every script: one line that names what is wrong, exit status 2, nothing written, no traceback, no hang.

To add a case: one row in a table below, (name, what is done to the folder, script and flags, what the line must name).
The folder holds images/ (24 of colour, 16x16) and trained models/a (of these) and models/grey (of grey/, as many).
"""
import os
import shutil
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, write_images
from PIL import Image
from test_datasets import mnist, pictures

import datasets

SECONDS = 60  # more is a hang
LONGEST = 1000  # characters of a line that is still read
SMALL = ("--hidden-size", "8", "--k", "16", "--batch-size", "8", "--num-epochs", "1", "--device", "cpu", "--precision",
         "fp32", "--no-download", "--num-workers", "0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_images(folder, 24)
    pictures(folder / "grey", 24, (16, 16), mode="L")
    for name, images in (("a", "images"), ("grey", "grey")):
        code, _, err = call(folder, "vqvae.py", *SMALL, "--data-folder", images, "--output-folder", name)
        assert code == 0, err
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "work"))


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check(folder, command, culprit):
    """Run a command line that must fail as every bad input must."""
    script, *flags = command
    before = files(folder)
    hang = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"hangs for {SECONDS} s"))
    signal.alarm(SECONDS)
    try:
        code, out, err = call(folder, script, *flags)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, hang)
    lines = err.strip().splitlines()
    told = [line for line in lines if line.startswith(f"{Path(script).name}: error: ")]
    assert code == 2 and len(told) == 1 and "Traceback" not in err, (code, out, err)
    assert all(line.startswith(("usage:", " ")) for line in lines if line not in told), err  # of a wrong flag
    assert culprit in told[0] and len(told[0]) < LONGEST, told[0]
    assert files(folder) == before


# --- what is done to the folder

def nothing(folder):
    pass


def empty(folder):
    (folder / "data").mkdir()


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


def another_ending(folder):
    Image.open(folder / "images/7.png").save(folder / "images/7.jpg")


def same_stem(folder):
    for path in ("x/same/a.png", "y/same/a.png"):
        (folder / path).parent.mkdir(parents=True)
        shutil.copy(folder / "images" / "0.png", folder / path)


# --- the tables

def vqvae(*flags, data="data"):
    return "vqvae.py", *SMALL, "--data-folder", data, *flags


IMAGES = vqvae(data="images")
BENCHMARK = "benchmarks/benchmark.py"
EVALUATE = ("evaluate.py", "--no-features", "--device", "cpu", "--model")
RECONSTRUCT = ("reconstruct.py", "--device", "cpu", "--model", "models/a/best.pt")

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

TRAINED = [
    ("evaluate: no folder", nothing, (*EVALUATE, "models/a/best.pt", "--data-folder", "nowhere"), "nowhere does not"),
    ("evaluate: colour for a grey model", nothing, (*EVALUATE, "models/grey/best.pt", "--data-folder", "images"),
     "colour image"),
    ("evaluate: over a run", nothing, (*EVALUATE, "models/a", "--output", "models/grey"), "--output models/grey"),
    ("reconstruct: a pipe", pipes, (*RECONSTRUCT, "data/a.png"), "data/a.png does not exist or is no regular file"),
    ("reconstruct: no file", nothing, (*RECONSTRUCT, "nowhere.png"), "nowhere.png does not exist"),
    ("reconstruct: empty folder", empty, (*RECONSTRUCT, "data"), "no images under data"),
    ("reconstruct: broken", broken(b""), (*RECONSTRUCT, "images/7.png"), "images/7.png does not decode"),
    ("reconstruct: too large", bomb, (*RECONSTRUCT, "images/7.png"), "images/7.png does not decode"),
    ("reconstruct: two of one name", same_stem, (*RECONSTRUCT, "x/same", "y/same"), "y/same/a.png"),
    ("reconstruct: beside its input", another_ending, (*RECONSTRUCT, "images/7.jpg", "--output", "images"),
     "images/7.png exists: pass --overwrite"),
    ("reconstruct: one file twice", nothing, (*RECONSTRUCT, "images/7.png", "images/7.png"), "images/7.png"),
    ("reconstruct: onto itself", nothing, (*RECONSTRUCT, "images", "--output", "."), "images/0.png"),
    ("reconstruct: a file for a folder", file_data, (*RECONSTRUCT, "images/7.png", "--output", "data"), "data"),
    ("reconstruct: no pixels a tile", nothing, (*RECONSTRUCT, "images/7.png", "--tile", "0"), "--tile"),
]

def best(content=None, **entries):
    """models/a/best.pt holds other bytes, or other entries, None for none."""
    def spoil(folder):
        path = folder / "models" / "a" / "best.pt"
        if content is not None:
            path.write_bytes(content)
        else:
            kept = torch.load(path, weights_only=True) | entries
            torch.save({name: value for name, value in kept.items() if value is not None}, path)
    return spoil


def half(folder):
    path = folder / "models" / "a" / "best.pt"
    path.write_bytes(path.read_bytes()[:5000])


def a_file_for_models(folder):
    shutil.rmtree(folder / "models")
    (folder / "models").write_text("no folder")


COMPARE = ("compare.py", "--losses")

CHECKPOINTS = [
    ("model: nothing there", nothing, (*EVALUATE, "models/b/best.pt"), "no checkpoint at models/b/best.pt"),
    ("model: a folder of something else", nothing, (*EVALUATE, "images"), "no checkpoint at images/best.pt"),
    ("model: an image", nothing, (*EVALUATE, "images/7.png"), "images/7.png is damaged or is no checkpoint"),
    ("model: empty", best(b""), (*EVALUATE, "models/a"), "models/a/best.pt is damaged"),
    ("model: cut", half, (*EVALUATE, "models/a"), "models/a/best.pt is damaged"),
    ("model: of another kind", best(kind="prior"), (*EVALUATE, "models/a"), "a checkpoint of a prior, not of a vqvae"),
    ("model: of no kind", best(kind=None), (*EVALUATE, "models/a"), "a checkpoint of something else"),
    ("model: of the future", best(format=2), (*EVALUATE, "models/a"), "models/a/best.pt has format 2"),
    ("model: no weights", best(model=None), (*EVALUATE, "models/a"), "models/a/best.pt does not hold all"),
    ("model: other weights", best(model={}), (*EVALUATE, "models/a"), "models/a/best.pt does not hold all"),
    ("models of two data sets", nothing, (*EVALUATE, "models/a", "models/grey"), "evaluate them apart"),
    ("codes of an empty path", nothing, (*IMAGES, "--frozen-codebook", ""), "--frozen-codebook: must be a path"),
    ("codes of nowhere", nothing, (*IMAGES, "--frozen-codebook", "models/b"), "no checkpoint at models/b"),
    ("codes of another width", nothing, (*IMAGES, "--hidden-size", "4", "--frozen-codebook", "models/a"), "dim 8"),
    ("codes from its own folder", nothing, (*IMAGES, "--frozen-codebook", "models/a", "--output-folder", "a",
                                            "--overwrite"), "which this run reads"),
]

RUN_FLAGS = [
    ("taken", nothing, (*IMAGES, "--output-folder", "a"), "models/a already holds a run"),
    ("taken, by its path", nothing, (*IMAGES, "--output-folder", "models/a/"), "models/a already holds a run"),
    ("resumed otherwise", nothing, (*IMAGES, "--output-folder", "a", "--resume", "--beta", "7"), "--beta 1.0 (now 7"),
    ("models is a file", a_file_for_models, IMAGES, "models"),
    ("absolute output", nothing, (*IMAGES, "--output-folder", "/tmp/x"), "--output-folder"),
    ("output upwards", nothing, (*IMAGES, "--output-folder", "../x"), "--output-folder"),
    ("negative weight", nothing, (*IMAGES, "--ssim-weight", "-1"), "--ssim-weight"),
    ("no number for a weight", nothing, (*IMAGES, "--ssim-weight", "nan"), "--ssim-weight"),
    ("no weight", nothing, (*IMAGES, "--mse-weight", "0"), "all loss weights are zero"),
    ("nothing to sharpen", nothing, (*IMAGES, "--sharpen", "0.3"), "--sharpen"),
    ("colour of grey", nothing, (*vqvae(data="grey"), "--mse-weight", "0", "--chroma-weight", "1"), "chroma"),
    ("too small for a term", nothing, (*IMAGES, "--image-size", "8", "--ssim-weight", "1"), "at least 11"),
    ("no codes", nothing, (*IMAGES, "--k", "0"), "--k"),
    ("half an epoch", nothing, (*IMAGES, "--num-epochs", "0.5"), "--num-epochs"),
    ("endless rate", nothing, (*IMAGES, "--lr", "inf"), "--lr"),
    ("negative seed", nothing, (*IMAGES, "--seed", "-1"), "--seed"),
    ("huge seed", nothing, (*IMAGES, "--seed", str(2 ** 64)), "--seed"),
    ("more than an integer", nothing, (*IMAGES, "--batch-size", "1" + 22 * "0"), "--batch-size"),
    ("more than a float", nothing, (*IMAGES, "--ssim-weight", "1", "--sharpen", "1e300"), "--sharpen"),
    ("more than any memory", nothing, (*IMAGES, "--k", "1" + 12 * "0"), "too little memory"),
    ("more than can be counted", nothing, (*IMAGES, "--k", str(2 ** 63 - 1)), "too little memory"),
    ("a device of a package", nothing, (*IMAGES, "--device", "hpu"), "--device hpu"),
    ("no device", nothing, (*IMAGES, "--device", "warp"), "--device warp"),
    ("a device without numbers", nothing, (*IMAGES, "--device", "meta"), "--device meta"),
    ("unknown quantizer", nothing, (*IMAGES, "--quantizer", "magic"), "--quantizer"),
    ("unknown recipe", nothing, (*IMAGES, "--recipe", "soup"), "--recipe"),
    ("unknown flag", nothing, (*IMAGES, "--sim-weight", "1"), "--sim-weight"),
    ("discriminator too deep", nothing, ("vqgan.py", *IMAGES[1:], "--disc-layers", "5"), "--disc-layers"),
    ("compare: no such term", nothing, (*COMPARE, "sim"), "no loss term 'sim'"),
    ("compare: no weight", nothing, (*COMPARE, "ssim=x"), "the weight of ssim"),
    ("compare: what it sets itself", nothing, (*COMPARE, "ssim", "--seed", "3"), "--seed is set by this script"),
    ("compare: flags for nobody", nothing, (*COMPARE, "mse", "--vqgan-flags", "--nonsense 3"), "--vqgan-flags are for"),
    *((f"compare: --output {name!r}", nothing, (*COMPARE, "mse", "--output", name), "--output: must be the name")
      for name in ("/tmp/x", "../x", ".", "", "models")),
    ("evaluation into a file", nothing, (*EVALUATE, "models/a", "--output", "images/7.png"), "7.png is no folder"),
    *((f"benchmark: --output {name}", nothing, (BENCHMARK, "losses", "--output", name), "in a folder that exists")
      for name in ("nowhere/x", "images")),
    ("benchmark: no such subject", nothing, (BENCHMARK, "juggling"), "no such subject: juggling"),
]

CASES = FOLDERS + FILES + LISTS + DATA_FLAGS + TRAINED + CHECKPOINTS + RUN_FLAGS


@pytest.mark.parametrize("spoil, command, culprit", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_is_one_line(folder, spoil, command, culprit):
    spoil(folder)
    check(folder, command, culprit)


def test_names_of_cases_differ():
    assert len({case[0] for case in CASES}) == len(CASES)


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_images_that_stream_are_named_in_one_line(folder, monkeypatch, workers):
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    truncated(folder)
    script, *flags = (*IMAGES, "--num-workers", workers)
    code, _, err = call(folder, script, *flags)
    assert code == 2 and err.startswith("vqvae.py: error: images/7.png does not decode") and err.count("\n") == 1
