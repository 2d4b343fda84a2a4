"""A classifier of a data set's own classes, through whose features its reconstructions are judged.

It counts what tells the images of this data set apart, where a network trained on ImageNet counts what tells those
apart; and its accuracy on reconstructions says how much of that is left.
"""
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import datasets
from harness import checkpoint
from harness.batches import Batches
from harness.device import autocast_of
from harness.errors import UserError
from harness.progress import Progress

EPOCHS, BATCH, PEAK_LR, WEIGHT_DECAY = 5, 128, 3e-3, 5e-2
SHIFT = 1 / 8  # of a side: the furthest that a training image is moved
LEAST_SIDE = 8  # pixels
DO_WITHOUT = "do without it (--features classifier, --prior)"


class Classifier(nn.Module):
    """A small residual network (He et al. 2015, arXiv 1512.03385) that learns the classes of a data set.

    forward: images (B, C, H, W) in [0, 1] -> pooled features (B, `features`), the layer before the last.
    logits: features (B, `features`) -> (B, n_classes).

    Args:
        channels: C. n_classes: at least 2. width: of the first layer; features are four times as many.
    Raises:
        UserError: fewer than two classes.
    """

    def __init__(self, channels, n_classes, width=32):
        super().__init__()
        if n_classes < 2:
            raise UserError(f"a classifier needs a data set with at least two classes, this one has "
                            f"{n_classes or 'none'}: {DO_WITHOUT}")
        self.features = 4 * width
        self.body = nn.Sequential(
            *_convolution(channels, width),
            *_convolution(width, 2 * width, stride=2), _Residual(2 * width),
            *_convolution(2 * width, 4 * width, stride=2), _Residual(4 * width))
        self.logits = nn.Linear(self.features, n_classes)

    def forward(self, x):
        return self.body(2 * x - 1).mean((2, 3))


def _convolution(width, wider, stride=1):
    return nn.Conv2d(width, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider), nn.ReLU(True)


class _Residual(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.block = nn.Sequential(*_convolution(width, width))

    def forward(self, x):
        return x + self.block(x)


def open_classifier(data, source, folder="models", epochs=EPOCHS):
    """The `Classifier` of a data set, in eval mode on its device: from the cache, or trained now and kept there.

    The cache is folder/classifier-<digest>.pt, whose digest names the images (`datasets.fingerprint`), split and
    recipe; the one of its contents, which another machine may make another, stands in the network's `description`.

    Args:
        data: `datasets.Data`; its train split is learned from. source: the `datasets.Source` it was opened from.
    Raises:
        UserError: the data set has no classes, or others in valid or test than in train, images are too small, or the
            file in the cache is damaged.
    """
    with torch.random.fork_rng([]):
        model = Classifier(data.channels, len(data.classes))
    train, valid, test = (set(getattr(data, split).labels.tolist()) for split in datasets.SPLITS)
    unknown = (valid | test) - train
    if unknown:
        raise UserError(f"a classifier learns the classes of train, and valid or test have "
                        f"{data.classes[min(unknown)]}, which train lacks: add images of it to train, or {DO_WITHOUT}")
    if min(data.size) < LEAST_SIDE:
        raise UserError(f"a classifier needs sides of at least {LEAST_SIDE} pixels, got {tuple(data.size)}: "
                        f"{DO_WITHOUT}")
    recipe = (datasets.fingerprint(data.name, source), len(data.train.labels), epochs, BATCH, PEAK_LR, WEIGHT_DECAY,
              SHIFT, str(model))
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:16]
    path = Path(folder) / f"classifier-{digest}.pt"
    if path.exists():
        try:
            with checkpoint.complete(path):
                model.load_state_dict(checkpoint.load(path, "classifier")["model"])
        except UserError as error:
            raise UserError(f"{path} is damaged: delete it, and it is trained anew") from error
        model = model.to(data.train.device, memory_format=torch.channels_last).eval()
    else:
        print(f"training a classifier of the {len(data.classes)} classes of {data.name}, kept in {path}", flush=True)
        model = train_classifier(data, epochs)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, "classifier", {"model": model.state_dict(), "data": data.facts()})
    model.description = f"a small residual network that learned the classes of the training split " \
                        f"({checkpoint.digest(path)[:16]})"
    return model


def train_classifier(data, epochs=EPOCHS, seed=0):
    """A `Classifier` of a data set's train split, in eval mode: AdamW, one cycle, images mirrored and shifted.

    Depends on the data and the seed alone, and leaves torch's random state as it was.
    """
    device = data.train.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        batches = Batches(data.train.images, data.train.labels, BATCH, device, shuffle=True, flip=True, seed=seed,
                          workers=data.train.workers)
        model = Classifier(data.channels, len(data.classes)).to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=epochs * len(batches) + 1)
        generator, autocast = torch.Generator().manual_seed(seed), autocast_of(device, "auto")
        with Progress("classifier", epochs * len(data.train.labels)) as progress:
            for epoch in range(epochs):
                for x, label in batches.epoch(epoch):
                    with autocast():
                        logits = model.logits(model(shifted((x + 1) / 2, generator)))
                    loss = F.cross_entropy(logits.float(), label)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
                    progress.add(len(label))
    return model.eval()


def shifted(x, generator):
    """Images x (B, C, H, W), each moved by up to `SHIFT` of its sides; what comes in is mirrored."""
    height, width = x.shape[2:]
    rows, columns = (_shifted_index(len(x), side, generator).to(x.device) for side in (height, width))
    image = torch.arange(len(x), device=x.device).view(-1, 1, 1)
    moved = x.permute(0, 2, 3, 1)[image, rows.unsqueeze(2), columns.unsqueeze(1)]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2)


def _shifted_index(count, side, generator):
    most = int(side * SHIFT)
    index = torch.arange(side) + torch.randint(-most, most + 1, (count, 1), generator=generator)  # (B, side)
    index = index.abs()
    return torch.minimum(index, 2 * (side - 1) - index)
