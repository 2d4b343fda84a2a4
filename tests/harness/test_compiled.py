"""torch.compile stood in for: what is compiled, and what happens where it cannot be."""
import pytest
import torch
from torch import nn

from harness.compiled import compile_forward


@pytest.fixture
def modes(monkeypatch):
    """Modes that networks are compiled with, here by a compiler that merely traces them."""
    asked, real = [], torch.compile

    def traced(function, mode):
        asked.append(mode)
        return real(function, backend="eager")
    monkeypatch.setattr(torch, "compile", traced)
    return asked


@pytest.mark.parametrize("graphs, mode", [(True, "reduce-overhead"), (False, None)])
def test_a_compiled_network_computes_the_same(modes, graphs, mode):
    network, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(2, 3, 8, 8)
    names, expected = list(network.state_dict()), network(x)
    compile_forward(network, graphs)
    for _ in range(2):
        torch.testing.assert_close(network(x), expected)
    network(x).sum().backward()
    assert network[0].weight.grad is not None and modes == [mode] and list(network.state_dict()) == names
    torch.testing.assert_close(network.eval()(x), network.forward(x))


def test_a_compiler_that_fails_is_one_line_and_the_network_works(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("no C++ compiler\nfound")
    monkeypatch.setattr(torch, "compile", lambda *_, **__: fail)
    network, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3)
    expected = network(x)
    compile_forward(network)
    assert torch.equal(network(x), expected) and torch.equal(network(x), expected)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "no C++ compiler" in out and "--compile" in out


def test_an_error_of_the_network_s_own_is_raised(modes, capsys):
    network = nn.Sequential(nn.Linear(3, 3))
    compile_forward(network)
    with pytest.raises(RuntimeError, match="shapes"):
        network(torch.randn(2, 5))
    assert not capsys.readouterr().out


def test_a_compiled_network_is_differentiated_twice(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode: real(function, backend="aot_eager"))
    network, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()), torch.randn(2, 3, 8, 8)
    compile_forward(network)
    loss = network(x).square().sum()
    first, = torch.autograd.grad(loss, network[0].weight, retain_graph=True)
    loss.backward()
    torch.testing.assert_close(network[0].weight.grad, first)
