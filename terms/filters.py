"""Terms of what a bank of fixed filters answers: the form of a perceptual distance, without a network."""
import math

import torch
import torch.nn.functional as F

from kernels.backend import exact_products, in_parts, register_gradient
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
        total = total + _distance(_blocks(luma_tilde), _blocks(luma), filters, _shares(luma))[0]
        luma_tilde, luma, scales = halved(luma_tilde), halved(luma), scales + 1
    return total / scales


def _blocks(luma):
    """(B, 4, ⌈H/2⌉ + 3, ⌈W/2⌉ + 3) of luma (B, 1, H, W): its blocks of 2x2 pixels, with a margin that filters reach."""
    (height, width), pad = luma.shape[2:], SIDE // 2
    return F.pixel_unshuffle(F.pad(luma, (pad, pad + width % 2, pad, pad + height % 2), mode="reflect"), 2)


def _shares(luma):
    """(1, 4, ⌈H/2⌉, ⌈W/2⌉): the share of each pixel of each block in a mean; 0 of those beyond an odd side."""
    (height, width), shares = luma.shape[2:], torch.full_like(luma[:1], 1 / luma.numel())
    return F.pixel_unshuffle(F.pad(shares, (0, width % 2, 0, height % 2)), 2)


def _in_blocks(filters):
    """Filters over 4x4 blocks of 2x2 pixels, each for the four pixels of a block: (4 filters, 4, 4, 4) of `_filters`.

    A convolution of one channel is slow: on a CPU it takes 1.7 times as long as this one.
    """
    return F.pixel_unshuffle(torch.cat([F.pad(filters, (j, 1 - j, i, 1 - i)) for i in (0, 1) for j in (0, 1)]), 2)


@torch.library.custom_op("terms::gabor_distance", mutates_args=())
def _distance(blocks_tilde: torch.Tensor, blocks: torch.Tensor, filters: torch.Tensor,
              shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared distance of the normalised responses of filters to the `_blocks` of two images, and its gradient in
    the first, which cannot be differentiated again: on a CPU of a few images at a time, so that all values stay in its
    cache.
    """
    with exact_products(blocks.device):  # TF32 would spoil small gradients
        distances, gradients = zip(*(_part_distance(*part, filters, shares) for part in in_parts(
            blocks_tilde, blocks, values=len(filters) * shares[0, 0].numel())))
    return torch.stack(distances).sum(), torch.cat(gradients).contiguous()


@_distance.register_fake
def _(blocks_tilde, blocks, filters, shares):
    return blocks.new_empty(()), blocks.new_empty(blocks.shape)


register_gradient(_distance)


def _part_distance(blocks_tilde, blocks, filters, shares):
    """Value and gradient of `_distance` for a few images.

    The distance is expanded, |a|^2 + |b|^2 - 2 a.b, to about 1e-7. Positive parts meet positive ones alone, and
    negative ones negative: of the products in a.b those above 0 count.
    """
    a, b = (_responses(part, filters) for part in (blocks_tilde, blocks))
    shares = shares.expand(len(blocks), -1, -1, -1).transpose(0, 1).reshape(4, 1, -1)
    product = a * b
    same_sign = b * (product >= 0)
    square_a, square_b, product = (values.sum(1, keepdim=True) for values in (
        a.square(), b.square(), product.clamp_(min=0)))
    floored_a, floored_b = square_a + FLOOR ** 2, square_b + FLOOR ** 2
    scale = (floored_a * floored_b).rsqrt()
    cosine = product * scale
    distance = ((square_a / floored_a + square_b / floored_b - 2 * cosine) * shares).sum()
    of_a, of_b = 2 * shares * (cosine + FLOOR ** 2 / floored_a) / floored_a, -2 * shares * scale
    gradient = same_sign.mul_(of_b).addcmul_(a, of_a).flatten(0, 1).t().contiguous()
    sides = (side - SIDE // 2 for side in blocks.shape[2:])
    return distance, F.conv_transpose2d(gradient.view(len(blocks), *sides, -1).permute(0, 3, 1, 2), filters)


def _responses(blocks, filters):
    """(4, filters, positions): those of the four pixels of each block."""
    # A CPU is fastest if a convolution sees channels last, and all that follows sees them first.
    found = F.conv2d(blocks.contiguous(memory_format=torch.channels_last), filters).permute(0, 2, 3, 1)
    return found.reshape(-1, len(filters)).t().contiguous().unflatten(0, (4, -1))


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
