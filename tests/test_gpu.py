"""What only a GPU can show: a captured step is the step, to the bit where the step itself is the same twice."""
import functools

import pytest
import torch
import torch.nn.functional as F
from conftest import call, write_images
from torch import nn

import experiment
from harness import batches, cli
from harness.device import adam, autocast_of, one_step, pick_device, set_lr
from losses import TERMS, ReconstructionLoss
from modules import GatedPixelCNN, VectorQuantizedVAE
from quantizers import QUANTIZERS, filled

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
CAPTURED = "is one CUDA graph from here on"


@pytest.fixture(scope="module")
def gpu():
    return pick_device("cuda")


@pytest.fixture
def deterministic(monkeypatch):
    """Sums in one order, where PyTorch has a kernel for it: those of atomic additions differ from run to run."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_what_is_drawn_in_a_graph_is_what_is_drawn_without(gpu, capsys):
    drawn, states = [], []
    for graph in (True, False):
        torch.manual_seed(0)
        step = one_step(lambda x: torch.randint(2048, (512,), device=gpu) + 0 * x, gpu, graph=graph)
        drawn.append(torch.stack([step(torch.zeros(512, dtype=torch.int64, device=gpu)).clone() for _ in range(12)]))
        states.append(torch.cuda.get_rng_state(gpu))
    assert CAPTURED in capsys.readouterr().out
    assert torch.equal(*drawn) and torch.equal(*states) and len(drawn[0].unique(dim=0)) == 12


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name != "fsq"])
def test_a_codebook_whose_codes_restart_is_the_same_with_and_without_a_graph(gpu, deterministic, name):
    batches, books = torch.randn(30, 4, 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(gpu), []
    for graph in (True, False, False):
        torch.manual_seed(0)
        book = QUANTIZERS[name](64, 16, decay=0.8, data_init=True, restart_below=0.5).to(gpu).train()

        def update(x, book=book):
            with torch.no_grad():
                return book.straight_through(x)[2]
        step = one_step(update, gpu, graph=graph, ready=functools.partial(filled, book))
        latents = torch.stack([step(x).clone() for x in batches])
        books.append([latents, *book.state_dict().values()])
    graphed, plain, again = books
    assert all(map(torch.equal, plain, again)), "the codebook itself differs from run to run"
    assert all(map(torch.equal, graphed, plain))


def trained(gpu, graph, *flags, steps=50):
    """{name: value} of weights and averages after steps on one batch, its losses among them."""
    parser = cli.Parser()
    experiment.add_arguments(parser, "x")
    args = experiment.parse_args(parser, ["--hidden-size", "32", "--k", "64", *flags])
    torch.manual_seed(0)
    model = VectorQuantizedVAE(**experiment.model_args_of(args, 3)).to(gpu, memory_format=torch.channels_last).train()
    criterion = ReconstructionLoss(experiment.weights_of(args), sharpen=args.sharpen).to(gpu)
    optimizer, autocast = adam(model.parameters(), 1e-3), autocast_of(gpu, "auto")
    average = experiment.average_of(model, optimizer, args.average_weights)
    x = (torch.rand(32, 3, 32, 32) * 2 - 1).to(gpu, memory_format=torch.channels_last)

    def update(x):
        with autocast():
            x_tilde, z_e, z_q = model(x)
        loss = criterion(x_tilde, x)[0] + F.mse_loss(z_q, z_e.detach().float()) + F.mse_loss(z_e.float(), z_q.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()
    step, losses = one_step(update, gpu, optimizer, graph=graph, ready=functools.partial(filled, model)), []
    for number in range(steps):
        set_lr(optimizer, 1e-3 * (1 - number / steps))
        losses.append(step(x).clone())
    averaged = average.module.state_dict() if average else {}
    return {"losses": torch.stack(losses), **model.state_dict()} | {
        f"average {name}": value for name, value in averaged.items()}


@pytest.mark.parametrize("flags", [
    (), ("--recipe", "recommended", "--restart-below", "0.2"), ("--recipe", "recommended-photos"),
    ("--quantizer", "gradient", "--restart-below", "0.2"),
    ("--quantizer", "fsq", "--average-weights", "0.99"), ("--quantizer", "rotation"), ("--quantizer", "cosine")])
def test_weights_after_50_steps_are_those_without_a_graph(gpu, deterministic, flags):
    graphed, plain, again = (trained(gpu, graph, *flags) for graph in (True, False, False))
    assert_alike(graphed, plain, again)


def assert_alike(graphed, plain, again):
    """The run as a graph differs from the plain one by no more than that one from a second of its kind."""
    def largest(one, two):
        return float((one.double() - two.double()).abs().max())
    sizes = {name: (largest(graphed[name], value), largest(again[name], value)) for name, value in plain.items()}
    assert {name: size for name, size in sizes.items() if size[0] > 10 * size[1]} == {}


@pytest.mark.parametrize("name", TERMS)
def test_a_loss_term_is_that_of_a_cpu_in_float64(gpu, name):
    torch.manual_seed(0)
    x = F.interpolate(torch.rand(4, 3, 16, 16, dtype=torch.float64), scale_factor=4, mode="bilinear") * 1.8 - 0.9
    x_tilde, found = (x + 0.05 * torch.randn_like(x)).clamp(-1, 1), []
    for where, dtype in (("cpu", torch.float64), (gpu, torch.float32)):
        image = x_tilde.to(where, dtype, memory_format=torch.channels_last).requires_grad_()
        value = TERMS[name](image, x.to(where, dtype, memory_format=torch.channels_last))
        found.append([part.double().cpu() for part in (value.detach(), *torch.autograd.grad(value, image))])
    (value, gradient), (value_there, gradient_there) = found
    torch.testing.assert_close(value_there, value, rtol=1e-3, atol=1e-6)
    assert (gradient_there - gradient).norm() < 1e-2 * gradient.norm()


def test_images_that_stay_on_the_cpu_come_in_the_same_batches(gpu, monkeypatch):
    images = torch.randint(256, (40, 12, 12, 3), dtype=torch.uint8)
    near, far = [], []
    for found, room in ((near, True), (far, False)):
        monkeypatch.setattr(batches, "has_room", lambda device, images, room=room: room)
        train = batches.Batches(images, torch.arange(40), 8, gpu, shuffle=True, flip=True, size=(8, 8))
        assert train.images.is_cuda == room
        found += [*(part for batch in train.epoch(2) for part in batch), train.examples(5)]
    assert all(a.is_cuda and b.is_cuda and torch.equal(a, b) for a, b in zip(near, far, strict=True))


def test_a_step_that_waits_is_one_line_and_training_goes_on(gpu, capsys):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.ones(4, device=gpu))
    optimizer = adam([weight], 0.1)

    def update(x):
        loss = (weight * x * torch.rand(4, device=gpu)).sum()
        loss.backward()
        assert loss.item() is not None  # waits for the device
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()
    step, found = one_step(update, gpu, optimizer), []
    for _ in range(8):
        step(torch.ones(4, device=gpu))
        found.append(weight.detach().clone())
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "is no CUDA graph" in out
    assert all((new < old).all() for old, new in zip(found, found[1:])) and weight.grad is None
    assert torch.rand(2, device=gpu).isfinite().all()  # its generator draws outside of a capture again
    other = one_step(lambda x: x + torch.rand(4, device=gpu), gpu)
    assert len({float(other(torch.zeros(4, device=gpu))[0]) for _ in range(8)}) == 8
    assert CAPTURED in capsys.readouterr().out


def test_a_prior_samples_on_a_gpu_what_it_samples_on_a_cpu(gpu):
    torch.manual_seed(0)
    model, label = GatedPixelCNN(32, 16, 4, 3).eval(), torch.arange(6) % 3
    grids = [model.to(where).generate(label.to(where), (5, 6), 6, top_k=20, generator=torch.Generator().manual_seed(1))
             for where in ("cpu", gpu)]
    assert (grids[0] == grids[1].cpu()).float().mean() > 0.95  # nearly equal logits draw nearly always the same


# --- the scripts

SMALL = ("--dataset", "folder", "--data-folder", "images", "--hidden-size", "16", "--k", "32", "--batch-size", "8",
         "--num-epochs", "3", "--log-every", "4", "--restart-below", "0.2")


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, 90, side=32)
    return tmp_path


def run(folder, script, *flags):
    code, out, err = call(folder, script, *flags)
    assert code == 0, err
    return out


def weights(folder, name):
    return torch.load(folder / "models" / name / "last.pt")["model"]


@pytest.mark.parametrize("script, flags", [
    ("vqvae.py", ("--average-weights", "0.9", "--lr-schedule", "cosine")), ("vqvae.py", ("--recipe", "recommended")),
    ("vqvae.py", ("--precision", "fp32")), ("vqgan.py", ("--disc-start", "0.4", "--disc-layers", "1"))])
def test_a_script_trains_alike_with_and_without_a_graph(gpu, deterministic, folder, script, flags):
    outputs = [run(folder, script, *SMALL, *flags, *more, "--output-folder", name)
               for name, more in (("graph", ()), ("plain", ("--no-graph",)), ("again", ("--no-graph",)))]
    assert [CAPTURED in out for out in outputs] == [True, False, False]
    assert_alike(*(weights(folder, name) for name in ("graph", "plain", "again")))


def test_a_run_goes_on_where_it_stopped_and_on_another_device(gpu, deterministic, folder):
    flags = ("--average-weights", "0.9")
    run(folder, "vqvae.py", *SMALL, *flags, "--output-folder", "whole")
    for number, device in (("1", "cuda"), ("2", "cpu"), ("3", "cuda")):
        run(folder, "vqvae.py", *SMALL, *flags, "--num-epochs", number, "--device", device, "--resume")
    assert all(value.isfinite().all() for value in weights(folder, "vqvae").values())
    for number in ("1", "3"):
        run(folder, "vqvae.py", *SMALL, *flags, "--num-epochs", number, "--resume", "--output-folder", "parts")
    for name, value in weights(folder, "whole").items():
        torch.testing.assert_close(weights(folder, "parts")[name], value, atol=1e-3, rtol=1e-3)


def test_the_priors_train_and_sample_as_graphs(gpu, folder):
    run(folder, "vqvae.py", *SMALL)
    prior = ("--model", "models/vqvae", "--num-epochs", "3", "--batch-size", "8", "--hidden-size-prior", "16",
             "--num-layers", "2")
    assert CAPTURED in run(folder, "pixelcnn_prior.py", *prior)
    run(folder, "stacked_vqvae.py", *prior)


def test_a_compiled_step_is_captured_too(gpu, folder):
    out = run(folder, "vqvae.py", *SMALL, "--recipe", "recommended", "--compile")
    assert "compiled in" in out and CAPTURED in out and "left out" not in out
