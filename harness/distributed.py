"""Many processes, one run: rank, world size, reductions. In a single process nothing here does anything.

Processes are started by torchrun; the files of a run lie on a disk that all of them see, and rank 0 alone writes.
"""
import os
import sys
from contextlib import contextmanager
from inspect import signature
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel

from harness.errors import UserError


def asked():
    """Number of processes that the environment says there are, 1 where it says nothing. UserError as `_number`."""
    return _number("WORLD_SIZE", 1, low=1)


def _number(name, default, low=0):
    """A whole number of the environment. UserError where it is none."""
    text = os.environ.get(name, str(default))
    if not (text.isdecimal() and len(text) < 10 and int(text) >= low):
        raise UserError(f"the environment variable {name} is {text!r}, which is no number of processes: start many "
                        "with torchrun, or unset it")
    return int(text)


def start():
    """Join the processes that torchrun started, if it did; all but rank 0 print nothing from here on.

    Raises:
        UserError: the environment names other processes, but not as torchrun does.
    """
    if asked() > 1 and not dist.is_initialized():
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        except (ValueError, OverflowError, RuntimeError) as error:
            text = " ".join(str(error).split())
            raise UserError(f"WORLD_SIZE is {asked()}, but these processes cannot meet ({text}): start them with "
                            "torchrun, or unset it") from error
        # A compiler leaves the exchange itself alone: what it makes of one in place is not awaited.
        for name, function in vars(_exchange).items():
            setattr(_exchange, name, torch.compiler.disable(function))
        if rank():
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank():
    """Number of this process on its machine."""
    return _number("LOCAL_RANK", 0) if dist.is_initialized() else 0


def local_world_size():
    """Number of processes on this machine."""
    return _number("LOCAL_WORLD_SIZE", 1, low=1) if dist.is_initialized() else 1


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextmanager
def rank_0_first():
    """Rank 0 goes through the block, then all others: what it downloads or computes, they find on disk."""
    if rank():
        barrier()
    yield
    if not rank():
        barrier()


def is_failure(error):
    """Whether an error says that another process of the run is gone."""
    return dist.is_initialized() and (isinstance(error, dist.DistError)
                                      or any(name in str(error).lower() for name in ("gloo", "nccl")))


# --- reductions

def total(tensor):
    """Sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        _exchange.all_reduce(tensor)
    return tensor


def of_rank_0(tensor):
    """Rank 0's values of a tensor, in place."""
    if dist.is_initialized():
        _exchange.broadcast(tensor, 0)
    return tensor


def mean(number):
    """Mean of a number over all processes."""
    return total(torch.tensor(float(number))).item() / world_size() if dist.is_initialized() else number


def concatenate(rows):
    """Tensors (N_i, ...) of all processes as one, in order of rank."""
    return _exchange.concatenate(rows) if dist.is_initialized() else rows


def _concatenated(rows):
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    longest = int(max(counts))
    padded = torch.cat([rows, rows.new_zeros(longest - len(rows), *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:int(count)] for part, count in zip(parts, counts)])


_exchange = SimpleNamespace(all_reduce=dist.all_reduce, broadcast=dist.broadcast, concatenate=_concatenated)


def count_of(rows):
    """Number of rows on all processes together, and of those before this process's."""
    if not dist.is_initialized():
        return len(rows), 0
    counts = concatenate(torch.tensor([len(rows)])).tolist()  # on the CPU, so that nobody waits for a GPU
    return sum(counts), sum(counts[:rank()])


def rand(rows, *shape):
    """Numbers (len(rows), *shape) in [0, 1) for this process's rows, the same for a batch whatever the processes."""
    count, offset = count_of(rows)
    return of_rank_0(torch.rand(count, *shape))[offset:offset + len(rows)]


def take(rows, index, offset):
    """Rows (M, D) at `index` (M,) of `concatenate(rows)`, of which this process holds those from `offset` on."""
    if not dist.is_initialized():
        return rows[index]
    own = index - offset
    held = ((own >= 0) & (own < len(rows))).unsqueeze(1)
    return total(torch.where(held, rows[own.clamp(0, len(rows) - 1)], 0))


# --- networks

class _Total(Function):
    """Sum over all processes, of the gradient too: each process's loss depends on what every other one put in."""

    @staticmethod
    def forward(ctx, x):
        return total(x.clone())

    @staticmethod
    def backward(ctx, grad):
        return total(grad.clone())


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all processes, on any device; PyTorch's own for that needs a GPU."""

    def forward(self, x):
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            images = x.float()
            count = total(images.new_full((), images.numel() // images.shape[1]))
            mean = _Total.apply(images.sum((0, 2, 3))) / count
            centered = images - mean.view(1, -1, 1, 1)
            variance = _Total.apply(centered.square().sum((0, 2, 3))) / count
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            scale = self.weight / (variance + self.eps).sqrt()
            return (centered * scale.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)).to(x.dtype)


# Whether a forward pass copies rank 0's buffers, by the name that this PyTorch knows: newer ones warn of the older.
_BUFFERS = ("forward_sync_buffers" if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
            else "broadcast_buffers")


def wrap(model, device):
    """The model whose backward takes the mean gradient over all processes.

    Its weights are those of `model`, which stays what is saved, loaded and asked for codes.
    """
    if not dist.is_initialized():
        return model
    return DistributedDataParallel(model, [device] if device.type == "cuda" else None, **{_BUFFERS: False})
