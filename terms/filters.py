"""Terms of what a bank of fixed filters answers: the form of a perceptual distance, without a network."""
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from terms.images import Row, check_sides, halved, luma_of, unit

SIDE, WAVELENGTH, SIGMA = 7, 4., 1.8  # of the filters, in pixels
ORIENTATIONS, SCALES, FLOOR = 4, 3, 0.05


def gabor(x_tilde, x):
    """Squared distance of normalised Gabor responses, mean over positions, then over scales: in [0, 2].

    Sum over filters of (r / sqrt(|r|^2 + 0.05^2) - r' / sqrt(|r'|^2 + 0.05^2))^2, where r holds the responses of the
    luma to even and odd 7-pixel Gabor filters (Daugman 1985) at 4 orientations, split into positive and negative parts,
    as simple cells do. Three scales, each half of the last; one with a side under 8 pixels is left out. The form is
    that of LPIPS (Zhang et al. 2018, arXiv 1801.03924), with fixed filters in place of a trained network.

    Raises:
        UserError: a side is smaller than 8 pixels.
    """
    check_sides("gabor", x, SIDE + 1)
    luma_tilde, luma, total, scales = luma_of(unit(x_tilde)), luma_of(unit(x)), 0., 0
    filters = _in_blocks(_filters(luma))
    while scales < SCALES and min(luma.shape[2:]) > SIDE:
        distances = _Distance.apply(_responses(luma_tilde, filters), _responses(luma, filters))
        distances = F.pixel_shuffle(distances, 2)[:, 0, :luma.shape[2], :luma.shape[3]]  # odd sides lie in a wider grid
        total = total + distances.mean()
        luma_tilde, luma, scales = halved(luma_tilde), halved(luma), scales + 1
    return total / scales


def _responses(luma, filters):
    """(B, 4, filters, ⌈H/2⌉, ⌈W/2⌉) of luma (B, 1, H, W): those of the four pixels of each 2x2 block."""
    # A convolution of ten bits (TF32) would do: equal images have equal responses, however they are rounded.
    (height, width), pad = luma.shape[2:], SIDE // 2
    luma = F.pad(luma, (pad, pad + width % 2, pad, pad + height % 2), mode="reflect")
    return F.conv2d(F.pixel_unshuffle(luma, 2), filters).unflatten(1, (4, -1))


def _in_blocks(filters):
    """Filters over 4x4 blocks of 2x2 pixels, each for the four pixels of a block: (4 filters, 4, 4, 4) of `_filters`.

    A convolution of one channel is slow: on a CPU it takes 1.7 times as long as this one.
    """
    return F.pixel_unshuffle(torch.cat([F.pad(filters, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)]), 2)


class _Distance(torch.autograd.Function):
    """Squared distance of normalised responses a and b, expanded: |a|^2 + |b|^2 - 2 a.b, to about 1e-7.

    Positive parts meet positive ones alone, and negative ones negative: of the products in a.b those above 0 count.
    The gradient, in a alone, is written out: on a CPU that of autograd takes twice as long.
    """

    @staticmethod
    def forward(ctx, a, b):
        square_a, square_b, product = a.square().sum(2), b.square().sum(2), (a * b).clamp_(min=0).sum(2)
        floored_a, floored_b = square_a + FLOOR ** 2, square_b + FLOOR ** 2
        scale = (floored_a * floored_b).rsqrt()
        ctx.save_for_backward(a, b, floored_a, product * scale, scale)
        return square_a / floored_a + square_b / floored_b - 2 * product * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        a, b, floored_a, cosine, scale = ctx.saved_tensors
        of_a, of_b = 2 * grad * (cosine + FLOOR ** 2 / floored_a) / floored_a, -2 * grad * scale
        same_sign = torch.where(a * b >= 0, b, 0)
        return same_sign.mul_(of_b.unsqueeze(2)).addcmul_(a, of_a.unsqueeze(2)), None


def _filters(like):
    """(2 orientations, 1, SIDE, SIDE) even and odd filters of unit length and zero mean, on the device of `like`."""
    offsets = torch.arange(SIDE, dtype=like.dtype, device=like.device) - SIDE // 2
    angles = torch.arange(ORIENTATIONS, dtype=like.dtype, device=like.device).view(-1, 1, 1) * (math.pi / ORIENTATIONS)
    phase = (offsets * angles.cos() + offsets.view(-1, 1) * angles.sin()) * (2 * math.pi / WAVELENGTH)
    window = torch.exp(-(offsets.square() + offsets.view(-1, 1).square()) / (2 * SIGMA ** 2))
    even, odd = window * phase.cos(), window * phase.sin()
    even = even - window * (even.sum((1, 2), keepdim=True) / window.sum())
    filters = torch.stack([even, odd], 1).flatten(0, 1)
    return (filters / filters.square().sum((1, 2), keepdim=True).sqrt()).unsqueeze(1)


ROWS = {"gabor": Row(gabor, structural=True)}
