"""Vector quantization: the exact nearest-code search and its straight-through gradient."""
import torch
from torch.autograd import Function

CPU_BLOCK, BLOCK = 2 ** 20, 2 ** 26  # distances held at any one time: 4 MB of float32 stay in a CPU's cache
CODES = 2048  # codes that a block spans at most: more make it too thin for a fast matrix product
GROUP = 64  # codes whose least distance is found at once, far cheaper than its index; `CODES` is a multiple of it
_CENTER_STEPS = 2 ** 12  # the center of the codebook is rounded to this fraction of the scale: see _nearest


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

    with torch.autocast(x.device.type, enabled=False):
        largest = torch.stack([bound.to(dtype) for bound in (*x.aminmax(), *codes.aminmax())]).abs().max()
        scale = torch.exp2(torch.floor(torch.log2(largest.clamp(min=torch.finfo(dtype).tiny))))
        codes = codes / scale
        center = torch.round(codes.mean(0) * _CENTER_STEPS) / _CENTER_STEPS  # (D,)
        codes = codes - center
        norms = codes.square().sum(1)
        width, block = min(CODES, len(codes)), CPU_BLOCK if x.device.type == "cpu" else BLOCK
        rows = min(max(1, block // width), len(x))
        parts = list(zip(codes.split(width), norms.split(width)))
        buffer = codes.new_empty(rows * width)
        for vectors, result in zip(x.split(rows), nearest.split(rows)):
            vectors = torch.addcdiv(-center, vectors.to(dtype), scale)
            least, index = zip(*(_least(vectors, *part, group, buffer) for part in parts))
            part = torch.stack(least).argmin(0, keepdim=True)  # (1, rows)
            result.copy_((torch.stack(index).gather(0, part) + part * width)[0])
    return _lowest_equal_code(codebook)[padded][nearest].view(inputs.shape[:-1])


def _least(vectors, codes, norms, group, buffer):
    """Least |c|^2 - 2 x.c of each of the vectors (rows, D) over the codes, and its lowest index, both (rows,)."""
    distances = buffer[:len(vectors) * len(codes)].view(len(vectors), len(codes))
    distances = torch.addmm(norms, vectors, codes.t(), alpha=-2, out=distances).unflatten(1, (-1, group))
    least, where = distances.amin(2).min(1)
    within = distances[torch.arange(len(vectors), device=where.device), where].argmin(1)
    return least, where * group + within


def _lowest_equal_code(codebook):
    """(K,) lowest index that holds the same code: a matrix product may round equal columns differently."""
    unique, group = torch.unique(codebook, dim=0, return_inverse=True)
    indices = torch.arange(len(codebook), device=codebook.device)
    return torch.full_like(indices[:len(unique)], len(codebook)).scatter_reduce(0, group, indices, "amin")[group]
