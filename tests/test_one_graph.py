"""A step of training as one graph: it compiles without a break, and nothing in it would be frozen by a capture."""
import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.debugging import aot_eager

import experiment
from harness import cli
from losses import ReconstructionLoss
from modules import VectorQuantizedVAE
from quantizers import QUANTIZERS, filled

# Every quantizer and every recipe; whether one compiles does not depend on the other.
PAIRS = [("ema", "recommended"), ("gradient", "recommended-photos"), ("cosine", "mse"), ("fsq", "recommended"),
         ("rotation", "recommended-photos")]


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

    def count(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    def loss_of(model, x):
        x_tilde, z_e, z_q = model(x)
        return criterion(x_tilde, x)[0] + F.mse_loss(z_q, z_e.detach()) + args.beta * F.mse_loss(z_e, z_q.detach())

    for model in models:
        torch.manual_seed(1)
        loss_of(model, x)  # fills the codebook
        assert filled(model)
        function = functools.partial(loss_of, model)
        loss = (torch.compile(function, fullgraph=True, dynamic=False, backend=count) if graphs or results else function)(x)
        loss.backward()
        results.append([loss.detach(), *model.state_dict().values(),
                        *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
    assert len(graphs) == 1
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
