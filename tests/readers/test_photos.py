"""Crops of photographs that ship with scikit-image."""
import numpy as np
import pytest
import skimage.data
import torch

from datasets import Source, load
from readers.photos import PHOTO_STRIPS, PHOTOS, photos


def test_photos_come_from_disjoint_regions_and_are_always_the_same(monkeypatch):
    data = load("photos", Source(image_size=(32, 48)), 64)
    assert data.channels == 3 and data.size == (32, 48)
    again = load("photos", Source(image_size=(32, 48)), 64)
    assert torch.equal(data.test.images, again.test.images)
    strips = sorted(PHOTO_STRIPS.values())
    assert all(stop == start for (_, stop), (start, _) in zip(strips, strips[1:]))
    numbered = np.arange(250 * 240).reshape(250, 240, 1) // (1, 256, 65536) % 256  # of each pixel, in its colour
    for name in PHOTOS:
        monkeypatch.setattr(skimage.data, name, lambda: numbered.astype(np.uint8))
    splits, _ = photos(Source(image_size=(32, 48)))
    seen = [set((images.long() * torch.tensor([1, 256, 65536])).sum(3).flatten().tolist())
            for images, _ in splits.values()]
    assert len(set.union(*seen)) == sum(map(len, seen)) and min(map(len, seen)) > 32 * 48
    with pytest.raises(ValueError, match="smaller --image-size"):
        load("photos", Source(image_size=(1000, 1000)), 64)


def test_photos_are_cropped_without_being_enlarged():
    data, plain = (load("photos", Source(image_size=(32, 32), crop_scale=scale), 64) for scale in (1.5, 1.))
    assert data.train.images.shape[1:3] == (48, 48) and data.size == (32, 32)
    assert torch.equal(data.test.images, plain.test.images) and torch.equal(data.valid.images, plain.valid.images)
    assert next(iter(data.train))[0].shape[2:] == (32, 32)
