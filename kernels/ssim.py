"""SSIM (Wang et al. 2004) of images and its gradient in closed form: matrix products on a CPU, Triton on a GPU.

SSIM is the product of two maps, luminance and contrast-structure, of means under a Gaussian window. `window` is its odd
number of pixels, no more than a side of the images, and `sigma` its standard deviation in pixels.
"""
import torch

from kernels.backend import exact_products, fits_triton

C1, C2 = 0.01 ** 2, 0.03 ** 2
ROOT_EPS = 1e-4
TILE = 64  # pixels of a filter's output that come out of one matrix product


def mean_ssim(x_tilde, x, window, sigma, root=False):
    """Mean over positions of SSIM, or with `root` of sqrt(max(1 - SSIM, 0) + 1e-4), of images (B, C, H, W) in [0, 1].

    Returns:
        A scalar, differentiable once, in x_tilde alone.
    """
    if _fits_triton(x_tilde, x):
        return _mean(x_tilde, x, window, sigma, root)[0]
    luminance, structure = ssim_maps(x_tilde, x, window, sigma)
    value = luminance * structure
    return ((1 - value).clamp(min=0) + ROOT_EPS).sqrt().mean() if root else value.mean()


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


# --- the mean on a GPU: value and gradient at once

@torch.library.custom_op("kernels::mean_ssim", mutates_args=())
def _mean(x_tilde: torch.Tensor, x: torch.Tensor, window: int, sigma: float,
          root: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return triton_ssim(x_tilde, x, window, sigma, root)


@_mean.register_fake
def _(x_tilde, x, window, sigma, root):
    return x.new_empty(()), x.new_empty(x.shape)


def _keep_gradient(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _mean_backward(ctx, grad_value, _):
    gradient, = ctx.saved_tensors
    return grad_value * gradient, None, None, None, None


_mean.register_autograd(_mean_backward, setup_context=_keep_gradient)


# --- the maps

@torch.library.custom_op("kernels::ssim_maps", mutates_args=())
def _maps(x_tilde: torch.Tensor, x: torch.Tensor, window: int,
          sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The two maps, and what the backward needs: the rows filtered on a GPU, the means and denominators on a CPU."""
    if _fits_triton(x_tilde, x):
        from kernels import ssim_triton
        return ssim_triton.maps(x_tilde, x, window, sigma)
    x_tilde, x = x_tilde.contiguous(), x.contiguous()
    kept = _filtered((x_tilde, x, torch.addcmul(x_tilde.square(), x, x), x_tilde * x), _gaussian_band(window, sigma, x))
    mean_tilde, mean, squares, product = kept
    mean_product, mean_squares = mean_tilde * mean, torch.addcmul(mean_tilde.square(), mean, mean)
    squares.sub_(mean_squares).add_(C2)
    structure = product.sub(mean_product).mul_(2).add_(C2).div_(squares)
    torch.add(mean_squares, C1, out=product)
    return mean_product.mul_(2).add_(C1).div_(product), structure, kept


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
    mean_tilde, mean, below_structure, below_luminance = kept
    grad_luminance, grad_structure = grad_luminance / below_luminance, grad_structure / below_structure
    # Halves of the gradients of the mean, of the product and of the squares of x_tilde.
    grad_mean = torch.addcmul(mean, luminance, mean_tilde, value=-1).mul_(grad_luminance)
    grad_mean.sub_(torch.addcmul(mean, structure, mean_tilde, value=-1).mul_(grad_structure))
    of_mean, of_product, of_squares = _filtered(
        (grad_mean, grad_structure, grad_structure * structure), _gaussian_band(window, sigma, x), window - 1)
    return of_mean.addcmul_(of_product, x).addcmul_(of_squares, x_tilde, value=-1).mul_(2)


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


# --- Gaussian filters as matrix products

def _gaussian_band(window, sigma, like):
    """(TILE + window - 1, TILE) matrix whose product with a row filters it by a Gaussian window."""
    taps = torch.arange(window, dtype=like.dtype, device=like.device) - window // 2
    taps = torch.exp(-taps.square() / (2 * sigma ** 2))
    columns = torch.arange(TILE, device=like.device).expand(window, -1)
    rows = columns + torch.arange(window, device=like.device).unsqueeze(1)
    band = torch.zeros(TILE + window - 1, TILE, dtype=like.dtype, device=like.device)
    return band.index_put_((rows, columns), (taps / taps.sum()).unsqueeze(1))


@exact_products()  # a variance is the small difference of two of them
def _filtered(images, band, padding=0):
    """Both axes of each of images (B, C, H, W) filtered by a band, after zeros on all sides: window - 1 shorter each.

    Matrix products of `TILE` outputs at a time: a matrix for the whole side would be zeros nearly everywhere. On a CPU
    they take 8 ms where `F.conv2d` on rows and columns takes 26 (128 images of 32x32, 11 pixels, and their gradient).
    """
    window = band.shape[0] - TILE + 1
    (batch, channels, height, width), shorter = images[0].shape, window - 1 - 2 * padding
    columns = list(_tiles(band, window, padding, width))
    rows = [(out, inputs, weight.t().expand(batch * channels, -1, -1))
            for out, inputs, weight in _tiles(band, window, padding, height)]
    results = images[0].new_empty(len(images), batch * channels, height - shorter, width - shorter)
    across = images[0].new_empty(batch * channels, height, width - shorter)
    for x, result in zip(images, results):
        for out, inputs, weight in columns:
            torch.mm(x.reshape(-1, width)[:, inputs], weight, out=across.view(-1, width - shorter)[:, out])
        for out, inputs, weight in rows:
            torch.bmm(weight, across[:, inputs], out=result[:, out])
    return results.unflatten(1, (batch, channels))


def _tiles(band, window, padding, side):
    """Slices of the outputs and of the inputs of each tile of a side, and the part of the band between them."""
    length = side + 2 * padding - window + 1
    for first in range(0, length, TILE):
        count, start = min(TILE, length - first), first - padding
        inputs = slice(max(start, 0), min(start + count + window - 1, side))
        yield slice(first, first + count), inputs, band[inputs.start - start:inputs.stop - start, :count]
