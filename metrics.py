"""What is reported: the same for every run, whatever it was trained on.

Every image metric takes reconstructions and originals (B, C, H, W) in [0, 1] and returns one value an image, (B,);
`as_8bit` brings a network's output there the way an image file would.
"""
import torch
from pytorch_msssim import ssim as msssim_ssim

from functions import exact_products

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
    with exact_products():  # variances are small differences of large numbers
        return msssim_ssim(x_tilde, x, data_range=1., size_average=False, win_size=window)


def _mean_gradient(x):
    horizontal, vertical = torch.diff(x, dim=3)[:, :, :-1], torch.diff(x, dim=2)[:, :, :, :-1]
    return (horizontal.square() + vertical.square()).sqrt().mean((1, 2, 3))


def gradient_ratio(x_tilde, x):
    """Mean gradient magnitude, reconstruction / original: (B,). 1 is as sharp as the original, below 1 is blurry."""
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
