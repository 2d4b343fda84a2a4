"""What a compiler and a CUDA graph need of every term: one graph, no setting that is toggled, buffers that stay."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from losses import STRUCTURAL_TERMS, TERMS, ReconstructionLoss
from terms import frequency

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "matmul", "convolution", "convolution_backward"}


def images(size=(48, 40)):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, *size, generator=generator) * 2 - 1
    return x + 0.1 * torch.randn(x.shape, generator=generator), x


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def differentiate(function, x_tilde, x):
    image = x_tilde.clone().requires_grad_()
    value = function(image, x)
    value = value[0] if isinstance(value, tuple) else value
    return value.detach(), torch.autograd.grad(value, image)[0]


@pytest.mark.parametrize("name", TERMS)
def test_a_term_is_one_graph_with_the_same_value_and_gradient(name, monkeypatch):
    # Bands of a pyramid are one loop, and each takes seconds to trace: a few show what all do.
    monkeypatch.setattr(frequency, "NLPD_BANDS", frequency.NLPD_BANDS[2:5])
    monkeypatch.setattr(frequency, "LAPLACIAN_LEVELS", 2)
    pair, eager = images(), ReconstructionLoss({name: 1.}, sharpen=0.3 if name in STRUCTURAL_TERMS else 0.)
    for a, b in zip(differentiate(compiled(eager), *pair), differentiate(eager, *pair)):
        torch.testing.assert_close(a, b)


def test_compiled_code_never_looks_at_values_and_check_does():
    x_tilde, x = images()
    criterion = ReconstructionLoss({"mse": 1.})
    assert compiled(criterion)(x_tilde, 100 * x)[0] > 1
    with pytest.raises(ValueError, match=r"\[-1, 1\]"):
        criterion.check(100 * x)


class Products(TorchDispatchMode):
    """Collects the matrix products and convolutions, which a GPU may do in ten bits (TF32)."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found |= {function.overloadpacket.__name__} & PRODUCTS
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", TERMS)
def test_a_term_has_no_product_that_a_gpu_may_shorten(name):
    criterion = ReconstructionLoss({name: 1.}, sharpen=0.3 if name in STRUCTURAL_TERMS else 0.)
    with Products() as products:
        differentiate(criterion, *images())
    # Ten bits are enough for the projections of patches, and for `gabor`, whose operator is not looked into.
    assert not products.found or name == "patch-swd", products.found


def test_the_collector_sees_products():
    with Products() as products:
        torch.nn.functional.conv2d(torch.rand(1, 1, 4, 4), torch.rand(1, 1, 3, 3))
        torch.einsum("bchw,kc->bkhw", torch.rand(2, 3, 4, 4), torch.rand(2, 3))
    assert {"convolution", "bmm"} <= products.found


def test_running_norms_stay_where_they_are_in_memory():
    x_tilde, x = images()
    criterion = ReconstructionLoss({"l1": 1.}, balance="gradient")
    address, before = criterion.average_norms.data_ptr(), criterion.average_norms.clone()
    for _ in range(2):
        criterion(x_tilde.clone().requires_grad_(), x)
    assert criterion.average_norms.data_ptr() == address and not torch.equal(criterion.average_norms, before)
