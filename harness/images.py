"""Image files: finding and decoding them."""
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps


class BrokenImage(ValueError):
    """An image file that does not decode."""


def find_images(folder):
    """Sorted paths of the image files under a folder, judged by their endings."""
    endings = Image.registered_extensions()
    return sorted(Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names
                  if Path(name).suffix.lower() in endings and not name.startswith("."))


class ImageFiles(torch.utils.data.Dataset):
    """Image files decoded one by one to (H, W, C) uint8; a broken one raises, or is None where it may be skipped."""

    def __init__(self, paths, size, channels, skip_broken=False):
        self.paths, self.size, self.channels, self.skip_broken = paths, size, channels, skip_broken

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        return decode_or_skip(self.paths[index], self.size, self.channels, self.skip_broken)


def decode_or_skip(path, size, channels, skip_broken):
    try:
        return decode(path, size, channels)
    except BrokenImage:
        if not skip_broken:
            raise
        return None


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
    if channels == 1 and not is_grey(image):
        raise ValueError(f"{path} is a colour image among greyscale ones: keep one kind in a folder")
    image = image.convert("L" if channels == 1 else "RGB")
    if size and image.size != (size[1], size[0]):
        image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.LANCZOS)
    return np.array(image).reshape(image.height, image.width, channels)


def is_grey(image):
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I") or image.mode == "F"
