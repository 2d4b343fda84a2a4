"""Custom autograd functions: the nearest-code search, the straight-through gradient, SSIM's maps, cross-entropy."""
from contextlib import contextmanager
from functools import cache

import torch
import torch.nn.functional as F
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

BLOCK = 2 ** 20  # distances held at any one time: 4 MB of float32 stay in a CPU's cache
LARGEST_BLOCK, SHARE_OF_MEMORY = 2 ** 26, 1 / 64  # of a GPU's free memory, when it is first asked for
CODES = 2048  # codes that a block spans at most: more make it too thin for a fast matrix product
GROUP = 64  # codes whose least distance is found at once, far cheaper than its index; `CODES` is a multiple of it
ROTATION_EPS = 1e-6  # lengths below are no direction
_CENTER_STEPS = 2 ** 12  # the center of the codebook is rounded to this fraction of the scale: see _nearest
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a floating point number
_MIXER = 0x1E3779B97F4A7C15  # odd, with bits well spread
C1, C2 = 0.01 ** 2, 0.03 ** 2  # of SSIM
TILE = 64  # pixels of a filter's output that come out of one matrix product
CROSS_ENTROPY_ROWS = 512  # logits of so many latents at a time stay in a CPU's cache


# --- the nearest code

def vq(inputs, codebook):
    """Index of the nearest code, argmin_k ||inputs - codebook[k]||^2 (van den Oord et al. 2017, eq. 1).

    Exact in float32 (float64 if either argument is), whatever autocast surrounds it; ties go to the lowest index.

    Args:
        inputs: (..., D) floating point, any scale.
        codebook: (K, D) floating point.
    Returns:
        indices (...) int64, not differentiable: for a gradient use `vq_st`.
    Raises:
        ValueError: widths differ, an argument is not floating point, or the codebook is empty.
    """
    return _NearestCode.apply(inputs, codebook)


def vq_st(inputs, codebook):
    """Nearest code with the straight-through gradient (van den Oord et al. 2017, section 3.2; Bengio et al. 2013).

    Args:
        inputs: (..., D) floating point.
        codebook: (K, D) floating point.
    Returns:
        codes (..., D) in the codebook's dtype, and indices (N,) int64 with N the product of the leading sizes.
        The gradient of `codes` reaches `inputs` unchanged and the codebook as that of an embedding look-up.
    Raises:
        ValueError: as `vq`.
    """
    return _StraightThrough.apply(inputs, codebook)


class _NearestCode(Function):
    @staticmethod
    def forward(ctx, inputs, codebook):
        indices = _nearest(inputs, codebook)
        ctx.mark_non_differentiable(indices)
        return indices

    @staticmethod
    def backward(ctx, grad_indices):
        raise RuntimeError("vq returns indices and is not differentiable: use vq_st for the straight-through gradient")


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx, inputs, codebook):
        indices = _nearest(inputs, codebook).flatten()  # (N,)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(indices)
        ctx.codebook_shape, ctx.input_dtype = codebook.shape, inputs.dtype
        return codebook.index_select(0, indices).view(inputs.shape), indices

    @staticmethod
    def backward(ctx, grad_codes, grad_indices):
        grad_inputs = grad_codebook = None
        if ctx.needs_input_grad[0]:
            grad_inputs = grad_codes.to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            indices, = ctx.saved_tensors
            grad_codebook = grad_codes.new_zeros(ctx.codebook_shape)
            grad_codebook.index_add_(0, indices, grad_codes.reshape(-1, ctx.codebook_shape[1]))
        return grad_inputs, grad_codebook


def rotation_st(inputs, codes):
    """The codes of inputs, with the gradient of the rotation trick (Fifty et al. 2024, arXiv 2410.06424, section 4.2).

    The gradient is that of lambda R e at constant lambda and R: R rotates e, an input, to the direction of q, its code,
    in the plane of both, and lambda = |q| / |e|. Angles between a gradient and a code are kept at the input.

    Args:
        inputs: (B, D, h, w) floating point. codes: (B, D, h, w).
    Returns:
        (B, D, h, w): the codes; no gradient reaches `codes`.
    """
    return _RotationTrick.apply(inputs, codes)


class _RotationTrick(Function):
    @staticmethod
    def forward(ctx, inputs, codes):
        ctx.save_for_backward(inputs, codes)
        return codes.view_as(codes)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_codes):
        inputs, codes = ctx.saved_tensors
        e, q = (normalize(vectors.float(), dim=1, eps=ROTATION_EPS) for vectors in (inputs, codes))
        r, scale = normalize(e + q, dim=1, eps=ROTATION_EPS), _length(codes) / _length(inputs).clamp(min=ROTATION_EPS)
        # R = I - 2 r r' + 2 q e', transposed.
        turned = grad_codes - 2 * r * (r * grad_codes).sum(1, True) + 2 * e * (q * grad_codes).sum(1, True)
        return (scale * turned).to(inputs.dtype), None


def _length(vectors):
    return vectors.float().norm(dim=1, keepdim=True)


def _check(inputs, codebook):
    shapes = f"inputs {tuple(inputs.shape)} {inputs.dtype}, codebook {tuple(codebook.shape)} {codebook.dtype}"
    if codebook.ndim != 2 or inputs.ndim < 1 or inputs.shape[-1] != codebook.shape[1]:
        raise ValueError(f"vq needs inputs (..., D) and a codebook (K, D) of the same width D, got {shapes}")
    if codebook.numel() == 0:
        raise ValueError(f"vq needs at least one code of at least one dimension, got {shapes}")
    if not (inputs.is_floating_point() and codebook.is_floating_point()):
        raise ValueError(f"vq needs floating point inputs and codebook, got {shapes}")


@torch.no_grad()
def _nearest(inputs, codebook):
    """argmin_k |c_k|^2 - 2 x.c_k, the row norm |x|^2 left out because argmin cannot see it.

    The expanded square loses digits where x and the codes lie far from the origin and overflows where they are huge,
    so both are divided by a common power of two and moved by a center of few bits: neither step breaks an exact tie.
    """
    _check(inputs, codebook)
    dtype = torch.promote_types(torch.promote_types(inputs.dtype, codebook.dtype), torch.float32)
    x = inputs.reshape(-1, inputs.shape[-1])  # (N, D)
    nearest = torch.empty(len(x), dtype=torch.int64, device=x.device)
    if len(x) == 0:
        return nearest.view(inputs.shape[:-1])
    group = min(GROUP, len(codebook))
    padded = torch.arange(-(-len(codebook) // group) * group, device=x.device) % len(codebook)
    codes = codebook[padded].to(dtype)  # whole groups: the first codes once more at the end

    with torch.autocast(x.device.type, enabled=False), exact_products():
        largest = torch.stack([bound.to(dtype) for bound in (*x.aminmax(), *codes.aminmax())]).abs().max()
        scale = torch.exp2(torch.floor(torch.log2(largest.clamp(min=torch.finfo(dtype).tiny))))
        codes = codes / scale
        center = torch.round(codes.mean(0) * _CENTER_STEPS) / _CENTER_STEPS  # (D,)
        codes = codes - center
        norms = codes.square().sum(1)
        width = min(CODES, len(codes))
        rows = min(max(1, _block(x.device) // width), len(x))
        parts = list(zip(codes.split(width), norms.split(width)))
        buffer = codes.new_empty(rows * width)
        for vectors, result in zip(x.split(rows), nearest.split(rows)):
            vectors = torch.addcdiv(-center, vectors.to(dtype), scale)
            least, index = zip(*(_least(vectors, *part, group, buffer) for part in parts))
            part = torch.stack(least).argmin(0, keepdim=True)  # (1, rows)
            result.copy_((torch.stack(index).gather(0, part) + part * width)[0])
    return _lowest_equal_code(codebook.to(dtype))[padded][nearest].view(inputs.shape[:-1])


@contextmanager
def exact_products():
    """Matrix products and convolutions in float32, where the program may have allowed TF32 or bfloat16 for them."""
    allowed, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    convolutions = cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
        cudnn.allow_tf32 = convolutions


def _block(device):
    """Distances that a block may hold."""
    return _gpu_block(device) if device.type == "cuda" else BLOCK


@cache
def _gpu_block(device):
    free = torch.cuda.mem_get_info(device)[0] // 4  # float32 numbers
    return max(BLOCK, min(LARGEST_BLOCK, int(free * SHARE_OF_MEMORY)))


def _least(vectors, codes, norms, group, buffer):
    """Least |c|^2 - 2 x.c of each of the vectors (rows, D) over the codes, and its lowest index, both (rows,)."""
    distances = buffer[:len(vectors) * len(codes)].view(len(vectors), len(codes))
    distances = torch.addmm(norms, vectors, codes.t(), alpha=-2, out=distances).unflatten(1, (-1, group))
    least, where = distances.amin(2).min(1)
    within = distances[torch.arange(len(vectors), device=where.device), where].argmin(1)
    return least, where * group + within


def _lowest_equal_code(codebook):
    """(K,) lowest index that holds the same code: a matrix product may round equal columns differently.

    Equal codes have equal hashes and so meet when these are sorted; codes that merely share a hash are told apart.
    No shape depends on the values, so that nobody has to wait for them.
    """
    count, width = codebook.shape
    bits = (codebook + 0.).view(_BITS[codebook.element_size()]).long() * _MIXER  # + 0: the two zeros are equal
    position = torch.arange(width, device=codebook.device)
    hashes, order = torch.sort(((bits ^ (bits >> 32)) * ((2 * position + 1) * _MIXER)).sum(1), stable=True)
    new = torch.cat([hashes.new_ones(1, dtype=torch.bool), hashes[1:] != hashes[:-1]])
    first = torch.where(new, torch.arange(count, device=codebook.device), 0).cummax(0).values
    lowest = torch.empty_like(order).scatter_(0, order, order[first])
    return torch.where((codebook[lowest] == codebook).all(1), lowest, torch.arange(count, device=codebook.device))


# --- the two maps that SSIM (Wang et al. 2004) is the mean product of, and their gradient in closed form

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
        mean_tilde, mean, squares, product = _filtered(
            (x_tilde, x, torch.addcmul(x_tilde.square(), x, x), x_tilde * x), band)
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
        of_mean, of_product, of_squares = _filtered([grad.contiguous() for grad in (
            grad_mean, grad_structure, grad_structure * structure)], band, padding)
        return of_mean.addcmul_(of_product, x).addcmul_(of_squares, x_tilde, value=-1).mul_(2), None, None, None


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

    Matrix products of `TILE` outputs at a time: a matrix for the whole side would be zeros nearly everywhere.
    """
    window = band.shape[0] - TILE + 1
    (batch, channels, height, width), shorter = images[0].shape, window - 1 - 2 * padding
    columns, results = list(_tiles(band, window, padding, width)), []
    rows = [(out, inputs, weight.t().expand(batch * channels, -1, -1))
            for out, inputs, weight in _tiles(band, window, padding, height)]
    for x in images:
        across = x.new_empty(batch * channels * height, width - shorter)
        for out, inputs, weight in columns:
            torch.mm(x.view(-1, width)[:, inputs], weight, out=across[:, out])
        across = across.view(batch * channels, height, -1)
        down = x.new_empty(batch * channels, height - shorter, across.shape[2])
        for out, inputs, weight in rows:
            torch.bmm(weight, across[:, inputs], out=down[:, out])
        results.append(down.view(batch, channels, *down.shape[1:]))
    return results


def _tiles(band, window, padding, side):
    """Slices of the outputs and of the inputs of each tile of a side, and the part of the band between them."""
    length = side + 2 * padding - window + 1
    for first in range(0, length, TILE):
        count, start = min(TILE, length - first), first - padding
        inputs = slice(max(start, 0), min(start + count + window - 1, side))
        yield slice(first, first + count), inputs, band[inputs.start - start:inputs.stop - start, :count]


# --- cross-entropy

def cross_entropy(logits, latents):
    """Mean nats a latent of logits (B, K, h, w) for latents (B, h, w) int64, in float32 whatever the logits are."""
    rows = logits.permute(0, 2, 3, 1).flatten(0, 2)  # (N, K), in memory as it is where logits are channels_last
    if rows.device.type != "cpu":
        return F.cross_entropy(rows.float(), latents.flatten())
    return _CrossEntropy.apply(rows, latents.flatten())


class _CrossEntropy(Function):
    """Value and gradient in one pass over blocks of rows, which never leaves the cache."""

    @staticmethod
    def forward(ctx, logits, targets):
        total, gradient = 0., torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(logits), CROSS_ENTROPY_ROWS):
            block = slice(start, start + CROSS_ENTROPY_ROWS)
            target = targets[block].unsqueeze(1)
            log_p = logits[block].float().log_softmax(1)
            total = total - log_p.gather(1, target).sum()
            if gradient is not None:
                gradient[block] = log_p.exp_().scatter_add_(1, target, -torch.ones_like(log_p[:, :1])).div_(len(logits))
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx, grad_value):
        gradient, = ctx.saved_tensors
        return grad_value.to(gradient.dtype) * gradient, None


# --- a gradient that is known

def with_gradient(x, value, gradient):
    """A scalar `value` whose gradient in x is `gradient`, of the shape of x; first order only."""
    return _WithGradient.apply(x, value, gradient)


class _WithGradient(Function):
    """A value whose gradient is already known."""

    @staticmethod
    def forward(ctx, x, value, gradient):
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx, grad_value):
        gradient, = ctx.saved_tensors
        return grad_value * gradient, None, None
