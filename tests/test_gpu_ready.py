"""What a GPU needs, shown without one: no step waits for the device, no tensor is left behind, few operators a step."""
from collections import Counter
from functools import cache
from subprocess import CalledProcessError

import pytest
import torch
import torch.nn.functional as F
from conftest import call, write_images
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from functions import vq
from harness import checkpoint, device
from harness.run import Run
from kernels import ssim
from losses import TERMS, ReconstructionLoss
from metrics import CONVENTIONS, IMAGE_METRICS, as_8bit
from modules import GatedPixelCNN, VectorQuantizedVAE
from priors.networks import StackedVQVAE, VideoPrior
from quantizers import QUANTIZERS, settings_of
from study.classifier import Classifier
from study.judges import EffNetLite
from terms import filters
from vqgan import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss

WAITS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "bincount", "unique_dim",
         "_unique2", "unique_consecutive", "repeat_interleave"}
SMALL = ["--hidden-size", "8", "--batch-size", "8", "--num-epochs", "2", "--device", "cpu", "--log-every", "4"]
MOST_OPERATORS = {"vqvae.py": 700, "vqgan.py": 650, "pixelcnn_prior.py": 160}  # with the flags below


class Operators(TorchDispatchMode):
    """Counts operators by name while `on`, those that index by a mask as "mask"."""

    on, steps = False, 0

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if self.on:
            name = function.overloadpacket.__name__
            indices = args[1] if name in ("index", "index_put", "index_put_") else ()
            masked = any(torch.is_tensor(index) and index.dtype == torch.bool for index in indices)
            self.counts["mask" if masked else name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture
def operators(monkeypatch):
    """Counts what happens in the training steps that log nothing, the first few left aside."""
    counter, batches = Operators(), Run.batches

    def counted(self, loader):
        for batch in batches(self, loader):
            counter.on = self.step > 4 and not self.log_now()
            counter.steps += counter.on
            yield batch
        counter.on = False
    monkeypatch.setattr(Run, "batches", counted)
    return counter


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, 80, side=32)
    return tmp_path


def test_the_counter_sees_waits():
    counter = Operators()
    with counter:
        counter.on = True
        x = torch.rand(4)
        x[x > 0.5].sum().item()
        torch.unique(x, dim=0)
        torch.bincount(torch.ones(3, dtype=torch.int64))
    assert {"mask", "_local_scalar_dense", "unique_dim", "bincount"} <= set(counter.counts)


@pytest.mark.parametrize("script, flags", [
    ("vqvae.py", ["--recipe", "recommended"]), ("vqvae.py", ["--balance", "gradient", "--ssim-weight", "1"]),
    *(("vqvae.py", ["--quantizer", name]) for name in QUANTIZERS),
    ("vqvae.py", ["--average-weights", "0.9"]),
    ("vqgan.py", ["--disc-start", "0", "--disc-layers", "2"]), ("pixelcnn_prior.py", [])])
def test_no_step_waits_for_the_device_between_two_logs(folder, operators, script, flags):
    data = ["--dataset", "folder", "--data-folder", "images", "--k", "16"]
    if script == "pixelcnn_prior.py":
        assert call(folder, "vqvae.py", *SMALL, *data)[0] == 0
        data, flags = ["--model", "models/vqvae"], [*SMALL[2:], "--hidden-size-prior", "8", "--num-layers", "3"]
    else:
        flags = [*SMALL, *flags]
    with operators:
        code, _, err = call(folder, script, *data, *flags)
    assert code == 0, err
    assert operators.steps >= 6
    waits = {name: count for name, count in operators.counts.items() if name in WAITS | {"mask"}}
    assert not waits, waits
    a_step = sum(operators.counts.values()) / operators.steps
    print(f"{script} {' '.join(flags)}: {a_step:.0f} operators a step")
    assert a_step < MOST_OPERATORS[script]


def test_a_loss_that_turns_nan_between_two_logs_never_reaches_a_checkpoint(folder, monkeypatch):
    calls = []

    def broken(x_tilde, x):
        calls.append(0)
        return TERMS["l1"](x_tilde, x) * (torch.nan if len(calls) == 6 else 1.)  # once at construction
    monkeypatch.setitem(TERMS, "mse", broken)
    code, _, err = call(folder, "vqvae.py", *SMALL, "--log-every", "100", "--dataset", "folder", "--data-folder",
                        "images", "--k", "16")
    assert code == 2 and "the loss is not finite at step 4" in err and "mse" in err, (err, len(calls))
    last = checkpoint.load(folder / "models" / "vqvae" / "last.pt", "vqvae")
    assert last["counters"]["step"] == 0 and all(value.isfinite().all() for value in last["model"].values())


# --- on fake CUDA tensors, which have shapes and devices and no values

class NoCopies(TorchDispatchMode):
    """Fails where something is copied from the CPU to a device: unless the memory is pinned, the step waits for it.

    Numbers without dimensions are passed to kernels by value.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given, made = (tree_leaves(values) for values in ((args, kwargs), result))
        if any(torch.is_tensor(part) and part.device.type == "cuda" for part in (*given, *made)):
            left = [part for part in given if torch.is_tensor(part) and part.device.type == "cpu" and part.dim()]
            assert not left, f"{function} takes {left} of the CPU to a device"
        return result


@pytest.fixture
def cuda():
    """A fake device."""
    device = torch.device("cuda")
    with FakeTensorMode():
        yield device


def on_cuda(*tensors):
    assert all(tensor.device.type == "cuda" for tensor in tensors), tensors


@pytest.mark.parametrize("downsample", [4, 8])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_vqvae_stays_on_the_device(cuda, quantizer, downsample):
    settings = {"restart_below": 0.02} if "restart_below" in settings_of(quantizer) else {}
    with cuda:
        model = VectorQuantizedVAE(3, 8, 16, downsample=downsample, quantizer=quantizer, fine_blocks=1, **settings)
    x = torch.zeros(2, 3, 32, 32, device=cuda)
    with NoCopies():
        on_cuda(*model.eval()(x), model.encode(x), model.decode(model.encode(x)))
        on_cuda(*model.train()(x))


def test_the_loss_of_a_recipe_waits_for_nothing(cuda):
    with cuda:
        criterion = ReconstructionLoss(dict.fromkeys(TERMS, 1.), sharpen=0.3)
        criterion._range_checked = True  # a look at values, once
        x = torch.zeros(2, 3, 48, 48)
    with NoCopies():
        total, parts = criterion(x, x)
    on_cuda(total, *parts.values())


def test_the_networks_over_latents_and_judges_stay_on_the_device(cuda):
    with cuda:
        stacked, video = StackedVQVAE(16, 8, (9, 9), 2, 8, 2), VideoPrior(16, 2, 3, 8, 2)
        judge, pretrained = Classifier(3, 4, 8), EffNetLite(0)
        grid, x = torch.zeros(2, 3, 9, 9, dtype=torch.int64), torch.zeros(2, 3, 32, 32)
        action, absent = torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    for book in stacked.codebooks:
        book.data_init = False  # a look at values, in the first steps
    with NoCopies():
        on_cuda(*stacked(grid[:, 0], absent), video(grid, action), judge.logits(judge(x)), pretrained(x),
                pretrained.paired(x, x), *(metric(x, x) for metric in CONVENTIONS.values()))


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    """On a machine with one GPU, where auto finds it."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device, "has_triton", lambda: True)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", taken.append, raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed, empty = torch.get_float32_matmul_precision(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, device=None, **kwargs: empty(*args, **kwargs))
    try:
        assert device.pick_device("auto") == device.pick_device("cuda") == torch.device("cuda", 0)
        assert device.pick_device("cuda:1") == torch.device("cuda", 1) and taken == [0, 0, 1]
    finally:
        torch.set_float32_matmul_precision(allowed)


@pytest.mark.parametrize("error", [RuntimeError("Failed to find C compiler"), CalledProcessError(1, ["gcc"]),
                                   AssertionError("libcuda.so cannot found!")])
def test_a_gpu_without_a_compiler_trains_without_triton(monkeypatch, capsys, error):
    class Driver:
        @property
        def active(self):
            raise error
    monkeypatch.setattr(pytest.importorskip("triton.runtime", reason="needs Triton"), "driver", Driver())
    monkeypatch.setattr(device, "has_triton", cache(device.has_triton.__wrapped__))
    assert not device.has_triton() and not device.has_triton()
    out = capsys.readouterr().out
    assert out.count("apt install gcc") == 1 and out.endswith(f"libcuda.so: {error}\n")


@pytest.mark.parametrize("precision, allowed", [("fp32", True), ("bf16", False)])
def test_tf32_is_for_networks_in_float32_alone(monkeypatch, precision, allowed):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", not allowed)
    before = torch.get_float32_matmul_precision()
    try:
        device.autocast_of(torch.device("cuda"), precision)
        assert (torch.get_float32_matmul_precision() != "highest") == torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("amx, avx512_bf16, intel, precision", [
    (True, True, True, "bf16"), (False, True, True, "fp32"), (False, True, False, "bf16"),
    (False, False, False, "fp32")])
def test_a_cpu_has_bf16_where_it_is_faster(monkeypatch, amx, avx512_bf16, intel, precision):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(device, "_is_intel", lambda: intel)
    with device.autocast_of(torch.device("cpu"), "auto")():
        assert torch.is_autocast_enabled("cpu") == (precision == "bf16")


def test_the_prior_and_the_discriminator_stay_on_the_device(cuda):
    with cuda:
        prior, discriminator = GatedPixelCNN(16, 8, 3, 4), PatchDiscriminator(3, 8)
    latents = torch.zeros(2, 5, 6, dtype=torch.int64, device=cuda)
    logits = prior(latents, torch.zeros(2, dtype=torch.int64, device=cuda))
    on_cuda(logits, F.cross_entropy(logits.float(), latents))
    on_cuda(discriminator(torch.zeros(2, 3, 32, 32, device=cuda)))


def test_the_search_stays_on_the_device(cuda):
    on_cuda(vq(torch.zeros(2, 5, 8, device=cuda), torch.zeros(4096, 8, device=cuda)))


@pytest.mark.parametrize("name", TERMS)
def test_a_loss_term_stays_on_the_device(cuda, name):
    images = torch.zeros(2, 2, 3, 48, 48, device=cuda)
    with NoCopies():
        on_cuda(TERMS[name](*images))


def test_what_an_operator_runs_stays_on_the_device_and_is_what_its_fake_says(cuda, monkeypatch):
    """Without Triton; fake tensors do not enter operators of `torch.library` by themselves."""
    monkeypatch.setattr(device, "has_triton", lambda: False)

    def enter(operator, *inputs):
        with NoCopies():
            made, said = (tree_leaves(call(*inputs)) for call in (operator._init_fn, operator))
        on_cuda(*made, *said)
        of_made, of_said = ([(part.shape, part.stride(), part.dtype) for part in parts] for parts in (made, said))
        assert of_made == of_said
        return made
    x = torch.zeros(2, 3, 49, 48, device=cuda)
    luma = x[:, :1]
    blocks = filters._blocks(luma)
    enter(filters._distance, blocks, blocks, filters._in_blocks(filters._filters(luma)), filters._shares(luma))
    enter(ssim._mean, x, x, 11, 1.5, False)
    enter(ssim._mean, x, x, 3, 0.75, True)
    maps = enter(ssim._maps, x, x, 11, 1.5)
    enter(ssim._maps_gradient, *maps[:2], *maps, x, x, 11, 1.5)


@pytest.mark.parametrize("name", IMAGE_METRICS)
def test_a_metric_stays_on_the_device(cuda, name):
    on_cuda(IMAGE_METRICS[name](*as_8bit(torch.zeros(2, 2, 3, 32, 32, device=cuda))))


def test_the_backward_of_every_term_and_network_has_no_shape_that_depends_on_values(cuda):
    with torch.device("cpu"):
        model, x = VectorQuantizedVAE(3, 8, 16, quantizer="ema"), torch.zeros(2, 3, 48, 48)
        criterion = ReconstructionLoss(dict.fromkeys(TERMS, 1.))
        criterion._range_checked = True  # a look at values, once
        x_tilde, z_e, z_q = model(x)
        (criterion(x_tilde, x)[0] + F.mse_loss(z_e, z_q.detach())).backward()
        prior, latents = GatedPixelCNN(16, 8, 3, 0), torch.zeros(2, 5, 6, dtype=torch.int64)
        F.cross_entropy(prior(latents), latents).backward()
        discriminator = PatchDiscriminator(3, 8)
        x_tilde = model(x)[0]
        made = generator_loss(discriminator, x_tilde, torch.no_grad)
        assert made.shape == () and discriminator_loss(discriminator, x, x_tilde, torch.enable_grad)[0].shape == ()
        adversarial = generator_loss(discriminator, x_tilde, torch.enable_grad)
        adaptive_weight(x_tilde.square().mean(), adversarial, model.decoder[-2].weight)
        assert all(parameter.grad is not None for parameter in prior.parameters())


# --- the search

@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_search_is_exact_whatever_products_are_allowed_to_be(precision):
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        torch.manual_seed(0)
        x, codes = torch.randn(500, 32), torch.randn(64, 32)
        expected = torch.cdist(x.double(), codes.double()).argmin(1)
        assert torch.equal(vq(x, codes), expected)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(allowed)


def test_the_search_asks_for_whole_products_and_gives_the_setting_back_and_ssim_has_none(monkeypatch):
    asked, allowed, x = [], torch.get_float32_matmul_precision(), torch.rand(1, 3, 16, 16, requires_grad=True)
    for real in (torch.addmm, torch.mm, torch.bmm):
        def product(*args, real=real, **kwargs):
            asked.append((real.__name__, torch.get_float32_matmul_precision()))
            return real(*args, **kwargs)
        monkeypatch.setattr(torch, real.__name__, product)
    torch.set_float32_matmul_precision("high")
    try:
        vq(torch.rand(5, 4), torch.rand(3, 4))
        TERMS["ssim"](x, torch.rand(1, 3, 16, 16)).backward()
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert set(asked) == {("addmm", "highest")}
