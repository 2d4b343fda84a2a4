"""SSIM (Wang et al. 2004) of images and its gradient in closed form: Triton on a GPU, on a CPU a few planes at a time.

SSIM is the product of two maps, luminance and contrast-structure, of means under a Gaussian window. `window` is its odd
number of pixels, no more than a side of the images, and `sigma` its standard deviation in pixels.
"""
import math

import torch
import torch.nn.functional as F

from kernels.backend import fits_triton, in_parts, register_gradient

C1, C2 = 0.01 ** 2, 0.03 ** 2
ROOT_EPS = 1e-4


def mean_ssim(x_tilde, x, window, sigma, root=False):
    """Mean over positions of SSIM, or with `root` of sqrt(max(1 - SSIM, 0) + 1e-4), of images (B, C, H, W) in [0, 1].

    Returns:
        A scalar, differentiable once, in x_tilde alone.
    """
    return _mean(x_tilde, x, window, sigma, root)[0]


def ssim_maps(x_tilde, x, window, sigma):
    """Luminance and contrast-structure of images x_tilde and x (B, C, H, W) in [0, 1].

    Returns:
        luminance, structure: (B, C, H - window + 1, W - window + 1) each, differentiable once, in x_tilde alone.
    """
    return _maps(x_tilde, x, window, sigma)[:2]


def triton_ssim(x_tilde, x, window, sigma, root):
    """The value of `mean_ssim` and its gradient in x_tilde, of float32 images, in four launches."""
    from kernels import ssim_triton  # here, because Triton is slow to import and not everywhere
    return ssim_triton.mean(x_tilde, x, window, sigma, root)


def _fits_triton(x_tilde, x):
    return fits_triton(x_tilde, x) and x_tilde.dtype == x.dtype == torch.float32


# --- the mean: value and gradient at once

@torch.library.custom_op("kernels::mean_ssim", mutates_args=())
def _mean(x_tilde: torch.Tensor, x: torch.Tensor, window: int, sigma: float,
          root: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if _fits_triton(x_tilde, x):
        return triton_ssim(x_tilde, x, window, sigma, root)
    taps, total, gradients = _gaussian(window, sigma), 0., []
    count = x[..., window - 1:, window - 1:].numel()
    for part_tilde, part in _chunks(x_tilde, x):
        luminance, structure, *kept = _plane_maps(part_tilde, part, taps)
        value, slope = luminance * structure, 1 / count
        if root:
            inside = value <= 1
            value = (1 - value).clamp_(min=0).add_(ROOT_EPS).sqrt_()
            slope = torch.div(inside, value).mul_(-0.5 / count)
        total = total + value.sum()
        gradients.append(_plane_gradient(structure * slope, luminance * slope, luminance, structure, *kept, part_tilde,
                                         part, taps))
    return total / count, torch.cat(gradients).view(x.shape)


@_mean.register_fake
def _(x_tilde, x, window, sigma, root):
    return x.new_empty(()), x.new_empty(x.shape)


register_gradient(_mean)


# --- the maps

@torch.library.custom_op("kernels::ssim_maps", mutates_args=())
def _maps(x_tilde: torch.Tensor, x: torch.Tensor, window: int,
          sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two maps, and what the backward needs: the rows filtered on a GPU, the means and divisors on a CPU."""
    if _fits_triton(x_tilde, x):
        from kernels import ssim_triton
        return ssim_triton.maps(x_tilde, x, window, sigma)
    taps = _gaussian(window, sigma)
    parts = [_plane_maps(*planes, taps) for planes in _chunks(x_tilde, x)]
    luminance, structure, *kept = (torch.cat(part).unflatten(0, x.shape[:2]) for part in zip(*parts))
    return luminance, structure, torch.stack(kept)


@_maps.register_fake
def _(x_tilde, x, window, sigma):
    batch, channels, height, width = x.shape
    shorter = height - window + 1, width - window + 1
    kept = x.new_empty(4, batch, channels, height if _fits_triton(x_tilde, x) else shorter[0], shorter[1])
    return x.new_empty(batch, channels, *shorter), x.new_empty(batch, channels, *shorter), kept


@torch.library.custom_op("kernels::ssim_maps_backward", mutates_args=())
def _maps_gradient(grad_luminance: torch.Tensor, grad_structure: torch.Tensor, luminance: torch.Tensor,
                   structure: torch.Tensor, kept: torch.Tensor, x_tilde: torch.Tensor, x: torch.Tensor,
                   window: int, sigma: float) -> torch.Tensor:
    if _fits_triton(x_tilde, x):
        from kernels import ssim_triton
        return ssim_triton.maps_gradient(grad_luminance, grad_structure, kept, x_tilde, x, window, sigma)
    taps = _gaussian(window, sigma)
    parts = [_plane_gradient(*planes, taps) for planes in _chunks(
        grad_luminance, grad_structure, luminance, structure, *kept, x_tilde, x)]
    return torch.cat(parts).view(x.shape)


@_maps_gradient.register_fake
def _(grad_luminance, grad_structure, luminance, structure, kept, x_tilde, x, window, sigma):
    return x.new_empty(x.shape)


def _keep_maps(ctx, inputs, output):
    x_tilde, x, ctx.window, ctx.sigma = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(*output, x_tilde, x)


def _maps_backward(ctx, grad_luminance, grad_structure, _):
    luminance, structure, kept, x_tilde, x = ctx.saved_tensors
    grads = (torch.zeros_like(luminance) if grad is None else grad for grad in (grad_luminance, grad_structure))
    return _maps_gradient(*grads, luminance, structure, kept, x_tilde, x, ctx.window, ctx.sigma), None, None, None


_maps.register_autograd(_maps_backward, setup_context=_keep_maps)


# --- planes on a CPU

def _chunks(*images):
    """Planes (N, H, W) of each of images (B, C, H, W), a few at a time on a CPU."""
    return in_parts(*(image.contiguous().flatten(0, 1) for image in images), values=images[-1][0, 0].numel())


def _plane_maps(x_tilde, x, taps):
    """Luminance and structure of planes, the means of both, and what structure and luminance were divided by."""
    mean_tilde, mean, squares, product = (
        _filtered(planes, taps) for planes in (x_tilde, x, torch.addcmul(x_tilde.square(), x, x), x_tilde * x))
    mean_product, mean_squares = mean_tilde * mean, torch.addcmul(mean_tilde.square(), mean, mean)
    squares.sub_(mean_squares).add_(C2)
    structure = product.sub_(mean_product).mul_(2).add_(C2).div_(squares)
    mean_squares.add_(C1)
    return mean_product.mul_(2).add_(C1).div_(mean_squares), structure, mean_tilde, mean, squares, mean_squares


def _plane_gradient(grad_luminance, grad_structure, luminance, structure, mean_tilde, mean, below_structure,
                    below_luminance, x_tilde, x, taps):
    """The gradient in planes x_tilde, given those in the two maps of `_plane_maps`."""
    grad_luminance, grad_structure = grad_luminance / below_luminance, grad_structure / below_structure
    # Halves of the gradients of the mean, of the product and of the squares of x_tilde.
    grad_mean = torch.addcmul(mean, luminance, mean_tilde, value=-1).mul_(grad_luminance)
    grad_mean.sub_(torch.addcmul(mean, structure, mean_tilde, value=-1).mul_(grad_structure))
    of_mean, of_product, of_squares = (
        _spread(planes, taps) for planes in (grad_mean, grad_structure, grad_structure * structure))
    return of_mean.addcmul_(of_product, x).addcmul_(of_squares, x_tilde, value=-1).mul_(2)


def _gaussian(window, sigma):
    """The middle weight of a Gaussian window and those to one side of it."""
    taps = [math.exp(-distance ** 2 / (2 * sigma ** 2)) for distance in range(window // 2 + 1)]
    return [tap / (2 * sum(taps) - taps[0]) for tap in taps]


def _filtered(planes, taps):
    """Both axes of planes (N, H, W) filtered by a window: window - 1 shorter each."""
    (count, height, width), rest = planes.shape, 2 * (len(taps) - 1)
    row = _filtered_row(planes.reshape(-1), width, taps)  # windows that reach over an edge are left out
    return row.as_strided((count, height - rest, width - rest), (height * width, width, 1)).contiguous()


def _spread(planes, taps):
    """The transpose of `_filtered`: each axis is window - 1 longer."""
    rest = 2 * (len(taps) - 1)
    padded = F.pad(planes, (0, rest, 0, rest))  # the zeros behind one line, or plane, lie before the next one
    row = F.pad(padded.view(-1), (rest * (padded.shape[2] + 1), 0))
    return _filtered_row(row, padded.shape[2], taps).view_as(padded)


def _filtered_row(row, width, taps):
    """Planes in one long row, filtered along both axes by adding shifted copies, which are fast where they lie in a
    cache: (window - 1)(width + 1) shorter.
    """
    for step in (1, width):
        middle = (len(taps) - 1) * step
        length = len(row) - 2 * middle
        total = row[middle:][:length] * taps[0]
        for distance, tap in enumerate(taps[1:], 1):
            total.add_(row[middle - distance * step:][:length], alpha=tap)
            total.add_(row[middle + distance * step:][:length], alpha=tap)
        row = total
    return row
