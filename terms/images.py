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
    """A term (x_tilde, x) -> scalar, and whether it is structural: whether `--sharpen` shows it sharpened originals."""

    term: Callable
    structural: bool = False


def unit(x):
    return (x + 1) / 2  # [-1, 1] -> [0, 1]


def luma_of(x):
    """(B, 1, H, W) luma of colour images; one-channel images are their own. ValueError for other images.

    A sum, not a product of matrices: on a GPU such a product may be of ten bits (TF32).
    """
    if x.shape[1] == 1:
        return x
    if x.shape[1] != 3:
        raise ValueError(f"luma needs images of 1 or 3 channels, got {x.shape[1]}")
    red, green, blue = x.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def chroma_of(x):
    """(B, 2, H, W) chroma channels I and Q of colour images. UserError where they have no colour."""
    if x.shape[1] != 3:
        raise UserError(f"chroma terms need 3 channels, not {x.shape[1]}: --chroma-weight 0 --coarse-chroma-weight 0")
    red, green, blue = x.split(1, 1)
    red, blue = red - green, blue - green  # the three weights of a channel sum to 0
    return torch.cat([weights[0] * red + weights[2] * blue for weights in CHROMA], 1)


def halved(x):
    """Means of 2x2 pixels."""
    return F.avg_pool2d(x, 2)
