"""SSIM on a GPU in Triton: rows filtered, columns filtered with all that is local, and both again for the gradient.

Imported only where it runs, because Triton takes a while to import and is missing in some builds of PyTorch.
Filtered are x_tilde, x, x_tilde^2 + x^2 and x_tilde x; a "plane" is one channel of one image.
"""
from functools import cache

import torch
import triton
import triton.language as tl

C1, C2 = tl.constexpr(0.01 ** 2), tl.constexpr(0.03 ** 2)  # of SSIM
ROOT_EPS = tl.constexpr(1e-4)
SIZE = 512  # pixels of a program


@triton.jit
def rows_kernel(a_ptr, b_ptr, out_ptr, taps_ptr, count, width, WINDOW: tl.constexpr, SIZE: tl.constexpr):
    """The rows of the four images filtered: (4, count), count = planes x height x (width - WINDOW + 1)."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = i < count
    shorter = width - WINDOW + 1
    at = i // shorter * width + i % shorter
    mean_a = tl.zeros((SIZE,), tl.float32)
    mean_b, squares, product = mean_a, mean_a, mean_a
    for tap in tl.static_range(WINDOW):
        weight = tl.load(taps_ptr + tap)
        a = tl.load(a_ptr + at + tap, mask=live, other=0.)
        b = tl.load(b_ptr + at + tap, mask=live, other=0.)
        mean_a += weight * a
        mean_b += weight * b
        squares += weight * (a * a + b * b)
        product += weight * (a * b)
    tl.store(out_ptr + i, mean_a, mask=live)
    tl.store(out_ptr + count + i, mean_b, mask=live)
    tl.store(out_ptr + 2 * count + i, squares, mask=live)
    tl.store(out_ptr + 3 * count + i, product, mask=live)


@triton.jit
def columns_kernel(rows_ptr, fields_ptr, l_ptr, s_ptr, taps_ptr, row_count, count, height, width,
                   WINDOW: tl.constexpr, MODE: tl.constexpr, SIZE: tl.constexpr):
    """Columns filtered, count = planes x (height - WINDOW + 1) x width of them, then what is local to a pixel.

    "mean", "root": the sums of the value by program, to `l_ptr`, and the `_fields` of the gradient of its mean.
    "maps": luminance and structure, to `l_ptr` and `s_ptr`. "gradient": the `_fields` of their gradients, read there.
    """
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = i < count
    plane = (height - WINDOW + 1) * width
    at = rows_ptr + i // plane * height * width + i % plane
    mean_a = tl.zeros((SIZE,), tl.float32)
    mean_b, squares, product = mean_a, mean_a, mean_a
    for tap in tl.static_range(WINDOW):
        weight = tl.load(taps_ptr + tap)
        mean_a += weight * tl.load(at + tap * width, mask=live, other=0.)
        mean_b += weight * tl.load(at + row_count + tap * width, mask=live, other=0.)
        squares += weight * tl.load(at + 2 * row_count + tap * width, mask=live, other=0.)
        product += weight * tl.load(at + 3 * row_count + tap * width, mask=live, other=0.)
    mean_product = mean_a * mean_b
    mean_squares = mean_a * mean_a + mean_b * mean_b
    below_l = mean_squares + C1
    below_s = squares - mean_squares + C2
    luminance = (2 * mean_product + C1) / below_l
    structure = (2 * (product - mean_product) + C2) / below_s
    if MODE == "maps":
        tl.store(l_ptr + i, luminance, mask=live)
        tl.store(s_ptr + i, structure, mask=live)
    else:
        if MODE == "gradient":
            grad_l = tl.load(l_ptr + i, mask=live, other=0.)
            grad_s = tl.load(s_ptr + i, mask=live, other=0.)
        else:
            value = luminance * structure
            grad = 1. / count
            if MODE == "root":
                short = tl.maximum(1 - value, 0., propagate_nan=tl.PropagateNan.ALL)
                root = tl.sqrt(short + ROOT_EPS)
                grad = tl.where(value <= 1, -0.5 / root, 0.) / count
                value = root
            tl.store(l_ptr + tl.program_id(0), tl.sum(tl.where(live, value, 0.), 0))
            grad_l, grad_s = grad * structure, grad * luminance
        _fields(fields_ptr, i, live, count, mean_a, mean_b, luminance, structure, grad_l / below_l, grad_s / below_s)


@triton.jit
def _fields(out_ptr, i, live, count, mean_a, mean_b, luminance, structure, grad_l, grad_s):
    """Halves of the gradients of the mean of a, of the product and of the squares: what is filtered back."""
    of_mean = (mean_b - luminance * mean_a) * grad_l - (mean_b - structure * mean_a) * grad_s
    tl.store(out_ptr + i, of_mean, mask=live)
    tl.store(out_ptr + count + i, grad_s, mask=live)
    tl.store(out_ptr + 2 * count + i, grad_s * structure, mask=live)


@triton.jit
def back_kernel(in_ptr, out_ptr, a_ptr, b_ptr, taps_ptr, in_count, count, side, step, LAST: tl.constexpr,
                WINDOW: tl.constexpr, SIZE: tl.constexpr):
    """Three fields filtered to `side` pixels along an axis, `step` apart, zeros beyond; LAST makes the gradient."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    live = i < count
    shorter = side - WINDOW + 1
    position = i // step % side
    at = in_ptr + i // (step * side) * (step * shorter) + i % step
    of_mean = tl.zeros((SIZE,), tl.float32)
    of_product, of_squares = of_mean, of_mean
    for tap in tl.static_range(WINDOW):
        source = position - tap
        inside = live & (source >= 0) & (source < shorter)
        weight = tl.load(taps_ptr + tap)
        of_mean += weight * tl.load(at + source * step, mask=inside, other=0.)
        of_product += weight * tl.load(at + in_count + source * step, mask=inside, other=0.)
        of_squares += weight * tl.load(at + 2 * in_count + source * step, mask=inside, other=0.)
    if LAST:
        a = tl.load(a_ptr + i, mask=live, other=0.)
        b = tl.load(b_ptr + i, mask=live, other=0.)
        tl.store(out_ptr + i, 2 * (of_mean + of_product * b - of_squares * a), mask=live)
    else:
        tl.store(out_ptr + i, of_mean, mask=live)
        tl.store(out_ptr + count + i, of_product, mask=live)
        tl.store(out_ptr + 2 * count + i, of_squares, mask=live)


@cache
def _taps(window, sigma, device):
    taps = torch.arange(window, dtype=torch.float32, device=device) - window // 2
    taps = torch.exp(-taps.square() / (2 * sigma ** 2))
    return taps / taps.sum()


def mean(x_tilde, x, window, sigma, root):
    """Mean of SSIM, or of sqrt(max(1 - SSIM, 0) + 1e-4), and its gradient in x_tilde."""
    x_tilde, x = x_tilde.contiguous(), x.contiguous()
    with torch.cuda.device_of(x):
        rows = _rows(x_tilde, x, window, sigma)
        fields = _map(x, window, 3)
        sums = x.new_empty(_grid(fields[0]))
        _columns(rows, fields, sums, sums, window, sigma, "root" if root else "mean")
        return sums.sum() / fields[0].numel(), _back(fields, x_tilde, x, window, sigma)


def maps(x_tilde, x, window, sigma):
    """Luminance, structure, and the filtered rows for `maps_gradient`."""
    x_tilde, x = x_tilde.contiguous(), x.contiguous()
    with torch.cuda.device_of(x):
        rows, luminance, structure = _rows(x_tilde, x, window, sigma), _map(x, window), _map(x, window)
        _columns(rows, rows, luminance, structure, window, sigma, "maps")
        return luminance, structure, rows


def maps_gradient(grad_luminance, grad_structure, rows, x_tilde, x, window, sigma):
    """Gradient in x_tilde, from those of the two maps and the filtered rows."""
    x_tilde, x = x_tilde.contiguous(), x.contiguous()
    with torch.cuda.device_of(x):
        fields = _map(x, window, 3)
        _columns(rows, fields, grad_luminance.contiguous(), grad_structure.contiguous(), window, sigma, "gradient")
        return _back(fields, x_tilde, x, window, sigma)


def _map(x, window, *several):
    """Room for a map of the images, or for several."""
    *outer, height, width = x.shape
    return x.new_empty(*several, *outer, height - window + 1, width - window + 1)


def _rows(x_tilde, x, window, sigma):
    *outer, width = x.shape
    rows = x.new_empty(4, *outer, width - window + 1)
    rows_kernel[_grid(rows[0])](x_tilde, x, rows, _taps(window, sigma, x.device), rows[0].numel(), width,
                                WINDOW=window, SIZE=SIZE)
    return rows


def _columns(rows, fields, luminance, structure, window, sigma, mode):
    height, width = rows.shape[3:]
    count = rows[0].numel() // height * (height - window + 1)
    columns_kernel[triton.cdiv(count, SIZE),](
        rows, fields, luminance, structure, _taps(window, sigma, rows.device), rows[0].numel(), count, height, width,
        WINDOW=window, MODE=mode, SIZE=SIZE)


def _back(fields, x_tilde, x, window, sigma):
    height, width = x.shape[2:]
    taps = _taps(window, sigma, x.device)
    rows = x.new_empty(*fields.shape[:-1], width)
    back_kernel[_grid(rows[0])](fields, rows, x_tilde, x, taps, fields[0].numel(), rows[0].numel(), width, 1,
                                LAST=False, WINDOW=window, SIZE=SIZE)
    gradient = torch.empty_like(x)
    back_kernel[_grid(x)](rows, gradient, x_tilde, x, taps, rows[0].numel(), x.numel(), height, width,
                          LAST=True, WINDOW=window, SIZE=SIZE)
    return gradient


def _grid(x):
    return triton.cdiv(x.numel(), SIZE),
