"""Training losses, kept on the device, so that no step waits for them: means of an epoch, and what is not finite."""
import torch

from harness import distributed


class Tally:
    """Means of losses since the last `restart`, and the step at which each was first not finite.

    Everything is changed in place, and the step is read from a tensor: `add` may be part of a CUDA graph.
    """

    def __init__(self, device):
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self._kept = {}  # names -> first bad step of each (-1 is none), their sums, number of additions

    @torch.no_grad()
    def add(self, losses):
        """Add the losses {name: scalar} of a step. Those that are added together are always the same."""
        names, values = tuple(losses), torch.stack([loss.detach().float() for loss in losses.values()])
        if names not in self._kept:
            self._kept[names] = (torch.full_like(values, -1, dtype=torch.int64), torch.zeros_like(values),
                                 values.new_zeros(()))
        first_bad, sums, count = self._kept[names]
        first_bad.copy_(torch.where((first_bad < 0) & ~values.isfinite(), self.step, first_bad))
        sums.add_(values)
        count.add_(1)

    def first_bad(self):
        """(step, names of the losses) that were the first not to be finite; None where all are."""
        bad = [(step, name) for names, (steps, *_) in self._kept.items()
               for name, step in zip(names, steps.tolist()) if step >= 0]
        first = min(bad, default=(None,))[0]
        return (first, [name for step, name in bad if step == first]) if bad else None

    def restart(self):
        """Forget the losses so far, but not what was not finite."""
        for _, sums, count in self._kept.values():
            sums.zero_()
            count.zero_()

    def means(self):
        """{name: mean over steps and processes}."""
        return {name: distributed.mean(value) for names, (_, sums, count) in self._kept.items()
                for name, value in zip(names, (sums / count).tolist())}
