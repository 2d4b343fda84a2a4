"""MNIST and CIFAR whose files are damaged, packed, incomplete or in another folder: each is named as what it is."""
import gzip
import shutil
import socket

import pytest
from conftest import call
from test_datasets import mnist

from datasets import Source, detect, load
from harness.errors import UserError

RAW = "MNIST/raw"
CIFAR = "cifar-10-batches-py"
BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch", "batches.meta")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test fetches anything."""
    def refuse(*_, **__):
        raise OSError("no network in tests")
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def labels(count, top=10):
    return (2049).to_bytes(4, "big") + count.to_bytes(4, "big") + bytes(i % top for i in range(count))


def swap(folder, one, other):
    (folder / one).rename(folder / "kept")
    (folder / other).rename(folder / one)
    (folder / "kept").rename(folder / other)


def write(name, data):
    return lambda raw: (raw / name).write_bytes(data)


DAMAGED = [
    ("labels swapped", lambda raw: swap(raw, "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"),
     "40 images and 10 labels of train"),
    ("images swapped", lambda raw: swap(raw, "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"),
     "10 images and 40 labels of train"),
    ("images for labels", lambda raw: swap(raw, "train-images-idx3-ubyte", "train-labels-idx1-ubyte"), "is damaged ("),
    ("too few labels", write("train-labels-idx1-ubyte", labels(10)), "40 images and 10 labels of train"),
    ("too many labels", write("t10k-labels-idx1-ubyte", labels(11)), "10 images and 11 labels of test"),
    ("a label that is no class", write("train-labels-idx1-ubyte", labels(40, 11)), "labels of train from 0 to 10"),
    ("no images", write("train-labels-idx1-ubyte", labels(0)), "is damaged ("),
    ("cut", write("t10k-images-idx3-ubyte", b"\0\0\x08\x03\0\0\0\x0a\0\0\0\x1c\0\0\0\x1c" + bytes(100)), "is damaged"),
    ("empty", write("train-images-idx3-ubyte", b""), "is damaged ("),
    ("text", write("t10k-images-idx3-ubyte", b"<html>404 not found</html>"), "is damaged ("),
]


@pytest.mark.parametrize("spoil, message", [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_damaged_mnist_is_damaged(tmp_path, spoil, message):
    mnist(tmp_path)
    spoil(tmp_path / RAW)
    with pytest.raises(UserError) as caught:
        load("mnist", Source(str(tmp_path), download=False), 8)
    assert f"{tmp_path / RAW} is damaged (" in str(caught.value) and message in str(caught.value)
    assert "delete it, and MNIST is downloaded anew" in str(caught.value)


def pack(folder):
    for path in sorted(folder.iterdir()):
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()


@pytest.mark.parametrize("download", [False, True])
def test_packed_and_incomplete_mnist_name_what_is_there(tmp_path, download):
    def message():
        with pytest.raises(OSError) as caught:
            load("mnist", Source(str(tmp_path), download=download), 8)
        return str(caught.value)
    mnist(tmp_path)
    (tmp_path / RAW / "train-labels-idx1-ubyte").unlink()
    assert f"MNIST is not in {tmp_path} ({tmp_path / RAW} lacks train-labels-idx1-ubyte)" in message()
    pack(tmp_path / RAW)
    (tmp_path / RAW / "t10k-images-idx3-ubyte.gz").rename(tmp_path / RAW / "train-images-idx3-ubyte.gz")
    assert f"(unpack {tmp_path / RAW / 'train-images-idx3-ubyte.gz'} into {tmp_path / RAW})" in message()
    shutil.move(tmp_path / RAW / "train-images-idx3-ubyte.gz", tmp_path)
    shutil.rmtree(tmp_path / "MNIST")
    assert f"(unpack {tmp_path / 'train-images-idx3-ubyte.gz'} into {tmp_path / RAW})" in message()


@pytest.mark.parametrize("spoiled", BATCHES)
def test_damaged_cifar_is_damaged(tmp_path, spoiled):
    (tmp_path / CIFAR).mkdir()
    (tmp_path / CIFAR / spoiled).write_bytes(b"not what was published")
    for download in (False, True):
        with pytest.raises(UserError, match=f"{tmp_path / CIFAR} is damaged .{spoiled} is not as it was published"):
            load("cifar10", Source(str(tmp_path), download=download), 8)


def test_packed_and_incomplete_cifar_name_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"CIFAR10 is not in {tmp_path}, and --no-download"):
        load("cifar10", Source(str(tmp_path), download=False), 8)
    (tmp_path / CIFAR).mkdir()
    with pytest.raises(FileNotFoundError, match=f"{CIFAR} lacks data_batch_1"):
        load("cifar10", Source(str(tmp_path), download=False), 8)
    (tmp_path / "cifar-10-python.tar.gz").touch()
    with pytest.raises(FileNotFoundError, match=f"unpack {tmp_path}/cifar-10-python.tar.gz into {tmp_path}"):
        load("cifar10", Source(str(tmp_path), download=False), 8)


# --- one level too deep, or too high

@pytest.mark.parametrize("folder", ["data/MNIST", "data/MNIST/raw", "."])
@pytest.mark.parametrize("named", [False, True])
def test_a_folder_near_the_data_set_is_told_from_it(tmp_path, folder, named):
    mnist(tmp_path / "data")
    code, _, err = call(tmp_path, "vqvae.py", "--data-folder", folder, *["--dataset", "mnist"] * named)
    assert code == 2 and "pass --data-folder data" in err and err.count("\n") == 1
    assert not (tmp_path / folder / "MNIST/raw").exists()


def test_detection_looks_around_only_where_there_are_no_images(tmp_path):
    (tmp_path / CIFAR).mkdir()
    with pytest.raises(UserError, match=f"no images under {tmp_path / CIFAR}, but cifar10 in {tmp_path}: pass"):
        detect(tmp_path / CIFAR)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    assert detect(tmp_path / "photos") == "folder"
