"""The nearest code on a GPU in one Triton kernel: exact, and no N x K matrix of distances leaves the chip.

Imported only where it runs, because Triton takes a while to import and is missing in some builds of PyTorch.
"""
import torch
import triton
import triton.language as tl

CENTER_STEPS = tl.constexpr(4096)  # the center is rounded to this fraction of the scale, so that ties stay ties
LARGEST = tl.constexpr(2. ** 112)  # scaled inputs are cut there: their products with 300 scaled codes do not overflow
PREPARED = 16  # codes that one program prepares
MANY_CODES = 4096  # from here on, wider tiles of codes are faster


@triton.jit
def prepare_kernel(code_ptr, mean_ptr, largest_ptr, out_ptr, norm_ptr, center_ptr, inverse_ptr, K,
                   D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr):
    """Codes divided by a power of two and centered (whole tiles, zeros around them), and |c|^2 (infinite beyond K)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exponent = (tl.load(largest_ptr).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255
    exponent = tl.minimum(tl.maximum(exponent, 1), 253)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)  # 2^-floor(log2 largest)
    norm = tl.zeros((ROWS,), tl.float32)
    for start in range(0, WIDTH, STEP):
        dims = start + tl.arange(0, STEP)
        center = tl.load(mean_ptr + dims, mask=dims < D, other=0.).to(tl.float32) * inverse
        center = tl.floor(center * CENTER_STEPS + 0.5) / CENTER_STEPS
        center = tl.where(tl.abs(center) <= 2., center, 0.)  # the mean of huge codes may be infinite
        live = (rows[:, None] < K) & (dims[None, :] < D)
        code = tl.load(code_ptr + rows[:, None] * D + dims[None, :], mask=live, other=0.).to(tl.float32) * inverse
        code = tl.where(live, code - center[None, :], 0.)
        tl.store(out_ptr + rows[:, None] * WIDTH + dims[None, :], code)
        tl.store(center_ptr + dims, center)  # every program stores the same
        norm += tl.sum(code * code, 1)
    tl.store(norm_ptr + rows, tl.where(rows < K, norm, float("inf")))
    tl.store(inverse_ptr, inverse)


@triton.jit
def nearest_kernel(x_ptr, code_ptr, norm_ptr, center_ptr, inverse_ptr, out_ptr, N, K: tl.constexpr, D: tl.constexpr,
                   WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr):
    """argmin_k |c_k|^2 - 2 x.c_k of BN inputs: tiles of BK codes stream past, the least so far and its index stay."""
    rows = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    cols = tl.arange(0, BK)
    inverse = tl.load(inverse_ptr)
    least = tl.full((BN,), float("inf"), tl.float32)
    index = tl.zeros((BN,), tl.int32)
    if WIDTH == BD:
        x = _scaled(x_ptr, center_ptr, inverse, rows, 0, N, D, BD)
    for first in range(0, K, BK):
        product = tl.zeros((BN, BK), tl.float32)
        for start in range(0, WIDTH, BD):
            if WIDTH != BD:
                x = _scaled(x_ptr, center_ptr, inverse, rows, start, N, D, BD)
            dims = start + tl.arange(0, BD)
            code = tl.load(code_ptr + (first + cols)[None, :] * WIDTH + dims[:, None])  # (BD, BK)
            product = tl.dot(x, code, product, input_precision=PRECISION)
        score = tl.load(norm_ptr + first + cols)[None, :] - 2. * product
        lowest = tl.min(score, 1)
        place = tl.min(tl.where(score == lowest[:, None], cols[None, :], BK), 1)
        better = lowest < least  # strictly: of equal codes the first
        least = tl.where(better, lowest, least)
        index = tl.where(better, first + place, index)
    tl.store(out_ptr + rows, index.to(tl.int64), mask=rows < N)


@triton.jit
def _scaled(x_ptr, center_ptr, inverse, rows, start, N, D: tl.constexpr, BD: tl.constexpr):
    """(BN, BD) inputs, scaled and centered as the codes are."""
    dims = start + tl.arange(0, BD)
    live = rows[:, None] < N
    if D % BD != 0:
        live = live & (dims[None, :] < D)
    x = tl.load(x_ptr + rows[:, None] * D + dims[None, :], mask=live, other=0.).to(tl.float32) * inverse
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST) - tl.load(center_ptr + dims)[None, :]


def tiles(count, codes, width, precision, generation=9):
    """Sizes of the tiles and options of the compiler for `count` inputs of a width: the fastest of some on an H100.

    Args:
        generation: of the GPU, the first number of its compute capability; 9 is an H100's.
    """
    narrow = width <= 64 and generation in (9, 10)  # others would spill registers or lack shared memory
    step = min(max(16, triton.next_power_of_2(width)), 64 if narrow and precision == "tf32x3" else 32)
    if count >= 128 * 128:
        codes = 128 if narrow and codes >= MANY_CODES else 64
        return {"BN": 128, "BK": codes, "BD": step, "num_warps": 8, "num_stages": 2}
    if width > 64:  # fewer rows a tile, or a GPU of 132 processors would idle
        return {"BN": 32, "BK": 128, "BD": step, "num_warps": 4, "num_stages": 3}
    return {"BN": 64, "BK": 64, "BD": step, "num_warps": 4, "num_stages": 2}


def search(x, codebook, precision, **chosen):
    """Indices (N,) int64 of the nearest codes; `chosen` replaces entries of `tiles`."""
    (count, width), codes = x.shape, len(codebook)
    generation = torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 9
    options = tiles(count, codes, width, precision, generation) | chosen
    padded = triton.cdiv(width, options["BD"]) * options["BD"]
    rows = triton.cdiv(codes, options["BK"]) * options["BK"]
    x, codebook = x.contiguous(), codebook.contiguous()
    out = torch.empty(count, dtype=torch.int64, device=x.device)
    prepared, norms, center, inverse = torch.empty(
        rows * padded + rows + padded + 1, device=x.device).split([rows * padded, rows, padded, 1])
    with torch.cuda.device_of(x):
        largest = torch.linalg.vector_norm(codebook, float("inf"), dtype=torch.float32)
        mean = codebook.mean(0, dtype=torch.float32)
        prepare_kernel[rows // PREPARED,](codebook, mean, largest, prepared, norms, center, inverse, codes,
                                          D=width, WIDTH=padded, ROWS=PREPARED, STEP=options["BD"])
        nearest_kernel[triton.cdiv(count, options["BN"]),](
            x, prepared, norms, center, inverse, out, count,
            K=codes, D=width, WIDTH=padded, PRECISION=precision, **options)
    return out
