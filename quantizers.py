"""Quantizers: encoder outputs to discrete latents and back."""
import torch
from torch import nn

from functions import vq, vq_st
from harness import distributed

CODEBOOK_LEARNERS = ("ema", "gradient")
_TRIAL = 0.05  # usage, in units of uniform, that a restarted code is credited with: it has to earn the rest soon
_LAPLACE = 1e-5  # smooths the average counts, so that a code nobody uses does not divide by zero


class VQEmbedding(nn.Module):
    """Codebook of K codes of width D, learnt by gradient descent or by exponential moving averages.

    In training mode `straight_through` also keeps the codebook healthy; in eval mode nothing changes.
    As constructed by default it is the published gradient codebook, untouched by anything but its optimizer.

    Args:
        K, D: number of codes, width of a code.
        learner: "gradient" (the loss ||sg[z_e] - z_q||^2 moves the codes) or "ema" (each code is the moving average
            of the encoder outputs assigned to it: van den Oord et al. 2017, appendix A.1; no gradient reaches it).
        decay: of the moving averages, per step.
        data_init: the first K encoder outputs drawn at random from the first batches replace the random codes.
        restart_below: a code used less than this share of uniform usage restarts at a random encoder output
            (Dhariwal et al. 2020, arXiv 2005.00341, appendix A); 0 never restarts.
    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, K, D, learner="gradient", decay=0.99, data_init=False, restart_below=0.0):
        super().__init__()
        if K < 1 or D < 1:
            raise ValueError(f"a codebook needs at least one code of at least one dimension, got K={K}, D={D}")
        if learner not in CODEBOOK_LEARNERS:
            raise ValueError(f"codebook learner must be one of {', '.join(CODEBOOK_LEARNERS)}, got {learner!r}")
        if not 0 <= decay < 1 or not 0 <= restart_below < 1:
            raise ValueError(f"decay and restart threshold lie in [0, 1), got {decay} and {restart_below}")
        self.learner, self.decay, self.data_init, self.restart_below = learner, decay, data_init, restart_below
        self.embedding = nn.Embedding(K, D)
        self.embedding.weight.data.uniform_(-1. / K, 1. / K)
        self.embedding.weight.requires_grad_(learner == "gradient")
        self.register_buffer("average_count", torch.ones(K))
        self.register_buffer("average_sum", self.embedding.weight.data.clone())
        self.register_buffer("initialised", torch.tensor(0 if data_init else K))

    def forward(self, z_e):
        """Latents (B, h, w) int64: the nearest code of each position of z_e (B, D, h, w)."""
        return vq(z_e.permute(0, 2, 3, 1), self.embedding.weight)

    def straight_through(self, z_e):
        """Quantized z_e (B, D, h, w), twice, both (B, D, h, w) in float32.

        Returns:
            z_q_st: its gradient passes to z_e unchanged and never to the codebook; feed it to the decoder.
            z_q: its gradient reaches the codebook (learner "gradient") and never z_e; use it in the losses.
        """
        vectors = z_e.permute(0, 2, 3, 1)  # (B, h, w, D), no copy where z_e is channels_last
        if self.training and self.data_init:
            self._fill(vectors)
        codes, indices = vq_st(vectors, self.embedding.weight.detach())
        z_q = self.embedding(indices).view(vectors.shape)
        if self.training:
            self._update(vectors, indices)
        return codes.permute(0, 3, 1, 2), z_q.permute(0, 3, 1, 2)

    @torch.no_grad()
    def _fill(self, vectors):
        filled = int(self.initialised)
        if filled == self.embedding.num_embeddings:
            self.data_init = False
            return
        vectors = vectors.detach().flatten(0, 2).float()  # (N, D)
        count, offset = distributed.count_of(vectors)
        index = torch.randperm(count, device=vectors.device)[:self.embedding.num_embeddings - filled]
        drawn, replaced = distributed.take(vectors, index, offset), slice(filled, filled + len(index))
        self.embedding.weight.data[replaced] = drawn
        self.average_sum[replaced] = drawn * _TRIAL
        self.average_count[replaced] = _TRIAL
        self.initialised += len(drawn)

    @torch.no_grad()
    def _update(self, vectors, indices):
        vectors = vectors.detach().flatten(0, 2).float()  # (N, D)
        weight = self.embedding.weight.data
        count = distributed.total(torch.bincount(indices, minlength=len(weight)).float())  # (K,)
        total = distributed.total(torch.zeros_like(weight).index_add_(0, indices, vectors))  # (K, D)
        rows, offset = distributed.count_of(vectors)
        # Averages are kept in units of uniform usage, so that they do not depend on the batch's size.
        unit = len(weight) / rows
        self.average_count.lerp_(count * unit, 1 - self.decay)
        self.average_sum.lerp_(total * unit, 1 - self.decay)
        if self.learner == "ema":
            weight.copy_(self.average_sum / (self.average_count + _LAPLACE).unsqueeze(1))
        if self.restart_below:
            dead = (self.average_count < self.restart_below).unsqueeze(1)  # (K, 1)
            index = torch.randint(rows, (len(weight),), device=vectors.device)
            drawn = distributed.take(vectors, index, offset)
            weight.copy_(torch.where(dead, drawn, weight))
            self.average_sum.copy_(torch.where(dead, drawn * _TRIAL, self.average_sum))
            self.average_count.masked_fill_(dead.squeeze(1), _TRIAL)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A checkpoint of the public pytorch-vqvae project holds the codes alone: they count as initialised and in use.
        codes = state_dict.get(prefix + "embedding.weight")
        if codes is not None and prefix + "average_count" not in state_dict:
            state_dict[prefix + "average_count"] = torch.ones(len(codes))
            state_dict[prefix + "average_sum"] = codes.clone()
            state_dict[prefix + "initialised"] = torch.tensor(len(codes))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
