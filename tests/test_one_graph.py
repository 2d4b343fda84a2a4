"""A step of training as one graph: it compiles without a break, and nothing in it would be frozen by a capture."""
import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from conftest import call, write_images
from recording import Recording
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

import experiment
import stacked_vqvae
from harness import cli
from harness.device import GraphedStep
from losses import ReconstructionLoss
from modules import VectorQuantizedVAE
from priors import networks
from quantizers import QUANTIZERS, filled

# Every quantizer and every recipe; whether one compiles does not depend on the other.
PAIRS = [("ema", "recommended"), ("gradient", "recommended-photos"), ("cosine", "mse"), ("fsq", "mse"),
         ("rotation", "mse")]
MOST_OPERATORS = {"mse": 180, "recommended": 275, "recommended-photos": 480}  # of forward and backward, before fusion


def flags(*argv):
    parser = cli.Parser()
    experiment.add_arguments(parser, "x")
    return experiment.parse_args(parser, list(argv))


@pytest.mark.parametrize("quantizer, recipe", PAIRS)
def test_forward_loss_codebook_and_backward_compile_as_one_graph(quantizer, recipe):
    assert {name for name, _ in PAIRS} == set(QUANTIZERS)
    args = flags("--quantizer", quantizer, "--recipe", recipe, "--hidden-size", "8", "--k", "16")
    torch.manual_seed(0)
    models = [VectorQuantizedVAE(**experiment.model_args_of(args, 3)).train() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    criterion, x = ReconstructionLoss(experiment.weights_of(args), sharpen=args.sharpen), torch.rand(8, 3, 32, 32)
    graphs, results = [], []
    torch._dynamo.reset()  # what was compiled before decides what is seen as changing

    def keep(graph, inputs):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    def loss_of(model, x):
        x_tilde, z_e, z_q = model(x)
        return criterion(x_tilde, x)[0] + F.mse_loss(z_q, z_e.detach()) + args.beta * F.mse_loss(z_e, z_q.detach())

    for model, how in zip(models, (lambda function: function, functools.partial(
            torch.compile, fullgraph=True, dynamic=False, backend=aot_autograd(fw_compiler=keep)))):
        torch.manual_seed(1)
        loss_of(model, x)  # fills the codebook
        assert filled(model)
        loss = how(functools.partial(loss_of, model))(x)
        loss.backward()
        results.append([loss.detach(), *model.state_dict().values(),
                        *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
    assert len(graphs) == 2  # forward and backward
    operators = sum(node.op == "call_function" and not getattr(node.target, "is_view", True)
                    for graph in graphs for node in graph.graph.nodes)
    print(f"{recipe}, {quantizer}: {operators} operators to fuse")
    assert operators < MOST_OPERATORS[recipe]
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


# --- the scripts with the graph of a step stood in for

SMALL = ["--dataset", "folder", "--data-folder", "images", "--hidden-size", "8", "--k", "16", "--batch-size", "4",
         "--num-epochs", "2", "--log-every", "3", "--device", "cpu", "--lr-schedule", "cosine", "--average-weights",
         "0.9", "--restart-below", "0.5", "--codebook-decay", "0.8"]
PRIOR = ["--model", "models/vqvae", "--hidden-size-prior", "8", "--num-layers", "2", "--batch-size", "4",
         "--num-epochs", "2", "--log-every", "3", "--device", "cpu", "--lr-schedule", "cosine"]
SCRIPTS = {
    "vqvae.py": [*SMALL, "--recipe", "recommended"],
    "vqvae.py --balance gradient": [*SMALL, "--balance", "gradient", "--ssim-weight", "1"],
    **{f"vqvae.py --quantizer {name}": [*SMALL, "--quantizer", name] for name in QUANTIZERS},
    "vqgan.py": [*SMALL, "--disc-start", "0.5", "--disc-layers", "1"],
    "pixelcnn_prior.py": PRIOR,
    "stacked_vqvae.py": PRIOR,
}


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, 48, side=32)
    return tmp_path


def train(folder, monkeypatch, script, flags, recordings):
    """A run's last checkpoint; its steps are replayed where `recordings` is a list, which then holds them."""
    def graphed(step, _, *optimizers, ready=lambda: True, **__):
        if recordings is None:
            return step
        recordings.append(GraphedStep(step, optimizers, ready, Recording()))
        return recordings[-1]
    monkeypatch.setattr(importlib.import_module(script.removesuffix(".py")), "one_step", graphed)
    monkeypatch.setattr(torch.optim, "Adam", TensorRate)
    name = "plain" if recordings is None else "graphed"
    code, _, err = call(folder, script, *flags, "--output-folder", name)
    assert code == 0, err
    return torch.load(folder / "models" / name / "last.pt")


class TensorRate(torch.optim.Adam):
    """Adam whose learning rate is a tensor, as on a GPU."""

    def __init__(self, parameters, lr, **how):
        super().__init__(parameters, torch.tensor(lr), **how)


@pytest.mark.parametrize("case", SCRIPTS)
def test_a_run_whose_steps_are_replayed_equals_one_whose_steps_are_not_to_the_bit(folder, monkeypatch, case):
    script, *_ = case.split()
    recorded = []
    for module in (networks, stacked_vqvae):
        monkeypatch.setattr(module, "CODES", 8)  # as many as a few small batches fill
    if SCRIPTS[case] is PRIOR:
        assert call(folder, "vqvae.py", *SMALL, "--num-epochs", "1")[0] == 0
    plain, replayed = (train(folder, monkeypatch, script, SCRIPTS[case], kept) for kept in (None, recorded))
    (step,) = recorded
    assert step.graphs.replays >= 6, step.seen
    for name in ("model", "optimizer", "average", "discriminator", "disc_optimizer", "random", "best"):
        assert_equal(plain.get(name), replayed.get(name), name)


def assert_equal(one, two, where):
    if isinstance(one, dict):
        assert list(one) == list(two)
        for name in one:
            assert_equal(one[name], two[name], f"{where} {name}")
    elif isinstance(one, list):
        for number, pair in enumerate(zip(one, two)):
            assert_equal(*pair, f"{where} {number}")
    else:
        assert torch.equal(one, two) if torch.is_tensor(one) else one == two, where
