"""The networks: vector quantizer, VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937), prior and discriminator."""
import torch
import torch.nn.functional as F
from torch import nn

import distributed
from functions import vq, vq_st

_CROSS_ENTROPY_ROWS = 512
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


class Rebuilt:
    """A network that a checkpoint holds all of."""

    @classmethod
    def rebuild(cls, checkpoint):
        """The network of a checkpoint's contents, on the CPU, in eval mode."""
        model = cls(**checkpoint["model_args"])
        model.load_state_dict(checkpoint["model"])
        return model.eval()


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


class VectorQuantizedVAE(Rebuilt, nn.Module):
    """Convolutional VQ-VAE; keys and arguments of the public pytorch-vqvae project, whose `downsample` is 4.

    Args:
        input_dim: channels C of the images.
        dim: width of every layer, and D of the codes.
        K: number of codes.
        downsample: sides of an image over those of its latents, a power of two of at least 4.
        codebook: further arguments of `VQEmbedding`.
    """

    codes_frozen = False

    def __init__(self, input_dim, dim, K=512, downsample=4, **codebook):
        super().__init__()
        self.input_dim, self.dim, self.K, self.downsample = input_dim, dim, K, downsample
        deeper = downsample.bit_length() - 3  # halvings beyond the published two
        self.encoder = nn.Sequential(
            nn.Conv2d(input_dim, dim, 4, 2, 1),
            nn.BatchNorm2d(dim),
            nn.ReLU(True),
            *(layer for _ in range(deeper) for layer in (
                nn.Conv2d(dim, dim, 4, 2, 1), nn.BatchNorm2d(dim), nn.ReLU(True))),
            nn.Conv2d(dim, dim, 4, 2, 1),
            ResBlock(dim),
            ResBlock(dim),
        )
        self.codebook = VQEmbedding(K, dim, **codebook)
        self.decoder = nn.Sequential(
            ResBlock(dim),
            ResBlock(dim),
            nn.ReLU(True),
            *(layer for _ in range(deeper + 1) for layer in (
                nn.ConvTranspose2d(dim, dim, 4, 2, 1), nn.BatchNorm2d(dim), nn.ReLU(True))),
            nn.ConvTranspose2d(dim, input_dim, 4, 2, 1),
            nn.Tanh(),
        )
        self.apply(_initialise)

    @staticmethod
    def check_size(size, downsample):
        """Raise ValueError unless both sides (H, W) divide by the downsampling."""
        if any(side % downsample for side in size):
            nearest = "x".join(str(max(downsample, side // downsample * downsample)) for side in size)
            raise ValueError(f"images are {size[0]}x{size[1]} but both sides must divide by {downsample}: pass "
                             f"--image-size {nearest}")

    def freeze_codes(self, found):
        """Take encoder and codebook from another model's checkpoint contents, and learn the decoder alone.

        Raises:
            ValueError: that model's channels, width or number of codes differ.
        """
        other = VectorQuantizedVAE.rebuild(found)
        for name in ("input_dim", "dim", "K", "downsample"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"the frozen codebook has {name} {getattr(other, name)}, this model "
                                 f"{getattr(self, name)}: pass the flags that it was trained with")
        self.codes_frozen = True
        for part in ("encoder", "codebook"):
            getattr(self, part).load_state_dict(getattr(other, part).state_dict())
            getattr(self, part).requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.codes_frozen:  # nor do batch statistics and moving averages
            self.encoder.eval()
            self.codebook.eval()
        return self

    def compile_networks(self):
        """torch.compile encoder and decoder; the search between them has nothing to gain."""
        self.encoder.compile()
        self.decoder.compile()

    def encode(self, x):
        """Latents (B, H/f, W/f) int64, f the downsampling, of images x (B, C, H, W) in [-1, 1]."""
        return self.codebook(self.encoder(x))

    def decode(self, latents):
        """Images (B, C, f h, f w) in [-1, 1] of latents (B, h, w) int64."""
        z_q = self.codebook.embedding(latents).permute(0, 3, 1, 2)  # (B, D, h, w)
        return self.decoder(z_q)

    def forward(self, x):
        """Reconstruct images x (B, C, H, W) in [-1, 1].

        Returns:
            x_tilde (B, C, H, W) in [-1, 1], the encoder's z_e (B, D, H/f, W/f), and its nearest codes z_q, alike.
        """
        z_e = self.encoder(x)
        z_q_st, z_q = self.codebook.straight_through(z_e)
        return self.decoder(z_q_st), z_e, z_q


class GatedMaskedConv2d(nn.Module):
    """One layer of the gated PixelCNN: a vertical stack that sees the rows above, a horizontal one the row's left.

    Args:
        mask_type: "A" does not see the current row (vertical) or position (horizontal), "B" does.
        dim: width. kernel: odd width of the receptive field. residual: add the horizontal input to its output.
        n_classes: number of classes that condition the gates, 0 for none.
    """

    def __init__(self, mask_type, dim, kernel, residual=True, n_classes=10):
        super().__init__()
        self.reach, self.hidden, self.residual = kernel // 2, int(mask_type == "A"), residual
        self.class_cond_embedding = nn.Embedding(n_classes, 2 * dim) if n_classes else None
        self.vert_stack = nn.Conv2d(dim, dim * 2, (kernel // 2 + 1, kernel), padding=(kernel // 2, kernel // 2))
        self.vert_to_horiz = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.horiz_stack = nn.Conv2d(dim, dim * 2, (1, kernel // 2 + 1), padding=(0, kernel // 2))
        self.horiz_resid = nn.Conv2d(dim, dim, 1)

    # What a mask hides is sliced off the weights, so that it is neither computed nor ever changed.

    def vertical(self, above):
        """(B, dim, rows + reach - hidden, W), the rows above first -> (B, 2 dim, rows, W)."""
        weight = self.vert_stack.weight[:, :, :-1] if self.hidden else self.vert_stack.weight
        return F.conv2d(above, weight, self.vert_stack.bias, padding=(0, self.reach))

    def horizontal(self, left):
        """(B, dim, H, columns + reach - hidden), those to the left first -> (B, 2 dim, H, columns)."""
        weight = self.horiz_stack.weight[..., :-1] if self.hidden else self.horiz_stack.weight
        return F.conv2d(left, weight, self.horiz_stack.bias)

    def condition(self, label):
        """(B, 2 dim, 1, 1) what the class adds to the gates; a single 0 without classes."""
        if self.class_cond_embedding is None:
            return self.vert_stack.bias.new_zeros(())
        return self.class_cond_embedding(label)[:, :, None, None]

    def join(self, v_to_h, h, x_h, condition):
        """Horizontal output (B, dim, H, W) from the two stacks' features (B, 2 dim, H, W) and the layer's input."""
        out = self.horiz_resid(_gate(v_to_h + h, condition))
        return out + x_h if self.residual else out

    def forward(self, x_v, x_h, label):
        condition = self.condition(label)
        v = self.vertical(F.pad(x_v, (0, 0, self.reach, -self.hidden)))
        h = self.horizontal(F.pad(x_h, (self.reach, -self.hidden)))
        return _gate(v, condition), self.join(self.vert_to_horiz(v), h, x_h, condition)


def _gate(x, condition):
    tanh, sigmoid = (x + condition.to(x.dtype)).chunk(2, dim=1)  # in the precision of autocast, not the embedding's
    return torch.tanh(tanh) * torch.sigmoid(sigmoid)


class GatedPixelCNN(Rebuilt, nn.Module):
    """Autoregressive prior over grids of latents (van den Oord et al. 2016, arXiv 1606.05328).

    Keys and arguments of the public pytorch-vqvae project; right on grids of any height and width.

    Args:
        input_dim: number of codes K. dim: width. n_layers: depth. n_classes: 0 for an unconditional prior.
    """

    def __init__(self, input_dim=256, dim=64, n_layers=15, n_classes=10):
        super().__init__()
        self.n_classes = n_classes
        self.embedding = nn.Embedding(input_dim, dim)
        self.layers = nn.ModuleList(
            GatedMaskedConv2d("B" if i else "A", dim, 3 if i else 7, residual=i > 0, n_classes=n_classes)
            for i in range(n_layers))
        self.output_conv = nn.Sequential(nn.Conv2d(dim, 512, 1), nn.ReLU(True), nn.Conv2d(512, input_dim, 1))
        self.apply(_initialise)

    def _check(self, label):
        if (label is None) != (self.n_classes == 0):
            raise ValueError(f"this prior has {self.n_classes} classes: labels are "
                             f"{'needed' if self.n_classes else 'of no use'}")
        if label is not None and not ((label >= 0) & (label < self.n_classes)).all():
            raise ValueError(f"labels must lie in 0...{self.n_classes - 1}, got {label.tolist()}")

    def forward(self, latents, label=None):
        """Logits (B, K, h, w) of every position of latents (B, h, w) int64, each given those above and to its left.

        label (B,) int64, None for an unconditional prior. Raises ValueError where it is missing or superfluous.
        """
        if (label is None) != (self.n_classes == 0):
            self._check(label)
        x_v = x_h = self.embedding(latents).permute(0, 3, 1, 2)  # (B, dim, h, w)
        for layer in self.layers:
            x_v, x_h = layer(x_v, x_h, label)
        return self.output_conv(x_h)

    @torch.no_grad()
    def generate(self, label=None, shape=(8, 8), batch_size=64, temperature=1., top_k=None, generator=None):
        """Sample latents (batch_size, *shape) int64, each position once: what is computed for it is kept.

        For a row, every layer's vertical stack; for a position, every layer's horizontal stack at that position.
        Equal to drawing each position from a full forward, given the same generator.

        Args:
            label: (batch_size,) int64, None for an unconditional prior.
            temperature: divides the logits. top_k: draw from the k most probable codes only.
            generator: torch.Generator on the CPU; None uses the global one.
        Raises:
            ValueError: label out of range, of another length, missing or superfluous; temperature or top_k below 0.
        """
        self._check(label)
        if label is not None and len(label) != batch_size:
            raise ValueError(f"{len(label)} labels for {batch_size} samples")
        (height, width), weight = shape, self.embedding.weight
        conditions = [layer.condition(label) for layer in self.layers]
        # Inputs of each layer's two stacks so far, behind the zeros beyond the border: of all rows, of this row.
        rows = [weight.new_zeros(batch_size, weight.shape[1], layer.reach + height, width) for layer in self.layers]
        latents = torch.zeros(batch_size, height, width, dtype=torch.int64, device=weight.device)
        for i in range(height):
            v_to_h = []
            for depth, (layer, condition) in enumerate(zip(self.layers, conditions)):
                v = layer.vertical(rows[depth][:, :, i:i + layer.reach + 1 - layer.hidden])  # (B, 2 dim, 1, w)
                v_to_h.append(layer.vert_to_horiz(v))
                if depth + 1 < len(self.layers):
                    below = rows[depth + 1]
                    below[:, :, self.layers[depth + 1].reach + i] = _gate(v, condition).squeeze(2)
            row = [weight.new_zeros(batch_size, weight.shape[1], 1, layer.reach + width) for layer in self.layers]
            for j in range(width):
                x_h = torch.zeros_like(row[0][..., :1])  # the position itself, which the first layer does not see
                for layer, condition, left, above in zip(self.layers, conditions, row, v_to_h):
                    left[..., layer.reach + j] = x_h.squeeze(3)
                    h = layer.horizontal(left[..., j:j + layer.reach + 1 - layer.hidden])  # (B, 2 dim, 1, 1)
                    x_h = layer.join(above[..., j:j + 1], h, x_h, condition)
                latents[:, i, j] = draw(self.output_conv(x_h)[:, :, 0, 0], temperature, top_k, generator)
                row[0][..., self.layers[0].reach + j] = self.embedding(latents[:, i, j]).unsqueeze(2)
            rows[0][:, :, self.layers[0].reach + i] = self.embedding(latents[:, i]).transpose(1, 2)
        return latents


def cross_entropy(logits, latents):
    """Mean nats a latent of logits (B, K, h, w) for latents (B, h, w) int64, in float32 whatever the logits are."""
    rows = logits.permute(0, 2, 3, 1).flatten(0, 2)  # (N, K), in memory as it is where logits are channels_last
    return _CrossEntropy.apply(rows, latents.flatten())


class _CrossEntropy(torch.autograd.Function):
    """Value and gradient in one pass over blocks of rows, which never leaves the cache."""

    @staticmethod
    def forward(ctx, logits, targets):
        total, gradient = 0., torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        for start in range(0, len(logits), _CROSS_ENTROPY_ROWS):
            block = slice(start, start + _CROSS_ENTROPY_ROWS)
            target = targets[block].unsqueeze(1)
            log_p = logits[block].float().log_softmax(1)
            total = total - log_p.gather(1, target).sum()
            if gradient is not None:
                gradient[block] = log_p.exp_().scatter_add_(1, target, -torch.ones_like(log_p[:, :1])).div_(len(logits))
        ctx.save_for_backward(gradient)
        return total / len(logits)

    @staticmethod
    def backward(ctx, grad_value):
        gradient, = ctx.saved_tensors
        return grad_value.to(gradient.dtype) * gradient, None


def draw(logits, temperature=1., top_k=None, generator=None):
    """One code (B,) int64 for each row of logits (B, K), by inverting the cumulative distribution.

    Takes one uniform number a row from the generator, so that nearly equal logits draw equal codes.
    """
    if not temperature > 0 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature and top-k must be positive, got {temperature} and {top_k}")
    logits = logits.double() / temperature
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    cumulative = logits.softmax(1).cumsum(1)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator).to(logits.device)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1).clamp(
        max=logits.shape[1] - 1)


class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of an image real or made (Isola et al. 2017, arXiv 1611.07004).

    Args:
        input_dim: channels C. dim: width of the first layer. n_layers: halvings of each side.
    """

    def __init__(self, input_dim, dim=64, n_layers=2):
        super().__init__()
        layers, width = [nn.Conv2d(input_dim, dim, 4, 2, 1), nn.LeakyReLU(0.2, True)], dim
        for i in range(1, n_layers + 1):
            wider, stride = dim * min(2 ** i, 8), 2 if i < n_layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.BatchNorm2d(wider),
                       nn.LeakyReLU(0.2, True)]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0., 0.02)

    @staticmethod
    def check_size(size, n_layers):
        """Raise ValueError where images (H, W) are too small for so many halvings."""
        if min(size) // 2 ** n_layers < 3:
            raise ValueError(f"images of {size[0]}x{size[1]} are too small for a discriminator of {n_layers} halvings: "
                             "pass a smaller --disc-layers or a larger --image-size")

    def forward(self, x):
        """Logits (B, 1, h, w) of the patches of images x (B, C, H, W) in [-1, 1]: positive is real."""
        return self.layers(x)
