"""The networks: VQ-VAE (van den Oord et al. 2017, arXiv 1711.00937) and PixelCNN prior (2016, arXiv 1606.05328)."""
import torch
import torch.nn.functional as F
from torch import nn

from harness import checkpoint
from harness.batches import send
from harness.checkpoint import check, complete
from harness.device import one_step
from harness.distributed import BatchNorm2d
from harness.errors import UserError
from harness.fields import MODEL_ARGS
from harness.progress import counted
from quantizers import QUANTIZERS, VQEmbedding  # noqa: F401 (VQEmbedding is looked for here)


def _initialise(module):
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Rebuilt:
    """A network that a checkpoint holds all of."""

    @classmethod
    def rebuild(cls, checkpoint):
        """The network of a checkpoint's contents, on the CPU, in eval mode.

        Raises:
            UserError: the checkpoint lacks some of it, or holds weights that are not finite.
        """
        path = checkpoint.get("path", "the checkpoint")
        with complete(path):
            args, weights, right = checkpoint["model_args"], checkpoint["model"], MODEL_ARGS.get(cls.__name__, {})
            check(args, {name: right[name] for name in right if name in args}, "model_args")
            with torch.device("meta"):  # which builds nothing: other arguments than the weights' may ask for any memory
                for name, value in cls(**args).state_dict().items():
                    if name not in weights:
                        raise TypeError(f"its model has no {name}")
                    if weights[name].shape != value.shape:
                        raise TypeError(f"its {name} is {tuple(weights[name].shape)}, not {tuple(value.shape)}")
            model = cls(**args)
            model.load_state_dict(weights)
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise UserError(f"{path} holds weights that are not finite: its training diverged, train again with a "
                            "lower --lr")
        return model.eval()


class ResBlock(nn.Module):
    """x -> ReLU(x) + f(ReLU(x)): the skip path carries ReLU(x), as where the published block works in place."""

    def __init__(self, dim):
        super().__init__()
        self.block = nn.Sequential(
            nn.Identity(),  # stands where the published block has the first ReLU, for the keys of its layers
            nn.Conv2d(dim, dim, 3, 1, 1),
            BatchNorm2d(dim),
            nn.ReLU(True),
            nn.Conv2d(dim, dim, 1),
            BatchNorm2d(dim),
        )

    def forward(self, x):
        x = F.relu(x)
        return x + self.block(x)


class VectorQuantizedVAE(Rebuilt, nn.Module):
    """Convolutional VQ-VAE; keys and arguments of the public pytorch-vqvae project, whose `downsample` is 4.

    Args:
        input_dim: channels C of the images.
        dim: width of every layer, and D of the codes.
        K: number of codes asked for; the attribute is the number that the quantizer has.
        downsample: sides of an image over those of its latents, a power of two of at least 4.
        quantizer: a row of `QUANTIZERS`; "gradient" is the published codebook. `settings` are its further arguments.
        fine_blocks: residual blocks of the decoder at each scale between latents and image, 0 as published; with them
            every residual block starts as x -> ReLU(x), its last scale at zero (Goyal et al. 2017, arXiv 1706.02677),
            or the deeper network learns slower than the published one.
    """

    codes_frozen = False

    def __init__(self, input_dim, dim, K=512, downsample=4, quantizer="gradient", fine_blocks=0, **settings):
        super().__init__()
        if quantizer not in QUANTIZERS:
            raise UserError(f"the quantizer must be one of {', '.join(QUANTIZERS)}, got {quantizer!r}")
        self.input_dim, self.dim, self.downsample, self.quantizer = input_dim, dim, downsample, quantizer
        deeper = downsample.bit_length() - 3  # halvings beyond the published two
        self.encoder = nn.Sequential(
            nn.Conv2d(input_dim, dim, 4, 2, 1),
            BatchNorm2d(dim),
            nn.ReLU(True),
            *(layer for _ in range(deeper) for layer in (
                nn.Conv2d(dim, dim, 4, 2, 1), BatchNorm2d(dim), nn.ReLU(True))),
            nn.Conv2d(dim, dim, 4, 2, 1),
            ResBlock(dim),
            ResBlock(dim),
        )
        self.codebook = QUANTIZERS[quantizer](K, dim, **settings)
        self.K = self.codebook.K
        self.decoder = nn.Sequential(
            ResBlock(dim),
            ResBlock(dim),
            nn.ReLU(True),
            *(layer for _ in range(deeper + 1) for layer in (
                nn.ConvTranspose2d(dim, dim, 4, 2, 1), BatchNorm2d(dim), nn.ReLU(True),
                *(ResBlock(dim) for _ in range(fine_blocks)), *((nn.ReLU(True),) if fine_blocks else ()))),
            nn.ConvTranspose2d(dim, input_dim, 4, 2, 1),
            nn.Tanh(),
        )
        self.apply(_initialise)
        for module in self.modules() if fine_blocks else ():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.block[-1].weight)

    @staticmethod
    def check_size(size, downsample):
        """Raise UserError unless both sides (H, W) divide by the downsampling."""
        if any(side % downsample for side in size):
            nearest = "x".join(str(max(downsample, side // downsample * downsample)) for side in size)
            raise UserError(f"images are {size[0]}x{size[1]} but both sides must divide by {downsample}: crop "
                            f"or resize them, say with --image-size {nearest}")

    def freeze_codes(self, checkpoint):
        """Take encoder and codebook from another model's checkpoint contents, and learn the decoder alone.

        Raises:
            UserError: that model's channels, width, number of codes, downsampling or quantizer differ.
        """
        other = VectorQuantizedVAE.rebuild(checkpoint)
        for name in ("input_dim", "dim", "K", "downsample", "quantizer"):
            if getattr(self, name) != getattr(other, name):
                raise UserError(f"the frozen codebook has {name} {getattr(other, name)}, this model "
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

    def encode(self, x):
        """Latents (B, H/f, W/f) int64, f the downsampling, of images x (B, C, H, W) in [-1, 1].

        Raises:
            UserError: a side does not divide by the downsampling.
        """
        self.check_size(x.shape[2:], self.downsample)
        return self.codebook(self.encoder(x))

    def decode(self, latents):
        """Images (B, C, f h, f w) in [-1, 1] of latents (B, h, w) int64."""
        return self.decoder(self.codebook.embed(latents))

    def reconstruct(self, x):
        """What `forward` returns, and the latents (B, H/f, W/f) int64 that were decoded, found once."""
        z_e = self.encoder(x)
        z_q_st, z_q, latents = self.codebook.straight_through(z_e)
        return self.decoder(z_q_st), z_e, z_q, latents

    def forward(self, x):
        """Reconstruct images x (B, C, H, W) in [-1, 1].

        Returns:
            x_tilde (B, C, H, W) in [-1, 1], the encoder's z_e (B, D, H/f, W/f), and its nearest codes z_q, alike.
        """
        return self.reconstruct(x)[:3]


def load(path):
    """The trained VQ-VAE of a run's folder (its best.pt) or of a checkpoint, on the CPU, in eval mode.

    `load("models/mine").encode(x)` and `.decode(latents)` take and give images (B, C, H, W) in [-1, 1].

    Raises:
        FileNotFoundError: there is none. UserError: it is damaged or no VQ-VAE.
    """
    return VectorQuantizedVAE.rebuild(checkpoint.load(path, "vqvae"))


class GatedMaskedConv2d(nn.Module):
    """One layer of the gated PixelCNN: a vertical stack that sees the rows above, a horizontal one the row's left.

    Args:
        mask_type: "A" does not see the current row (vertical) or position (horizontal), "B" does.
        dim: width. kernel: odd width of the receptive field. residual: add the horizontal input to its output.
        n_classes: number of classes that condition the gates, 0 for none.
        condition_dim: channels of a condition at each position, added to the gates too, 0 for none.
    """

    def __init__(self, mask_type, dim, kernel, residual=True, n_classes=10, condition_dim=0):
        super().__init__()
        self.reach, self.masked, self.residual = kernel // 2, int(mask_type == "A"), residual
        self.class_cond_embedding = nn.Embedding(n_classes, 2 * dim) if n_classes else None
        self.vert_stack = nn.Conv2d(dim, dim * 2, (kernel // 2 + 1, kernel), padding=(kernel // 2, kernel // 2))
        self.vert_to_horiz = nn.Conv2d(2 * dim, 2 * dim, 1)
        self.horiz_stack = nn.Conv2d(dim, dim * 2, (1, kernel // 2 + 1), padding=(0, kernel // 2))
        self.horiz_resid = nn.Conv2d(dim, dim, 1)
        self.spatial_cond = nn.Conv2d(condition_dim, 4 * dim, 1) if condition_dim else None

    # What is masked is sliced off the weights, so that it is neither computed nor ever changed.

    def vertical(self, above):
        """(B, dim, rows + reach - masked, W), the rows above first -> (B, 2 dim, rows, W)."""
        weight = self.vert_stack.weight[:, :, :-1] if self.masked else self.vert_stack.weight
        return F.conv2d(above, weight, self.vert_stack.bias, padding=(0, self.reach))

    def horizontal(self, left):
        """(B, dim, H, columns + reach - masked), those to the left first -> (B, 2 dim, H, columns)."""
        weight = self.horiz_stack.weight[..., :-1] if self.masked else self.horiz_stack.weight
        return F.conv2d(left, weight, self.horiz_stack.bias)

    def condition(self, label, spatial=None):
        """What is added to the gates of the vertical and of the horizontal stack, each (B, 2 dim, 1, 1) of the class.

        With a spatial condition (B, condition_dim, h, w) each (B, 2 dim, h, w); a single 0 without either.
        """
        condition = self.vert_stack.bias.new_zeros(())
        if self.class_cond_embedding is not None:
            condition = self.class_cond_embedding(label)[:, :, None, None]
        if self.spatial_cond is None:
            return condition, condition
        return tuple(part + condition for part in self.spatial_cond(spatial).chunk(2, dim=1))

    def join(self, v_to_h, h, x_h, condition):
        """Horizontal output (B, dim, H, W) from the two stacks' features (B, 2 dim, H, W) and the layer's input."""
        out = self.horiz_resid(_gate(v_to_h + h, condition))
        return out + x_h if self.residual else out

    def forward(self, x_v, x_h, label, spatial=None):
        vertical, horizontal = self.condition(label, spatial)
        v = self.vertical(F.pad(x_v, (0, 0, self.reach, -self.masked)))
        h = self.horizontal(F.pad(x_h, (self.reach, -self.masked)))
        return _gate(v, vertical), self.join(self.vert_to_horiz(v), h, x_h, horizontal)


def _gate(x, condition):
    tanh, sigmoid = (x + condition.to(x.dtype)).chunk(2, dim=1)  # in the precision of autocast, not the embedding's
    return torch.tanh(tanh) * torch.sigmoid(sigmoid)


class GatedPixelCNN(Rebuilt, nn.Module):
    """Autoregressive prior over grids of latents (van den Oord et al. 2016, arXiv 1606.05328).

    Keys and arguments of the public pytorch-vqvae project; right on grids of any height and width.

    Args:
        input_dim: number of codes K. dim: width. n_layers: depth. n_classes: 0 for an unconditional prior.
        condition_dim: channels of a condition (B, condition_dim, h, w) that both stacks' gates take at each position in
            every layer, as the paper's spatial conditioning (section 2.3); 0 for none.
    """

    def __init__(self, input_dim=256, dim=64, n_layers=15, n_classes=10, condition_dim=0):
        super().__init__()
        self.n_classes, self.condition_dim = n_classes, condition_dim
        self.embedding = nn.Embedding(input_dim, dim)
        self.layers = nn.ModuleList(
            GatedMaskedConv2d("B" if i else "A", dim, 3 if i else 7, residual=i > 0, n_classes=n_classes,
                              condition_dim=condition_dim)
            for i in range(n_layers))
        self.output_conv = nn.Sequential(nn.Conv2d(dim, 512, 1), nn.ReLU(True), nn.Conv2d(512, input_dim, 1))
        self.apply(_initialise)

    def _check(self, label):
        if (label is None) != (self.n_classes == 0):
            raise ValueError(f"this prior has {self.n_classes} classes: labels are "
                             f"{'needed' if self.n_classes else 'of no use'}")
        if label is not None and not ((label >= 0) & (label < self.n_classes)).all():
            raise ValueError(f"labels must lie in 0...{self.n_classes - 1}, got {label.tolist()}")

    def _check_spatial(self, spatial, shape):
        """`spatial` must be (B, condition_dim, h, w) for latents of `shape` (B, h, w), None where there is none."""
        found = None if spatial is None else tuple(spatial.shape)
        if found != ((shape[0], self.condition_dim, *shape[1:]) if self.condition_dim else None):
            raise ValueError(f"latents {tuple(shape)} of a prior with {self.condition_dim} channels of spatial "
                             f"condition came with a condition of shape {found}")

    def forward(self, latents, label=None, spatial=None):
        """Logits (B, K, h, w) of every position of latents (B, h, w) int64, each given those above and to its left.

        label (B,) int64 and spatial (B, condition_dim, h, w), None for a prior without. Raises ValueError where one is
        missing, superfluous or of another shape.
        """
        if (label is None) != (self.n_classes == 0):
            self._check(label)
        self._check_spatial(spatial, latents.shape)
        x_v = x_h = self.embedding(latents).permute(0, 3, 1, 2)  # (B, dim, h, w)
        for layer in self.layers:
            x_v, x_h = layer(x_v, x_h, label, spatial)
        return self.output_conv(x_h)

    @torch.no_grad()
    def generate(self, label=None, shape=(8, 8), batch_size=64, temperature=1., top_k=None, generator=None,
                 spatial=None):
        """Sample latents (batch_size, *shape) int64, each position once: what is computed for it is kept.

        For a row, every layer's vertical stack; for a position, every layer's horizontal stack at that position.
        Equal to drawing each position from a full forward, given the same generator.

        Args:
            label: (batch_size,) int64, None for an unconditional prior.
            temperature: divides the logits. top_k: draw from the k most probable codes only.
            generator: torch.Generator on the CPU, so that every device draws the same; None uses the global one.
            spatial: (batch_size, condition_dim, *shape), None for a prior without.
        Raises:
            ValueError: condition of another shape; label out of range, of another length, missing or superfluous;
                temperature or top_k below 0.
        """
        self._check(label)
        if label is not None and len(label) != batch_size:
            raise ValueError(f"{len(label)} labels for {batch_size} samples")
        (height, width), weight = shape, self.embedding.weight
        self._check_spatial(spatial, (batch_size, height, width))
        vertical, horizontal = zip(*(
            [part.expand(batch_size, -1, height, width) if part.ndim else part.expand(1, 1, height, width)
             for part in layer.condition(label, spatial)] for layer in self.layers))
        # Inputs of each layer's two stacks so far, behind the zeros beyond the border: of all rows, of this row.
        rows = [weight.new_zeros(batch_size, weight.shape[1], layer.reach + height, width) for layer in self.layers]
        row = [weight.new_zeros(batch_size, weight.shape[1], 1, layer.reach + width) for layer in self.layers]
        v_to_h = [weight.new_empty(batch_size, 2 * weight.shape[1], 1, width) for _ in self.layers]

        def position(i, j, uniform):
            x_h = torch.zeros_like(row[0][..., :1])  # the position itself, which the first layer does not see
            for layer, condition, left, above in zip(self.layers, horizontal, row, v_to_h):
                _put(left, layer.reach + j, x_h)
                h = layer.horizontal(_part(left, 3, j, layer.reach + 1 - layer.masked))  # (B, 2 dim, 1, 1)
                x_h = layer.join(_part(above, 3, j), h, x_h, _part(_part(condition, 2, i), 3, j))
            codes = draw(self.output_conv(x_h)[:, :, 0, 0], temperature, top_k, uniform=uniform)
            _put(row[0], self.layers[0].reach + j, self.embedding(codes)[..., None, None])
            return codes

        on_gpu = weight.device.type == "cuda"
        position = one_step(position, weight.device, what=None)
        places = torch.arange(max(shape), device=weight.device).split(1) if on_gpu else range(max(shape))
        uniform = torch.rand(height * width, batch_size, 1, dtype=torch.float64, generator=generator)
        uniform = iter(send(uniform, weight.device) if on_gpu else uniform)
        latents = torch.zeros(batch_size, height, width, dtype=torch.int64, device=weight.device)
        for i in counted(range(height), "sampling", "rows"):
            for depth, (layer, condition) in enumerate(zip(self.layers, vertical)):
                v = layer.vertical(rows[depth][:, :, i:i + layer.reach + 1 - layer.masked])  # (B, 2 dim, 1, w)
                v_to_h[depth].copy_(layer.vert_to_horiz(v))
                if depth + 1 < len(self.layers):
                    below = rows[depth + 1]
                    below[:, :, self.layers[depth + 1].reach + i] = _gate(
                        v, condition[:, :, i:i + 1]).squeeze(2)
            for left in row:
                left.zero_()
            for j in range(width):
                latents[:, i, j] = position(places[i], places[j], next(uniform))
            rows[0][:, :, self.layers[0].reach + i] = self.embedding(latents[:, i]).transpose(1, 2)
        return latents


# Where a position is a tensor (1,) of the device, not a number, a graph of its operators does for all positions.

def _part(x, axis, start, length=1):
    """`length` entries of x along an axis, from a position on."""
    if torch.is_tensor(start):
        return x.index_select(axis, start + torch.arange(length, device=x.device))
    return x.narrow(axis, start, length)


def _put(x, position, values):
    """Write values (B, dim, 1, 1) to a position of x (B, dim, 1, width)."""
    if torch.is_tensor(position):
        x.index_copy_(3, position, values)
    else:
        x[..., position] = values.squeeze(3)


def draw(logits, temperature=1., top_k=None, generator=None, uniform=None):
    """One code (B,) int64 for each row of logits (B, K), by inverting the cumulative distribution.

    Takes one uniform number a row, so that nearly equal logits draw equal codes: those of `uniform` (B, 1) float64 in
    [0, 1), on the CPU or the logits' device, where they are drawn already, else from the generator.
    """
    if not temperature > 0 or (top_k is not None and top_k < 1):
        raise UserError(f"temperature and top-k must be positive, got {temperature} and {top_k}")
    if uniform is None:
        uniform = torch.rand(len(logits), 1, dtype=torch.float64, generator=generator)
    device, logits = logits.device, logits.to(uniform.device).double() / temperature  # a device may lack float64
    if top_k is not None and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    cumulative = logits.softmax(1).cumsum(1)
    codes = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).squeeze(1)
    return codes.clamp(max=logits.shape[1] - 1).to(device)
