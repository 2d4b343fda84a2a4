"""The nearest code: blocks that stay in the cache on a CPU, one Triton kernel on a GPU.

Both find argmin_k |c_k|^2 - 2 x.c_k, the row norm |x|^2 left out because argmin cannot see it. The expanded square
loses digits where x and the codes lie far from the origin and overflows where they are huge, so both are divided by a
common power of two and moved by a center of few bits: neither step breaks an exact tie.
"""
from contextlib import contextmanager
from importlib.util import find_spec

import torch

BLOCK = 2 ** 20  # distances held at any one time: 4 MB of float32 stay in a CPU's cache
GPU_BLOCK = 2 ** 24  # on a GPU, for float64 or where Triton is missing
CODES = 2048  # codes that a block spans at most: more make it too thin for a fast matrix product
GROUP = 64  # codes whose least distance is found at once, far cheaper than its index; `CODES` is a multiple of it
HAS_TRITON = find_spec("triton") is not None  # not on Windows, nor in builds for a CPU
_CENTER_STEPS = 2 ** 12  # the center of the codebook is rounded to this fraction of the scale
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a floating point number
_MIXER = 0x1E3779B97F4A7C15  # odd, with bits well spread


@torch.library.custom_op("kernels::nearest", mutates_args=())
def nearest(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code of vectors x (..., D) in a codebook (K, D): (...) int64, of equal codes the lowest."""
    flat = x.reshape(-1, x.shape[-1])  # (N, D)
    if len(flat) == 0:
        indices = flat.new_empty(0, dtype=torch.int64)
    elif HAS_TRITON and x.is_cuda and torch.float64 not in (x.dtype, codebook.dtype):
        indices = triton_nearest(flat, codebook)
    else:
        indices = blocked_nearest(flat, codebook)
    return indices.view(x.shape[:-1])


@nearest.register_fake
def _(x, codebook):
    return x.new_empty(x.shape[:-1], dtype=torch.int64)


def triton_nearest(x, codebook, precision="tf32x3", **tiles):
    """Indices (N,) int64 of the nearest codes of x (N, D) in a codebook (K, D), each float32, bfloat16 or float16.

    Args:
        precision: of the products, "ieee" (float32 multiplications) or "tf32x3" (three TF32 products of two parts).
        tiles: replaces entries of `nearest_triton.tiles`.
    """
    from kernels import nearest_triton  # here, because Triton is slow to import and not everywhere
    indices = nearest_triton.search(x, codebook, precision, **tiles)
    if not x.is_cuda:  # interpreted, with the matrix products of a CPU
        indices = _lowest_equal_code(codebook)[indices]
    return indices


def blocked_nearest(x, codebook):
    """Indices (N,) int64 of the nearest codes of x (N, D) in a codebook (K, D), in blocks of `BLOCK` distances."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    indices = torch.empty(len(x), dtype=torch.int64, device=x.device)
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
        rows = min(max(1, (BLOCK if x.device.type == "cpu" else GPU_BLOCK) // width), len(x))
        parts = list(zip(codes.split(width), norms.split(width)))
        buffer = codes.new_empty(rows * width)
        for vectors, result in zip(x.split(rows), indices.split(rows)):
            vectors = torch.addcdiv(-center, vectors.to(dtype), scale)
            least, index = zip(*(_least(vectors, *part, group, buffer) for part in parts))
            part = torch.stack(least).argmin(0, keepdim=True)  # (1, rows)
            result.copy_((torch.stack(index).gather(0, part) + part * width)[0])
    return _lowest_equal_code(codebook.to(dtype))[padded][indices]


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
    """
    count, width = codebook.shape
    bits = (codebook + 0.).view(_BITS[codebook.element_size()]).long() * _MIXER  # + 0: the two zeros are equal
    position = torch.arange(width, device=codebook.device)
    hashes, order = torch.sort(((bits ^ (bits >> 32)) * ((2 * position + 1) * _MIXER)).sum(1), stable=True)
    new = torch.cat([hashes.new_ones(1, dtype=torch.bool), hashes[1:] != hashes[:-1]])
    first = torch.where(new, torch.arange(count, device=codebook.device), 0).cummax(0).values
    lowest = torch.empty_like(order).scatter_(0, order, order[first])
    return torch.where((codebook[lowest] == codebook).all(1), lowest, torch.arange(count, device=codebook.device))
