"""Terms of the level and colour of each pixel by itself."""
import math

import torch
import torch.nn.functional as F

from terms.images import Row, check_sides, chroma_of, unit


def mse(x_tilde, x):
    """Mean squared error, mean (x_tilde - x)^2: in [0, 4]. Alone with weight 1 it is the published VQ-VAE."""
    return F.mse_loss(x_tilde, x)


def l1(x_tilde, x):
    """Mean absolute error, mean |x_tilde - x|: in [0, 2]."""
    return F.l1_loss(x_tilde, x)


CHARBONNIER_EPS = 1e-3


def charbonnier(x_tilde, x):
    """Charbonnier loss, mean sqrt((x_tilde - x)^2 + eps^2) - eps, eps = 1e-3: in [0, 2] (Charbonnier et al. 1994).

    The absolute error, smooth at 0 (as a loss of images: Lai et al. 2017, arXiv 1704.03915).
    """
    return ((x_tilde - x).square() + CHARBONNIER_EPS ** 2).sqrt().mean() - CHARBONNIER_EPS


def psnr(x_tilde, x, ceiling=60.0):
    """Shortfall of the peak signal-to-noise ratio from 60 dB, as a share of them: in [0, 1], per image, averaged.

    log10(1 + MSE / e) / log10(1 + 1 / e) with e = 10^(-ceiling / 10), MSE on [0, 1]. About 1 - PSNR / ceiling.
    """
    e = 10 ** (-ceiling / 10)
    error = (unit(x_tilde) - unit(x)).square().mean((1, 2, 3))  # (B,)
    return torch.log1p(error / e).mean() / math.log1p(1 / e)


def chroma(x_tilde, x):
    """Mean absolute error of the chroma channels I and Q of YIQ: in [0, 1.2]. Keeps saturated colours from fading.

    Raises:
        UserError: the images have no colour.
    """
    return chroma_of(unit(x_tilde) - unit(x)).abs().mean()


COARSE = 4  # pixels of a side


def coarse_chroma(x_tilde, x):
    """Mean squared error of I and Q, averaged over 4x4 pixels: in [0, 1.3]. Keeps small coloured things from fading.

    Of colours that are seldom there it asks for the mean, where an absolute error asks for the median: grey.

    Raises:
        UserError: the images have no colour, or a side is smaller than 4 pixels.
    """
    check_sides("coarse-chroma", x, COARSE)
    return F.avg_pool2d(chroma_of(unit(x_tilde) - unit(x)), COARSE).square().mean()


ROWS = {
    "mse": Row(mse),
    "l1": Row(l1),
    "charbonnier": Row(charbonnier),
    "chroma": Row(chroma, colour=True),
    "coarse-chroma": Row(coarse_chroma, colour=True),
    "psnr": Row(psnr),
}
