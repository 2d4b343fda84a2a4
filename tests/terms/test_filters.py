"""The terms of fixed filters against SciPy's filtering, one image and one filter at a time."""
import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage import data

from harness.errors import UserError
from kernels import backend
from losses import TERMS
from terms import filters


def responses(luma):
    """(16, H, W) positive and negative parts of the responses of one luma (H, W) in [0, 1]."""
    rows, columns = np.mgrid[-3:4, -3:4]
    window, found = np.exp(-(rows ** 2 + columns ** 2) / (2 * 1.8 ** 2)), []
    for angle in (0, 45, 90, 135):
        along = columns * np.cos(np.radians(angle)) + rows * np.sin(np.radians(angle))
        for wave in (np.cos, np.sin):
            kernel = window * wave(2 * np.pi * along / 4)
            kernel -= window * kernel.sum() / window.sum()
            found.append(ndimage.correlate(luma, kernel / np.linalg.norm(kernel), mode="mirror"))
    return np.maximum([*found, *(-response for response in found)], 0)


@pytest.mark.parametrize("side, scales", [(48, 3), (47, 3), (20, 2)])
def test_gabor_is_the_distance_of_normalised_responses(side, scales):
    crops = np.stack([getattr(data, name)()[40:40 + side, 60:60 + side] for name in ("astronaut", "coffee")])
    x = torch.from_numpy(crops).permute(0, 3, 1, 2) / 127.5 - 1
    y = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)
    expected = []
    for pair in zip(y, x):
        lumas = [np.tensordot((0.299, 0.587, 0.114), (image.double().numpy() + 1) / 2, 1) for image in pair]
        for _ in range(scales):
            a, b = (part / np.sqrt((part ** 2).sum(0) + 0.05 ** 2) for part in map(responses, lumas))
            expected.append(((a - b) ** 2).sum(0).mean())
            half = len(lumas[0]) // 2
            lumas = [luma[:2 * half, :2 * half].reshape(half, 2, half, 2).mean((1, 3)) for luma in lumas]
    assert TERMS["gabor"](y, x).item() == pytest.approx(np.mean(expected), rel=1e-4)


@pytest.mark.parametrize("shape", [(2, 1, 8, 10), (1, 3, 9, 16), (1, 1, 17, 11)])
def test_gradient_of_gabor_is_that_of_its_value(shape):
    generator = torch.Generator().manual_seed(0)
    y, x = torch.rand(2, *shape, generator=generator, dtype=torch.float64) * 2 - 1
    assert torch.autograd.gradcheck(lambda y: TERMS["gabor"](y, x), y.requires_grad_())


def test_its_operator_is_sound():
    blocks = filters._blocks(torch.rand(2, 1, 9, 16))
    torch.library.opcheck(filters._distance, (
        blocks.clone().requires_grad_(), blocks + 0.1, filters._in_blocks(filters._filters(blocks)),
        filters._shares(torch.rand(2, 1, 9, 16))))


def test_images_are_worked_on_a_few_at_a_time(monkeypatch):
    y, x = torch.rand(2, 5, 1, 12, 15, dtype=torch.float64) * 2 - 1
    values, gradients = [], []
    for most in (backend.CACHED, 2 * 32 * 6 * 8, 1):
        monkeypatch.setattr(backend, "CACHED", most)
        value = TERMS["gabor"](y.requires_grad_(), x)
        values.append(value.detach())
        gradients += torch.autograd.grad(value, y)
    for found in (values, gradients):
        torch.testing.assert_close(found[1], found[0])
        torch.testing.assert_close(found[2], found[0])


def test_gabor_needs_room_for_a_filter():
    with pytest.raises(UserError, match="at least 8 pixels"):
        TERMS["gabor"](*torch.zeros(2, 1, 3, 7, 20))
