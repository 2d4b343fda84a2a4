"""Networks over latents: conditions reach what they should, sampling equals the loop, few codes describe a grid."""

import pytest
import torch
import torch.nn.functional as F

from modules import GatedPixelCNN, draw
from priors.networks import StackedVQVAE, VideoPrior


def conditioned(seed=0, classes=0, channels=3):
    torch.manual_seed(seed)
    return GatedPixelCNN(20, 8, 4, classes, condition_dim=channels).eval()


@pytest.mark.parametrize("classes", [0, 3])
def test_without_a_spatial_condition_a_layer_is_what_the_paper_says(classes):
    torch.manual_seed(0)
    model = GatedPixelCNN(20, 8, 4, classes).eval()
    codes = torch.randint(20, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 2]) if classes else None
    with torch.no_grad():
        x_v = x_h = model.embedding(codes).permute(0, 3, 1, 2)
        for layer in model.layers:  # gate: tanh(a) * sigmoid(b), the class added to both
            gate = layer.class_cond_embedding(label)[:, :, None, None] if model.n_classes else 0.
            v = layer.vertical(F.pad(x_v, (0, 0, layer.reach, -layer.masked)))
            h = layer.vert_to_horiz(v) + layer.horizontal(F.pad(x_h, (layer.reach, -layer.masked)))
            (a, b), (c, d) = (v + gate).chunk(2, 1), (h + gate).chunk(2, 1)
            out = layer.horiz_resid(c.tanh() * d.sigmoid())
            x_v, x_h = a.tanh() * b.sigmoid(), out + x_h if layer.residual else out
        assert torch.equal(model(codes, label), model.output_conv(x_h))


@pytest.mark.parametrize("shape", [(4, 6), (5, 3), (1, 3)])
@pytest.mark.parametrize("classes", [0, 2])
def test_cached_sampling_with_conditions_is_naive_sampling(shape, classes):
    model, spatial = conditioned(classes=classes), 3 * torch.randn(3, 3, *shape)
    label = torch.tensor([0, 1, 1]) if classes else None
    cached = model.generate(label, shape, 3, generator=torch.Generator().manual_seed(1), spatial=spatial)
    generator, naive = torch.Generator().manual_seed(1), torch.zeros(3, *shape, dtype=torch.int64)
    with torch.no_grad():
        for i in range(shape[0]):
            for j in range(shape[1]):
                naive[:, i, j] = draw(model(naive, label, spatial)[:, :, i, j], generator=generator)
    assert torch.equal(cached, naive) and len(naive.unique()) > 3


def test_a_condition_reaches_its_row_and_those_below_and_none_above():
    shape, model = (3, 5), conditioned().double()
    codes = torch.randint(20, (1, *shape))
    jacobian = torch.autograd.functional.jacobian(
        lambda spatial: model(codes, spatial=spatial).sum(1).flatten(), torch.randn(1, 3, *shape).double())
    reaches = jacobian.abs().sum((1, 2)).view(15, 15) > 0  # logits at the first, condition at the second
    row = torch.arange(15) // 5
    assert reaches.diagonal().all() and not reaches[row[:, None] < row].any()
    assert reaches[10, 0] and reaches[7, 6] and reaches[7, 2]  # from far above, the left, and above


def test_a_condition_does_not_let_later_latents_through():
    model, spatial = conditioned(), torch.randn(1, 3, 4, 5)
    codes = torch.randint(20, (1, 4, 5))
    changed = codes.clone()
    changed[:, 2, 3] = (changed[:, 2, 3] + 1) % 20
    one, two = (model(grid, spatial=spatial).flatten(2) for grid in (codes, changed))
    assert torch.equal(one[:, :, :14], two[:, :, :14]) and not torch.equal(one[:, :, 14:], two[:, :, 14:])


def test_conditions_are_checked():
    for model, spatial in ((conditioned(), None), (conditioned(), torch.zeros(1, 3, 2, 3)),
                           (GatedPixelCNN(20, 8, 2, 0), torch.zeros(1, 3, 2, 2))):
        for ask in (lambda: model(torch.zeros(1, 2, 2, dtype=torch.int64), spatial=spatial),  # noqa: B023
                    lambda: model.generate(None, (2, 2), 1, spatial=spatial)):  # noqa: B023
            with pytest.raises(ValueError, match="condition"):
                ask()


def toy(count):
    """Grids 4x6 of which three choices among four say all: the upper left, the upper right and the lower half."""
    parts = torch.randint(4, (count, 3))
    grids = torch.zeros(count, 4, 6, dtype=torch.int64)
    grids[:, :2, :3], grids[:, :2, 3:] = parts[:, :1, None], parts[:, 1:2, None] + 4
    grids[:, 2:] = parts[:, 2:, None] + 8
    return grids


def test_three_codes_that_can_describe_a_grid_do():
    torch.manual_seed(0)
    model = StackedVQVAE(12, 8, (4, 6), n_codes=3, dim=16, n_layers=2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(150):
        grids = toy(32)
        logits, alone, z_e, z_q, prior, codes = model(grids)
        loss = F.cross_entropy(logits, grids) + F.cross_entropy(alone, grids) + 0.25 * F.mse_loss(z_e, z_q.detach())
        optimizer.zero_grad()
        (loss + F.cross_entropy(prior, codes)).backward()
        optimizer.step()
    model.eval()
    grids = toy(64)
    with torch.no_grad():
        codes = model.codes(grids)
        conditions = (model.condition(model.embed(part)) for part in (codes, codes.roll(1, 0)))
        right, swapped = (float(F.cross_entropy(model.pixelcnn(grids, spatial=given), grids)) for given in conditions)
    assert right < 0.05 and swapped > 10 * right and swapped > 0.3
    assert (model.draw(codes) == grids).float().mean() > 0.95
    drawn = model.draw_codes(200)
    assert drawn.shape == (200, 3) and drawn.min() >= 0 and drawn.max() < 512


def test_more_codes_than_latents_are_refused():
    with pytest.raises(ValueError, match="25 codes are more than the 4x6 latents"):
        StackedVQVAE(12, 8, (4, 6), n_codes=25)


def test_the_second_stage_fits_grids_of_any_size():
    for shape in ((3, 5), (7, 7), (21, 16)):
        model = StackedVQVAE(12, 8, shape, n_codes=2, dim=8, n_layers=2).eval()
        codes = model.codes(torch.randint(12, (2, *shape)))
        assert model.condition(model.embed(codes)).shape == (2, 8, *shape) and model.draw(codes).shape == (2, *shape)


def test_a_rollout_is_frame_after_frame_and_obeys_its_actions():
    torch.manual_seed(0)
    model = VideoPrior(12, context=2, n_actions=3, dim=16, n_layers=2)
    optimizer, shape = torch.optim.Adam(model.parameters(), lr=5e-3), (2, 4)
    step = torch.tensor([0, 1, -1])
    for _ in range(150):  # a column that moves with the action and wraps around
        place, action = torch.randint(4, (32, 2)), torch.randint(3, (32,))
        place = torch.cat([place, (place[:, 1:] + step[action, None]) % 4], 1)
        window = F.one_hot(place, 4)[:, :, None].expand(-1, -1, *shape)
        loss = F.cross_entropy(model(window, action), window[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    actions = torch.tensor([[1, 1, 2, 0, 1], [2, 0, 2, 1, 1]])
    frames = model.rollout(window[:2, :2], actions, top_k=1)
    expected = (place[:2, 1:2] + step[actions].cumsum(1)) % 4
    assert torch.equal(frames, F.one_hot(expected, 4)[:, :, None].expand(-1, -1, *shape))
