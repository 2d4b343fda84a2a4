"""Terms of statistics: how much contrast or texture there is, not which pixel has it.

None of them punishes detail for being slightly misplaced. They see the originals as they are, whatever `--sharpen` is:
a sharpened original has more of what they count than there was.
"""
import math

import torch
import torch.nn.functional as F

from terms.images import Row, check_sides, derivatives, luma_of, unit

GRADIENT_PATCH = 8  # pixels of a side


def gradient_variance(x_tilde, x):
    """Mean squared difference of the variances of Sobel gradients within 8x8 patches: 0 or more, seldom above 1.

    Of the luma on [0, 1], across and down, the two added (Abrahamyan et al. 2022, arXiv 2202.00997). Patches do not
    overlap; rows and columns that fill none are left out.

    Raises:
        UserError: a side is smaller than a patch.
    """
    check_sides("gradient-variance", x, GRADIENT_PATCH)
    pairs = zip(derivatives(luma_of(unit(x_tilde)), 1., 2.), derivatives(luma_of(unit(x)), 1., 2.))
    return sum((_variances(a) - _variances(b)).square().mean() for a, b in pairs)


def _variances(x):
    """(B, C, h, w) unbiased variances of the patches of x."""
    patches = x.unfold(2, GRADIENT_PATCH, GRADIENT_PATCH).unfold(3, GRADIENT_PATCH, GRADIENT_PATCH)
    return patches.var((4, 5))


SPECTRUM_EPS = 1e-6  # power of a frequency on [0, 1], about that of rounding to 8 bits


def log_spectrum(x_tilde, x):
    """Mean squared difference of the logarithms of the batch's mean power spectra: 0 or more, in squared nats.

    mean_f (ln(P~_f + eps) - ln(P_f + eps))^2 with P_f the mean over the batch of |FFT(x)_f|^2, per channel, on [0, 1]
    and orthonormal, over half a plane of frequencies, which is all there is of a real image. The log-spectral distance
    of speech processing (Gray and Markel 1976), squared, of images.
    """
    spectra, target = (torch.view_as_real(torch.fft.rfft2(unit(image), norm="ortho")).square().sum(-1).mean(0)
                       for image in (x_tilde, x))  # (C, H, W // 2 + 1)
    return ((spectra + SPECTRUM_EPS).log() - (target + SPECTRUM_EPS).log()).square().mean()


PATCH, PATCH_STRIDE = 5, 3  # every third position: in turn all places on the grid of a decoder that doubles its sides


def patch_swd(x_tilde, x):
    """Sliced Wasserstein distance of the 5x5 patches of the batch: in [0, 9], below 0.1 on photographs.

    Mean absolute difference of sorted projections, averaged over directions (Rabin et al. 2011; of patches as a loss,
    Elnekave and Weiss 2022, arXiv 2203.11862); on [0, 1]. The directions are fixed and orthonormal, the cosine basis
    of a patch but for the means of its channels, which is level and not texture: nothing is drawn, so that the same
    images have the same value and a CUDA graph of it is right.

    Raises:
        UserError: a side is smaller than a patch.
    """
    check_sides("patch-swd", x, PATCH)
    directions = _patch_directions(x)
    # A GPU may round to ten bits (TF32) here: a sixteenth of a grey level, for both images alike.
    projections, target = (F.conv2d(unit(image), directions, stride=PATCH_STRIDE).transpose(0, 1).flatten(1)
                           for image in (x_tilde, x))  # (directions, patches of the batch)
    return (projections.sort(1).values - target.sort(1).values).abs().mean()


def _patch_directions(like):
    """(24 C, C, 5, 5) orthonormal patches: cosines over channels, rows and columns, none constant over the pixels."""
    colours, sides = _cosines(like.shape[1], like), _cosines(PATCH, like)
    grids = (sides[:, None, :, None] * sides[None, :, None, :]).flatten(0, 1)[1:]  # the first is constant
    return (colours[:, None, :, None, None] * grids[None, :, None]).flatten(0, 1)


def _cosines(count, like):
    """(count, count) orthonormal rows, the first constant: the discrete cosine transform."""
    i = torch.arange(count, dtype=like.dtype, device=like.device)
    rows = (math.pi / count * (i + 0.5) * i.unsqueeze(1)).cos() * math.sqrt(2 / count)
    return torch.where(i.unsqueeze(1) > 0, rows, math.sqrt(1 / count))


ROWS = {
    "gradient-variance": Row(gradient_variance),
    "log-spectrum": Row(log_spectrum),
    "patch-swd": Row(patch_swd),
}
