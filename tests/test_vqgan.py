"""vqgan.py: who gets which gradient, the adaptive weight, and runs that equal vqvae.py's until it starts."""
import json
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import call, write_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import vqgan
from harness import checkpoint
from modules import VectorQuantizedVAE
from vqgan import PatchDiscriminator, PerceptualLoss

SMALL = ("--dataset", "folder", "--data-folder", "images", "--hidden-size", "8", "--k", "16", "--batch-size", "8",
         "--num-epochs", "2", "--lr", "1e-3", "--log-every", "2", "--device", "cpu", "--precision", "fp32")
GAN = (*SMALL, "--disc-hidden-size", "8")


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, 60)
    return tmp_path


def has_gradient(module):
    return any(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_each_step_sends_its_gradient_to_one_side_only():
    torch.manual_seed(0)
    model, discriminator = VectorQuantizedVAE(3, 8, 16), PatchDiscriminator(3, 8)
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    vqgan.generator_loss(discriminator, model(x)[0], nullcontext).backward()
    assert has_gradient(model) and not has_gradient(discriminator)
    assert all(p.requires_grad for p in discriminator.parameters())
    model.zero_grad()
    vqgan.discriminator_loss(discriminator, x, model(x)[0], nullcontext)[0].backward()
    assert has_gradient(discriminator) and not has_gradient(model)


class Constant(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(2.))

    def forward(self, x):
        return self.weight * x


def test_hinge_losses_by_hand():
    real, made = torch.tensor([0.25, 1.]), torch.tensor([0.5, -1.])  # logits 0.5, 2 and 1, -2
    loss, logits = vqgan.discriminator_loss(Constant(), real, made, nullcontext)
    assert loss.item() == pytest.approx((0.5 / 2 + 2 / 2) / 2)
    assert logits["vqgan/logits_real"] == 1.25 and logits["vqgan/logits_fake"] == -0.5
    assert vqgan.generator_loss(Constant(), made, nullcontext).item() == pytest.approx(0.5)


def test_adaptive_weight_is_the_ratio_of_gradient_norms_and_capped():
    last = torch.nn.Parameter(torch.ones(4))
    losses = (3 * last).sum(), (2 * last).sum()
    assert vqgan.adaptive_weight(*losses, last).item() == pytest.approx(1.5, rel=1e-3)
    assert vqgan.adaptive_weight(losses[0], (0 * last).sum(), last).item() == vqgan.LARGEST_WEIGHT


def test_a_run_logs_and_keeps_the_discriminator(folder):
    code, out, err = call(folder, "vqgan.py", *GAN, "--disc-start", "3")
    assert code == 0, err
    found = checkpoint.load(folder / "models/vqgan/last.pt", "vqvae")
    assert "layers.0.weight" in found["discriminator"] and found["disc_optimizer"]["state"]
    events = EventAccumulator(str(folder / "logs/vqgan"))
    events.Reload()
    tags = {f"vqgan/{name}" for name in ("lambda", "logits_real", "logits_fake")}
    tags |= {"loss/train/generator", "loss/train/discriminator"}
    assert tags <= set(events.Tags()["scalars"])
    assert events.Scalars("vqgan/lambda")[0].step == 4  # logged every other step, active from the third on
    assert json.loads((folder / "models/vqgan/results.json").read_text())["psnr"] > 0
    VectorQuantizedVAE.rebuild(found)  # evaluate.py, reconstruct.py and the prior take it as any other


def test_the_discriminator_starts_at_its_share_of_the_training_and_its_rate_falls_with_the_others(folder):
    code, out, err = call(folder, "vqgan.py", *GAN, "--disc-start", "0.5", "--lr-schedule", "cosine", "--warmup-steps",
                          "2", "--disc-lr", "3e-3")
    assert code == 0, err
    events = EventAccumulator(str(folder / "logs/vqgan"))
    events.Reload()
    assert [event.step for event in events.Scalars("vqgan/lambda")] == [6, 8, 10]  # of 12 steps, every other logged
    last = checkpoint.load(folder / "models/vqgan/last.pt", "vqvae")
    rate, disc_rate = (last[name]["param_groups"][0]["lr"] for name in ("optimizer", "disc_optimizer"))
    assert disc_rate == pytest.approx(3 * rate) and rate == pytest.approx(1e-3 * (1 + math.cos(math.pi * 9 / 10)) / 2)


def test_a_discriminator_that_has_started_stays_in_a_longer_training(folder):
    flags = (*GAN, "--disc-start", "0.5", "--num-epochs")
    assert call(folder, "vqgan.py", *flags, "2")[0] == 0
    code, _, err = call(folder, "vqgan.py", *flags, "6", "--resume")  # of which 2 epochs are a third
    assert code == 0, err
    events = EventAccumulator(str(folder / "logs/vqgan"))
    events.Reload()
    assert [event.step for event in events.Scalars("vqgan/lambda")] == list(range(6, 36, 2))


def test_a_share_of_the_time_where_time_is_the_budget():
    run = SimpleNamespace(step=1000, progress=lambda loader: 0.79)
    assert not vqgan.has_started(run, None, 0.8) and vqgan.has_started(run, None, 0.79)
    assert vqgan.has_started(run, None, 1000) and not vqgan.has_started(run, None, 1001)


def test_what_is_judged_is_the_last_epoch(folder):
    code, out, err = call(folder, "vqgan.py", *GAN, "--disc-start", "0", "--lr", "0.05", "--num-epochs", "4")
    assert code == 0, err
    epochs = [line for line in out.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 4 and all("  best" in line for line in epochs)
    best, last = (checkpoint.load(folder / "models/vqgan" / name, "vqvae") for name in ("best.pt", "last.pt"))
    assert best["counters"]["step"] == last["counters"]["step"] == 24
    assert all(torch.equal(best["model"][name], value) for name, value in last["model"].items())


def test_before_the_discriminator_starts_a_run_is_vqvaes(folder):
    assert call(folder, "vqgan.py", *GAN, "--disc-start", "1000")[0] == 0
    assert call(folder, "vqvae.py", *SMALL)[0] == 0
    one, two = (checkpoint.load(folder / "models" / name / "last.pt", "vqvae")["model"] for name in ("vqgan", "vqvae"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_resumed_equals_uninterrupted(folder):
    flags = (*GAN, "--disc-start", "2")
    assert call(folder, "vqgan.py", *flags, "--output-folder", "whole")[0] == 0
    assert call(folder, "vqgan.py", *flags, "--output-folder", "cut", "--num-epochs", "1")[0] == 0
    assert call(folder, "vqgan.py", *flags, "--output-folder", "cut", "--resume")[0] == 0
    one, two = (checkpoint.load(folder / "models" / name / "last.pt", "vqvae") for name in ("whole", "cut"))
    for part in ("model", "discriminator"):
        assert all(torch.equal(one[part][name], two[part][name]) for name in one[part])


def test_images_too_small_for_the_discriminator(folder):
    code, _, err = call(folder, "vqgan.py", *GAN, "--disc-layers", "3")
    assert code == 2 and "--disc-layers" in err


def test_perceptual_loss_is_zero_at_equality_and_only_there():
    torch.manual_seed(0)
    loss, x = PerceptualLoss(), torch.rand(2, 3, 32, 32) * 2 - 1
    image = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1).requires_grad_()
    assert loss(x, x) == 0
    value = loss(image, x)
    value.backward()
    assert 0 < value < 4 and image.grad.abs().sum() > 0
    assert not any(p.requires_grad for p in loss.parameters()) and not loss.train().network.training
