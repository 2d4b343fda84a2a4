"""Quantizers: encoder outputs to discrete latents and back.

A quantizer is an `nn.Module` made of (K, D), the number of codes asked for and the width of z_e, and settings with
defaults, that has

    forward(z_e (B, D, h, w)) -> latents (B, h, w) int64 in 0...K-1
    embed(latents (B, h, w)) -> z_q (B, D, h, w) in float32, what the decoder sees of them
    straight_through(z_e) -> z_q_st, z_q, latents: the first two (B, D, h, w) in float32; z_q_st has the value
        `embed(latents)` and the gradient that the decoder's sends to the encoder; z_q is what the losses
        ||sg[z_e] - z_q||^2 and ||z_e - sg[z_q]||^2 are taken with: where the paper has no such losses it is z_e itself;
        latents (B, h, w) int64 are those of `forward(z_e)`, found before anything is learned from z_e
    K: the number of codes that it has

In training mode `straight_through` may learn; in eval mode nothing changes. Nothing outside this file looks further in.
Once `filled`, a training step changes tensors in place and nothing else, waits for nothing and copies nothing from the
CPU: it can be compiled, and captured as a CUDA graph.
To add one: write the class, give it a row in `QUANTIZERS` at the end. Its name for `--quantizer` and its tests follow.
"""
import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn

from functions import rotation_st, vq, vq_st
from harness import distributed
from harness.errors import UserError

# Usage, in units of uniform, that a new code is credited with: a multiple of the threshold of restarts, so that it has
# the time of ln 2.5 / (1 - decay) steps to earn the rest; so much where nothing restarts.
_TRIAL, _TRIAL_WITHOUT_RESTARTS = 2.5, 0.05
_MOST_FSQ_CODES = 2 ** 24  # more are searched for long, and counted in more memory than a model takes
_EPS = 1e-5  # keeps the division by an average count, or by a length, of nothing finite


class VQEmbedding(nn.Module):
    """Codebook of K codes of width D: a latent is its nearest code (van den Oord et al. 2017, arXiv 1711.00937).

    The loss ||sg[z_e] - z_q||^2 moves the codes by gradient descent. As constructed by default it is the published
    codebook, untouched by anything but its optimizer; in training mode `straight_through` can also keep it healthy.

    Args:
        K, D: number of codes, width of a code.
        decay: of the moving averages of each code's usage and encoder outputs, per step.
        data_init: the first K encoder outputs drawn at random from the first batches replace the random codes.
        restart_below: a code used less than this share of uniform usage restarts at a random encoder output
            (Dhariwal et al. 2020, arXiv 2005.00341, appendix A); 0 never restarts.
    Raises:
        ValueError: an argument is out of its range.
    """

    learns_by_gradient = True

    def __init__(self, K, D, decay=0.99, data_init=False, restart_below=0.0):
        super().__init__()
        if K < 1 or D < 1:
            raise ValueError(f"a codebook needs at least one code of at least one dimension, got K={K}, D={D}")
        if not 0 <= decay < 1 or not 0 <= restart_below < 1:
            raise ValueError(f"decay and restart threshold lie in [0, 1), got {decay} and {restart_below}")
        self.K, self.decay, self.data_init, self.restart_below = K, decay, data_init, restart_below
        self.trial = _TRIAL * restart_below or _TRIAL_WITHOUT_RESTARTS
        self.embedding = nn.Embedding(K, D)
        self.embedding.weight.data = self._placed(self.embedding.weight.data.uniform_(-1. / K, 1. / K))
        self.embedding.weight.requires_grad_(self.learns_by_gradient)
        self.register_buffer("average_count", torch.ones(K))
        self.register_buffer("average_sum", self.embedding.weight.data.clone())
        self.register_buffer("initialised", torch.tensor(0 if data_init else K))

    def forward(self, z_e):
        """Latents (B, h, w) int64: the nearest code of each position of z_e (B, D, h, w)."""
        return vq(self._placed(z_e.permute(0, 2, 3, 1)), self._placed(self.embedding.weight))

    def embed(self, latents):
        """Codes z_q (B, D, h, w) of latents (B, h, w)."""
        return F.embedding(latents, self._placed(self.embedding.weight)).permute(0, 3, 1, 2)

    def straight_through(self, z_e):
        """Quantized z_e (B, D, h, w), twice, both (B, D, h, w) in float32, and its latents.

        Returns:
            z_q_st: its gradient passes to z_e unchanged and never to the codebook; feed it to the decoder.
            z_q: its gradient reaches a codebook that learns by it and never z_e; use it in the losses.
            latents: (B, h, w) int64.
        """
        vectors = self._placed(z_e.permute(0, 2, 3, 1))  # (B, h, w, D), no copy where z_e is channels_last
        if self.training and self.data_init:
            self._fill(vectors)
        codes, indices = vq_st(vectors, self._placed(self.embedding.weight.detach()))
        latents = indices.view(vectors.shape[:-1])
        z_q = self.embed(latents)
        if self.training:
            self._update(vectors, indices)
        return codes.permute(0, 3, 1, 2), z_q, latents

    def _placed(self, vectors):
        """Codes or encoder outputs (..., D) where they may lie: here, anywhere."""
        return vectors

    def _learn(self):
        """Move the codes to their averages: here their optimizer moves them."""

    # What is drawn here is drawn on the device by its own generator, and all processes take what rank 0 drew.

    @torch.no_grad()
    def _fill(self, vectors):
        first = int(self.initialised)  # waits for the device, in the first steps alone
        last = first
        if first < self.K:
            vectors = vectors.detach().flatten(0, 2).float()  # (N, D)
            count, offset = distributed.count_of(vectors)
            index = distributed.of_rank_0(torch.randperm(count, device=vectors.device)[:self.K - first])
            drawn, last = distributed.take(vectors, index, offset), first + len(index)
            self.embedding.weight[first:last] = drawn
            self.average_sum[first:last] = drawn * self.trial
            self.average_count[first:last] = self.trial
            self.initialised.fill_(last)
        self.data_init = last < self.K

    @torch.no_grad()
    def _update(self, vectors, indices):
        vectors = vectors.detach().flatten(0, 2).float()  # (N, D)
        weight = self.embedding.weight
        count = vectors.new_zeros(self.K).index_add_(0, indices, vectors.new_ones(len(vectors)))
        count = distributed.total(count)  # (K,)
        total = distributed.total(torch.zeros_like(weight).index_add_(0, indices, vectors))  # (K, D)
        rows, offset = distributed.count_of(vectors)
        # Averages are kept in units of uniform usage, so that they do not depend on the batch's size.
        unit = len(weight) / rows
        self.average_count.lerp_(count * unit, 1 - self.decay)
        self.average_sum.lerp_(total * unit, 1 - self.decay)
        self._learn()
        if self.restart_below:
            dead = (self.average_count < self.restart_below).unsqueeze(1)  # (K, 1)
            index = distributed.of_rank_0(torch.randint(rows, (len(weight),), device=vectors.device))
            drawn = distributed.take(vectors, index, offset)
            weight.copy_(torch.where(dead, drawn, weight))
            self.average_sum.copy_(torch.where(dead, drawn * self.trial, self.average_sum))
            self.average_count.masked_fill_(dead.squeeze(1), self.trial)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A checkpoint of the public pytorch-vqvae project holds the codes alone: they count as initialised and in use.
        codes = state_dict.get(prefix + "embedding.weight")
        if codes is not None and prefix + "average_count" not in state_dict:
            state_dict[prefix + "average_count"] = torch.ones(len(codes))
            state_dict[prefix + "average_sum"] = codes.clone()
            state_dict[prefix + "initialised"] = torch.tensor(len(codes))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class MovingAverages(VQEmbedding):
    """Each code is the moving average of the encoder outputs assigned to it (van den Oord et al. 2017, appendix A.1).

    No gradient reaches the codes: the loss ||sg[z_e] - z_q||^2 is measured and moves nothing.
    """

    learns_by_gradient = False

    def _learn(self):
        averages = self.average_sum / (self.average_count + _EPS).unsqueeze(1)
        self.embedding.weight.copy_(self._placed(averages))


class Cosine(MovingAverages):
    """Codes and encoder outputs of unit length: the nearest code is that of the largest cosine similarity.

    Yu et al. 2022, arXiv 2110.04627 (ViT-VQGAN), section 3.2; here the codes are moving averages, brought back to unit
    length at each step. The decoder's gradient passes through the division of z_e by its length, so that it turns z_e
    and never stretches it; the commitment loss alone draws its length, towards that of the codes.
    """

    def _placed(self, vectors):
        return F.normalize(vectors.float(), dim=-1, eps=_EPS)


class Rotation(MovingAverages):
    """Moving averages; the decoder's gradient is turned with the rotation of z_e to its code, and scaled alike.

    Fifty et al. 2024, arXiv 2410.06424.
    """

    def straight_through(self, z_e):
        _, z_q, latents = super().straight_through(z_e)
        return rotation_st(z_e, z_q), z_q, latents


class FSQ(nn.Module):
    """Finite scalar quantization: a few bounded numbers, each rounded to one of a few levels.

    Mentzer et al. 2023, arXiv 2309.15505. The grid is fixed: no codebook to learn, no losses but the reconstruction's,
    no dead codes. K is the product of the levels, as near to the K asked for as `fsq_levels` comes.
    """

    def __init__(self, K, D):
        super().__init__()
        levels = fsq_levels(K)
        self.K, self.narrow, self.widen = math.prod(levels), nn.Linear(D, len(levels)), nn.Linear(len(levels), D)
        strides = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("strides", torch.tensor(strides), persistent=False)

    def extra_repr(self):
        return f"{' x '.join(map(str, self.levels.tolist()))} levels = {self.K} codes"

    def forward(self, z_e):
        return self._latents(self._bounded(z_e).round())

    def embed(self, latents):
        return self._widened(latents.unsqueeze(-1) // self.strides % self.levels - self.levels // 2)

    def straight_through(self, z_e):
        numbers = self._bounded(z_e)
        rounded = numbers.round().detach()
        z_q_st = self._widened(numbers + (rounded - numbers).detach())
        return z_q_st, z_e.detach().float(), self._latents(rounded)

    def _latents(self, rounded):
        digits = rounded.long() + self.levels // 2  # (B, h, w, number of levels)
        return (digits * self.strides).sum(-1)

    def _bounded(self, z_e):
        """Numbers (B, h, w, number of levels) that round to `levels` integers; around -1/2 where those are even."""
        half, offset = (self.levels - 1) * (1 + _EPS) / 2, (1 - self.levels % 2) / 2
        with torch.autocast(z_e.device.type, enabled=False):
            numbers = self.narrow(z_e.permute(0, 2, 3, 1).float())
        return torch.tanh(numbers + torch.atanh(offset / half)) * half - offset

    def _widened(self, numbers):
        with torch.autocast(numbers.device.type, enabled=False):
            return self.widen(numbers / (self.levels // 2)).permute(0, 3, 1, 2)


def fsq_levels(K):
    """Levels of 3 to 8, largest first, whose product is nearest to K; of such, those whose least is the largest.

    The paper's advice is five or more of each, of which few products are powers of two. With two, an even number that
    has zero among its levels, one of them would lie out of reach.

    Raises:
        UserError: K is below 3 or above `_MOST_FSQ_CODES`.
    """
    if not 3 <= K <= _MOST_FSQ_CODES:
        raise UserError(f"fsq has from 3 to {_MOST_FSQ_CODES:,} codes, got --k {K}")
    found, longer = [], [(level,) for level in range(3, 9)]
    while longer:
        found += longer
        longer = [(*levels, level) for levels in longer for level in range(3, levels[-1] + 1)
                  if math.prod(levels) * level < 2 * K]
    return min(found, key=lambda levels: (abs(math.prod(levels) - K), -levels[-1], len(levels), levels))


QUANTIZERS = {
    "ema": MovingAverages,
    "gradient": VQEmbedding,
    "cosine": Cosine,
    "fsq": FSQ,
    "rotation": Rotation,
}


def filled(model):
    """Whether every codebook that a model trains holds its first codes; until then a step looks at values."""
    return not any(part.training and getattr(part, "data_init", False) for part in model.modules())


def settings_of(name):
    """Names of the settings that a quantizer's constructor takes with K and D."""
    return set(inspect.signature(QUANTIZERS[name]).parameters) - {"K", "D"}
