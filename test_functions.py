"""`vq` against brute force, `vq_st` against torch.nn.functional.embedding."""
import pytest
import torch
import torch.nn.functional as F

import functions
from functions import rotation_st, vq, vq_st
from kernels import nearest


def brute_force(inputs, codebook):
    """Squared distances (N, K) in float64, by the definition."""
    return (inputs.double().reshape(-1, 1, inputs.shape[-1]) - codebook.double()).square().sum(-1)


@pytest.mark.parametrize("shape, codes", [((7,), 1), ((5, 3), 11), ((2, 3, 4, 16), 512), ((0, 8), 4), ((3000, 2), 700)])
def test_vq_finds_the_nearest_code(shape, codes):
    torch.manual_seed(0)
    inputs, codebook = torch.randn(shape), torch.randn(codes, shape[-1])
    indices = vq(inputs, codebook)
    assert indices.shape == shape[:-1] and indices.dtype == torch.int64
    assert torch.equal(indices.flatten(), brute_force(inputs, codebook).argmin(1))


@pytest.mark.parametrize("scale", [1e-30, 1e-5, 1., 1e6, 1e30])
@pytest.mark.parametrize("offset", [0., 1e4])
def test_vq_is_exact_at_any_scale_and_far_from_the_origin(scale, offset):
    torch.manual_seed(1)
    inputs, codebook = (torch.randn(400, 8) + offset) * scale, (torch.randn(300, 8) + offset) * scale
    distances = brute_force(inputs, codebook)
    chosen = distances.gather(1, vq(inputs, codebook).unsqueeze(1)).squeeze(1)
    assert (chosen <= distances.amin(1) * (1 + 1e-5)).all()


def test_vq_ties_go_to_the_lowest_index():
    torch.manual_seed(2)
    for _ in range(50):
        codes, width = (int(torch.randint(low, high, ())) for low, high in ((2, 600), (1, 100)))
        base = torch.randn(max(1, codes // 3), width)
        codebook = base[torch.randint(len(base), (codes,))]  # most codes stand there several times
        indices = vq(torch.randn(40, width), codebook)
        first = (codebook[indices].unsqueeze(1) == codebook).all(-1).int().argmax(1)  # of the codes equal to the chosen
        assert torch.equal(indices, first)
    lattice = torch.tensor([[0.], [1.], [5.], [1.]])
    assert vq(torch.tensor([[0.5], [3.], [1.]]), lattice).tolist() == [0, 1, 1]


def test_vq_search_is_float32_under_autocast():
    torch.manual_seed(3)
    inputs, codebook = torch.randn(500, 64), torch.randn(512, 64)
    with torch.autocast("cpu", torch.bfloat16):
        indices = vq(inputs, codebook)
    assert torch.equal(indices, brute_force(inputs, codebook).argmin(1))


def test_vq_never_holds_all_distances(monkeypatch):
    monkeypatch.setattr(nearest, "BLOCK", 500)
    monkeypatch.setattr(nearest, "CODES", 12)
    monkeypatch.setattr(nearest, "GROUP", 3)
    largest, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **kwargs: largest.append(addmm(*args, **kwargs)) or largest[-1])
    inputs, codebook = torch.randn(333, 4), torch.randn(50, 4)
    assert torch.equal(vq(inputs, codebook), brute_force(inputs, codebook).argmin(1))
    assert max(distances.numel() for distances in largest) == 500 // 12 * 12


def test_vq_accepts_half_precision_and_strides():
    inputs = torch.randn(2, 8, 3, 5).bfloat16().permute(0, 2, 3, 1)
    codebook = torch.randn(20, 8)
    assert torch.equal(vq(inputs, codebook).flatten(), brute_force(inputs, codebook).argmin(1))


@pytest.mark.parametrize("function", [vq, vq_st])
@pytest.mark.parametrize("inputs, codebook", [
    (torch.zeros(2, 3), torch.zeros(4, 5)), (torch.zeros(2, 3), torch.zeros(0, 3)), (torch.zeros(2, 3), torch.zeros(3)),
    (torch.zeros(2, 3).long(), torch.zeros(4, 3)), (torch.zeros(2, 3), torch.zeros(4, 3).int()),
    (torch.tensor(1.), torch.zeros(4, 1)), (torch.zeros(2, 0), torch.zeros(4, 0))])
def test_wrong_arguments_name_both_shapes(function, inputs, codebook):
    with pytest.raises(ValueError) as error:
        function(inputs, codebook)
    assert str(tuple(inputs.shape)) in str(error.value) and str(tuple(codebook.shape)) in str(error.value)


def test_vq_is_not_differentiable_and_says_what_is():
    indices = vq(torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True))
    assert not indices.requires_grad
    with pytest.raises(RuntimeError):
        indices.float().sum().backward()
    with pytest.raises(RuntimeError, match="vq_st"):
        functions._NearestCode.backward(None, torch.ones(3))


def test_vq_st_gradients_are_those_of_an_embedding():
    torch.manual_seed(4)
    inputs, codebook = torch.randn(6, 5, 7, requires_grad=True), torch.randn(11, 7, requires_grad=True)
    codes, indices = vq_st(inputs, codebook)
    upstream = torch.randn_like(codes)
    grad_inputs, grad_codebook = torch.autograd.grad(codes, (inputs, codebook), upstream)

    table = codebook.detach().clone().requires_grad_()
    looked_up = F.embedding(indices, table)
    looked_up.backward(upstream.view(-1, 7))
    assert indices.shape == (30,) and torch.equal(codes.view(-1, 7), looked_up)
    assert torch.equal(grad_inputs, upstream)
    torch.testing.assert_close(grad_codebook, table.grad)


def test_vq_st_gives_half_precision_inputs_a_gradient_of_their_own_dtype():
    inputs = torch.randn(6, 4, dtype=torch.bfloat16, requires_grad=True)
    codes, _ = vq_st(inputs, torch.randn(3, 4))
    codes.sum().backward()
    assert codes.dtype == torch.float32 and inputs.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("autocast", [False, True])
def test_each_function_is_one_graph_and_keeps_its_gradient(autocast):
    def step(inputs, codebook):
        codes, indices = vq_st(inputs, codebook)
        turned = rotation_st(inputs.transpose(1, -1), codes.detach().transpose(1, -1))
        return (codes ** 3).sum() + (turned ** 3).sum(), indices, vq(inputs, codebook)

    found = []
    for call in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(5)
        inputs, codebook = torch.randn(2, 5, 4, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value, *indices = call(inputs, codebook)
        value.backward()
        found.append((value, *indices, inputs.grad, codebook.grad))
    assert all(torch.equal(*pair) for pair in zip(*found))
