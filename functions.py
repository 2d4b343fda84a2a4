"""Custom autograd functions: the nearest code, the straight-through gradient, the rotation trick."""
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from kernels.nearest import nearest

ROTATION_EPS = 1e-6  # lengths below are no direction


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
    return _NearestCode.apply(inputs.detach(), codebook.detach())  # a compiler would trace the backward, which raises


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
        _check(inputs, codebook)
        indices = nearest(inputs, codebook)
        ctx.mark_non_differentiable(indices)
        return indices

    @staticmethod
    def backward(ctx, grad_indices):
        raise RuntimeError("vq returns indices and is not differentiable: use vq_st for the straight-through gradient")


class _StraightThrough(Function):
    @staticmethod
    def forward(ctx, inputs, codebook):
        _check(inputs, codebook)
        indices = nearest(inputs, codebook).flatten()  # (N,)
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
