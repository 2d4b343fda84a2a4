"""Images from disk as subjects of benchmark.py: what one process does for a batch of bytes."""
import tempfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from datasets import Source, load

IMAGES = 64  # of a call
PHOTO = 96  # side of the photographs that are enlarged to a file's size


def stream(side, scale, sides):
    """Subject: images of `side` with --random-crop `scale` from JPEG files of other sides (H, W)."""
    def subject(device):
        import torchvision.transforms as T
        folder = tempfile.TemporaryDirectory()
        photos = load("photos", Source(image_size=(PHOTO, PHOTO)), IMAGES).train.images[:2 * IMAGES]
        for i, photo in enumerate(photos):
            Image.fromarray(photo.numpy()).resize(sides[::-1]).save(Path(folder.name) / f"{i}.jpg", quality=90)
        streamed, kept = (load("folder", Source(folder.name, (side, side), crop_scale=scale, memory=memory),
                               IMAGES).train for memory in (0, 1))
        files, order = streamed.images.subset(slice(0, IMAGES)), torch.randperm(len(kept.labels))[:IMAGES]
        transform = T.Compose([T.Resize(files.size[0]), T.RandomCrop(side), T.ToTensor(),
                               T.Normalize((0.5,) * 3, (0.5,) * 3)])

        def plain(folder=folder):  # which lies on disk as long as this is held
            return torch.stack([transform(Image.open(path).convert("RGB")) for path in files.paths])
        calls = {"a worker of torchvision": plain,
                 "a worker of datasets.py": lambda: list(files.batches(0, batch_size=IMAGES)),
                 "--memory: no worker, the loop": partial(kept.images.index_select, 0, order)}
        for number, call in enumerate(calls.values()):
            call.images, call.is_worker = IMAGES, number < 2
        return calls
    subject.__doc__ = f"Batches of {side}x{side}, --random-crop {scale}, from JPEG files of {sides[0]}x{sides[1]}."
    return subject
