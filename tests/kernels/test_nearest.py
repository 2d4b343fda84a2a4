"""The search: Triton's kernel, run by its interpreter and compiled for GPUs, and the blocks, against brute force."""
import pytest
import torch
from interpreter import interpreted, resources

from benchmarks.exactness import search_errors
from kernels.nearest import lowest_equal_code, nearest

SHIPPED = [(count, 512, width) for width in (1, 16, 64, 256, 300) for count in (8192, 131072)] + [(16384, 16384, 64)]


def margins(x, codebook, indices):
    """By how much of the least squared distance, in float64, the chosen code is farther than the nearest: (N,)."""
    distances = torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    chosen, least = distances.gather(1, indices[:, None])[:, 0], distances.amin(1)
    return (chosen - least) / least


@pytest.fixture(scope="module")
def found():
    return interpreted(SEARCHES)


SEARCHES = """
from kernels.nearest_triton import tiles
for count, codes, width in ((7, 1, 3), (90, 70, 1), (60, 512, 16), (70, 77, 64), (40, 100, 300), (20, 5, 130)):
    torch.manual_seed(0)
    x, codebook = torch.randn(count, width), torch.randn(codes, width)
    save(f"sizes {count} {codes} {width}", x, codebook, triton_nearest(x, codebook))
for scale in (1e-38, 1e-30, 1e-5, 1e6, 1e30):
    for offset in (0, 1e4):
        x, codebook = (torch.randn(64, 8) + offset) * scale, (torch.randn(90, 8) + offset) * scale
        save(f"scale {scale} {offset}", x, codebook, triton_nearest(x, codebook))
x, codebook = torch.randn(64, 24).bfloat16(), torch.randn(70, 24)
save("bfloat16", x, codebook, triton_nearest(x, codebook))
save("both", x.half(), codebook.half(), triton_nearest(x.half(), codebook.half()))
save("huge inputs", x.float() * 1e25, codebook, triton_nearest(x.float() * 1e25, codebook))
base = torch.randn(30, 24)
codebook = base[torch.randint(30, (200,))]
save("ties", x, codebook, triton_nearest(x, codebook))
x, codebook = (torch.randint(-2, 3, (size, 3)).float() for size in (64, 100))
codebook = torch.cat([codebook, -codebook])  # whose mean is zero
save("whole numbers", x / 2, codebook, triton_nearest(x / 2, codebook))
save("zeros", x, codebook * 0, triton_nearest(x, codebook * 0))
save("no numbers", x, codebook, triton_nearest(x * float("nan"), codebook))
for shape in ((131072, 512, 64), (131072, 16384, 64), (131072, 512, 256)):  # the tiles of many inputs
    x, codebook = torch.randn(130, shape[2]), torch.randn(140, shape[2])
    save(f"sizes {shape}", x, codebook, triton_nearest(x, codebook, **tiles(*shape, "tf32x3")))
"""


def test_the_interpreted_kernel_finds_the_nearest_code(found):
    for name, (x, codebook, indices) in found.items():
        assert indices.dtype == torch.int64 and indices.shape == x.shape[:1]
        assert indices.min() >= 0 and indices.max() < len(codebook), name
        if name not in ("zeros", "no numbers", "whole numbers"):
            assert margins(x, codebook, indices).max() < 1e-5, name
            if name.startswith("sizes"):
                assert margins(x, codebook, indices).max() == 0, name


def test_the_interpreted_kernel_gives_ties_to_the_lowest_index(found):
    _, codebook, indices = found["ties"]
    assert torch.equal(indices, (codebook[indices][:, None] == codebook).all(-1).int().argmax(1))
    assert not found["zeros"][2].any()
    x, codebook, indices = found["whole numbers"]  # whose distances, many of them equal, are exact
    assert torch.equal(indices, torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist").argmin(1))


@pytest.mark.parametrize("architecture, most_shared", [(80, 101_376), (90, 232_448)])  # those of an RTX 4090, an H100
@pytest.mark.parametrize("count, codes, width", SHIPPED)
def test_the_kernel_fits_a_gpu_without_spills(count, codes, width, architecture, most_shared):
    nearest_triton = pytest.importorskip("kernels.nearest_triton")
    tiles = nearest_triton.tiles(count, codes, width, "tf32x3", architecture // 10)
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages")}
    padded = -(-width // tiles["BD"]) * tiles["BD"]
    shared, spilled = resources(
        nearest_triton.nearest_kernel, architecture, dict.fromkeys(
            ("x_ptr", "code_ptr", "norm_ptr", "center_ptr", "inverse_ptr"), "*fp32") | {"out_ptr": "*i64"}, ["N"],
        tiles | {"K": codes, "D": width, "WIDTH": padded, "PRECISION": "tf32x3"}, options)
    assert shared <= most_shared and spilled == 0


def three_products(a, b):
    """a @ b.t() as a GPU's three TF32 products of two parts each: 10 bits of mantissa, sums in float32."""
    def parts(x):
        big = _tf32(x)
        return big, _tf32(x - big)
    (a, a_rest), (b, b_rest) = parts(a), parts(b)
    return a_rest @ b.t() + a @ b_rest.t() + a @ b.t()


def _tf32(x):
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_three_tf32_products_are_exact_enough_and_one_is_not():
    torch.manual_seed(0)
    x, codebook = torch.randn(4096, 64), torch.randn(512, 64)
    norms = codebook.square().sum(1)

    def wrong(products):
        return int((margins(x, codebook, (norms - 2 * products).argmin(1)) > 1e-6).sum())
    assert wrong(three_products(x, codebook)) == 0
    assert wrong(_tf32(x) @ _tf32(codebook).t()) > 0


@pytest.mark.parametrize("seed", range(5))
def test_equal_codes_share_the_lowest_index(seed):
    torch.manual_seed(seed)
    codes = torch.randint(-1, 2, (200, 3)).float() * torch.tensor([1., -1., 0.])  # few values, and both zeros
    lowest = lowest_equal_code(codes)
    expected = [next(i for i, other in enumerate(codes) if torch.equal(code + 0., other + 0.)) for code in codes]
    assert lowest.tolist() == expected


def test_the_operator_is_sound():
    x, codebook = torch.randn(2, 5, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    torch.library.opcheck(nearest, (x, codebook))
    torch.library.opcheck(nearest, (x.detach().bfloat16().transpose(0, 1), codebook.detach()))


def test_the_proof_of_exactness_sees_wrong_codes_and_ties():
    def search(x, codebook):
        return torch.cdist(x.double(), codebook.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    right = search_errors(search, 300, 40, 5, torch.device("cpu"))
    assert set(right.values()) == {0}
    last = search_errors(lambda x, c: len(c) - 1 - search(x, c.flip(0)), 300, 40, 5, torch.device("cpu"))
    assert last["wrong"] == last["wrong among ties"] == 0 < last["ties not lowest"]
    assert search_errors(lambda x, c: search(x, c) * 0, 300, 40, 5, torch.device("cpu"))["wrong"] > 200
