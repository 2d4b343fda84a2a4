"""The two maps that SSIM (Wang et al. 2004) is the mean product of, and their gradient in closed form."""
import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

C1, C2 = 0.01 ** 2, 0.03 ** 2
TILE = 64  # pixels of a filter's output that come out of one matrix product


def ssim_maps(x_tilde, x, window, sigma):
    """Luminance and contrast-structure of images x_tilde and x (B, C, H, W) in [0, 1], under a Gaussian window.

    Args:
        window: its odd number of pixels, no more than a side. sigma: its standard deviation in pixels.
    Returns:
        luminance, structure: (B, C, H - window + 1, W - window + 1) each, differentiable once, in x_tilde alone.
    """
    return _SSIMMaps.apply(x_tilde, x, window, sigma)


class _SSIMMaps(Function):
    @staticmethod
    def forward(ctx, x_tilde, x, window, sigma):
        x_tilde, x = x_tilde.contiguous(), x.contiguous()
        band = _gaussian_band(window, sigma, x)
        mean_tilde, mean, squares, product = (_filtered(moment, band) for moment in (
            x_tilde, x, torch.addcmul(x_tilde.square(), x, x), x_tilde * x))
        mean_product, mean_squares = mean_tilde * mean, torch.addcmul(mean_tilde.square(), mean, mean)
        below = mean_squares + C1, squares.sub_(mean_squares).add_(C2)
        structure = product.sub_(mean_product).mul_(2).add_(C2).div_(below[1])
        luminance = mean_product.mul_(2).add_(C1).div_(below[0])
        ctx.save_for_backward(x_tilde, x, mean_tilde, mean, luminance, structure, *below, band)
        return luminance, structure

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_luminance, grad_structure):
        x_tilde, x, mean_tilde, mean, luminance, structure, *below, band = ctx.saved_tensors
        grad_luminance, grad_structure = grad_luminance / below[0], grad_structure / below[1]
        # Halves of the gradients of the mean, of the product and of the squares of x_tilde.
        grad_mean = torch.addcmul(mean, luminance, mean_tilde, value=-1).mul_(grad_luminance)
        grad_mean.sub_(torch.addcmul(mean, structure, mean_tilde, value=-1).mul_(grad_structure))
        padding = band.shape[0] - TILE
        of_mean, of_product, of_squares = (_filtered(grad.contiguous(), band, padding) for grad in (
            grad_mean, grad_structure, grad_structure * structure))
        return of_mean.addcmul_(of_product, x).addcmul_(of_squares, x_tilde, value=-1).mul_(2), None, None, None


def _gaussian_band(window, sigma, like):
    """(TILE + window - 1, TILE) matrix whose product with a row filters it by a Gaussian window."""
    taps = torch.arange(window, dtype=like.dtype, device=like.device) - window // 2
    taps = torch.exp(-taps.square() / (2 * sigma ** 2))
    columns = torch.arange(TILE, device=like.device).expand(window, -1)
    rows = columns + torch.arange(window, device=like.device).unsqueeze(1)
    band = torch.zeros(TILE + window - 1, TILE, dtype=like.dtype, device=like.device)
    return band.index_put_((rows, columns), (taps / taps.sum()).unsqueeze(1))


def _filtered(x, band, padding=0):
    """Both axes of x (B, C, H, W) filtered by a band, after zeros on all sides: each side ends window - 1 shorter.

    Matrix products of `TILE` outputs at a time: a matrix for the whole side would be zeros nearly everywhere.
    """
    window = band.shape[0] - TILE + 1
    (batch, channels, height, width), shorter = x.shape, window - 1 - 2 * padding
    across = x.new_empty(batch * channels * height, width - shorter)
    for out, inputs, weight in _tiles(band, window, padding, width):
        torch.mm(x.view(-1, width)[:, inputs], weight, out=across[:, out])
    across = across.view(batch * channels, height, -1)
    down = x.new_empty(batch * channels, height - shorter, across.shape[2])
    for out, inputs, weight in _tiles(band, window, padding, height):
        torch.bmm(weight.t().expand(len(across), -1, -1), across[:, inputs], out=down[:, out])
    return down.view(batch, channels, *down.shape[1:])


def _tiles(band, window, padding, side):
    """Slices of the outputs and of the inputs of each tile of a side, and the part of the band between them."""
    length = side + 2 * padding - window + 1
    for first in range(0, length, TILE):
        count, start = min(TILE, length - first), first - padding
        inputs = slice(max(start, 0), min(start + count + window - 1, side))
        yield slice(first, first + count), inputs, band[inputs.start - start:inputs.stop - start, :count]
