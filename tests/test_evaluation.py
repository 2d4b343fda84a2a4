"""A model measured on a split, against the same computed by hand."""
import math

import pytest
import torch

import metrics
from harness.batches import Batches
from losses import ReconstructionLoss
from metrics import measure
from modules import VectorQuantizedVAE


def test_figures_are_the_mean_over_images_whatever_the_batches():
    torch.manual_seed(0)
    model = VectorQuantizedVAE(3, 8, 16)
    pixels = torch.randint(256, (10, 16, 16, 3), dtype=torch.uint8)
    criterion = ReconstructionLoss({"mse": 1., "l1": 0.5})
    by_three, at_once = (measure(model, Batches(pixels, torch.zeros(10), size), criterion)[1] for size in (3, 10))
    assert by_three == pytest.approx(at_once, rel=1e-4, abs=1e-5) and model.training
    x = next(iter(Batches(pixels, torch.zeros(10), 10)))[0]
    with torch.no_grad():
        x_tilde = model.eval()(x)[0]
    assert at_once["psnr"] == pytest.approx(metrics.psnr(metrics.as_8bit(x_tilde), metrics.as_8bit(x)).mean().item())
    counts = torch.bincount(model.encode(x).flatten(), minlength=16)
    p = counts[counts > 0] / counts.sum()
    assert at_once["perplexity"] == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-5)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_outputs_that_are_not_finite_are_refused(part):
    model = VectorQuantizedVAE(3, 8, 16, quantizer="fsq")
    torch.nn.init.constant_(next(getattr(model, part).parameters()), 3e38)
    pixels = torch.randint(256, (4, 16, 16, 3), dtype=torch.uint8)
    with pytest.raises(ValueError, match="not finite"):
        measure(model, Batches(pixels, torch.zeros(4), 4))
