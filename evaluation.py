"""A model on a split, measured one way, whoever asks: training, evaluation or comparison."""
from contextlib import nullcontext

import torch

from harness import distributed
from metrics import IMAGE_METRICS, as_8bit, codebook_usage, color_bias


@torch.no_grad()
def measure(model, loader, criterion=None, autocast=nullcontext, network=None, real=None, on_batch=None):
    """Everything there is to say of a model on a split, with the model in eval mode.

    Args:
        model: a `VectorQuantizedVAE`. loader: yields x (B, C, H, W) in [-1, 1] and labels.
        criterion: a `ReconstructionLoss`, for `loss` on top (no metric: it depends on the training), a batch's mean
            standing for each of its images.
        autocast: makes the context of the forward pass.
        network: a feature network, or None to leave the distances out. real: `original_features` of the split.
        on_batch: called with each batch of reconstructions and originals (B, C, H, W) in [0, 1].
    Returns:
        values: {name: (N,) float64}, an entry an image: `IMAGE_METRICS`, color_bias_0... by channel, quantization
        (mean squared distance of z_e to its code), `loss` where a criterion is given.
        figures: their means, `codebook_usage` and, through a network, `frechet_and_kernel_distance`.
        Both are of all processes together, the distances of this one alone.
    """
    was_training = model.training
    model.eval()
    columns, counts, features = [], 0, []
    for x, _ in loader:
        with autocast():
            x_tilde, z_e, z_q = model(x)
            latents = model.codebook(z_e)
        counts = counts + torch.bincount(latents.flatten(), minlength=model.K)
        a, b = as_8bit(x_tilde), as_8bit(x)
        values = {name: metric(a, b) for name, metric in IMAGE_METRICS.items()}
        values |= {f"color_bias_{i}": bias for i, bias in enumerate(color_bias(a, b).unbind(1))}
        values["quantization"] = (z_e.float() - z_q).square().mean((1, 2, 3))
        if criterion:
            values["loss"] = criterion(x_tilde, x)[0].expand(len(x))
        columns.append({name: value.double() for name, value in values.items()})
        if network:
            features.append(network(a))
        if on_batch:
            on_batch(a, b)
    model.train(was_training)
    values = {name: distributed.concatenate(torch.cat([column[name] for column in columns])) for name in columns[0]}
    figures = {name: float(value.mean()) for name, value in values.items()} | codebook_usage(distributed.total(counts))
    if network:
        from features import frechet_and_kernel_distance  # slow to import, and training needs no distances
        figures |= frechet_and_kernel_distance(torch.cat(features), real)
    return values, figures


def original_features(network, loader):
    """Features (N, D) of the originals x (B, C, H, W) in [-1, 1] that a loader yields."""
    return torch.cat([network((x + 1) / 2) for x, _ in loader])
