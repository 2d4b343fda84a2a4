"""The nearest code: blocks that stay in the cache on a CPU, one Triton kernel on a GPU.

Both find argmin_k |c_k|^2 - 2 x.c_k, the row norm |x|^2 left out because argmin cannot see it. The expanded square
loses digits where x and the codes lie far from the origin and overflows where they are huge, so both are divided by a
common power of two and moved by a center of few bits: neither step breaks an exact tie.
"""
import torch

from kernels.backend import exact_products, fits_triton

BLOCK = 2 ** 20  # distances held at any one time: 4 MB of float32 stay in a CPU's cache
GPU_BLOCK = 2 ** 24  # on a GPU, for float64 or where Triton is missing
CODES = 2048  # codes that a block spans at most: more make it too thin for a fast matrix product
GROUP = 64  # codes whose least distance is found at once, far cheaper than its index; `CODES` is a multiple of it
_CENTER_STEPS = 2 ** 12  # the center of the codebook is rounded to this fraction of the scale


@torch.library.custom_op("kernels::nearest", mutates_args=())
def nearest(x: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """Index of the nearest code of vectors x (..., D) in a codebook (K, D): (...) int64, of equal codes the lowest."""
    flat = x.reshape(-1, x.shape[-1])  # (N, D)
    if len(flat) == 0:
        indices = flat.new_empty(0, dtype=torch.int64)
    elif fits_triton(x, codebook):
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
        indices = lowest_equal_code(codebook)[indices]
    return indices


def blocked_nearest(x, codebook):
    """Indices (N,) int64 of the nearest codes of x (N, D) in a codebook (K, D), in blocks of `BLOCK` distances."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    indices = torch.empty(len(x), dtype=torch.int64, device=x.device)
    group = min(GROUP, len(codebook))
    padded = torch.arange(-(-len(codebook) // group) * group, device=x.device) % len(codebook)
    codes = codebook[padded].to(dtype)  # whole groups: the first codes once more at the end

    with exact_products(x.device):
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
    return lowest_equal_code(codebook.to(dtype))[padded][indices]


def _least(vectors, codes, norms, group, buffer):
    """Least |c|^2 - 2 x.c of each of the vectors (rows, D) over the codes, and its lowest index, both (rows,)."""
    distances = buffer[:len(vectors) * len(codes)].view(len(vectors), len(codes))
    distances = torch.addmm(norms, vectors, codes.t(), alpha=-2, out=distances).unflatten(1, (-1, group))
    least, where = distances.amin(2).min(1)
    within = distances[torch.arange(len(vectors), device=where.device), where].argmin(1)
    return least, where * group + within


def lowest_equal_code(codebook):
    """(K,) lowest index that holds the same code: a matrix product may round equal columns differently.

    Without it 5 of 8,000 ties end at another index; it takes 0.9 ms of 15 where 8,192 inputs meet 512 codes of 64.
    """
    place = torch.unique(codebook, dim=0, return_inverse=True)[1]  # (K,), the same for equal codes
    index = torch.arange(len(codebook), device=codebook.device)
    return torch.full_like(index, len(codebook)).scatter_reduce(0, place, index, "amin")[place]
