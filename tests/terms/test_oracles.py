"""Terms against independent implementations: piq's values, and SciPy's filters and transforms."""
import re

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from scipy import fft, ndimage, stats
from skimage import data

from harness.errors import UserError
from losses import TERMS, ReconstructionLoss

LUMA = (0.299, 0.587, 0.114)


def photographs(side, channels=3):
    """(2, channels, side, side) crops of photographs, in [-1, 1]."""
    crops = [getattr(data, name)()[40:40 + side, 60:60 + side] for name in ("astronaut", "coffee")]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)[:, :channels] / 127.5 - 1


def noisy(x, amount=0.2):
    return (x + amount * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)


def pairs(*cases):
    """Noisy and real photographs as tensors, and as float64 arrays in [0, 1]."""
    for side, channels in cases:
        x = photographs(side, channels)
        y = noisy(x)
        yield y, x, *((image.double().numpy() + 1) / 2 for image in (y, x))


def luma(images):
    return images[:, 0] if images.shape[1] == 1 else np.tensordot(LUMA, images, (0, 1))


# Values of piq 0.8 for these very images. Its MDSI has no eps under the outer root, here 1e-8; its FSIM has I and Q of
# more digits.
@pytest.mark.parametrize("name, side, channels, expected", [
    ("mdsi", 64, 3, 0.4181805), ("mdsi", 256, 3, 0.4123546), ("mdsi", 48, 1, 0.3774078),
    ("fsim", 64, 3, 0.3847933), ("fsim", 256, 3, 0.2627221), ("fsim", 48, 1, 0.4307282),
    ("vsi", 256, 3, 0.1231822)])
def test_indices_against_piq(name, side, channels, expected):
    x = photographs(side, channels)
    value = TERMS[name](noisy(x), x).item() + (0.01 if name == "mdsi" else 0.)
    assert value == pytest.approx(expected, abs=5e-4)


def test_vsi_is_near_piqs_which_resizes_to_256x256_for_saliency():
    x = photographs(64)
    assert TERMS["vsi"](noisy(x), x).item() == pytest.approx(0.1778356, rel=0.05)


def test_contrast_is_that_of_the_standard_deviations_in_each_window():
    for y, x, b, a in pairs((24, 3), (33, 1)):
        s, t = (sliding_window_view(images, (7, 7), (2, 3)).std((4, 5)) for images in (b, a))
        expected = 1 - ((2 * s * t + 0.0009) / (s ** 2 + t ** 2 + 0.0009)).mean()
        assert TERMS["contrast"](y, x).item() == pytest.approx(expected, abs=1e-4)


def test_charbonnier_is_absolute_for_large_errors_and_square_for_small_ones():
    x = photographs(16)
    assert TERMS["charbonnier"](x + 0.5, x).item() == pytest.approx(0.5 - 1e-3, abs=2e-6)
    assert TERMS["charbonnier"](x + 1e-4, x).item() == pytest.approx(1e-8 / 2e-3, rel=2e-2)


def test_gradient_variance_against_scipys_sobel():
    for y, x, b, a in pairs((32, 3), (43, 1)):
        expected = 0.
        for axis in (1, 2):
            variances = []
            for images in (luma(b), luma(a)):
                slopes = np.stack([ndimage.sobel(image, axis - 1, mode="constant") for image in images])
                patches = sliding_window_view(slopes, (8, 8), (1, 2))[:, ::8, ::8]
                variances.append(patches.var((3, 4), ddof=1))
            expected += ((variances[0] - variances[1]) ** 2).mean()
        assert TERMS["gradient-variance"](y, x).item() == pytest.approx(expected, rel=1e-3)


def bands_of(image, levels):
    """Laplacian pyramid of an image (H, W), by two-dimensional filters and zeros between pixels."""
    taps, bands = np.outer(*2 * [[0.05, 0.25, 0.4, 0.25, 0.05]]), []
    for _ in range(levels - 1):
        low = ndimage.convolve(image, taps, mode="reflect")[::2, ::2]
        wide = np.pad(low, 1, mode="edge")
        spread = np.zeros((2 * wide.shape[0], 2 * wide.shape[1]))
        spread[::2, ::2] = 4 * wide
        bands.append(image - ndimage.convolve(spread, taps)[2:2 + image.shape[0], 2:2 + image.shape[1]])
        image = low
    return [*bands, image]


def test_laplacian_against_scipys_filters():
    for y, x, b, a in pairs((32, 3), (37, 1)):
        differences = (b - a).reshape(-1, *a.shape[2:])
        bands = zip(*(bands_of(image, 4) for image in differences))
        expected = sum(np.abs(np.stack(band)).mean() for band in bands)
        assert TERMS["laplacian"](y, x).item() == pytest.approx(expected, rel=1e-4)


DIVISORS = [(0.0248, [[0, 0.1011, 0], [0.1493, 0, 0.1460], [0, 0.1015, 0]]),
            (0.0185, [[0, 0.0757, 0], [0.1986, 0, 0.1846], [0, 0.0837, 0]]),
            (0.0179, [[0, 0.0477, 0], [0.2138, 0, 0.2243], [0, 0.0467, 0]]),
            (0.0191, [[0, 0, 0], [0.2503, 0, 0.2616], [0, 0, 0]]),
            (0.0220, [[0, 0, 0], [0.2598, 0, 0.2552], [0, 0, 0]]),
            (0.2782, [[0, 0, 0], [0.2215, 0, 0.0717], [0, 0, 0]])]


def test_nlpd_against_scipys_filters():
    for y, x, b, a in pairs((64, 3), (37, 1)):
        distances = []
        for pair in zip(luma(b), luma(a)):
            normalised = [[band / (constant + ndimage.convolve(np.abs(band), np.array(weights), mode="constant"))
                           for band, (constant, weights) in zip(bands_of(image, 6), DIVISORS)] for image in pair]
            distances.append(np.mean([np.sqrt(((p - q) ** 2).mean()) for p, q in zip(*normalised)]))
        assert TERMS["nlpd"](y, x).item() == pytest.approx(np.mean(distances), abs=2e-4)


def test_focal_frequency_against_numpys_transform():
    for y, x, b, a in pairs((32, 3), (27, 1)):
        distance = np.abs(np.fft.fft2(b, norm="ortho") - np.fft.fft2(a, norm="ortho"))
        expected = (distance / distance.max((2, 3), keepdims=True) * distance ** 2).mean()
        assert TERMS["focal-frequency"](y, x).item() == pytest.approx(expected, rel=1e-4)


def test_log_spectrum_against_numpys_transform_and_has_no_place():
    for y, x, b, a in pairs((32, 3), (27, 1)):
        power, target = (np.log((np.abs(np.fft.fft2(images, norm="ortho")) ** 2).mean(0) + 1e-6) for images in (b, a))
        half = a.shape[3] // 2 + 1
        assert TERMS["log-spectrum"](y, x).item() == pytest.approx(((power - target) ** 2)[..., :half].mean(), rel=1e-3)
        assert TERMS["log-spectrum"](x.roll((3, 5), (2, 3)), x) < 1e-6 < TERMS["log-spectrum"](y, x)


def test_patch_swd_is_scipys_wasserstein_distance_of_the_cosines_of_patches():
    for y, x, b, a in pairs((32, 3), (27, 1)):
        channels = a.shape[1]
        sets = []
        for images in (b, a):
            patches = sliding_window_view(images, (5, 5), (2, 3))[:, :, ::3, ::3].transpose(0, 2, 3, 1, 4, 5)
            cosines = fft.dctn(patches.reshape(-1, channels, 5, 5), axes=(1, 2, 3), norm="ortho")
            sets.append(cosines.reshape(len(cosines), channels, 25)[..., 1:].reshape(len(cosines), -1))
        expected = np.mean([stats.wasserstein_distance(p, q) for p, q in zip(sets[0].T, sets[1].T)])
        assert TERMS["patch-swd"](y, x).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", TERMS)
def test_values_lie_in_the_range_that_is_stated(name):
    stated = re.match(r"[^\n]*: in \[0, ([\d.]+)\]", TERMS[name].__doc__)
    generator = torch.Generator().manual_seed(0)
    noise, x = torch.rand(2, 3, 32, 32, generator=generator).round() * 2 - 1, photographs(32)
    white, checks = torch.ones_like(x), (torch.arange(32) + torch.arange(32).unsqueeze(1)) % 2 * 2. - 1
    for a, b in ((white, -white), (noise, -noise), (x, -x), (noise, x), (x, noise), (white, x), (x, -white),
                 (checks * white, -white), (-white, checks * white)):
        value = TERMS[name](a, b).item()
        assert -1e-6 <= value <= (float(stated[1]) + 1e-6 if stated else 1e3)


@pytest.mark.parametrize("name, channels, side, words", [
    ("contrast", 3, 6, "at least 7"), ("gradient-variance", 3, 7, "at least 8"), ("laplacian", 3, 4, "at least 5"),
    ("nlpd", 3, 16, "at least 17"), ("patch-swd", 3, 4, "at least 5"), ("vsi", 1, 32, "3 channels"),
    ("mdsi", 4, 32, "1 or 3 channels"), ("fsim", 2, 32, "1 or 3 channels")])
def test_images_that_do_not_suit_fail_at_construction(name, channels, side, words):
    with pytest.raises(UserError, match=words):
        ReconstructionLoss({name: 1.}, shape=(channels, side, 32))
