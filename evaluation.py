"""A model on a split, measured one way, whoever asks: training, evaluation or comparison."""
import math
from contextlib import nullcontext

import torch

from datasets import Source
from harness import distributed
from metrics import IMAGE_METRICS, as_8bit, codebook_usage, color_bias


def reported():
    """Names of the figures that tables show: what every model has, whatever it was trained on."""
    return [*IMAGE_METRICS, "perplexity", "used_codes"]


@torch.no_grad()
def measure(model, loader, criterion=None, autocast=nullcontext, judges=(), extra=None):
    """Everything there is to say of a model on a split, with the model in eval mode.

    Args:
        model: a `VectorQuantizedVAE`. loader: yields x (B, C, H, W) in [-1, 1] and labels.
        criterion: a `ReconstructionLoss`, for `loss` on top (no metric: it depends on the training), a batch's mean
            standing for each of its images.
        autocast: makes the context of the forward pass.
        judges: `features.Judge`s of the same split.
        extra: {name: function} beside `IMAGE_METRICS`, of reconstructions and originals (B, C, H, W) in [0, 1] -> (B,).
    Returns:
        values: {name: (N,) float64}, an entry an image: `IMAGE_METRICS`, color_bias_0... by channel, quantization
        (mean squared distance of z_e to its code), `extra`, `loss` where a criterion is given.
        figures: their means; color_bias, the largest of a channel by size; `codebook_usage`; bits_per_pixel, what an
        ideal entropy coder makes of the latents, each by itself; what each judge says under "<figure>/<judge>", and
        the first under "<figure>" too.
        Both are of all processes together, the judges' of this one alone.
    Raises:
        ValueError: outputs of the encoder or the decoder are not finite.
    """
    was_training = model.training
    model.eval()
    metrics = IMAGE_METRICS | (extra or {})
    columns, counts, features = [], 0, [[] for _ in judges]
    for x, _ in loader:
        with autocast():
            x_tilde, z_e, z_q = model(x)
            if not all(bool(output.isfinite().all()) for output in (z_e, x_tilde)):
                raise ValueError("outputs of the model are not finite, its training diverged: go on from its last.pt "
                                 "with --resume and a lower --lr or --precision fp32, or train again")
            latents = model.codebook(z_e)
        counts = counts + torch.bincount(latents.flatten(), minlength=model.K)
        a, b = as_8bit(x_tilde), as_8bit(x)
        values = {name: metric(a, b) for name, metric in metrics.items()}
        values |= {f"color_bias_{i}": bias for i, bias in enumerate(color_bias(a, b).unbind(1))}
        values["quantization"] = (z_e.float() - z_q).square().mean((1, 2, 3))
        if criterion:
            values["loss"] = criterion(x_tilde, x)[0].expand(len(x))
        columns.append({name: value.cpu().double() for name, value in values.items()})
        for judge, seen in zip(judges, features):
            seen.append(judge.network(a))
    model.train(was_training)

    values = {name: distributed.concatenate(torch.cat([column[name] for column in columns])) for name in columns[0]}
    figures = {name: float(value.mean()) for name, value in values.items()} | codebook_usage(distributed.total(counts))
    figures["color_bias"] = max((bias for name, bias in figures.items() if name.startswith("color_bias_")), key=abs)
    latents_per_pixel = latents[0].numel() / (x.shape[2] * x.shape[3])
    figures["bits_per_pixel"] = math.log2(figures["perplexity"]) * latents_per_pixel
    for judge, seen in zip(judges, features):
        said = judge.figures(torch.cat(seen))
        figures |= (said if judge is judges[0] else {}) | {f"{name}/{judge.name}": v for name, v in said.items()}
    return values, figures


def check_counts(path, known, now):
    """ValueError where a run, of which a checkpoint lies at `path`, was trained on another number of images.

    known, now: images by split; None where the checkpoint is too old to say.
    """
    if known not in (None, now):
        raise ValueError(f"{path} was trained on other images ({known}) than there are now ({now}): put them back as "
                         "they were, or train anew (--overwrite)")


def check_alike(models):
    """ValueError where one of the models has learnt what is held out for another: splits were carved from other files.

    Args:
        models: {name: contents of a checkpoint}.
    """
    carved = {contents["data"]["carved"]: name for name, contents in models.items() if contents["data"].get("carved")}
    if len(carved) > 1:
        first, second, *_ = carved.values()
        raise ValueError(f"{first} and {second} were trained on other files, of one folder or of two, and hold out "
                         "other images, some of which the other may have learnt: train both on one folder")


def held_out(models, folder):
    """What models, which are alike, hold out of a folder, as `Data.carved`: empty where none says so of this folder."""
    check_alike(models)
    carved = (Source.of(contents, folder).carved for contents in models.values() if contents["data"].get("carved"))
    return next(filter(None, carved), "")
