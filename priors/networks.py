"""Networks over the latents of a VQ-VAE: three codes for a grid, and a grid given those of the frames before it."""
import torch
import torch.nn.functional as F
from torch import nn

from harness.distributed import BatchNorm2d
from harness.errors import UserError
from harness.progress import counted
from modules import GatedPixelCNN, Rebuilt
from quantizers import QUANTIZERS

CODES, CODE_DIM = 512, 16  # of each codebook of the second stage: its size, and the width of a code
SMALLEST = 4  # sides of a grid that the second encoder halves no further
RESTART_BELOW = 0.2  # share of uniform usage at which a code of the second stage restarts
PRIOR_DIM, PRIOR_LAYERS = 64, 3  # of the prior over the few codes


class StackedVQVAE(Rebuilt, nn.Module):
    """A second VQ-VAE, from latents (B, h, w) of the first to a few codes, decoded by a PixelCNN.

    van den Oord et al. 2017, arXiv 1711.00937, section 4.1, figure 5. A PixelCNN can do without codes, and then they
    mean nothing (posterior collapse). Two things keep them: the map that they are widened to also predicts the latents
    by itself, without what was drawn so far, and the codes of some training images are left out, so that what the
    decoder takes from them is seen.

    Args:
        K, D: number of codes of the first stage and their width. shape: (h, w).
        n_codes: for a grid, each of a codebook of `CODES` of its own. dim: width. n_layers: of the PixelCNN.
    Raises:
        UserError: more codes than latents.
    """

    def __init__(self, K, D, shape, n_codes=3, dim=64, n_layers=4):
        super().__init__()
        if n_codes > shape[0] * shape[1]:
            raise UserError(f"{n_codes} codes are more than the {shape[0]}x{shape[1]} latents that they are to stand "
                            "for: pass a smaller --codes")
        self.shape, self.n_codes = tuple(shape), n_codes
        self.sizes = [self.shape]
        while max(self.sizes[-1]) > SMALLEST:
            self.sizes.append(tuple(-(-side // 2) for side in self.sizes[-1]))
        self.first = nn.Embedding(K, D).requires_grad_(False)  # codes of the first stage
        halvings = [nn.Sequential(nn.Conv2d(dim, dim, 3, 2, 1), BatchNorm2d(dim), nn.ReLU()) for _ in self.sizes[1:]]
        self.encoder = nn.Sequential(nn.Conv2d(D, dim, 3, 1, 1), BatchNorm2d(dim), nn.ReLU(), *halvings,
                                     nn.Conv2d(dim, n_codes * CODE_DIM, self.sizes[-1]),
                                     BatchNorm2d(n_codes * CODE_DIM))
        self.codebooks = nn.ModuleList(
            QUANTIZERS["ema"](CODES, CODE_DIM, data_init=True, restart_below=RESTART_BELOW) for _ in range(n_codes))
        self.absent = nn.Parameter(torch.zeros(n_codes * CODE_DIM))  # stands for the codes of an image without
        self.widen = nn.ConvTranspose2d(n_codes * CODE_DIM, dim, self.sizes[-1])
        self.upwards = nn.ModuleList(nn.Conv2d(dim, dim, 3, 1, 1) for _ in self.sizes)
        self.alone = nn.Conv2d(dim, K, 1)
        self.pixelcnn = GatedPixelCNN(K, dim, n_layers, 0, condition_dim=dim)
        self.prior = GatedPixelCNN(CODES, PRIOR_DIM, PRIOR_LAYERS, 0, condition_dim=n_codes)

    def encode(self, latents):
        """Encoder outputs (B, n_codes, CODE_DIM) of latents (B, h, w)."""
        z_e = self.encoder(self.first(latents).permute(0, 3, 1, 2))
        return z_e.view(len(latents), self.n_codes, -1).float()

    def codes(self, latents):
        """Codes (B, n_codes) int64 of latents (B, h, w)."""
        z_e = self.encode(latents)[..., None, None]  # (B, n_codes, CODE_DIM, 1, 1)
        return torch.cat([book(z_e[:, i]).flatten(1) for i, book in enumerate(self.codebooks)], 1)

    def quantize(self, z_e):
        """(z_q_st, z_q), both (B, n_codes, CODE_DIM), and codes (B, n_codes), of encoder outputs."""
        parts = [book.straight_through(z_e[:, i, :, None, None]) for i, book in enumerate(self.codebooks)]
        z_q_st, z_q, codes = (torch.stack(part, 1).flatten(2) for part in zip(*parts))
        return z_q_st, z_q, codes.flatten(1)

    def embed(self, codes):
        """(B, n_codes, CODE_DIM) of codes (B, n_codes)."""
        return torch.stack([book.embed(codes[:, i, None, None]).flatten(1) for i, book in enumerate(self.codebooks)], 1)

    def condition(self, z_q, absent=None):
        """What the PixelCNN takes of the codes: (B, dim, h, w); of none where `absent` (B,) is true."""
        z_q = z_q.flatten(1)
        if absent is not None:
            z_q = torch.where(absent[:, None], self.absent, z_q)
        x = self.widen(z_q[..., None, None])
        for size, layer in zip(reversed(self.sizes), self.upwards):
            x = F.relu(layer(F.interpolate(x, size)))
        return x

    def forward(self, latents, absent=None):
        """Train on latents (B, h, w); `absent` (B,) says of which the codes are left out.

        Returns:
            logits (B, K, h, w) of the PixelCNN, those of the codes' map alone, z_e and z_q (B, n_codes, CODE_DIM), and
            logits of the prior over codes (B, CODES, 1, n_codes) with the codes themselves (B, 1, n_codes).
        """
        z_e = self.encode(latents)
        z_q_st, z_q, codes = self.quantize(z_e)
        condition, codes = self.condition(z_q_st, absent), codes.unsqueeze(1)
        return (self.pixelcnn(latents, spatial=condition), self.alone(condition), z_e, z_q,
                self.prior(codes, spatial=self._which(len(codes))), codes)

    def _which(self, count):
        """(count, n_codes, 1, n_codes): which of the codebooks each of the prior's positions is of."""
        return torch.eye(self.n_codes, device=self.absent.device)[:, None].expand(count, -1, -1, -1)

    @torch.no_grad()
    def draw(self, codes, temperature=1., top_k=None, generator=None):
        """Latents (B, h, w) drawn given codes (B, n_codes)."""
        return self.pixelcnn.generate(None, self.shape, len(codes), temperature, top_k, generator,
                                      self.condition(self.embed(codes)))

    @torch.no_grad()
    def draw_codes(self, count, temperature=1., top_k=None, generator=None):
        """Codes (count, n_codes) drawn from the prior over them."""
        return self.prior.generate(None, (1, self.n_codes), count, temperature, top_k, generator,
                                   self._which(count)).squeeze(1)


class VideoPrior(Rebuilt, nn.Module):
    """p(z_t | z_{t-1} ... z_{t-context}, a_{t-1}) over grids of latents: video generated in latent space.

    van den Oord et al. 2017, arXiv 1711.00937, section 4.3. The frames before, embedded, and the action go through
    convolutions, whose output every layer of the PixelCNN adds to its gates.

    Args:
        K: number of codes. context: frames that the next one depends on. n_actions: 0 where there are none.
        dim: width. n_layers: of the PixelCNN.
    """

    def __init__(self, K, context=2, n_actions=0, dim=64, n_layers=4):
        super().__init__()
        self.context, width = context, dim
        self.embedding = nn.Embedding(K, width)
        self.action = nn.Embedding(n_actions, dim) if n_actions else None
        self.inwards = nn.Conv2d(context * width, dim, 5, 1, 2)
        self.deeper = nn.ModuleList(nn.Conv2d(dim, dim, 3, 1, 1) for _ in range(4))
        self.pixelcnn = GatedPixelCNN(K, dim, n_layers, 0, condition_dim=dim)

    def condition(self, before, action=None):
        """(B, dim, h, w) of the frames before (B, context, h, w), oldest first, and the action (B,) that followed."""
        x = self.embedding(before)  # (B, context, h, w, width)
        x = self.inwards(x.permute(0, 1, 4, 2, 3).flatten(1, 2))
        if self.action is not None:
            x = x + self.action(action)[:, :, None, None]
        for layer in self.deeper:
            x = x + layer(F.relu(x))
        return F.relu(x)

    def forward(self, window, action=None):
        """Logits (B, K, h, w) of the last of the frames in a window (B, context + 1, h, w), given the others."""
        return self.pixelcnn(window[:, -1], spatial=self.condition(window[:, :-1], action))

    @torch.no_grad()
    def rollout(self, before, actions, temperature=1., top_k=None, generator=None):
        """Frames (B, T, h, w) that follow those before (B, context, h, w) under actions (B, T)."""
        frames = before
        for action in counted(actions.unbind(1), "generating", "frames"):
            condition = self.condition(frames[:, -self.context:], action)
            frame = self.pixelcnn.generate(None, frames.shape[2:], len(frames), temperature, top_k, generator,
                                           condition)
            frames = torch.cat([frames, frame[:, None]], 1)
        return frames[:, before.shape[1]:]
