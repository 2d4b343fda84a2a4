"""Crops of photographs that ship with scikit-image."""
import torch

from harness.errors import UserError

PHOTOS = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "retina", "rocket")
PHOTO_STRIPS = {"train": (0., 0.6), "valid": (0.6, 0.8), "test": (0.8, 1.)}  # of the longer side
SEED = 0
PHOTO_SIZE = (64, 64)
PHOTO_CROPS = {"train": 4096, "valid": 512, "test": 512}


def photos(source):
    from skimage import data
    photographs = [torch.from_numpy(getattr(data, name)()[..., :3].copy()) for name in PHOTOS]
    generator, splits = torch.Generator().manual_seed(SEED), {}
    for split, (start, stop) in PHOTO_STRIPS.items():
        strips, (height, width) = [], source.train_size() if split == "train" else source.image_size
        for photo in photographs:
            axis = int(photo.shape[1] > photo.shape[0])
            side = photo.shape[axis]
            strips.append(photo.narrow(axis, int(start * side), int(stop * side) - int(start * side)))
        strips = [strip for strip in strips if strip.shape[0] >= height and strip.shape[1] >= width]
        if not strips:
            raise UserError(f"no photograph has a {split} strip of {height}x{width} pixels: pass a smaller "
                            "--image-size")
        crops = []
        for i in range(PHOTO_CROPS[split]):
            strip = strips[i % len(strips)]
            top, left = (int(torch.randint(side - crop + 1, (), generator=generator))
                         for side, crop in zip(strip.shape, (height, width)))
            crops.append(strip[top:top + height, left:left + width])
        splits[split] = (torch.stack(crops), torch.zeros(len(crops), dtype=torch.int64))
    return splits, []


photos.image_size = PHOTO_SIZE  # where none is asked for
