"""Every row of TERMS: its minimum, its gradient where gradients break, and independent oracles."""
import math

import pytest
import pytorch_msssim
import torch
import torch.nn.functional as F
from skimage.color import rgb2yiq
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import losses
from harness.errors import UserError
from losses import TERMS, ReconstructionLoss
from terms import structure

COLOURED = {"chroma", "coarse-chroma", "vsi"}
ROOT_EPS = 1e-4  # what the eps inside square roots may leave of an exact value


def photo(channels=3, size=(32, 32), count=2, seed=0):
    """Smooth images with edges in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, channels, 6, 6, generator=generator)
    x = F.interpolate(coarse, size, mode="bicubic") + 0.1 * torch.rand(count, channels, *size, generator=generator)
    return (x.clamp(0, 1) * 2 - 1)


def noisy(x, amount=0.2, seed=1):
    return (x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(-1, 1)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("channels, size", [(3, (32, 32)), (1, (28, 28)), (3, (24, 40))])
def test_smallest_at_equality(name, channels, size):
    x = photo(channels, size)
    if name in COLOURED and channels == 1:
        with pytest.raises(ValueError, match="3 channels"):
            TERMS[name](x, x)
        return
    at_equality = TERMS[name](x, x)
    assert at_equality.shape == () and abs(at_equality) < 1e-5
    assert TERMS[name](noisy(x, 0.05), x) > at_equality + 1e-6
    assert TERMS[name](noisy(x, 0.3), x) > TERMS[name](noisy(x, 0.05), x)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", TERMS)
def test_finite_gradient_everywhere(name, autocast):
    x = photo()
    constant, black = torch.full_like(x, 0.3), torch.full_like(x, -1.)
    for x_tilde, original in ((x, x), (constant, x), (x, constant), (constant, constant), (black, x), (x, black),
                              (black, black), (-x, x), (-black, black)):
        image = x_tilde.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            total, parts = ReconstructionLoss({name: 1.})(image, original)
        total.backward()
        assert total.dtype == torch.float32 and torch.isfinite(total)
        assert torch.isfinite(image.grad).all()


@pytest.mark.parametrize("name", TERMS)
def test_a_few_steps_on_the_pixels_decrease_it(name):
    x = photo()
    image = noisy(x).requires_grad_()
    optimizer, start = torch.optim.Adam([image], lr=0.01), float(TERMS[name](noisy(x), x))
    for _ in range(20):
        optimizer.zero_grad()
        TERMS[name](image, x).backward()
        optimizer.step()
    assert TERMS[name](image, x) < 0.9 * start


def test_pixel_terms_are_the_published_ones():
    x, y = photo(), noisy(photo())
    assert TERMS["mse"](y, x) == F.mse_loss(y, x) and TERMS["l1"](y, x) == F.l1_loss(y, x)


def test_psnr_against_skimage():
    x, y = photo(), noisy(photo())
    decibels = [peak_signal_noise_ratio(a.numpy() / 2, b.numpy() / 2, data_range=1.) for a, b in zip(x, y)]
    shortfall = (60 - sum(decibels) / len(decibels)) / 60
    assert TERMS["psnr"](y, x).item() == pytest.approx(shortfall, abs=1e-3)


@pytest.mark.parametrize("channels, size", [(3, (32, 32)), (1, (28, 40)), (3, (11, 64))])
def test_ssim_against_skimage_and_pytorch_msssim(channels, size):
    x, y = photo(channels, size), noisy(photo(channels, size))
    a, b = ((z + 1) / 2 for z in (y, x))
    skimage = [structural_similarity(p.numpy(), q.numpy(), channel_axis=0, data_range=1., gaussian_weights=True,
                                     sigma=1.5, use_sample_covariance=False) for p, q in zip(a, b)]
    assert TERMS["ssim"](y, x).item() == pytest.approx(1 - sum(skimage) / len(skimage), abs=1e-4)
    assert TERMS["ssim"](y, x).item() == pytest.approx(1 - pytorch_msssim.ssim(a, b, data_range=1.).item(), abs=1e-5)


@pytest.mark.parametrize("size, window, sigma", [((32, 40), 3, 0.75), ((128, 132), 5, 1.), ((256, 256), 11, 1.75)])
def test_root_ssim_against_pytorch_msssim_of_each_window(size, window, sigma):
    x = photo(size=size, count=1)
    y = noisy(x)
    windows = (F.unfold((z[:, :1] + 1) / 2, window)[0].t().reshape(-1, 1, window, window) for z in (y, x))
    ssim = pytorch_msssim.ssim(*windows, data_range=1., size_average=False, win_size=window, win_sigma=sigma)
    eps = structure.ROOT_EPS
    expected = (1 - ssim.clamp(max=1) + eps).sqrt().mean() - eps ** 0.5
    assert TERMS["root-ssim"](y[:, :1], x[:, :1]).item() == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises(ValueError, match="at least 3"):
        ReconstructionLoss({"root-ssim": 1.}, shape=(3, 2, 32))


def test_chroma_is_blind_to_grey_and_scikit_images_to_colour():
    x = photo()
    grey = 0.2 * torch.rand(2, 1, 32, 32)
    assert TERMS["chroma"]((x + grey), x) < 1e-6
    y = noisy(x)
    a, b = (rgb2yiq(((z + 1) / 2).permute(0, 2, 3, 1).numpy()) for z in (y, x))
    assert TERMS["chroma"](y, x).item() == pytest.approx(abs(a - b)[..., 1:].mean(), abs=1e-3)
    means = (a - b)[..., 1:].reshape(2, 8, 4, 8, 4, 2).mean((2, 4))
    assert TERMS["coarse-chroma"](y, x).item() == pytest.approx((means ** 2).mean(), rel=2e-2)


def test_gradients_of_ssim_and_ms_ssim_are_pytorch_msssims():
    x = photo(size=(170, 166), count=1)
    for ours, theirs in ((TERMS["ssim"], pytorch_msssim.ssim), (TERMS["ms-ssim"], pytorch_msssim.ms_ssim)):
        image = noisy(x).requires_grad_()
        value, reference = ours(image, x), 1 - theirs((image + 1) / 2, (x + 1) / 2, data_range=1.)
        assert value.item() == pytest.approx(reference.item(), abs=1e-5)
        gradients = (torch.autograd.grad(result, image)[0] for result in (value, reference))
        torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("seed", range(8))
def test_ssim_is_pytorch_msssims_at_any_size_kind_and_number_of_channels(seed):
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(11, 90, (2,), generator=generator).tolist()
    channels, dtype = (1, 2, 3, 4)[seed % 4], (torch.float32, torch.float64)[seed // 4]
    layout = (torch.contiguous_format, torch.channels_last)[seed // 2 % 2]
    x = photo(channels, (height, width), seed=seed).to(dtype, memory_format=layout)
    image = noisy(x).requires_grad_()
    value = TERMS["ssim"](image, x)
    reference = 1 - pytorch_msssim.ssim((image + 1) / 2, (x + 1) / 2, data_range=1.)
    gradients = (torch.autograd.grad(result, image)[0] for result in (value, reference))
    assert value.item() == pytest.approx(reference.item(), abs=1e-5) and value.dtype == dtype
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-3)


def test_ms_ssim_uses_the_scales_that_fit():
    assert structure.ms_ssim_weights(256, 161) == structure.MS_SSIM_WEIGHTS
    weights = structure.ms_ssim_weights(32, 32)
    published = structure.MS_SSIM_WEIGHTS
    assert len(weights) == 2 and sum(weights) == pytest.approx(sum(published))
    assert weights[1] / weights[0] == pytest.approx(published[1] / published[0])
    with pytest.raises(ValueError, match="two scales"):
        ReconstructionLoss({"ms-ssim": 1.}, shape=(3, 20, 64))


def test_gradient_term_by_hand():
    x = torch.zeros(1, 1, 2, 2)
    y = torch.tensor([[[[0., 1.], [0., 1.]]]])  # half a unit of contrast across, none down
    assert TERMS["gradient"](y, x).item() == pytest.approx(0.5)


# Values of the public package piq 0.8 for these very images; its GMSD has no eps under the root.
@pytest.mark.parametrize("name, channels, expected", [
    ("gmsd", 3, 0.0501075), ("gmsd", 1, 0.0640430), ("ms-gmsd", 3, 0.0672776), ("ms-gmsd", 1, 0.0829037),
    ("haarpsi", 3, 0.2007077), ("haarpsi", 1, 0.3048857)])
def test_gmsd_and_haarpsi_against_piq(name, channels, expected):
    x = photo(channels, (64, 48))
    assert TERMS[name](noisy(x), x).item() == pytest.approx(expected, abs=3 * ROOT_EPS)


@pytest.mark.parametrize("weights", [
    {"mse": 0.}, {}, {"mse": -1.}, {"mse": math.nan}, {"ssim": math.inf}, {"mse": 1., "sharpness": 1.}])
def test_wrong_weights(weights):
    with pytest.raises(ValueError):
        ReconstructionLoss(weights)


def test_wrong_range_and_shape_are_caught():
    criterion, x = ReconstructionLoss({"mse": 1.}), photo()
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        criterion(x, (x + 1) * 127.5)
    with pytest.raises(ValueError, match="shape"):
        criterion(x[:1], x)


def test_images_too_small_fail_at_construction():
    with pytest.raises(ValueError, match="ssim"):
        ReconstructionLoss({"ssim": 1.}, shape=(3, 8, 32))


def test_a_bug_in_a_term_is_no_error_of_the_user(monkeypatch):
    def broken(x_tilde, x):
        raise ValueError("a bug")
    monkeypatch.setitem(TERMS, "mse", broken)
    with pytest.raises(ValueError, match="a bug") as caught:
        ReconstructionLoss({"mse": 1.}, shape=(3, 8, 8))
    assert not isinstance(caught.value, UserError)


def test_total_and_gradient_are_those_of_the_weighted_sum():
    x = photo()
    image, plain = (noisy(x).requires_grad_() for _ in range(2))
    weights = {"mse": 1., "ssim": 0.5, "gradient": 0.1}
    total, parts = ReconstructionLoss(weights)(image, x)
    expected = sum(weight * TERMS[name](plain, x) for name, weight in weights.items())
    (3 * total).backward()
    (3 * expected).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(image.grad, plain.grad)
    assert set(parts) == set(weights) and not any(part.requires_grad for part in parts.values())
    assert parts["ssim"] == TERMS["ssim"](plain, x)


def test_sharpened_raises_the_contrast_of_detail_alone():
    flat, x = torch.full((1, 3, 8, 8), 0.3), photo()
    torch.testing.assert_close(losses.sharpened(flat, 0.5), flat)
    stripes = 0.4 * (torch.arange(8) % 2 * 2 - 1).float().expand(1, 1, 8, 8)  # the binomial filter takes them to 0
    torch.testing.assert_close(losses.sharpened(stripes, 0.5), 1.5 * stripes)
    assert losses.sharpened(stripes, 5.).abs().max() == 1
    means = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), 2, 1)  # twice: the binomial filter
    expected = x + 0.2 * (x - F.avg_pool2d(means, 2, 1))
    torch.testing.assert_close(losses.sharpened(x, 0.2), expected.clamp(-1, 1))


def test_structural_terms_see_the_sharpened_original_and_pixel_terms_the_original():
    x, weights = photo(), dict.fromkeys(TERMS, 1.)
    _, parts = ReconstructionLoss(weights, sharpen=0.2)(noisy(x), x)
    for name, term in TERMS.items():
        target = losses.sharpened(x, 0.2) if losses.ROWS[name].structural else x
        assert parts[name] == term(noisy(x), target)
    for amount, terms in ((-0.1, weights), (math.nan, weights), (math.inf, weights), (0.2, {"mse": 1.})):
        with pytest.raises(ValueError, match="--sharpen"):
            ReconstructionLoss(terms, sharpen=amount)


def test_no_gradient_is_computed_where_none_is_asked():
    x = photo()
    with torch.no_grad():
        total, _ = ReconstructionLoss({"mse": 1., "ssim": 1.})(noisy(x).requires_grad_(), x)
    assert not total.requires_grad


@pytest.mark.parametrize("with_mse", [True, False])
def test_balance_gives_each_term_its_weight_times_the_gradient_of_mse(with_mse):
    x, weights = photo(), {"mse": 1.} if with_mse else {}
    criterion = ReconstructionLoss(weights | {"ssim": 0.5, "gradient": 2.}, balance="gradient")
    for name, weight in (("ssim", 0.5), ("gradient", 2.)):
        image = noisy(x).requires_grad_()
        criterion(image, x)
        mse_norm = torch.autograd.grad(TERMS["mse"](image, x), image)[0].norm()
        scaled = criterion.gradient_norms[name] * criterion.weights[name] * criterion.scales()[
            list(criterion.weights).index(name)]
        assert scaled.item() == pytest.approx(weight * mse_norm.item(), rel=1e-3)


def test_balance_averages_over_steps_and_is_kept_in_the_state():
    x, criterion = photo(), ReconstructionLoss({"ssim": 1.}, balance="gradient")
    criterion(noisy(x).requires_grad_(), x)
    first = criterion.average_norms.clone()
    criterion(noisy(x, 0.5).requires_grad_(), x)
    change = (criterion.average_norms - first).abs() / first
    assert 0 < change.max() < 0.1
    other = ReconstructionLoss({"ssim": 1.}, balance="gradient")
    other.load_state_dict(criterion.state_dict())
    assert torch.equal(other.scales(), criterion.scales())
