"""SSIM's kernels against its definition in float64."""
from inspect import getsource

import pytest
import torch
import torch.nn.functional as F
from interpreter import interpreted, resources

from kernels import backend, ssim

SIZES = [((2, 2, 12, 16), 3, 0.75), ((1, 2, 13, 20), 11, 1.5), ((1, 1, 11, 11), 11, 1.75)]
POINTERS = {
    "rows_kernel": ("a_ptr", "b_ptr", "out_ptr", "taps_ptr"),
    "columns_kernel": ("rows_ptr", "fields_ptr", "l_ptr", "s_ptr", "taps_ptr"),
    "back_kernel": ("in_ptr", "out_ptr", "a_ptr", "b_ptr", "taps_ptr")}


def pair(size, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.rand(size)
    return (x + 0.1 * torch.randn(size)).clamp(0, 1).to(dtype).requires_grad_(), x.to(dtype)


def defined_maps(x_tilde, x, window, sigma):
    """Luminance and structure by one convolution with the whole window."""
    taps = torch.exp(-(torch.arange(window, dtype=x.dtype) - window // 2).square() / (2 * sigma ** 2))
    kernel = torch.outer(taps, taps)
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, window, window)

    def filtered(image):
        return F.conv2d(image, kernel, groups=x.shape[1])
    mean_tilde, mean = filtered(x_tilde), filtered(x)
    variances = filtered(x_tilde ** 2) - mean_tilde ** 2 + filtered(x ** 2) - mean ** 2
    return ((2 * mean_tilde * mean + ssim.C1) / (mean_tilde ** 2 + mean ** 2 + ssim.C1),
            (2 * (filtered(x_tilde * x) - mean_tilde * mean) + ssim.C2) / (variances + ssim.C2))


def expected(size, window, sigma, root):
    """Value and gradient in float64."""
    x_tilde, x = pair(size, torch.float64)
    luminance, structure = defined_maps(x_tilde, x, window, sigma)
    value = luminance * structure
    value = ((1 - value).clamp(min=0) + ssim.ROOT_EPS).sqrt().mean() if root else value.mean()
    return value.detach(), torch.autograd.grad(value, x_tilde)[0]


def check(found, wanted):
    value, gradient = wanted
    torch.testing.assert_close(found[0].detach().double(), value, atol=1e-6, rtol=0)
    assert (found[1] - gradient).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("size, window, sigma", [*SIZES, ((1, 3, 96, 150), 11, 1.5)])
def test_the_value_and_gradient_on_a_cpu(size, window, sigma, root):
    x_tilde, x = pair(size)
    value = ssim.mean_ssim(x_tilde, x, window, sigma, root)
    check((value, torch.autograd.grad(value, x_tilde)[0]), expected(size, window, sigma, root))


@pytest.mark.parametrize("cached", [1, 2 * 13 * 20])
def test_planes_are_worked_on_a_few_at_a_time(monkeypatch, cached):
    monkeypatch.setattr(backend, "CACHED", cached)
    size, window, sigma = (2, 3, 13, 20), 5, 1.
    x_tilde, x = pair(size, torch.float64)
    value = ssim.mean_ssim(x_tilde, x, window, sigma)
    check((value, torch.autograd.grad(value, x_tilde)[0]), expected(size, window, sigma, root=False))
    for found, wanted in zip(ssim.ssim_maps(x_tilde, x, window, sigma), defined_maps(x_tilde, x, window, sigma)):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("size, window, sigma", SIZES)
def test_each_map_has_its_gradient(size, window, sigma):
    maps = ssim.ssim_maps(*pair(size), window, sigma)
    x_tilde, x = pair(size, torch.float64)
    for found, wanted in zip(maps, defined_maps(x_tilde, x, window, sigma)):
        torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=0)
    assert torch.autograd.gradcheck(lambda a: ssim.ssim_maps(a, x, window, sigma), x_tilde, fast_mode=True)
    assert torch.autograd.gradcheck(lambda a: ssim.ssim_maps(a, x, window, sigma)[1], x_tilde, fast_mode=True)


@pytest.fixture(scope="module")
def found():
    return interpreted(f"SIZES = {SIZES}\n{getsource(pair)}\n{RUNS}")


RUNS = """
from kernels import ssim, ssim_triton
for size, window, sigma in SIZES:
    x_tilde, x = pair(size)
    for root in (False, True):
        save(f"mean {size} {root}", *triton_ssim(x_tilde.detach(), x, window, sigma, root))
    strided = x_tilde.detach().contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT
    save(f"strides {size}", *triton_ssim(*strided, window, sigma, True))
    luminance, structure, rows = ssim_triton.maps(x_tilde.detach(), x, window, sigma)
    gradients = [ssim_triton.maps_gradient(*grads, rows, x_tilde.detach(), x, window, sigma)
                 for grads in ((luminance, structure * 0), (luminance * 0, structure))]
    save(f"maps {size}", luminance, structure, *gradients)
x_tilde, x = pair(SIZES[0][0])
torch.library.opcheck(ssim._mean, (x_tilde, x, 3, 0.75, True))
value = ssim._mean(x_tilde, x, 3, 0.75, True)[0]
save("operator", value.detach(), torch.autograd.grad(3 * value, x_tilde)[0] / 3)
"""


@pytest.mark.parametrize("size, window, sigma", SIZES)
def test_the_interpreted_kernels(found, size, window, sigma):
    for root in (False, True):
        check(found[f"mean {size} {root}"], expected(size, window, sigma, root))
    check(found[f"strides {size}"], expected(size, window, sigma, True))
    if size == SIZES[0][0]:
        check(found["operator"], expected(size, window, sigma, True))

    x_tilde, x = pair(size, torch.float64)
    *maps, of_luminance, of_structure = found[f"maps {size}"]
    for found_map, gradient, wanted in zip(maps, (of_luminance, of_structure), defined_maps(x_tilde, x, window, sigma)):
        torch.testing.assert_close(found_map.double(), wanted, atol=1e-5, rtol=0)
        wanted_gradient, = torch.autograd.grad(wanted, x_tilde, found_map.double(), retain_graph=True)
        assert (gradient - wanted_gradient).norm() < 1e-5 * wanted_gradient.norm()


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("kernel, choice", [
    ("rows_kernel", {}), ("back_kernel", {"LAST": False}), ("back_kernel", {"LAST": True}),
    *(("columns_kernel", {"MODE": mode}) for mode in ("root", "maps", "gradient"))])
def test_the_kernels_compile_for_a_gpu_without_spills(kernel, choice, architecture):
    ssim_triton = pytest.importorskip("kernels.ssim_triton")
    compiled = getattr(ssim_triton, kernel)
    constants = {"WINDOW": 11, "SIZE": ssim_triton.SIZE} | choice
    integers = set(compiled.arg_names) - set(POINTERS[kernel]) - set(constants)
    _, spilled = resources(compiled, architecture, dict.fromkeys(POINTERS[kernel], "*fp32"), integers, constants, {})
    assert spilled == 0


def test_the_operators_are_sound():
    x_tilde, x = pair((1, 2, 14, 13))
    torch.library.opcheck(ssim._mean, (x_tilde, x, 11, 1.5, True))
    torch.library.opcheck(ssim._maps, (x_tilde, x, 11, 1.5))
    luminance, structure, kept = (part.detach() for part in ssim._maps(x_tilde, x, 11, 1.5))
    torch.library.opcheck(ssim._maps_gradient, (
        luminance, structure, luminance, structure, kept, x_tilde.detach(), x, 11, 1.5))


@pytest.mark.parametrize("root", [False, True])
def test_the_mean_is_one_graph_and_keeps_its_gradient(root):
    x_tilde, x = pair((2, 3, 14, 13))
    compiled = torch.compile(ssim.mean_ssim, backend="aot_eager", fullgraph=True)
    found = [torch.autograd.grad(mean(x_tilde, x, 11, 1.5, root), x_tilde)[0] for mean in (ssim.mean_ssim, compiled)]
    assert torch.equal(*found)


def test_images_that_are_not_finite_have_no_value():
    size, window, sigma = SIZES[0]
    broken = torch.full(size, torch.nan)
    assert ssim.mean_ssim(broken, torch.rand(size), window, sigma, root=True).isnan()
    value, = interpreted(f"""
x = torch.rand({size})
save("value", triton_ssim(x * torch.nan, x, {window}, {sigma}, True)[0])""")["value"]
    assert value.isnan()
