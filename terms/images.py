"""Images as the terms see them, and the row that makes a function a term."""
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

EPS = 1e-8
LUMA = (0.299, 0.587, 0.114)
CHROMA = ((0.596, -0.274, -0.322), (0.211, -0.523, 0.312))  # I and Q of YIQ


class Row(NamedTuple):
    """A term (x_tilde, x) -> scalar, and whether it is structural: whether `--sharpen` shows it sharpened originals."""

    term: Callable
    structural: bool = False


def unit(x):
    return (x + 1) / 2  # [-1, 1] -> [0, 1]


@cache
def constant(values, device):
    """A float32 tensor of nested tuples of numbers, brought to a device once: each step would wait for a copy."""
    return torch.tensor(values, device=device)


def luma_of(x):
    """(B, 1, H, W) luma of colour images; one-channel images are their own."""
    if x.shape[1] == 1:
        return x
    return torch.einsum("bchw,c->bhw", x, constant(LUMA, x.device)).unsqueeze(1)


def chroma_of(x):
    """(B, 2, H, W) chroma channels I and Q of colour images. ValueError where they have no colour."""
    if x.shape[1] != 3:
        raise ValueError(f"chroma terms need 3 channels, not {x.shape[1]}: --chroma-weight 0 --coarse-chroma-weight 0")
    return torch.einsum("bchw,kc->bkhw", x, constant(CHROMA, x.device))


def halved(x):
    """Means of 2x2 pixels."""
    return F.avg_pool2d(x, 2)
