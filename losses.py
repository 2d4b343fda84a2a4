"""Reconstruction loss terms and their weighted sum.

To add a term: write a function (x_tilde, x) -> scalar and give it a row in `PIXEL_TERMS` or `STRUCTURAL_TERMS` below.
Its flag, its curves, its tests and its place in comparisons follow from the row.

Every term takes images (B, C, H, W) in [-1, 1] in float32, is smallest where x_tilde = x, and returns 0 there.
"""
import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from functions import exact_products, ssim_maps, with_gradient
from harness import distributed

EPS = 1e-8
LUMA = (0.299, 0.587, 0.114)
CHROMA = ((0.596, -0.274, -0.322), (0.211, -0.523, 0.312))  # I and Q of YIQ


def _unit(x):
    return (x + 1) / 2  # [-1, 1] -> [0, 1]


@cache
def constant(values, device):
    """A float32 tensor of nested tuples of numbers, brought to a device once: each step would wait for a copy."""
    return torch.tensor(values, device=device)


# --- pixel terms: level and colour of each pixel by itself

def mse(x_tilde, x):
    """Mean squared error, mean (x_tilde - x)^2: in [0, 4]. Alone with weight 1 it is the published VQ-VAE."""
    return F.mse_loss(x_tilde, x)


def l1(x_tilde, x):
    """Mean absolute error, mean |x_tilde - x|: in [0, 2]."""
    return F.l1_loss(x_tilde, x)


def psnr(x_tilde, x, ceiling=60.0):
    """Shortfall of the peak signal-to-noise ratio from 60 dB, as a share of them: in [0, 1], per image, averaged.

    log10(1 + MSE / e) / log10(1 + 1 / e) with e = 10^(-ceiling / 10), MSE on [0, 1]. About 1 - PSNR / ceiling.
    """
    e = 10 ** (-ceiling / 10)
    error = (_unit(x_tilde) - _unit(x)).square().mean((1, 2, 3))  # (B,)
    return torch.log1p(error / e).mean() / math.log1p(1 / e)


def chroma(x_tilde, x):
    """Mean absolute error of the chroma channels I and Q of YIQ: in [0, 1.2]. Keeps saturated colours from fading.

    Raises:
        ValueError: the images have no colour.
    """
    return _chroma(_unit(x_tilde) - _unit(x)).abs().mean()


COARSE = 4  # pixels of a side


def coarse_chroma(x_tilde, x):
    """Mean squared error of I and Q, averaged over 4x4 pixels: in [0, 1.3]. Keeps small coloured things from fading.

    Of colours that are seldom there it asks for the mean, where an absolute error asks for the median: grey.

    Raises:
        ValueError: the images have no colour, or a side is smaller than 4 pixels.
    """
    if min(x.shape[2:]) < COARSE:
        raise ValueError(f"coarse-chroma needs sides of at least {COARSE} pixels, got {x.shape[2]}x{x.shape[3]}")
    return F.avg_pool2d(_chroma(_unit(x_tilde) - _unit(x)), COARSE).square().mean()


def _chroma(x):
    if x.shape[1] != 3:
        raise ValueError(f"chroma terms need 3 channels, not {x.shape[1]}: --chroma-weight 0 --coarse-chroma-weight 0")
    return torch.einsum("bchw,kc->bkhw", x, constant(CHROMA, x.device))  # (B, 2, H, W)


# --- structural terms: neighbourhoods, on [0, 1]

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5


def ssim(x_tilde, x):
    """1 - SSIM: in [0, 2]; 11-pixel Gaussian window of sigma 1.5, no padding, channels averaged (Wang et al. 2004).

    Raises:
        ValueError: a side is smaller than the window.
    """
    if min(x.shape[2:]) < SSIM_WINDOW:
        raise ValueError(f"ssim needs sides of at least {SSIM_WINDOW} pixels, got {x.shape[2]}x{x.shape[3]}")
    luminance, structure = ssim_maps(_unit(x_tilde), _unit(x), SSIM_WINDOW, SSIM_SIGMA)
    return 1 - (luminance * structure).mean()


ROOT_SSIM_EPS = 1e-4


def root_ssim_window(height, width):
    """(pixels, sigma) of a window in proportion to the image: (3, 0.75) below 96, (5, 1) at 128, (11, 1.75) at 256.

    Raises:
        ValueError: a side is smaller than the window.
    """
    if min(height, width) < 3:
        raise ValueError(f"root-ssim needs sides of at least 3 pixels, got {height}x{width}")
    radius = max(1, min(height, width) // 48)
    return 2 * radius + 1, 0.5 + radius / 4


def root_ssim(x_tilde, x):
    """Mean over positions of the root of 1 - SSIM: in [0, 1.42]; windows as `root_ssim_window` says.

    The root makes it a metric (Brunet et al. 2012) and, as L1 to MSE, a robust one: what cannot be matched weighs less.
    eps = 1e-4 inside the root, its own root taken off.
    """
    luminance, structure = ssim_maps(_unit(x_tilde), _unit(x), *root_ssim_window(*x.shape[2:]))
    dissimilarity = (1 - luminance * structure).clamp(min=0)
    return (dissimilarity + ROOT_SSIM_EPS).sqrt().mean() - math.sqrt(ROOT_SSIM_EPS)


MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def ms_ssim_weights(height, width):
    """Exponents of the scales that fit: the published five from 161 pixels on, else fewer, of the same sum.

    Raises:
        ValueError: fewer than two scales fit (a side of 20 pixels or less).
    """
    scales = sum(min(height, width) > (SSIM_WINDOW - 1) * 2 ** i for i in range(len(MS_SSIM_WEIGHTS)))
    if scales < 2:
        raise ValueError(f"ms-ssim needs sides of more than {2 * (SSIM_WINDOW - 1)} pixels for two scales, got "
                         f"{height}x{width}: use ssim, or larger images (--image-size)")
    share = sum(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS)
    return tuple(weight / share for weight in MS_SSIM_WEIGHTS[:scales])


def ms_ssim(x_tilde, x):
    """1 - MS-SSIM: in [0, 1]; per image and channel, averaged (Wang et al. 2003); scales as `ms_ssim_weights` says."""
    x_tilde, x, score = _unit(x_tilde), _unit(x), 1.
    weights = ms_ssim_weights(*x.shape[2:])
    for scale, weight in enumerate(weights):
        if scale:
            padding = [side % 2 for side in x.shape[2:]]
            x_tilde, x = (F.avg_pool2d(image, 2, padding=padding) for image in (x_tilde, x))
        luminance, structure = ssim_maps(x_tilde, x, SSIM_WINDOW, SSIM_SIGMA)
        last = scale == len(weights) - 1
        similarity = (luminance * structure if last else structure).mean((2, 3))  # (B, C)
        score = score * similarity.clamp(min=EPS) ** weight
    return 1 - score.mean()


def gradient(x_tilde, x):
    """Mean absolute difference of the finite differences along both axes: in [0, 4] (after Mathieu et al. 2016)."""
    difference = _unit(x_tilde) - _unit(x)
    return sum(torch.diff(difference, dim=axis).abs().mean() for axis in (2, 3))


def _luma(x):
    """(B, 1, H, W) luma of colour images; one-channel images are their own."""
    if x.shape[1] == 1:
        return x
    return torch.einsum("bchw,c->bhw", x, constant(LUMA, x.device)).unsqueeze(1)


PREWITT = (((1 / 3, 0., -1 / 3),) * 3, ((1 / 3,) * 3, (0.,) * 3, (-1 / 3,) * 3))


def _prewitt(luma):
    """(B, 1, H, W) gradient magnitude by the Prewitt filters, zeros beyond the border as published."""
    gradients = F.conv2d(luma, constant(PREWITT, luma.device).unsqueeze(1), padding=1)  # (B, 2, H, W)
    return (gradients.square().sum(1, keepdim=True) + EPS).sqrt()


GMSD_C = 170 / 255 ** 2


def _similarity(a, b, c, masking=0.):
    """Similarity of two magnitudes on [0, 1], in (0, 1]; c is the published constant for [0, 255] over 255^2."""
    return ((2 - masking) * a * b + c) / (a.square() + b.square() - masking * a * b + c)


def _gmsd(luma_tilde, luma, masking=0.):
    """(B,) standard deviation of the gradient magnitude similarity map, 0 at equality."""
    similarity = _similarity(_prewitt(luma_tilde), _prewitt(luma), GMSD_C, masking)
    return (similarity.var((1, 2, 3), unbiased=False) + EPS).sqrt() - math.sqrt(EPS)


def _halved(luma):
    return F.avg_pool2d(luma, 2)


def gmsd(x_tilde, x):
    """Gradient magnitude similarity deviation: about [0, 0.35]; luma, halved once (Xue et al. 2014, arXiv 1308.3052).

    A deviation, not a mean: an image that is equally wrong everywhere scores 0, so it needs a pixel term beside it.
    """
    return _gmsd(_halved(_luma(_unit(x_tilde))), _halved(_luma(_unit(x)))).mean()


MS_GMSD_WEIGHTS, MS_GMSD_MASKING = (0.096, 0.596, 0.289, 0.019), 0.5


def ms_gmsd(x_tilde, x):
    """Root of the weighted mean square of GMSD over four scales of the luma: about [0, 0.35] (Zhang et al. 2017).

    Scales with a side under 3 pixels are left out and the weights renormalised.
    """
    luma_tilde, luma, total, weights = _luma(_unit(x_tilde)), _luma(_unit(x)), 0., 0.
    for scale, weight in enumerate(MS_GMSD_WEIGHTS):
        if scale:
            luma_tilde, luma = _halved(luma_tilde), _halved(luma)
        if min(luma.shape[2:]) < 3:
            break
        total, weights = total + weight * _gmsd(luma_tilde, luma, MS_GMSD_MASKING).square(), weights + weight
    return ((total / weights + EPS).sqrt() - math.sqrt(EPS)).mean()


HAARPSI_C, HAARPSI_ALPHA = 30 / 255 ** 2, 4.2


def _haar(luma, scale):
    """(B, 2, H, W) magnitudes of the horizontal and vertical Haar wavelet responses of size 2^scale."""
    size = 2 ** scale
    step = torch.ones(size, size, dtype=luma.dtype, device=luma.device) / size
    step[:size // 2] *= -1
    padding = (size // 2 - 1, size // 2) * 2
    return F.conv2d(F.pad(luma, padding), torch.stack([step, step.t()]).unsqueeze(1)).abs()


def haarpsi(x_tilde, x):
    """1 - HaarPSI, the Haar wavelet perceptual similarity index: in [0, 1] (Reisenhofer et al. 2018, arXiv 1607.06140).

    Images are halved once, as published; colour images add the chroma channels I and Q.
    """
    x_tilde, x = _halved(_unit(x_tilde)), _halved(_unit(x))
    luma_tilde, luma = _luma(x_tilde), _luma(x)
    scales = [(_haar(luma_tilde, scale), _haar(luma, scale)) for scale in (1, 2, 3)]  # (B, 2, h, w) each
    similarity = sum(_similarity(a, b, HAARPSI_C) for a, b in scales[:2]) / 2
    weight = torch.maximum(*scales[2])
    if x.shape[1] == 3:
        chroma_tilde, chroma = (_mean_filtered(_chroma(image)).abs() for image in (x_tilde, x))
        similarity = torch.cat([similarity, _similarity(chroma_tilde, chroma, HAARPSI_C).mean(1, keepdim=True)], 1)
        weight = torch.cat([weight, weight.mean(1, keepdim=True)], 1)
    ceiling = 1 / (1 + math.exp(-HAARPSI_ALPHA))  # of identical images; also the score where nothing has any contrast
    local = torch.sigmoid(HAARPSI_ALPHA * similarity)
    score = ((local * weight).sum((1, 2, 3)) + EPS * ceiling) / (weight.sum((1, 2, 3)) + EPS)
    return 1 - (torch.logit(score) / HAARPSI_ALPHA).square().mean()


def _mean_filtered(x):
    return F.avg_pool2d(F.pad(x, (0, 1, 0, 1)), 2, stride=1)


PIXEL_TERMS = {
    "mse": mse,
    "l1": l1,
    "chroma": chroma,
    "coarse-chroma": coarse_chroma,
    "psnr": psnr,
}
STRUCTURAL_TERMS = {  # those that --sharpen shows a sharpened original
    "ssim": ssim,
    "root-ssim": root_ssim,
    "ms-ssim": ms_ssim,
    "gradient": gradient,
    "gmsd": gmsd,
    "ms-gmsd": ms_gmsd,
    "haarpsi": haarpsi,
}
TERMS = PIXEL_TERMS | STRUCTURAL_TERMS


BINOMIAL = ((1., 2., 1.), (2., 4., 2.), (1., 2., 1.))


def sharpened(x, amount):
    """Images x (B, C, H, W) after an unsharp mask: x + amount (x - x blurred by 3x3 binomial weights), within [-1, 1].

    As targets (after Real-ESRGAN, Wang et al. 2021, arXiv 2107.10833) they give back contrast that is lost where detail
    is uncertain and the best guess its mean.
    """
    weights = constant(BINOMIAL, x.device).expand(x.shape[1], 1, 3, 3) / 16
    blurred = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weights, groups=x.shape[1])
    return x.lerp(blurred, -amount).clamp(-1, 1)


class ReconstructionLoss(nn.Module):
    """Weighted sum of terms, sum_i w_i s_i term_i(x_tilde, x), with s_i = 1 or as `balance` says.

    Where it is asked to, each term is differentiated at the reconstruction by itself, which leaves its norm in
    `gradient_norms`; the total then carries a first-order gradient only.

    Args:
        weights: term name -> weight; terms of weight 0 are left out.
        balance: None, or "gradient": s_i is the ratio of the gradient norms at the reconstruction, of MSE to term i,
            (both running averages), so that a weight means the same for every term and data set.
        shape: (C, H, W) of the images, where known, to fail now rather than at the first batch.
        sharpen: the `STRUCTURAL_TERMS` see the originals `sharpened` by this amount; 0 is not at all.
    Raises:
        ValueError: unknown term, weight or amount negative, NaN or infinite, all weights zero, images too small for a
            term, sharpen without a structural term.
    """

    decay = 0.99  # of the running averages

    def __init__(self, weights, balance=None, shape=None, sharpen=0.):
        super().__init__()
        for name, weight in weights.items():
            if name not in TERMS:
                raise ValueError(f"unknown loss term {name!r}: the terms are {', '.join(TERMS)}")
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"--{name}-weight must be finite and not negative, got {weight}")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight > 0}
        if not self.weights:
            raise ValueError("all loss weights are zero: give at least one term a positive weight, say --mse-weight 1")
        if balance not in (None, "gradient"):
            raise ValueError(f"balance must be None or 'gradient', got {balance!r}")
        if not math.isfinite(sharpen) or sharpen < 0:
            raise ValueError(f"--sharpen must be finite and not negative, got {sharpen}")
        if sharpen and not set(self.weights) & set(STRUCTURAL_TERMS):
            raise ValueError("--sharpen is for structural terms: give one a weight, say --root-ssim-weight 0.4, "
                             "or take it out")
        self.balance, self.sharpen, self.gradient_norms = balance, sharpen, {}
        self.register_buffer("_weights", torch.tensor(list(self.weights.values())), persistent=False)
        self._range_checked = False
        # Running norms of the terms' gradients, then of MSE's; 0 is none yet.
        self.register_buffer("average_norms", torch.zeros(len(self.weights) + 1))
        if shape:
            self.value(*torch.zeros(2, 1, *shape))

    def value(self, x_tilde, x):
        """Raw values of the terms by name."""
        with torch.autocast(x.device.type, enabled=False), exact_products():
            x_tilde, x = x_tilde.float(), x.float()
            target = sharpened(x, self.sharpen) if self.sharpen else x
            return {name: TERMS[name](x_tilde, target if name in STRUCTURAL_TERMS else x) for name in self.weights}

    def scales(self):
        """(number of terms,) what each term is multiplied by, its weight left aside."""
        norms, mse_norm = self.average_norms[:-1], self.average_norms[-1]
        if self.balance is None:
            return torch.ones_like(norms)
        return torch.where(mse_norm > 0, mse_norm / norms.clamp(min=EPS * mse_norm), 1.)

    def forward(self, x_tilde, x, apart=False):
        """Compare reconstructions x_tilde with originals x, both (B, C, H, W) in [-1, 1].

        Args:
            apart: differentiate each term by itself, for its `gradient_norms`; balancing always does.
        Returns:
            total: scalar to minimise. parts: detached, raw, unweighted values by term name.
        Raises:
            ValueError: shapes differ, or the first originals leave [-1, 1].
        """
        if x_tilde.shape != x.shape:
            raise ValueError(f"reconstruction {tuple(x_tilde.shape)} and original {tuple(x.shape)} differ in shape")
        if not self._range_checked:  # once: it waits for the device, and images of one kind have one range
            if x.abs().amax() > 1 + 1e-4:
                raise ValueError(f"images must lie in [-1, 1], got {x.min():.3g} to {x.max():.3g}")
            self._range_checked = True
        weights = self._weights
        if not ((apart or self.balance) and torch.is_grad_enabled() and x_tilde.requires_grad):
            terms = self.value(x_tilde, x)
            values = torch.stack(list(terms.values()))
            return (weights * self.scales() * values).sum(), dict(zip(terms, values.detach()))

        image = x_tilde.detach().float().requires_grad_()
        terms = self.value(image, x)
        values = torch.stack([term.detach() for term in terms.values()])
        parts = dict(zip(terms, values))

        gradients = [torch.autograd.grad(term, image)[0] for term in terms.values()]
        norms = torch.stack([gradient.norm() for gradient in gradients])
        self.gradient_norms = dict(zip(terms, norms))
        if self.balance:
            mse_norm = 2 * (image.detach() - x).norm() / x.numel()
            squares = distributed.total(torch.cat([norms, mse_norm.view(1)]).square())
            self._average(squares.sqrt() / distributed.world_size())
        weights = weights * self.scales()
        combined = sum(weight * gradient for weight, gradient in zip(weights, gradients))
        return with_gradient(x_tilde, (weights * values).sum(), combined), parts

    def curves(self, parts):
        """{tag: value} of each term for TensorBoard: raw, weighted, and the gradient norm of the last step."""
        weighted = {name: self.weights[name] * scale * parts[name] for name, scale in zip(self.weights, self.scales())}
        return {f"term/{name}/{kind}": values[name] for name in self.weights for kind, values in (
            ("raw", parts), ("weighted", weighted), ("gradient_norm", self.gradient_norms))}

    def _average(self, norms):
        old = self.average_norms
        self.average_norms = torch.where(old > 0, old.lerp(norms, 1 - self.decay), norms)
