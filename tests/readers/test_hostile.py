"""Folders, files and lists that are no good as data: each is one line that names what is wrong, and exit status 2.

A case is a row: (name, what is done to an empty folder, flags beyond the usual,
 what the line must name). Nothing may be
written, and what is found is found before anything is trained.
"""
import io
import os
import shutil
import signal
import socket
import struct
import zlib

import numpy as np
import pytest
import tifffile
from conftest import call
from PIL import Image
from test_datasets import mnist

SECONDS = 20  # more is a hang
LONGEST = 1000  # characters of a line that is still read
USUAL = ("--data-folder", "data", "--hidden-size", "4", "--k", "8", "--batch-size", "4", "--num-epochs", "1",
 "--device",
         "cpu", "--precision", "fp32", "--no-download", "--num-workers", "0")
RANDOM = np.random.default_rng(0)


def good(folder, count=12, size=(16, 16), first=0):
    """Write images, each of its own colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        pixels = np.full((*size, 3), (i % 256, 7 * i % 256, 100), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png", compress_level=0)


NOISE = Image.fromarray(RANDOM.integers(0, 256, (16, 16, 3), dtype=np.uint8))


def encoded(kind, image=NOISE):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def one_more(name, data):
    """12 good images and one that is not."""
    def make(data_folder):
        good(data_folder)
        (data_folder / name).write_bytes(data)
    return make


# --- damaged files

ENDINGS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp", "PPM": "ppm",
           "JPEG2000": "jp2", "TGA": "tga", "PCX": "pcx", "ICO": "ico"}
DAMAGES = {"empty": lambda data: b"", "text": lambda data: b"not an image\n",
           "an error page": lambda data: b"<html>404", "zeros": lambda data: bytes(len(data)),
           "half of it": lambda data: data[:len(data) // 2], "four bytes": lambda data: data[:4]}
DAMAGED = [(f"{ending}, {name}", one_more(f"z.{ending}", damage(encoded(kind))), (), f"data/z.{ending} does not decode")
           for kind, ending in ENDINGS.items() for name, damage in DAMAGES.items()]


# --- whole files that would be read wrong

def tiff(array, **options):
    def make(folder):
        good(folder)
        tifffile.imwrite(folder / "z.tif", array, metadata=None, **options)
    return make


def bomb(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
            + encoded("PNG")[33:])


FLOATS, WORDS = np.full((16, 16), 0.5, np.float32), np.zeros((16, 16), np.uint16)
PLANES = {"photometric": "rgb", "planarconfig": "separate"}
Z = "data/z.tif has "
UNREADABLE = [
    ("floats above 1", tiff(FLOATS * 14), (), f"{Z}values from 7 to 7"),
    ("floats below 0", tiff(-FLOATS), (), f"{Z}values from -0.5"),
    ("floats that are not numbers", tiff(FLOATS * np.nan), (), f"{Z}values from nan"),
    ("infinite floats", tiff(FLOATS * np.inf), (), f"{Z}values from inf"),
    ("big-endian deflated floats", tiff(FLOATS, byteorder=">", compression="zlib"), (), f"{Z}compressed floats"),
    ("doubles", tiff(FLOATS.astype(np.float64)), (), "data/z.tif does not decode"),
    ("halves", tiff(FLOATS.astype(np.float16)), (), "data/z.tif does not decode"),
    ("signed bytes", tiff(WORDS.astype(np.int8)), (), f"{Z}signed integers"),
    ("signed words", tiff(WORDS.astype(np.int16)), (), f"{Z}signed integers"),
    ("32 bits", tiff(WORDS.astype(np.uint32)), (), f"{Z}32-bit integers"),
    ("signed 32 bits", tiff(WORDS.astype(np.int32)), (), f"{Z}32-bit integers"),
    ("planes of 16 bits", tiff(np.stack([WORDS] * 3), **PLANES), (), f"{Z}channels in separate planes"),
    ("deflated planes of 16 bits", tiff(np.stack([WORDS] * 3), compression="zlib", **PLANES), (),
     f"{Z}channels in separate planes"),
    ("premultiplied 16 bits", tiff(np.zeros((16, 16, 4), np.uint16), photometric="rgb", extrasamples=["assocalpha"]),
     (), f"{Z}colours of 16 bits that are multiplied"),
    ("planes of grey and alpha", tiff(np.zeros((2, 16, 16), np.uint8), photometric="minisblack",
                                      planarconfig="separate", extrasamples=["unassalpha"]), (), "data/z.tif"),
    ("complex numbers", tiff(FLOATS.astype(np.complex64)), (), "data/z.tif does not decode"),
    ("five channels", tiff(np.zeros((16, 16, 5), np.uint16), photometric="minisblack", planarconfig="contig"), (),
     "data/z.tif does not decode"),
    ("L*a*b*", one_more("z.tif", encoded("TIFF", Image.new("LAB", (16, 16)))), (), f"{Z}colours in LAB"),
    ("a name that is no text", one_more(os.fsdecode(b"\xff.png"), b""), (), ".png does not decode"),
    ("a name of two lines", one_more("a\nb.png", b""), (), "data/a b.png does not decode"),
    ("20,000 x 20,000 pixels", one_more("z.png", bomb(20000, 20000)), (), "data/z.png does not decode"),
    ("2^31 pixels wide", one_more("z.png", bomb(2 ** 31 - 1, 16)), (), "data/z.png does not decode"),
    ("no pixels wide", one_more("z.png", bomb(0, 16)), (), "data/z.png does not decode"),
    ("another size", one_more("z.png", encoded("PNG", NOISE.resize((16, 20)))), (), "z.png is 20x16 but"),
    ("one that is wider", one_more("z.png", encoded("PNG", NOISE.resize((18, 16)))), (), "z.png is 16x18 but"),
]


# --- folders

def folders(*layout):
    """Images in folders: (path, how many)."""
    def make(folder):
        for i, (path, count) in enumerate(layout):
            good(folder / path, count, first=20 * i)
    return make


def holding(*names):
    """A folder of files that are no images."""
    def make(folder):
        folder.mkdir()
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"no image")
    return make


def nothing(folder):
    pass


def a_file(folder):
    folder.write_bytes(encoded("PNG"))


def links(*pairs):
    """A folder of links: (name, where it leads)."""
    def make(folder):
        folder.mkdir()
        for name, target in pairs:
            (folder / name).symlink_to(target)
    return make


def pipe(folder):
    folder.mkdir()
    os.mkfifo(folder / "a.png")


def bound_socket(folder):
    folder.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(folder)  # the name of a socket must be short
        server.bind("a.png")
        os.chdir(folder.parent)


def shared(bring, one="train", two="test"):
    """Splits of which two have an image."""
    def make(folder):
        folders(("train/cat", 6), ("val/cat", 6), ("test/cat", 6))(folder)
        bring(next((folder / one / "cat").iterdir()), folder / two / "cat" / "copy.png")
    return make


def linked(path, target):
    target.symlink_to(path)


def turned_wrapping(folder):
    """Folders that wrap one another without end."""
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "b").symlink_to(folder, target_is_directory=True)


EMPTY = "no images under data"
UNCLEAR = "may be a split or a class"
MISPLACED = "is named as a split but lies within"
TWICE = "is the same image as data/"
FOLDERS = [
    ("no folder", nothing, (), "data does not exist"),
    ("a file for a folder", a_file, (), "data does not exist or is no"),
    ("nothing in it", holding(), (), EMPTY), ("hidden files alone", holding(".a.png", ".b/c.png"), (), EMPTY),
    ("text alone", holding("a.txt", "b.md"), (), EMPTY), ("no endings", holding("0001", "0002"), (), EMPTY),
    ("documents", holding("a.pdf", "b.eps", "c.ps"), (), EMPTY), ("films", holding("a.mpg", "b.mp4"), (), EMPTY),
    ("tables", holding("a.h5", "b.npz", "c.parquet"), (), EMPTY), ("archives", holding("a.zip", "b.tar.gz"), (), EMPTY),
    ("records", holding("a.tfrecord", "b.lmdb"), (), EMPTY), ("raw photographs", holding("a.cr2", "b.nef"), (), EMPTY),
    ("thumbnails alone", folders(("@eaDir", 12)), (), EMPTY),
    ("a Mac's shadow", folders(("__MACOSX/train", 12)), (), EMPTY),
    ("folders alone", lambda folder: (folder / "cat").mkdir(parents=True), (), EMPTY),
    ("a pipe", pipe, (), EMPTY), ("a socket", bound_socket, (), EMPTY),
    ("a device", links(("a.png", "/dev/zero")), (), EMPTY),
    ("a link to nowhere", links(("a.png", "nowhere")), (), EMPTY),
    ("a link to itself", links(("a.png", "a.png")), (), EMPTY),
    ("a link upwards", links(("up", "..")), (), EMPTY), ("folders in folders", turned_wrapping, (), EMPTY),
    ("one image", folders((".", 1)), (), "1 training images are too few"),
    ("two images", folders((".", 2)), (), "2 training images are too few"),
    ("one in train", folders(("train", 1), ("test", 5)), (), "1 training images are too few"),
    ("train without images", lambda folder: (folders(("test", 5))(folder), (folder / "train").mkdir()), (),
     "no images under data/train"),
    ("test without images", lambda folder: (folders(("train", 5))(folder), (folder / "test").mkdir()), (),
     "no images under data/test"),
    ("no train", folders(("val", 5), ("test", 5)), (), "without a folder train"),
    ("no train, by alias", folders(("test2017", 5)), (), "data/test2017 without a folder train"),
    ("train twice", folders(("train", 5), ("Train", 5)), (), "are both the train split"),
    ("train twice, by alias", folders(("train", 5), ("training_set", 5)), (), "are both the train split"),
    ("train twice, by year", folders(("train2014", 5), ("train2017", 5)), (), "are both the train split"),
    ("valid twice", folders(("train", 5), ("val", 5), ("validation", 5)), (), "are both the valid split"),
    ("test twice", folders(("train", 5), ("test", 5), ("testing", 5)), (), "are both the test split"),
    ("train among classes", folders(("bus", 5), ("car", 5), ("train", 5)), (), UNCLEAR),
    ("train and masks", folders(("train", 5), ("masks", 5)), (), UNCLEAR),
    ("bullet_train", folders(("bullet_train", 5), ("steam", 5)), (), UNCLEAR),
    ("crash_test", folders(("crash_test", 5), ("car", 5)), (), UNCLEAR),
    ("two kinds of pairs", folders(("a_train", 5), ("a_test", 5), ("b_train", 5), ("b_test", 5)), (), UNCLEAR),
    ("splits in classes", folders(("cat/train", 5), ("cat/test", 5), ("dog/train", 5), ("dog/test", 5)), (), MISPLACED),
    ("two data sets", folders(("a/train", 5), ("a/val", 5), ("b/train", 5), ("b/val", 5)), (), MISPLACED),
    ("a split in a split", folders(("train/cat/test", 5), ("train/dog", 5)), (), MISPLACED),
    ("a split in an archive", folders(("a/train", 5), ("a/test", 5), ("more", 5)), (), MISPLACED),
    ("copied to test", shared(shutil.copy), (), TWICE), ("linked to test", shared(linked), (), TWICE),
    ("a hard link to test", shared(os.link), (), TWICE), ("copied to val", shared(shutil.copy, two="val"), (), TWICE),
    ("linked to val", shared(linked, two="val"), (), TWICE),
    ("a hard link to val", shared(os.link, two="val"), (), TWICE),
    ("from val to test", shared(shutil.copy, "val"), (), TWICE), ("from val, linked", shared(linked, "val"), (), TWICE),
    ("sizes that differ", lambda folder: (good(folder), good(folder / "b", size=(20, 16), first=30)), (),
     "--image-size"),
    ("sides that do not divide", lambda folder: good(folder, size=(18, 18)), (), "--image-size 16x16"),
    ("one pixel high", lambda folder: good(folder, size=(1, 64)), (), "--image-size"),
]


# --- lists

def listed(train=None, rows=(), encoding="utf-8", without=None, name=None):
    """Mini-ImageNet of 12 images, whose train.csv has further rows, or is other bytes."""
    def make(folder):
        good(folder / "images")
        for split, numbers in (("train", range(8)), ("val", range(8, 10)), ("test", range(10, 12))):
            lines = ["filename,label", *(f"{i:03}.png,cat" for i in numbers), *(rows if split == "train" else ())]
            (folder / f"{split}.csv").write_bytes("\n".join(lines).encode(encoding))
        if train is not None:
            (folder / "train.csv").write_bytes(train)
        if without:
            (folder / without).unlink()
        if name:
            (folder / "train.csv").rename(folder / name)
    return make


def heading(text):
    return listed(text.encode() + b"\n000.png,cat\n")


COLUMNS, ROW = "train.csv must have the columns", "train.csv row 10 "
LISTS = [
    *((f"no {name}", listed(without=name), (), f"no {name} in data") for name in ("train.csv", "val.csv", "test.csv")),
    *((f"{name} is gone", listed(without=f"images/{name}"), (), f"lists data/images/{name}, which does not exist")
      for name in ("000.png", "007.png", "008.png", "011.png")),
    *((f"the list is {name}", listed(name=name), (), "no train.csv in data")
      for name in ("Train.csv", "TRAIN.CSV", "t.csv")),
    *((f"heading {text}", heading(text), (), COLUMNS) for text in (
        "file,label", "filename;label", "filename", "label", "Filename,Label", " filename, label",
        "filename,label,label", "filename,filename,label", "filename\tlabel", "000.png,cat", "filename,labels")),
    *((f"row {text[:20]}", listed(rows=(text,)), (), ROW + message) for text, message in (
        ("000.png", "has a cell missing"), ("000.png,", "has a cell missing"), (",cat", "has a cell missing"),
        ("000.png,  ", "has a cell missing"), ("0,00.png,cat", "has a cell missing or too many"),
        (",", "has a cell missing"), ("000.png,cat", "lists 000.png again"),
        ("./000.png,cat", "lists ./000.png again"), (".,cat", "lists data/images, which"),
        ("/etc/hosts,cat", "lists /etc/hosts, which is outside"),
        ("../images/000.png,cat", "lists ../images/000.png, which is outside"),
        ("nowhere.png,cat", "lists data/images/now"),
        ("x" * 100000 + ",cat", "lists data/images/xxx"), ('"' + "x" * 200000 + '",cat', "cannot be read"),
        ("000.png\0,cat", ""), ("000,cat", "lists data/images/000, which"),
        ("000.PNG,cat", "lists data/images/000.PNG"))),
    ("a list that is empty", listed(b""), (), COLUMNS), ("a list of blanks", listed(b"\n\n \n"), (), COLUMNS),
    ("a heading alone", listed(b"filename,label\n"), (), "train.csv lists no images"),
    ("Latin-1", listed(b"filename,label\n000.png,K\xe4tzchen\n"), (), "train.csv row 2 is not UTF-8"),
    ("UTF-16", listed(encoding="utf-16"), (), "train.csv row 1 is not UTF-8"),
    ("a workbook", listed(b"PK\x03\x04" + bytes(range(256))), (), "train.csv"),
    ("a row of test in train", listed(rows=("011.png,cat",)), (), "test.csv row 3 lists 011.png again"),
    ("a row of val in train", listed(rows=("009.png,cat",)), (), "val.csv row 3 lists 009.png again"),
]


# --- sets of torchvision and Atari

def spoiled(name, data):
    """MNIST, one file of which is other bytes, or what a function makes of its own."""
    def make(folder):
        mnist(folder)
        path = folder / "MNIST/raw" / name
        path.write_bytes(data(path.read_bytes()) if callable(data) else data)
    return make


def cifar(name):
    def make(folder):
        (folder / "cifar-10-batches-py").mkdir(parents=True)
        (folder / "cifar-10-batches-py" / name).write_bytes(b"not as published")
    return make


def both(folder):
    mnist(folder)
    folders(("train", 5), ("test", 5))(folder)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
RAW = "data/MNIST/raw is damaged ("
SETS = [
    *((f"MNIST's {name}, {how}", spoiled(name, data), (), RAW) for name in (IMAGES, LABELS) for how, data in (
        ("empty", b""), ("cut", lambda data: data[:len(data) // 2]), ("text", b"<html>404 not found</html>"),
        ("zeros", lambda data: bytes(len(data))), ("longer", lambda data: data + b"1"))),
    *((f"CIFAR's {name}", cifar(name), (), "data/cifar-10-batches-py is damaged (" + name)
      for name in ("data_batch_1", "data_batch_5", "test_batch", "batches.meta")),
    *((f"{name} that is not there", folders((".", 12)), ("--dataset", name), "is not in data")
      for name in ("mnist", "fashion-mnist", "cifar10", "imagenette")),
    ("Mini-ImageNet that is not there", folders((".", 12)), ("--dataset", "miniimagenet"), "no train.csv in data"),
    ("two sets", both, (), "holds mnist and folder"),
    ("an archive of frames that is cut", lambda folder: one_more("boxing-84.npz", b"PK\3\4 cut")(folder), (),
     "boxing-84.npz is damaged"),
    ("photographs that need no folder", folders((".", 12)), ("--dataset", "photos"), "reads no folder"),
    ("MNIST one level deeper", lambda folder: mnist(folder / "x"), (),
     "but mnist in data/x: pass --data-folder data/x"),
    ("CIFAR one level deeper", lambda folder: cifar("test_batch")(folder / "x"), ("--dataset", "cifar10"),
     "CIFAR10 is not in data but in data/x"),
]


# --- flags

def flag(name, value, culprit=None):
    return f"{name} {value[:20]}", folders((".", 12)), (name, value), culprit or name


FLAGS = [
    *(flag("--image-size", value) for value in ("0", "-1", "8x", "x8", "8x8x8", "0x8", "big", "8.5", "", " ", "8,8")),
    *(flag("--limit", value) for value in ("0", "-1", "1.5", "all", "", str(2 ** 63))),
    *(flag("--num-workers", value) for value in ("-1", "1.5", "many", "")),
    *(flag("--random-crop", value) for value in ("0.5", "9", "nan", "inf", "x", "-1")),
    flag("--random-crop", "1.5", "--random-crop needs --image-size"), flag("--data-folder", "", "must be a path"),
    flag("--data-folder", "nowhere", "nowhere does not exist"),
    flag("--data-folder", "/dev/null", "/dev/null does not exist"),
    flag("--data-folder", "x" * 5000, "--data-folder xxx"), flag("--dataset", "sunsets", "sunsets"),
    ("data in the output folder", lambda folder: good(folder.parent / "models/own"),
     ("--data-folder", "models/own", "--output-folder", "own"), "--data-folder models/own would share files with"),
]

CASES = [*DAMAGED, *UNREADABLE, *FOLDERS, *LISTS, *SETS, *FLAGS]


def hang(*_):
    pytest.fail(f"hangs for {SECONDS} s")


@pytest.mark.parametrize("make, flags, culprit", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_data_are_one_line(tmp_path, make, flags, culprit):
    make(tmp_path / "data")
    before = {path: os.lstat(path).st_mtime_ns for path in tmp_path.rglob("*")}
    handler = signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        code, out, err = call(tmp_path, "vqvae.py", *USUAL, *flags)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    lines = [line for line in err.splitlines() if not line.startswith(("usage:", " "))]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("vqvae.py: error: "), (code, out, err)
    assert culprit in lines[0] and len(lines[0]) < LONGEST, lines[0]
    assert {path: os.lstat(path).st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_they_are_at_least_200():
    assert len(CASES) >= 200 and len({case[0] for case in CASES}) == len(CASES)
