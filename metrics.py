"""What is reported: the same for every run, whatever it was trained on.

Every image metric takes reconstructions and originals (B, C, H, W) in [0, 1] and returns one value an image, (B,);
`as_8bit` brings a network's output there the way an image file would.
"""
import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from pytorch_msssim import ssim as msssim_ssim

from harness import distributed
from harness.errors import UserError
from kernels.backend import exact_products
from terms.images import luma_of
from terms.structure import ms_ssim_of_each, ms_ssim_weights

PERFECT_PSNR = 100.0  # dB, reported where an image is reproduced exactly
_FLAT = 1e-3  # a quarter of an 8-bit step: keeps ratios finite on images without detail
_GREY = 2e-2  # five 8-bit steps: an image with next to no colour cannot lose much


def as_8bit(x):
    """Images in [-1, 1] -> [0, 1], clamped and rounded to the 256 levels of an image file."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255) / 255


def mse(x_tilde, x):
    """Mean squared error of an image on [0, 1]: (B,)."""
    return (x_tilde - x).square().mean((1, 2, 3))


def psnr(x_tilde, x):
    """Peak signal-to-noise ratio in dB, -10 log10(MSE), at most `PERFECT_PSNR`: (B,). Higher is better."""
    return -10 * torch.log10(mse(x_tilde, x).clamp(min=10 ** (-PERFECT_PSNR / 10)))


def ssim(x_tilde, x):
    """Structural similarity (Wang et al. 2004), 11-pixel Gaussian window of sigma 1.5: (B,), 1 is perfect.

    On images smaller than the window, the largest odd window that fits.
    """
    window = min(11, *(side - 1 + side % 2 for side in x.shape[2:]))
    with exact_products(x.device):  # variances are small differences of large numbers
        return msssim_ssim(x_tilde, x, data_range=1., size_average=False, win_size=window)


def _mean_gradient(x):
    horizontal, vertical = torch.diff(x, dim=3)[:, :, :-1], torch.diff(x, dim=2)[:, :, :, :-1]
    return (horizontal.square() + vertical.square()).sqrt().mean((1, 2, 3))


def gradient_ratio(x_tilde, x):
    """Mean gradient magnitude, reconstruction / original: (B,). 1 is as sharp as the original, below 1 is blurry,
    above 1 is noise or over-sharpening."""
    return (_mean_gradient(x_tilde) + _FLAT) / (_mean_gradient(x) + _FLAT)


def _high_frequency_power(x):
    height, width = x.shape[2:]
    window = torch.outer(*(torch.hann_window(side, periodic=False, device=x.device) for side in (height, width)))
    spectrum = torch.fft.fft2((x - x.mean((2, 3), keepdim=True)) * window, norm="ortho").abs().square()
    frequencies = (torch.fft.fftfreq(side, device=x.device).square() for side in (height, width))
    high = sum(torch.meshgrid(*frequencies, indexing="ij")).sqrt() > 0.25  # cycles a pixel; Nyquist is 0.5
    return (spectrum * high).mean((1, 2, 3))


def high_frequency_ratio(x_tilde, x):
    """Spectral power above half of Nyquist, reconstruction / original: (B,); Hann window, mean removed. 1 is ideal."""
    return (_high_frequency_power(x_tilde) + _FLAT ** 2) / (_high_frequency_power(x) + _FLAT ** 2)


def _saturation(x):
    return (x - x.mean(1, keepdim=True)).square().sum(1).sqrt().mean((1, 2))


def saturation_ratio(x_tilde, x):
    """Mean distance of the colours from grey, reconstruction / original: (B,). Below 1 colours fade; 1 without any."""
    return (_saturation(x_tilde) + _GREY) / (_saturation(x) + _GREY)


def color_bias(x_tilde, x):
    """Mean of x_tilde - x in each channel: (B, C). 0 is ideal; a common sign over a split is a colour drift."""
    return (x_tilde - x).mean((2, 3))


IMAGE_METRICS = {
    "mse": mse,
    "psnr": psnr,
    "ssim": ssim,
    "gradient_ratio": gradient_ratio,
    "high_frequency_ratio": high_frequency_ratio,
    "saturation_ratio": saturation_ratio,
}


# --- the same under other conventions, for comparison with published figures

def psnr_of_mean_mse(mse):
    """PSNR of a whole split in dB, -10 log10 of its mean MSE, from the `mse` of its images (N,): a number.

    Never above the mean `psnr` of the images (Jensen): the worst of them count most.
    """
    return float(-10 * torch.log10(mse.mean().clamp(min=10 ** (-PERFECT_PSNR / 10))))


def psnr_of_luma(x_tilde, x):
    """PSNR of Y = 0.299 R + 0.587 G + 0.114 B (BT.601, full range) in dB, errors of colour left out: (B,)."""
    return psnr(luma_of(x_tilde), luma_of(x))


def ssim_uniform(x_tilde, x):
    """SSIM with a uniform window of 7x7 pixels and sample covariances, as scikit-image has it by default: (B,).

    On images smaller than the window, the largest odd window that fits.
    """
    window = min(7, *(side - 1 + side % 2 for side in x.shape[2:]))
    mean_a, mean_b, aa, bb, ab = (F.avg_pool2d(image, window, 1)
                                  for image in (x_tilde, x, x_tilde ** 2, x ** 2, x_tilde * x))
    unbiased = window ** 2 / (window ** 2 - 1)
    variances, covariance = unbiased * (aa - mean_a ** 2 + bb - mean_b ** 2), unbiased * (ab - mean_a * mean_b)
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a ** 2 + mean_b ** 2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2, 3))


CONVENTIONS = {
    "psnr_of_luma": psnr_of_luma,
    "ssim_uniform": ssim_uniform,
    "ms_ssim": ms_ssim_of_each,
}


def conventions_for(size):
    """Those of `CONVENTIONS` that images (H, W) are large enough for."""
    try:
        ms_ssim_weights(*size)
    except UserError:
        return {name: metric for name, metric in CONVENTIONS.items() if name != "ms_ssim"}
    return CONVENTIONS


# --- codes, and how sure a mean is

def codebook_usage(counts):
    """Health of a codebook from how often each code was chosen over a whole split, counts (K,).

    Returns:
        dict: perplexity exp(H) in [1, K], the number of codes used as if evenly; used_codes; dead_codes = K - used.
    """
    counts = counts.cpu()  # a GPU may lack float64
    p = counts.double() / counts.sum().clamp(min=1)
    used = int((counts > 0).sum())
    perplexity = float(torch.special.entr(p).sum().exp())
    return {"perplexity": perplexity, "used_codes": used, "dead_codes": len(counts) - used}


def bootstrap_interval(values, resamples=1000, seed=0):
    """(low, high): 95% percentile bootstrap interval of the mean of values (N,)."""
    generator = torch.Generator().manual_seed(seed)
    values = values.cpu()
    means = torch.stack([values[torch.randint(len(values), (len(values),), generator=generator)].mean()
                         for _ in range(resamples)])
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return low, high


# --- a model measured on a split, one way, whoever asks: training, evaluation or comparison

SHARPNESS = "gradient_ratio: 1 is as sharp as the original, below 1 is blurry, above 1 is noise or over-sharpening"


def reported():
    """Names of the figures that tables show: what every model has, whatever it was trained on."""
    return [*IMAGE_METRICS, "perplexity", "used_codes"]


@torch.no_grad()
def measure(model, loader, criterion=None, autocast=nullcontext, judges=(), extra=None):
    """Everything there is to say of a model on a split, with the model in eval mode.

    Args:
        model: a `VectorQuantizedVAE`. loader: yields x (B, C, H, W) in [-1, 1] and labels.
        criterion: a `ReconstructionLoss`, for `loss` on top (no metric: it depends on the training), a batch's mean
            standing for each of its images.
        autocast: makes the context of the forward pass.
        judges: `study.judges.Judge`s of the same split.
        extra: {name: function} besides `IMAGE_METRICS`, of reconstructions and originals (B, C, H, W) -> (B,).
    Returns:
        values: {name: (N,) float64}, an entry an image: `IMAGE_METRICS`, color_bias_0... by channel, quantization
        (mean squared distance of z_e to its code), `extra`, `loss` where a criterion is given,
        "paired_distance/<judge>" of judges that have one.
        figures: their means; color_bias, the largest of a channel by size; `codebook_usage`; bits_per_pixel, what an
        ideal entropy coder makes of the latents, each by itself; what each judge says of the split under
        "<figure>/<judge>", and the first that says it under "<figure>" too.
        Both are of all processes together, the judges' of this one alone.
    Raises:
        UserError: outputs of the encoder or the decoder are not finite.
    """
    was_training = model.training
    model.eval()
    measured = IMAGE_METRICS | (extra or {})
    columns, counts, features = [], 0, [[] for _ in judges]
    for x, _ in loader:
        with autocast():
            x_tilde, z_e, z_q, latents = model.reconstruct(x)
            if not all(bool(output.isfinite().all()) for output in (z_e, x_tilde)):
                raise UserError("outputs of the model are not finite, its training diverged: go on from its last.pt "
                                "with --resume and a lower --lr or --precision fp32, or train again")
        counts = counts + torch.bincount(latents.flatten(), minlength=model.K)
        a, b = as_8bit(x_tilde), as_8bit(x)
        values = {name: metric(a, b) for name, metric in measured.items()}
        values |= {f"color_bias_{i}": bias for i, bias in enumerate(color_bias(a, b).unbind(1))}
        values["quantization"] = (z_e.float() - z_q).square().mean((1, 2, 3))
        if criterion:
            values["loss"] = criterion(x_tilde, x)[0].expand(len(x))
        for judge, seen in zip(judges, features):
            if judge.real is not None:
                seen.append(judge.network(a))
            values |= judge.paired(a, b)
        columns.append({name: value.cpu().double() for name, value in values.items()})
    model.train(was_training)

    values = {name: distributed.concatenate(torch.cat([column[name] for column in columns])) for name in columns[0]}
    figures = {name: float(value.mean()) for name, value in values.items()} | codebook_usage(distributed.total(counts))
    figures["color_bias"] = max((bias for name, bias in figures.items() if name.startswith("color_bias_")), key=abs)
    latents_per_pixel = latents[0].numel() / (x.shape[2] * x.shape[3])
    figures["bits_per_pixel"] = math.log2(figures["perplexity"]) * latents_per_pixel
    for judge, seen in zip(judges, features):
        said = judge.figures(torch.cat(seen)) if seen else {}
        figures = said | figures | {f"{name}/{judge.name}": value for name, value in said.items()}
    return values, figures
