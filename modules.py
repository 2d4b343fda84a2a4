"""The networks: the vector quantizer and the VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937)."""
import torch
import torch.nn.functional as F
from torch import nn

from functions import vq, vq_st

CODEBOOK_LEARNERS = ("ema", "gradient")
_TRIAL = 0.05  # usage, in units of uniform, that a restarted code is credited with: it has to earn the rest soon
_LAPLACE = 1e-5  # smooths the average counts, so that a code nobody uses does not divide by zero


def _initialise(module):
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


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
        drawn = torch.randperm(len(vectors), device=vectors.device)[:self.embedding.num_embeddings - filled]
        replaced = slice(filled, filled + len(drawn))
        self.embedding.weight.data[replaced] = vectors[drawn]
        self.average_sum[replaced] = vectors[drawn] * _TRIAL
        self.average_count[replaced] = _TRIAL
        self.initialised += len(drawn)

    @torch.no_grad()
    def _update(self, vectors, indices):
        vectors = vectors.detach().flatten(0, 2).float()  # (N, D)
        weight = self.embedding.weight.data
        count = torch.bincount(indices, minlength=len(weight)).float()  # (K,)
        total = torch.zeros_like(weight).index_add_(0, indices, vectors)  # (K, D)
        # Averages are kept in units of uniform usage, so that they do not depend on the batch's size.
        unit = len(weight) / len(vectors)
        self.average_count.lerp_(count * unit, 1 - self.decay)
        self.average_sum.lerp_(total * unit, 1 - self.decay)
        if self.learner == "ema":
            weight.copy_(self.average_sum / (self.average_count + _LAPLACE).unsqueeze(1))
        if self.restart_below:
            dead = (self.average_count < self.restart_below).unsqueeze(1)  # (K, 1)
            drawn = vectors[torch.randint(len(vectors), (len(weight),), device=vectors.device)]
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


class ResBlock(nn.Module):
    """x -> ReLU(x) + f(ReLU(x)): the skip path carries ReLU(x), as where the published block works in place."""

    def __init__(self, dim):
        super().__init__()
        self.block = nn.Sequential(
            nn.Identity(),  # stands where the published block has the first ReLU, for the keys of its layers
            nn.Conv2d(dim, dim, 3, 1, 1),
            nn.BatchNorm2d(dim),
            nn.ReLU(True),
            nn.Conv2d(dim, dim, 1),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x):
        x = F.relu(x)
        return x + self.block(x)


class VectorQuantizedVAE(nn.Module):
    """Convolutional VQ-VAE that reduces each side by 4; keys and arguments of the public pytorch-vqvae project.

    Args:
        input_dim: channels C of the images.
        dim: width of every layer, and D of the codes.
        K: number of codes.
        codebook: further arguments of `VQEmbedding`.
    """

    downsample = 4

    def __init__(self, input_dim, dim, K=512, **codebook):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(input_dim, dim, 4, 2, 1),
            nn.BatchNorm2d(dim),
            nn.ReLU(True),
            nn.Conv2d(dim, dim, 4, 2, 1),
            ResBlock(dim),
            ResBlock(dim),
        )
        self.codebook = VQEmbedding(K, dim, **codebook)
        self.decoder = nn.Sequential(
            ResBlock(dim),
            ResBlock(dim),
            nn.ReLU(True),
            nn.ConvTranspose2d(dim, dim, 4, 2, 1),
            nn.BatchNorm2d(dim),
            nn.ReLU(True),
            nn.ConvTranspose2d(dim, input_dim, 4, 2, 1),
            nn.Tanh(),
        )
        self.apply(_initialise)

    @classmethod
    def check_size(cls, size):
        """Raise ValueError unless both sides (H, W) divide by the downsampling."""
        if any(side % cls.downsample for side in size):
            nearest = "x".join(str(max(cls.downsample, side // cls.downsample * cls.downsample)) for side in size)
            raise ValueError(f"images are {size[0]}x{size[1]} but both sides must divide by {cls.downsample}: pass "
                             f"--image-size {nearest}")

    def encode(self, x):
        """Latents (B, H/4, W/4) int64 of images x (B, C, H, W) in [-1, 1]."""
        return self.codebook(self.encoder(x))

    def decode(self, latents):
        """Images (B, C, 4h, 4w) in [-1, 1] of latents (B, h, w) int64."""
        z_q = self.codebook.embedding(latents).permute(0, 3, 1, 2)  # (B, D, h, w)
        return self.decoder(z_q)

    def forward(self, x):
        """Reconstruct images x (B, C, H, W) in [-1, 1].

        Returns:
            x_tilde (B, C, H, W) in [-1, 1], the encoder's z_e (B, D, H/4, W/4), and its nearest codes z_q, alike.
        """
        z_e = self.encoder(x)
        z_q_st, z_q = self.codebook.straight_through(z_e)
        return self.decoder(z_q_st), z_e, z_q
