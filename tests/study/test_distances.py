"""Distances of features against closed forms, brute force and other implementations."""
import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance
from torchmetrics.image.kid import poly_mmd

from study import distances


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    torch.manual_seed(0)
    a, b = torch.randn(20000, 4), 2 * torch.randn(20000, 4) + 1
    assert distances.frechet_distance(a, b) == pytest.approx(4 * 1 ** 2 + 4 * (1 - 2) ** 2, rel=0.03)
    whitened = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T)).T)
    scale, shift = torch.tensor([1., 2., 0.5, 3.]), torch.tensor([0., 1., -1., 2.])
    exact = float(shift.square().sum() + (1 - scale).square().sum())
    assert distances.frechet_distance(whitened, whitened * scale + shift) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("fake, real", [(300, 200), (10, 12)])  # more images than features, and fewer
def test_frechet_distance_is_that_of_matrix_square_roots(fake, real):
    random = np.random.default_rng(0)
    a, b = random.gamma(1., size=(fake, 20)) @ random.normal(size=(20, 20)), random.normal(size=(real, 20))
    covariances = np.cov(a.T), np.cov(b.T)
    roots = [scipy.linalg.sqrtm(covariance).real for covariance in covariances]
    cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1]) - 2 * cross
    assert distances.frechet_distance(torch.tensor(a), torch.tensor(b)) == pytest.approx(expected, rel=1e-5)


def test_equal_features_are_at_no_distance():
    a = torch.randn(1500, 8, generator=torch.Generator().manual_seed(0))
    assert abs(distances.frechet_distance(a, a)) < 1e-9
    kernel, deviation = distances.kernel_distance(a, a)
    assert kernel == pytest.approx(0, abs=1e-12) and deviation == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("rows", [7, 1024])
def test_the_kernel_distance_is_kid_but_for_an_images_meeting_its_own_original(monkeypatch, rows):
    monkeypatch.setattr(distances, "ROWS_AT_ONCE", rows)
    random = np.random.default_rng(0)
    x, y = random.normal(size=(30, 5)), random.normal(size=(30, 5)) + 0.5

    def k(a, b):
        return (a @ b / 5 + 1) ** 3
    expected = np.mean([k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
                        for i in range(30) for j in range(30) if i != j])
    found, _ = distances.kernel_distance(torch.tensor(x), torch.tensor(y))
    assert found == pytest.approx(expected, rel=1e-9)
    own = k(x, y.T).diagonal()
    kid = float(poly_mmd(torch.tensor(x), torch.tensor(y)))  # which has the mean of all i, j in its cross term
    cross = k(x, y.T).mean(), (k(x, y.T).sum() - own.sum()) / (30 * 29)
    assert found == pytest.approx(kid + 2 * cross[0] - 2 * cross[1], rel=1e-9)


def test_the_kernel_distance_of_pairs_is_unbiased_and_its_deviation_is_what_draws_differ_by():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 40, 3, generator=generator)  # 400 draws of 40 images
    y = (x + 0.8 * torch.randn(400, 40, 3, generator=generator)) / 1.64 ** 0.5  # pairs alike, sets equally distributed
    values = torch.tensor([distances.kernel_distance(a, b)[0] for a, b in zip(y, x)])
    assert abs(values.mean()) < 3 * values.std() / 20
    shifted, deviations = torch.tensor([distances.kernel_distance(a + 1, b) for a, b in zip(y, x)]).unbind(1)
    assert deviations.mean() == pytest.approx(float(shifted.std()), rel=0.2)


def test_paired_distance_is_of_unit_length_features():
    generator = torch.Generator().manual_seed(0)
    a, b = ([torch.randn(2, depth, side, side + 1, generator=generator) for depth, side in ((3, 4), (5, 2))]
            for _ in range(2))
    expected = np.zeros(2)
    for fake, real in zip(a, b):
        fake, real = fake.double().numpy(), real.double().numpy()
        cosine = (fake * real).sum(1) / np.linalg.norm(fake, axis=1) / np.linalg.norm(real, axis=1)
        expected += (2 - 2 * cosine).mean((1, 2)) / 2
    found = distances.paired_distance(a, b)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(distances.paired_distance([3 * m for m in a], b).numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(distances.paired_distance([-m for m in a], a).numpy(), 4, rtol=1e-5)
    assert not distances.paired_distance(a, a).any()


def test_sliced_wasserstein_of_one_dimension_is_the_exact_distance():
    random = np.random.default_rng(0)
    a, b = random.normal(size=200), random.gamma(2., size=200)
    cost = np.subtract.outer(a, b) ** 2
    exact = cost[linear_sum_assignment(cost)].mean()
    found = distances.sliced_wasserstein(torch.tensor(a).unsqueeze(1), torch.tensor(b).unsqueeze(1), projections=4)
    assert found == pytest.approx(exact, rel=1e-5)
    # Apart and of one shape: the squared distance is the square of scipy's.
    found = distances.sliced_wasserstein(torch.tensor(a + 3).unsqueeze(1), torch.tensor(a).unsqueeze(1), projections=4)
    assert found == pytest.approx(wasserstein_distance(a + 3, a) ** 2, rel=1e-5)


def test_sliced_wasserstein_is_zero_at_equality_in_any_order_and_squared_under_a_shift():
    a = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    assert distances.sliced_wasserstein(a, a) == 0
    assert distances.sliced_wasserstein(a, a.flip(0)) == pytest.approx(0, abs=1e-9)
    shift = torch.zeros(16)
    shift[3] = 2.
    assert distances.sliced_wasserstein(a + shift, a) == pytest.approx(4, rel=0.1)  # D E[u_3^2] |m|^2
    assert distances.sliced_wasserstein(a + 2 * shift, a) == pytest.approx(
        4 * distances.sliced_wasserstein(a + shift, a), rel=1e-4)


def test_sliced_wasserstein_sees_what_mean_and_covariance_do_not():
    generator = torch.Generator().manual_seed(0)
    gaussian, again = (torch.randn(2000, 2, generator=generator) for _ in range(2))
    signs = torch.randn(2000, 2, generator=generator).sign()
    assert distances.sliced_wasserstein(signs, gaussian) > 10 * distances.sliced_wasserstein(again, gaussian)


def test_sliced_wasserstein_is_deterministic_and_leaves_the_random_state():
    a, b = torch.randn(2, 100, 8).unbind()
    state = torch.get_rng_state()
    one, two = distances.sliced_wasserstein(a, b), distances.sliced_wasserstein(b, a)
    assert one == distances.sliced_wasserstein(a, b) == two and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("distance", [distances.sliced_wasserstein, distances.kernel_distance])
@pytest.mark.parametrize("shapes", [((4, 3), (5, 3)), ((4, 3), (4, 2)), ((4,), (4,))])
def test_wrong_shapes_are_named(distance, shapes):
    with pytest.raises(ValueError, match="one shape"):
        distance(*(torch.zeros(shape) for shape in shapes))
