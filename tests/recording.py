"""A CUDA graph stood in for on a CPU: operators are recorded once, with all numbers and addresses, and then re-run."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "is_nonzero"}


class Recording:
    """In place of `harness.device.CUDAGraphs`; counts captures and replays.

    fails: what a capture raises, from number `first` on.
    """

    def __init__(self, fails=None, first=0):
        self.fails, self.first, self.captures, self.replays, self.operators = fails, first, 0, 0, []

    def warm_up(self, function, *inputs):
        return function(*inputs)

    def capture(self, function, *inputs):
        random, tape = torch.get_rng_state(), _Tape()
        try:
            with tape:
                values = function(*inputs)
            if self.fails and self.captures >= self.first:
                raise RuntimeError(self.fails)
        finally:  # a capture computes nothing
            for storage, before in tape.before.values():
                storage.copy_(before)
            torch.set_rng_state(random)
        self.captures, self.operators = self.captures + 1, [function for function, *_ in tape.calls]

        def replay():
            self.replays += 1
            with torch.no_grad():
                for function, args, kwargs, results in tape.calls:
                    for old, new in zip(results, tree_leaves(function(*args, **kwargs))):
                        if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)
            return values
        return replay


class _Tape(TorchDispatchMode):
    """Calls in order, and what each storage that they met held before."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in WAITS:
            raise RuntimeError(f"{function} waits for the device")
        for tensor in tree_leaves((args, kwargs)):  # whatever the schema says: batch norm writes to its statistics
            self._keep(tensor)
        results = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, tree_leaves(results)))
        return results

    def _keep(self, tensor):
        if torch.is_tensor(tensor):
            storage = tensor.untyped_storage()
            self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
