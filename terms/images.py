"""Images as the terms see them, and the row that makes a function a term."""
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from harness.errors import UserError

EPS = 1e-8
LUMA = (0.299, 0.587, 0.114)
CHROMA = ((0.596, -0.274, -0.322), (0.211, -0.523, 0.312))  # I and Q of YIQ


class Row(NamedTuple):
    """A term (x_tilde, x) -> scalar, whether it is structural: whether `--sharpen` shows it sharpened originals; and
    whether it is of colour: grey images go without it."""

    term: Callable
    structural: bool = False
    colour: bool = False


def unit(x):
    return (x + 1) / 2  # [-1, 1] -> [0, 1]


def check_sides(term, x, least):
    """Raise UserError where a side of images x is smaller than a term needs."""
    if min(x.shape[2:]) < least:
        raise UserError(f"{term} needs sides of at least {least} pixels, got {x.shape[2]}x{x.shape[3]}: take larger "
                        "images, or leave it out")


def halved(x):
    """Means of 2x2 pixels."""
    return F.avg_pool2d(x, 2)


# --- colour

def weighted_channels(x, rows):
    """(B, len(rows), H, W) sums of the channels of x (B, 3, H, W), each row their three weights.

    No product of matrices: on a GPU that may be of ten bits (TF32).
    """
    red, green, blue = x.split(1, 1)
    return torch.cat([row[0] * red + row[1] * green + row[2] * blue for row in rows], 1)


def luma_of(x):
    """(B, 1, H, W) luma of colour images; one-channel images are their own. UserError for other images."""
    if x.shape[1] == 1:
        return x
    if x.shape[1] != 3:
        raise UserError(f"luma needs images of 1 or 3 channels, got {x.shape[1]}")
    return weighted_channels(x, (LUMA,))


def chroma_of(x):
    """(B, 2, H, W) chroma channels I and Q of colour images. UserError where they have no colour."""
    if x.shape[1] != 3:
        raise UserError(f"chroma terms need 3 channels, not {x.shape[1]}: --chroma-weight 0 --coarse-chroma-weight 0")
    red, green, blue = x.split(1, 1)
    red, blue = red - green, blue - green  # the three weights of a channel sum to 0
    return torch.cat([weights[0] * red + weights[2] * blue for weights in CHROMA], 1)


# --- edges, and what most indices do with them

def derivatives(x, outer, middle):
    """Differences of next neighbours but one, across and down, of the size of x, zeros beyond the border.

    Smoothed the other way by (outer, middle, outer): 1/3, 1/3 is Prewitt's filter, 1, 2 Sobel's, 3/16, 10/16 Scharr's.
    """
    x = F.pad(x, (1, 1, 1, 1))
    across, down = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]
    return (outer * (across[..., :-2, :] + across[..., 2:, :]) + middle * across[..., 1:-1, :],
            outer * (down[..., :-2] + down[..., 2:]) + middle * down[..., 1:-1])


def edges(x, outer, middle):
    """Magnitudes of the gradients of x, by the filter that `derivatives` is given."""
    across, down = derivatives(x, outer, middle)
    return (across.square() + down.square() + EPS).sqrt()


def similarity(a, b, c, masking=0.):
    """(2 a b + c) / (a^2 + b^2 + c): 1 where a = b, above 0 for magnitudes.

    `masking` a b is taken off above and below. Published constants c are for [0, 255]: over 255^2 here.
    """
    return ((2 - masking) * a * b + c) / (a.square() + b.square() - masking * a * b + c)


def power(x, exponent, softness=1e-4):
    """|x|^exponent for an exponent below 1, smooth at 0: ((x^2 + softness) / (1 + softness))^(exponent / 2)."""
    return ((x.square() + softness) / (1 + softness)) ** (exponent / 2)
