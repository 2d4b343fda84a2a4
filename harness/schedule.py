"""What happens when in a training: the learning rate, and which batches make an update."""
import math


def lr_scale(name, warmup, progress, step, steps=None):
    """Factor of the learning rate: a linear rise over the warm-up, then 1, or half a cosine down to 0 at the end.

    Args:
        name: "constant" or "cosine", after the warm-up. warmup: in steps, or a share of the training below 1.
        progress: share of the training that is done, in [0, 1]. step: number of the step, from 0.
        steps: of the whole training; None where a clock ends it.
    """
    if steps:
        warmup = round(warmup * steps) if warmup < 1 else warmup
        rise, start = (step + 1) / (warmup + 1), warmup / steps
    elif warmup < 1:
        rise, start = progress / warmup if warmup else 1., warmup
    else:
        rise, start = (step + 1) / (warmup + 1), 0.
    if rise < 1 or start >= 1:  # an epoch that was begun goes on past the end where --resume takes fewer epochs
        return min(1., rise)
    return 0.5 * (1 + math.cos(math.pi * max(0., progress - start) / (1 - start))) if name == "cosine" else 1.


def warmup_warning(warmup, steps):
    """One line where a training of so many steps ends within its warm-up, else nothing."""
    return "" if warmup < steps else (
        f"warning: --warmup-steps {warmup} leaves nothing of the {steps} steps: the learning rate never reaches --lr. "
        "Pass fewer, or a share such as 0.1")


def update_of(batch, batches, accumulate):
    """(number of batches in the update that a batch belongs to, whether it is the last of them).

    An update takes `accumulate` batches, and what is left at the end of an epoch of so many `batches`.
    """
    first = batch - batch % accumulate
    count = min(accumulate, batches - first)
    return count, batch + 1 == first + count
