"""Terms of neighbourhoods: local contrast, edges, wavelets."""
import math

import torch
import torch.nn.functional as F

from harness.errors import UserError
from kernels.ssim import ROOT_EPS, mean_ssim, ssim_maps
from terms.images import EPS, Row, check_sides, chroma_of, edges, halved, luma_of, similarity, unit, weighted_channels

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def ssim(x_tilde, x):
    """1 - SSIM: in [0, 2]; 11-pixel Gaussian window of sigma 1.5, no padding, channels averaged (Wang et al. 2004).

    Raises:
        UserError: a side is smaller than the window.
    """
    check_sides("ssim", x, SSIM_WINDOW)
    return 1 - mean_ssim(unit(x_tilde), unit(x), SSIM_WINDOW, SSIM_SIGMA)


def root_ssim_window(height, width):
    """(pixels, sigma) of a window in proportion to the image: (3, 0.75) below 96, (5, 1) at 128, (11, 1.75) at 256.

    Raises:
        UserError: a side is smaller than the window.
    """
    if min(height, width) < 3:
        raise UserError(f"root-ssim needs sides of at least 3 pixels, got {height}x{width}")
    radius = max(1, min(height, width) // 48)
    return 2 * radius + 1, 0.5 + radius / 4


def root_ssim(x_tilde, x):
    """Mean over positions of the root of 1 - SSIM: in [0, 1.42]; windows as `root_ssim_window` says.

    The root makes it a metric (Brunet et al. 2012) and, as L1 to MSE, a robust one: what cannot be matched weighs less.
    eps = 1e-4 inside the root, its own root taken off.
    """
    return mean_ssim(unit(x_tilde), unit(x), *root_ssim_window(*x.shape[2:]), root=True) - math.sqrt(ROOT_EPS)


MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim_weights(height, width):
    """Exponents of the scales that fit: the published five from 161 pixels on, else fewer, of the same sum.

    Raises:
        UserError: fewer than two scales fit (a side of 20 pixels or less).
    """
    scales = sum(min(height, width) > (SSIM_WINDOW - 1) * 2 ** i for i in range(len(MS_SSIM_WEIGHTS)))
    if scales < 2:
        raise UserError(f"ms-ssim needs sides of more than {2 * (SSIM_WINDOW - 1)} pixels for two scales, got "
                        f"{height}x{width}: use ssim, or larger images (--image-size)")
    share = sum(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS)
    return tuple(weight / share for weight in MS_SSIM_WEIGHTS[:scales])


def ms_ssim(x_tilde, x):
    """1 - MS-SSIM: in [0, 1]; per image and channel, averaged (Wang et al. 2003); scales as `ms_ssim_weights` says."""
    return 1 - ms_ssim_of_each(unit(x_tilde), unit(x)).mean()


def ms_ssim_of_each(x_tilde, x):
    """MS-SSIM of images (B, C, H, W) in [0, 1], channels averaged: (B,), 1 at equality."""
    weights, score = ms_ssim_weights(*x.shape[2:]), 1.
    for scale, weight in enumerate(weights):
        if scale:
            padding = [side % 2 for side in x.shape[2:]]
            x_tilde, x = (F.avg_pool2d(image, 2, padding=padding) for image in (x_tilde, x))
        luminance, structure = ssim_maps(x_tilde, x, SSIM_WINDOW, SSIM_SIGMA)
        last = scale == len(weights) - 1
        similarity = (luminance * structure if last else structure).mean((2, 3))  # (B, C)
        score = score * similarity.clamp(min=EPS) ** weight
    return score.mean(1)


CONTRAST_WINDOW, CONTRAST_C = 7, 0.03 ** 2


def contrast(x_tilde, x):
    """1 - the contrast factor of SSIM, mean (2 s~ s + C2) / (s~^2 + s^2 + C2): in [0, 1] (Wang et al. 2004).

    s is the standard deviation under a uniform 7-pixel window, no padding, per channel. It compares how much contrast
    there is around a pixel, not where.

    Raises:
        UserError: a side is smaller than the window.
    """
    check_sides("contrast", x, CONTRAST_WINDOW)
    return 1 - similarity(_deviation(unit(x_tilde)), _deviation(unit(x)), CONTRAST_C).mean()


def _deviation(x):
    means, squares = (_window_sums(y) / CONTRAST_WINDOW ** 2 for y in (x, x.square()))
    return ((squares - means.square()).clamp(min=0) + EPS).sqrt()


def _window_sums(x):
    """Sums under windows of 7x7 pixels, along each axis as 4 + 2 + 1."""
    for axis in (2, 3):
        length = x.shape[axis] - CONTRAST_WINDOW + 1
        two = x.narrow(axis, 0, length + 5) + x.narrow(axis, 1, length + 5)
        four = two.narrow(axis, 0, length) + two.narrow(axis, 2, length)
        x = four + two.narrow(axis, 4, length) + x.narrow(axis, 6, length)
    return x


def gradient(x_tilde, x):
    """Mean absolute difference of the finite differences along both axes: in [0, 4] (after Mathieu et al. 2016)."""
    difference = unit(x_tilde) - unit(x)
    return sum(torch.diff(difference, dim=axis).abs().mean() for axis in (2, 3))


GMSD_C = 170 / 255 ** 2


def _gmsd(luma_tilde, luma, masking=0.):
    """(B,) standard deviation of the gradient magnitude similarity map, 0 at equality."""
    alike = similarity(edges(luma_tilde, 1 / 3, 1 / 3), edges(luma, 1 / 3, 1 / 3), GMSD_C, masking)
    return (alike.var((1, 2, 3), unbiased=False) + EPS).sqrt() - math.sqrt(EPS)


def gmsd(x_tilde, x):
    """Gradient magnitude similarity deviation: about [0, 0.35]; luma, halved once (Xue et al. 2014, arXiv 1308.3052).

    A deviation, not a mean: an image that is equally wrong everywhere scores 0, so it needs a pixel term with it.
    """
    check_sides("gmsd", x, 2)
    return _gmsd(halved(luma_of(unit(x_tilde))), halved(luma_of(unit(x)))).mean()


MS_GMSD_WEIGHTS, MS_GMSD_MASKING = (0.096, 0.596, 0.289, 0.019), 0.5


def ms_gmsd(x_tilde, x):
    """Root of the weighted mean square of GMSD over four scales of the luma: about [0, 0.35] (Zhang et al. 2017).

    Scales with a side under 3 pixels are left out and the weights renormalised.
    """
    check_sides("ms-gmsd", x, 3)
    luma_tilde, luma, total, weights = luma_of(unit(x_tilde)), luma_of(unit(x)), 0., 0.
    for scale, weight in enumerate(MS_GMSD_WEIGHTS):
        if scale:
            luma_tilde, luma = halved(luma_tilde), halved(luma)
        if min(luma.shape[2:]) < 3:
            break
        total, weights = total + weight * _gmsd(luma_tilde, luma, MS_GMSD_MASKING).square(), weights + weight
    return ((total / weights + EPS).sqrt() - math.sqrt(EPS)).mean()


HAARPSI_C, HAARPSI_ALPHA = 30 / 255 ** 2, 4.2


def _haar(luma, scale):
    """(B, 2, H, W) magnitudes of the horizontal and vertical Haar wavelet responses of size 2^scale."""
    half = 2 ** scale // 2
    means = F.avg_pool2d(F.pad(luma, (half - 1, half) * 2), half, 1)  # of a quarter of the wavelet
    falling = means[..., :-half, :-half] - means[..., half:, half:]
    rising = means[..., :-half, half:] - means[..., half:, :-half]
    return half / 2 * torch.cat([falling + rising, falling - rising], 1).abs()


def haarpsi(x_tilde, x):
    """1 - HaarPSI, the Haar wavelet perceptual similarity index: in [0, 1] (Reisenhofer et al. 2018, arXiv 1607.06140).

    Images are halved once, as published; colour images add the chroma channels I and Q.
    """
    x_tilde, x = halved(unit(x_tilde)), halved(unit(x))
    luma_tilde, luma = luma_of(x_tilde), luma_of(x)
    scales = [(_haar(luma_tilde, scale), _haar(luma, scale)) for scale in (1, 2, 3)]  # (B, 2, h, w) each
    alike = sum(similarity(a, b, HAARPSI_C) for a, b in scales[:2]) / 2
    weight = torch.maximum(*scales[2])
    if x.shape[1] == 3:
        chroma_tilde, chroma = (_mean_filtered(chroma_of(image)).abs() for image in (x_tilde, x))
        alike = torch.cat([alike, similarity(chroma_tilde, chroma, HAARPSI_C).mean(1, keepdim=True)], 1)
        weight = torch.cat([weight, weight.mean(1, keepdim=True)], 1)
    ceiling = 1 / (1 + math.exp(-HAARPSI_ALPHA))  # of identical images; also the score where nothing has any contrast
    local = torch.sigmoid(HAARPSI_ALPHA * alike)
    score = ((local * weight).sum((1, 2, 3)) + EPS * ceiling) / (weight.sum((1, 2, 3)) + EPS)
    return 1 - (torch.logit(score) / HAARPSI_ALPHA).square().mean()


def _mean_filtered(x):
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, stride=1)


MDSI_C, MDSI_AVERAGE_C, MDSI_CHROMA_C, MDSI_EDGES = 140 / 255 ** 2, 55 / 255 ** 2, 550 / 255 ** 2, 0.6
MDSI_OPPONENTS = ((0.30, 0.04, -0.35), (0.34, -0.6, 0.17))


def mdsi(x_tilde, x):
    """Mean deviation similarity index: in [0, 1], 0.2 to 0.5 on photographs (Nafchi et al. 2016, arXiv 1608.07433).

    (mean |s^1/4 - mean s^1/4|)^1/4 per image, s the similarity of Prewitt gradients of the luma, of both images and of
    each with their average, and of two opponent colours. A deviation, not a mean: an image that is equally wrong
    everywhere scores 0, so it needs a pixel term as well.
    """
    x_tilde, x = unit(x_tilde), unit(x)
    luma_tilde, luma = luma_of(x_tilde), luma_of(x)
    edges_tilde, edges_x, edges_between = (edges(y, 1 / 3, 1 / 3)
                                           for y in (luma_tilde, luma, (luma_tilde + luma) / 2))
    alike = similarity(edges_tilde, edges_x, MDSI_C) + similarity(edges_tilde, edges_between, MDSI_AVERAGE_C) \
        - similarity(edges_x, edges_between, MDSI_AVERAGE_C)
    a, b = (weighted_channels(y.expand(-1, 3, -1, -1), MDSI_OPPONENTS) for y in (x_tilde, x))  # grey: three equal ones
    colour = (2 * (a * b).sum(1, keepdim=True) + MDSI_CHROMA_C) / (
        (a.square() + b.square()).sum(1, keepdim=True) + MDSI_CHROMA_C)
    score = (MDSI_EDGES * alike + (1 - MDSI_EDGES) * colour).clamp(min=EPS) ** 0.25
    deviation = (score - score.mean((2, 3), keepdim=True)).abs().mean((1, 2, 3))
    return ((deviation + EPS) ** 0.25 - EPS ** 0.25).mean()


ROWS = {
    "ssim": Row(ssim, structural=True),
    "root-ssim": Row(root_ssim, structural=True),
    "ms-ssim": Row(ms_ssim, structural=True),
    "contrast": Row(contrast, structural=True),
    "gradient": Row(gradient, structural=True),
    "gmsd": Row(gmsd, structural=True),
    "ms-gmsd": Row(ms_gmsd, structural=True),
    "haarpsi": Row(haarpsi, structural=True),
    "mdsi": Row(mdsi, structural=True),
}
