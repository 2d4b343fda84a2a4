"""Reported metrics against scikit-image, closed forms and brute force."""
import pytest
import torch
from pytorch_msssim import ms_ssim as msssim_ms_ssim
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import metrics
from metrics import IMAGE_METRICS

PERFECT = {"mse": 0., "psnr": metrics.PERFECT_PSNR, "ssim": 1., "gradient_ratio": 1., "high_frequency_ratio": 1.,
           "saturation_ratio": 1., "psnr_of_luma": metrics.PERFECT_PSNR, "ssim_uniform": 1., "ms_ssim": 1.}
METRICS = IMAGE_METRICS | metrics.CONVENTIONS


def images(channels=3, size=(32, 40), count=3, seed=0):
    return torch.rand(count, channels, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("x", [images(), images(1, (8, 8)), torch.zeros(2, 3, 16, 16), torch.ones(2, 1, 28, 28)])
def test_identical_images_score_perfectly(name, x):
    if name == "ms_ssim" and "ms_ssim" not in metrics.conventions_for(x.shape[2:]):
        x = x.tile(1, 1, 3, 3)
    values = METRICS[name](x, x)
    assert values.shape == (len(x),)
    torch.testing.assert_close(values, torch.full_like(values, PERFECT[name]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_psnr_and_ssim_per_image_against_skimage(channels):
    x, y = images(channels), (images(channels) + 0.1 * torch.randn(3, channels, 32, 40)).clamp(0, 1)
    for a, b, psnr, ssim in zip(y, x, metrics.psnr(y, x), metrics.ssim(y, x)):
        a, b = a.double().numpy(), b.double().numpy()
        assert psnr.item() == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1.), abs=1e-3)
        expected = structural_similarity(b, a, channel_axis=0, data_range=1., gaussian_weights=True, sigma=1.5,
                                         use_sample_covariance=False)
        assert ssim.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("channels, size", [(1, (32, 40)), (3, (33, 20)), (3, (6, 9))])
def test_ssim_uniform_is_scikit_images_default(channels, size):
    x = images(channels, size)
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    for a, b, found in zip(y, x, metrics.ssim_uniform(y, x)):
        expected = structural_similarity(b.double().numpy(), a.double().numpy(), channel_axis=0, data_range=1.,
                                         win_size=5 if min(size) < 7 else None)
        assert found.item() == pytest.approx(expected, abs=1e-6)


def test_psnr_of_luma_is_that_of_y():
    x, y = images(), (images() + 0.1 * images(seed=1)).clamp(0, 1)
    for a, b, found in zip(y, x, metrics.psnr_of_luma(y, x)):
        lumas = [(rgb2ycbcr(image.double().numpy(), channel_axis=0)[0] - 16) / 219 for image in (b, a)]
        assert found.item() == pytest.approx(peak_signal_noise_ratio(*lumas, data_range=1.), abs=1e-3)
    assert torch.equal(metrics.psnr_of_luma(y[:, :1], x[:, :1]), metrics.psnr(y[:, :1], x[:, :1]))


def test_psnr_of_the_mean_error_is_that_of_one_large_image():
    x = images()
    y = (x + torch.tensor([0.01, 0.1, 0.3]).view(3, 1, 1, 1) * images(seed=1)).clamp(0, 1)
    expected = peak_signal_noise_ratio(x.double().numpy(), y.double().numpy(), data_range=1.)
    found = metrics.psnr_of_mean_mse(metrics.mse(y, x).double())
    assert found == pytest.approx(expected, abs=1e-4) and found < metrics.psnr(y, x).mean()
    assert metrics.psnr_of_mean_mse(torch.zeros(3)) == metrics.PERFECT_PSNR


def test_ms_ssim_of_large_images_is_the_published_one():
    x, y = images(size=(176, 176)), (images(size=(176, 176)) + 0.2 * images(size=(176, 176), seed=1)).clamp(0, 1)
    expected = msssim_ms_ssim(y, x, data_range=1., size_average=False)
    torch.testing.assert_close(metrics.CONVENTIONS["ms_ssim"](y, x), expected, atol=1e-4, rtol=0)
    assert set(metrics.conventions_for((21, 40))) == set(metrics.CONVENTIONS)
    assert "ms_ssim" not in metrics.conventions_for((20, 40))


def test_gradient_ratio_of_half_the_contrast_is_one_half():
    x = images()
    torch.testing.assert_close(metrics.gradient_ratio(0.5 * x + 0.25, x), torch.full((3,), 0.5), atol=2e-3, rtol=0)


def test_high_frequency_ratio_sees_blur_and_only_high_frequencies():
    x = images()
    assert (metrics.high_frequency_ratio(torch.nn.functional.avg_pool2d(x, 3, 1, 1), x) < 0.3).all()
    torch.testing.assert_close(metrics.high_frequency_ratio(0.5 * x, x), torch.full((3,), 0.25), atol=1e-3, rtol=0)
    ramp = torch.linspace(0, 0.2, 40).expand(3, 3, 32, 40)
    torch.testing.assert_close(metrics.high_frequency_ratio(x + ramp, x), torch.ones(3), atol=1e-2, rtol=0)


def test_saturation_ratio_sees_colours_fade_and_not_light():
    x = images()
    grey = x.mean(1, keepdim=True)
    torch.testing.assert_close(metrics.saturation_ratio(grey + 0.5 * (x - grey), x), torch.full((3,), 0.5), atol=0.05,
                               rtol=0)
    torch.testing.assert_close(metrics.saturation_ratio(x + 0.1, x), torch.ones(3))
    assert (metrics.saturation_ratio(images(1), images(1, seed=1)) == 1).all()


def test_color_bias_is_the_mean_shift_of_each_channel():
    x, shift = images() * 0.5, torch.tensor([0.1, -0.05, 0.2])
    torch.testing.assert_close(metrics.color_bias(x + shift.view(3, 1, 1), x), shift.expand(3, 3))


def test_as_8bit_is_what_an_image_file_would_hold():
    x = torch.tensor([-1.5, -1., 0., 0.5, 1., 2.])
    assert (metrics.as_8bit(x) * 255).round().tolist() == [0, 0, 128, 191, 255, 255]


@pytest.mark.parametrize("counts, perplexity, used", [([5, 5, 5, 5], 4., 4), ([7, 0, 0], 1., 1), ([1, 1, 0, 0], 2., 2)])
def test_codebook_usage(counts, perplexity, used):
    usage = metrics.codebook_usage(torch.tensor(counts))
    assert usage["perplexity"] == pytest.approx(perplexity)
    assert (usage["used_codes"], usage["dead_codes"]) == (used, len(counts) - used)
