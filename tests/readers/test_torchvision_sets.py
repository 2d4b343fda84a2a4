"""Imagenette as torchvision extracts it: a few files of many shapes, and nothing is downloaded."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets as tv

import datasets
from datasets import Source, load

COUNTS = {"train": {"n01440764": 12, "n02102040": 9}, "val": {"n01440764": 3, "n02102040": 2}}


def imagenette(folder):
    """Write photographs of one colour each: red for a tench, green for an English springer."""
    for split, classes in COUNTS.items():
        for wnid, count in classes.items():
            path = folder / "imagenette2-160" / split / wnid
            path.mkdir(parents=True)
            for i in range(count):
                pixels = np.zeros((160, 170 + i, 3) if i % 2 else (200 + i, 160, 3), np.uint8)
                pixels[..., 0 if wnid == "n01440764" else 1] = 150 + 4 * i + 60 * (split == "val")
                Image.fromarray(pixels).save(path / f"{wnid}_{i}.JPEG")
    (folder / "imagenette2-160" / "noisy_imagenette.csv").write_text("path\n")
    return folder


def test_imagenette_is_read_from_disk(tmp_path):
    data = load("imagenette", Source(str(imagenette(tmp_path)), download=False), 8)
    assert data.classes == ["tench", "English springer"] and (data.channels, data.size) == (3, (128, 128))
    counts = {split: len(getattr(data, split).labels) for split in datasets.SPLITS}
    assert counts == {"train": 19, "valid": 2, "test": 5}  # a tenth of train is valid, and val is test
    assert sorted(data.test.labels.tolist()) == [0, 0, 0, 1, 1]
    for split in datasets.SPLITS:
        for x, labels in getattr(data, split):
            assert torch.equal(x.mean((2, 3)).argmax(1).cpu(), labels.cpu())
    assert load("imagenette", Source(str(tmp_path), (32, 48), False), 8).size == (32, 48)
    assert data.carved and datasets.detect(tmp_path) == "imagenette"


def test_imagenette_keeps_the_same_carved_split(tmp_path):
    source = Source(str(imagenette(tmp_path)), (16, 16), download=False)
    source = replace(source, carved=load("imagenette", source, 8).carved)
    assert load("imagenette", source, 8).carved == source.carved
    (tmp_path / "imagenette2-160" / "train" / "n01440764" / "n01440764_0.JPEG").unlink()
    with pytest.raises(ValueError, match="files of .* were added, removed or renamed"):
        load("imagenette", source, 8)


def test_imagenette_is_downloaded_where_it_may_be(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="Imagenette is not in .* --no-download"):
        load("imagenette", Source(str(tmp_path), download=False), 8)
    fetched = []

    def fetch(url, root, **options):
        fetched.append(url)
        imagenette(tmp_path)
    monkeypatch.setattr(tv.imagenette, "download_and_extract_archive", fetch)
    assert len(load("imagenette", Source(str(tmp_path), (16, 16)), 8).test.labels) == 5
    assert len(load("imagenette", Source(str(tmp_path), (16, 16)), 8).test.labels) == 5
    assert len(fetched) == 1 and fetched[0].endswith("imagenette2-160.tgz")


def test_an_imagenette_without_its_files_is_damaged(tmp_path):
    (tmp_path / "imagenette2-160" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="imagenette2-160 is damaged .*delete it"):
        load("imagenette", Source(str(tmp_path)), 8)
