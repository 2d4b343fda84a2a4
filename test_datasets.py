"""Splits, orders, decoding, and what is said of bad input."""
import csv

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets import Source, load


def pictures(folder, count, size=(8, 8), mode="RGB", seed=0, suffix=".png"):
    """Write distinct random images; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for i in range(count):
        shape = size if mode == "L" else (*size, len(mode))
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8), mode).save(folder / f"{i:03d}{suffix}")
    return sorted(folder.iterdir())


def rows(batches):
    """The images of a split as a set of bytes."""
    return {bytes(((image + 1) * 127.5).round().byte().numpy().tobytes()) for x, _ in batches for image in x}


def open_folder(path, batch_size=4, **options):
    source = Source(str(path), **{k: options.pop(k) for k in ("image_size", "skip_broken") if k in options})
    return load("folder", source, batch_size, **options)


def test_folder_without_splits_is_carved_into_disjoint_ones(tmp_path):
    pictures(tmp_path, 30)
    data = open_folder(tmp_path)
    splits = [rows(batches) for batches in (data.train, data.valid, data.test)]
    assert [len(split) for split in splits] == [24, 3, 3]
    assert len(set.union(*splits)) == 30
    assert data.classes == [] and data.size == (8, 8) and data.channels == 3


def test_splits_do_not_depend_on_the_seed_but_the_order_does(tmp_path):
    pictures(tmp_path, 30)
    one, two = open_folder(tmp_path, seed=1), open_folder(tmp_path, seed=2)
    assert rows(one.valid) == rows(two.valid) and rows(one.train) == rows(two.train)
    assert not torch.equal(next(iter(one.train))[0], next(iter(two.train))[0])


def test_class_indices_are_those_of_sorted_names_over_all_splits(tmp_path):
    for split, names in (("train", ["zebra", "ant", "cat"]), ("val", ["cat"]), ("test", ["bee", "zebra"])):
        for i, name in enumerate(names):
            pictures(tmp_path / split / name, 4, seed=i)
    data = open_folder(tmp_path, batch_size=100)
    assert data.classes == ["ant", "bee", "cat", "zebra"]
    labels = {split: set(next(iter(batches))[1].tolist())
              for split, batches in (("train", data.train), ("valid", data.valid), ("test", data.test))}
    assert labels == {"train": {0, 2, 3}, "valid": {2}, "test": {1, 3}}


def test_a_broken_image_is_named_or_skipped_and_counted(tmp_path, monkeypatch, capsys):
    paths = pictures(tmp_path, 30)
    paths[4].write_bytes(paths[4].read_bytes()[:40])
    with pytest.raises(ValueError, match=f"{paths[4].name} does not decode"):
        open_folder(tmp_path)
    data = open_folder(tmp_path, skip_broken=True)
    assert len(data.train.labels) + len(data.valid.labels) + len(data.test.labels) == 29
    assert "skipped 1 broken images of 30" in capsys.readouterr().out
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    data = open_folder(tmp_path, skip_broken=True)
    for _ in range(2):
        assert sum(len(x) for split in (data.train, data.valid, data.test) for x, _ in split) == 29
    assert capsys.readouterr().out.count("skipped 1 broken images") == 1


def test_sizes_that_differ_need_an_image_size(tmp_path):
    pictures(tmp_path / "a", 10, (8, 8))
    pictures(tmp_path / "b", 10, (12, 8))
    with pytest.raises(ValueError, match="--image-size"):
        open_folder(tmp_path)
    data = open_folder(tmp_path, image_size=(8, 12))
    assert next(iter(data.train))[0].shape[1:] == (3, 8, 12)


def test_greyscale_folders_have_one_channel_and_mixed_ones_three(tmp_path):
    pictures(tmp_path / "grey", 12, mode="L")
    assert open_folder(tmp_path / "grey").channels == 1
    pictures(tmp_path / "colour", 12)
    assert open_folder(tmp_path).channels == 3


def miniimagenet(folder):
    pictures(folder / "images", 12, (20, 30), suffix=".jpg")
    for split, start, names in (("train", 0, "dog cat"), ("val", 2, "ant"), ("test", 3, "eel")):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["filename", "label"])
            writer.writerows((f"{i:03d}.jpg", name) for i, name in enumerate(names.split(), start))


def test_miniimagenet(tmp_path):
    miniimagenet(tmp_path)
    data = load("miniimagenet", Source(str(tmp_path), (16, 16)), 4)
    assert data.classes == ["ant", "cat", "dog", "eel"] and data.size == (16, 16)
    assert sorted(data.train.labels.tolist()) == [1, 2] and data.test.labels.tolist() == [3]
    (tmp_path / "images" / "000.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="000.jpg"):
        load("miniimagenet", Source(str(tmp_path), (16, 16)), 4)
    (tmp_path / "val.csv").unlink()
    with pytest.raises(FileNotFoundError, match="val.csv"):
        load("miniimagenet", Source(str(tmp_path)), 4)


def test_photos_come_from_disjoint_regions_and_are_always_the_same():
    data = load("photos", Source(image_size=(32, 48)), 64)
    assert data.channels == 3 and data.size == (32, 48)
    again = load("photos", Source(image_size=(32, 48)), 64)
    assert torch.equal(data.test.images, again.test.images)
    strips = sorted(datasets.PHOTO_STRIPS.values())
    assert all(stop == start for (_, stop), (start, _) in zip(strips, strips[1:]))
    with pytest.raises(ValueError, match="smaller --image-size"):
        load("photos", Source(image_size=(1000, 1000)), 64)


def mnist(folder):
    """Write MNIST of 40 and 10 images as torchvision keeps it."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix, count in (("train", 40), ("t10k", 10)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count) % 10
        header = (2051).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            (2049).to_bytes(4, "big") + count.to_bytes(4, "big") + labels.astype(np.uint8).tobytes())


def test_torchvision_sets_load_from_disk_and_no_download_refuses(tmp_path):
    mnist(tmp_path)
    data = load("mnist", Source(str(tmp_path), download=False), 8)
    assert (data.channels, data.size, len(data.classes)) == (1, (28, 28), 10)
    assert len(data.train.labels) == 36 and len(data.test.labels) == 10
    assert load("mnist", Source(str(tmp_path), (32, 32)), 8).train.images.shape[1:] == (32, 32, 1)
    for name in ("cifar10", "fashion-mnist"):
        with pytest.raises(FileNotFoundError, match="--no-download"):
            load(name, Source(str(tmp_path), download=False), 8)


def test_limit_keeps_the_first_training_images_alone(tmp_path):
    pictures(tmp_path, 30)
    data, whole = open_folder(tmp_path, limit=5), open_folder(tmp_path)
    assert torch.equal(data.train.images, whole.train.images[:5]) and len(data.test.labels) == 3


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images under"):
        open_folder(tmp_path)
    pictures(tmp_path, 2)
    with pytest.raises(ValueError, match="too few"):
        open_folder(tmp_path)


def test_boxing_is_rendered_once_and_read_from_its_cache(tmp_path, monkeypatch):
    pytest.importorskip("ale_py")
    monkeypatch.setattr(datasets, "BOXING_FRAMES", {"train": 20, "valid": 5, "test": 5})
    data = load("boxing", Source(str(tmp_path)), 4)
    assert data.size == (84, 84) and data.train.images.float().std() > 10
    monkeypatch.setattr(datasets, "_render_boxing", None)
    assert torch.equal(load("boxing", Source(str(tmp_path)), 4).train.images, data.train.images)
    (tmp_path / "boxing-84.npz").write_bytes(b"broken")
    with pytest.raises(ValueError, match="delete it"):
        load("boxing", Source(str(tmp_path)), 4)


def test_boxing_names_the_package_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ale_py", None)
    with pytest.raises(ValueError, match="pip install ale-py"):
        load("boxing", Source(str(tmp_path)), 4)
