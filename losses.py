"""The table of the reconstruction loss terms, and their weighted sum.

A term is a function (x_tilde, x) -> scalar of images (B, C, H, W) in [-1, 1] in float32, smallest where x_tilde = x,
and 0 there. To add one, write it in a file of `terms/` and give it a row at the end of that file: its flag, its curves,
its tests and its place in comparisons follow from the row.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from harness import distributed
from harness.errors import UserError
from terms import filters, frequency, pixel, statistics, structure
from terms.images import EPS

ROWS = pixel.ROWS | structure.ROWS | frequency.ROWS | filters.ROWS | statistics.ROWS
TERMS = {name: row.term for name, row in ROWS.items()}
COLOUR_TERMS = {name for name, row in ROWS.items() if row.colour}  # left out where images are grey
STRUCTURAL_TERMS = {name for name, row in ROWS.items() if row.structural}  # --sharpen shows them sharpened originals


def sharpened(x, amount):
    """Images x (B, C, H, W) after an unsharp mask: x + amount (x - x blurred by 3x3 binomial weights), within [-1, 1].

    As targets (after Real-ESRGAN, Wang et al. 2021, arXiv 2107.10833) they give back contrast that is lost where detail
    is uncertain and the best guess its mean.
    """
    padded = F.pad(x, (1, 1, 1, 1), mode="reflect")
    blurred = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    blurred = (blurred[..., :-2, :] + 2 * blurred[..., 1:-1, :] + blurred[..., 2:, :]) / 16
    return x.lerp(blurred, -amount).clamp(-1, 1)


class ReconstructionLoss(nn.Module):
    """Weighted sum of terms, sum_i w_i s_i term_i(x_tilde, x), with s_i = 1 or as `balance` says.

    Where it is asked to, each term is differentiated at the reconstruction by itself, which leaves its norm in
    `gradient_norms`; the total then carries a first-order gradient only.

    Args:
        weights: term name -> weight; terms of weight 0 are left out.
        balance: None, or "gradient": s_i is the ratio of the gradient norms at the reconstruction, of MSE to term i,
            (both running averages), so that a weight means the same for every term and data set.
        shape: (C, H, W) of the images, where known, to fail now rather than at the first batch.
        sharpen: the `STRUCTURAL_TERMS` see the originals `sharpened` by this amount; 0 is not at all.
    Raises:
        UserError: unknown term, weight or amount negative, NaN or infinite, all weights zero, images too small for a
            term, sharpen without a structural term.
    """

    decay = 0.99  # of the running averages

    def __init__(self, weights, balance=None, shape=None, sharpen=0.):
        super().__init__()
        for name, weight in weights.items():
            if name not in TERMS:
                raise UserError(f"unknown loss term {name!r}: the terms are {', '.join(TERMS)}")
            if not math.isfinite(weight) or weight < 0:
                raise UserError(f"--{name}-weight must be finite and not negative, got {weight}")
        self.weights = {name: float(weight) for name, weight in weights.items() if weight > 0}
        if not self.weights:
            raise UserError("all loss weights are zero: give at least one term a positive weight, say --mse-weight 1")
        if balance not in (None, "gradient"):
            raise ValueError(f"balance must be None or 'gradient', got {balance!r}")
        if not math.isfinite(sharpen) or sharpen < 0:
            raise UserError(f"--sharpen must be finite and not negative, got {sharpen}")
        if sharpen and not STRUCTURAL_TERMS & set(self.weights):
            raise UserError("--sharpen is for structural terms: give one a weight, say --root-ssim-weight 0.4, "
                            "or take it out")
        self.balance, self.sharpen, self.gradient_norms = balance, sharpen, {}
        self.register_buffer("_weights", torch.tensor(list(self.weights.values())), persistent=False)
        self._range_checked = False
        # Running norms of the terms' gradients, then of MSE's; 0 is none yet.
        self.register_buffer("average_norms", torch.zeros(len(self.weights) + 1))
        if shape:
            self.value(*torch.zeros(2, 1, *shape))

    def value(self, x_tilde, x):
        """Raw values of the terms by name."""
        with torch.autocast(x.device.type, enabled=False):
            x_tilde, x = x_tilde.float(), x.float()
            target = sharpened(x, self.sharpen) if self.sharpen else x
            return {name: TERMS[name](x_tilde, target if name in STRUCTURAL_TERMS else x) for name in self.weights}

    def check(self, x):
        """Raise UserError where originals x leave [-1, 1]; a loop that compiles calls it with its first batch.

        Once: it waits for the device, and images of one kind have one range.
        """
        if x.abs().amax() > 1 + 1e-4:
            raise UserError(f"images must lie in [-1, 1], got {x.min():.3g} to {x.max():.3g}")
        self._range_checked = True

    def scales(self):
        """(number of terms,) what each term is multiplied by, its weight left aside."""
        norms, mse_norm = self.average_norms[:-1], self.average_norms[-1]
        if self.balance is None:
            return torch.ones_like(norms)
        return torch.where(mse_norm > 0, mse_norm / norms.clamp(min=EPS * mse_norm), 1.)

    def forward(self, x_tilde, x, apart=False):
        """Compare reconstructions x_tilde with originals x, both (B, C, H, W) in [-1, 1].

        Args:
            apart: differentiate each term by itself, for its `gradient_norms`; balancing always does.
        Returns:
            total: scalar to minimise. parts: detached, raw, unweighted values by term name.
        Raises:
            ValueError: shapes differ, or the first originals leave [-1, 1].
        """
        if x_tilde.shape != x.shape:
            raise ValueError(f"reconstruction {tuple(x_tilde.shape)} and original {tuple(x.shape)} differ in shape")
        if not (self._range_checked or torch.compiler.is_compiling()):
            self.check(x)
        weights = self._weights
        if not ((apart or self.balance) and torch.is_grad_enabled() and x_tilde.requires_grad):
            terms = self.value(x_tilde, x)
            values = torch.stack(list(terms.values()))
            return (weights * self.scales() * values).sum(), dict(zip(terms, values.detach()))

        image = x_tilde.detach().float().requires_grad_()
        terms = self.value(image, x)
        values = torch.stack([term.detach() for term in terms.values()])
        parts = dict(zip(terms, values))

        gradients = [torch.autograd.grad(term, image)[0] for term in terms.values()]
        norms = torch.stack([gradient.norm() for gradient in gradients])
        self.gradient_norms = dict(zip(terms, norms))
        if self.balance:
            mse_norm = 2 * (image.detach() - x).norm() / x.numel()
            squares = distributed.total(torch.cat([norms, mse_norm.view(1)]).square())
            self._average(squares.sqrt() / distributed.world_size())
        weights = weights * self.scales()
        combined = sum(weight * gradient for weight, gradient in zip(weights, gradients))
        nothing = (combined * (x_tilde - x_tilde.detach())).sum()  # whose gradient is the combined one
        return (weights * values).sum() + nothing, parts

    def curves(self, parts):
        """{tag: value} of each term for TensorBoard: raw, weighted, and the gradient norm of the last step."""
        weighted = {name: self.weights[name] * scale * parts[name] for name, scale in zip(self.weights, self.scales())}
        return {f"term/{name}/{kind}": values[name] for name in self.weights for kind, values in (
            ("raw", parts), ("weighted", weighted), ("gradient_norm", self.gradient_norms))}

    def _average(self, norms):
        old = self.average_norms
        old.copy_(torch.where(old > 0, old.lerp(norms, 1 - self.decay), norms))  # in place: a graph keeps its address
