"""What a device asks of training: its name, its precision, its optimizer, and a whole step in one launch."""
import ctypes
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch._functorch.config

from harness import distributed
from harness.errors import UserError

WARM_UP = 3  # steps before a capture: libraries pick their kernels and take their memory, the optimizer makes its state
MOST_GRAPHS = 6  # of a step: each part that is switched on, and logged steps, have one of their own
# Settings of torch._functorch.config, which has no public name: in torch 2.11 and 2.14, perhaps not in others.
COMPILER_SETTINGS = {
    "donated_buffer": False,  # else a backward that keeps its graph for another is refused
    "force_non_lazy_backward_lowering": True,  # the backward compiles before the forward runs: to fail early
}


# --- device

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
LARGEST_KEPT, MOST_KEPT = 2 ** 25, 2 ** 30  # bytes


def keep_freed_memory(most=MOST_KEPT):
    """Let the C library keep the memory of freed tensors for the next ones, rather than return it to the system.

    On a CPU, a step of training otherwise faults thousands of pages in anew: it takes 1.14 times as long (hidden size
    64). Nothing happens where there is no glibc.

    Args:
        most: bytes kept of all tensors together; those of half as many, and of `LARGEST_KEPT` or more, are returned.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_THRESHOLD, min(most // 2, LARGEST_KEPT))
    mallopt(M_TRIM_THRESHOLD, most)


def pick_device(name):
    """torch.device of a name; auto is cuda, then mps, then cpu. UserError where the machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and distributed.world_size() > 1:
        name = f"cuda:{distributed.local_rank()}"
    elif name.startswith("cuda:") and distributed.local_world_size() > 1:
        raise UserError(f"--device {name} is one GPU for several processes: leave its number out, and each has its own")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name} is not available here ({str(error).splitlines()[0]}): "
                        "use --device auto or cpu") from error
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
        has_triton()  # builds now, not in the first step
        torch.backends.cudnn.benchmark = True  # training has images of one size
        allow_tf32(False)
    return device


@cache
def has_triton():
    """Whether Triton can run kernels on the GPU. The first call builds what launches them, or a line says why not."""
    if find_spec("triton") is None:  # on Windows, and in builds for a CPU
        return False
    try:
        from triton.runtime import driver
        driver.active.get_current_target()  # its first use builds
    except (RuntimeError, OSError, ImportError, AssertionError, subprocess.SubprocessError) as error:
        print("Triton's kernels are left out, which is slower. They need a C compiler and the headers of Python (apt "
              f"install gcc python3-dev), and the driver's libcuda.so: {_line(error)}", flush=True)
        return False
    return True


def peak_memory_mb(device):
    """Most memory held at once so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2 ** 20  # with what a graph keeps to itself
    unit = 1 if sys.platform == "darwin" else 2 ** 10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


def allow_tf32(allowed):
    """Whether products and convolutions of float32 may be rounded to 10 bits on a GPU's tensor cores."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


# --- precision

def autocast_of(device, precision):
    """A function that makes the context of a network's forward pass.

    On a GPU in fp32 it lets networks use TF32. Under bf16 they have no use for it, and nothing else may use it.
    """
    bf16 = pick_precision(device, precision) == "bf16"
    if device.type == "cuda":
        allow_tf32(not bf16)
    # Without the cache of casts, which must not outlive the capture of a CUDA graph.
    return partial(torch.autocast, device.type, torch.bfloat16, cache_enabled=False) if bf16 else nullcontext


def pick_precision(device, precision):
    """--precision, where auto stands for what suits the device."""
    return ("bf16" if _has_bf16(device) else "fp32") if precision == "auto" else precision


def _has_bf16(device):
    """Whether products of bfloat16 are faster there than those of float32.

    With AVX-512 alone, without AMX, Intel's processors do as many products a cycle in either, AMD's twice as many.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported()
                                     or torch.cpu._is_avx512_bf16_supported() and not _is_intel())


def _is_intel():
    description = Path("/proc/cpuinfo")
    return "GenuineIntel" in (description.read_text() if description.exists() else platform.processor())


# --- optimizer

def adam(parameters, lr, betas=(0.9, 0.999)):
    """Adam for those of the parameters that have gradients, in one kernel where their device has it.

    On a GPU the learning rate is a tensor, which a captured step reads: set it with `set_lr`.
    """
    learned = [parameter for parameter in parameters if parameter.requires_grad]
    device = learned[0].device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.Adam(learned, lr=torch.tensor(lr, device=device) if on_gpu else lr, betas=betas,
                                 fused=device.type != "mps", capturable=on_gpu)
    optimizer.register_load_state_dict_pre_hook(_with_settings_of_this_run)
    optimizer.register_load_state_dict_post_hook(_check_state)
    return optimizer


def _with_settings_of_this_run(optimizer, state):
    """A saved state of Adam with the settings that it has here: the run may have begun on another device."""
    return state | {"param_groups": optimizer.state_dict()["param_groups"]}


def _check_state(optimizer):
    """TypeError where a loaded state of Adam does not fit its parameters: its next step might end the process."""
    for parameter, state in optimizer.state.items():
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        right = tuple(parameter.shape)
        if shapes != {"step": (), "exp_avg": right, "exp_avg_sq": right}:
            raise TypeError(f"its optimizer has {shapes} for a parameter of {right}")


def set_lr(optimizer, lr):
    """Set the learning rate of all parameters, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


# --- a step in one launch

def _always():
    return True


def compiled(function, ready=_always):
    """A function of a training step by torch.compile, forward and backward; where that fails, as it is.

    A failure of any call is one line, and the function is called as it is from then on. It is called so, too, until it
    is `ready` and a batch has the shape of one before, on batches of other shapes, and where a plain input is true, as
    for a logged step.
    """
    for name, value in COMPILER_SETTINGS.items():
        if hasattr(torch._functorch.config, name):
            setattr(torch._functorch.config, name, value)
    return _Compiled(function, ready)


class _Compiled:
    def __init__(self, function, ready):
        self.plain, self.ready, self.kind, self.seen = function, ready, None, set()
        self.fast = torch.compile(function, fullgraph=distributed.world_size() == 1, dynamic=False)

    def __call__(self, *inputs):
        kind = _kind(inputs)
        if not (self.fast and self.ready()) or any(value is True for value in inputs):
            return self.plain(*inputs)
        start, first = time.perf_counter(), self.kind is None and kind in self.seen
        self.seen.add(kind)
        self.kind = kind if first else self.kind
        if kind != self.kind:
            return self.plain(*inputs)
        try:
            values = self.fast(*inputs)
        except Exception as error:  # whatever a compiler, or the lack of one, raises
            self.fast = None
            values = self.plain(*inputs)  # raises again what is not the compiler's fault
            print(f"--compile failed here and is left out: {_line(error)}", flush=True)
            return values
        if first:
            print(f"compiled in {time.perf_counter() - start:.1f} s", flush=True)
        return values


def one_step(step, device, *optimizers, graph=True, accumulate=1, ready=_always, what="the step"):
    """A training step that is one CUDA graph wherever it can be, and elsewhere the step as it is.

    The first steps run as they are; then forward, loss, backward and update are captured once and replayed for each
    batch, which launches all kernels at once. Batches of a rare shape run as they are. A line says how long the first
    capture took, or why there is none.

    Args:
        step: batch tensors, and plain values such as whether a part is switched on -> tensors, in a dict or not. It
            does the whole update, reads no Python number that changes but these values, waits for nothing, copies
            nothing from the CPU, and draws random numbers on the device alone. The next call overwrites what it
            returned.
        optimizers: those that it steps, made by `adam`.
        graph: False leaves the step as it is. accumulate: batches of an update. ready: whether a step changes tensors
            alone by now. what: the lines call it; None says nothing.
    """
    if device.type != "cuda" or not graph:
        return step
    several = distributed.world_size() > 1
    if several or accumulate > 1:
        _say(what, "is no CUDA graph: " + ("several processes train together" if several
                                           else f"an update takes --accumulate {accumulate} batches"))
        return step
    return GraphedStep(step, optimizers, ready, CUDAGraphs(device), what)


def _say(what, text):
    if what:
        print(what, text, flush=True)


class GraphedStep:
    """`one_step` where graphs fit; `graphs` is what warms up, captures and replays: `CUDAGraphs`.

    There is a graph for each kind of call, of other shapes or other plain values, that is frequent enough.
    """

    def __init__(self, step, optimizers, ready, graphs, what="the step"):
        self.step, self.optimizers, self.ready, self.graphs, self.what = step, optimizers, ready, graphs, what
        self.seen, self.captured, self.most = Counter(), {}, MOST_GRAPHS  # captured: kind -> static inputs, replay

    def __call__(self, *inputs):
        kind = _kind(inputs)
        if kind not in self.captured:
            self.seen[kind] += self.ready()
            if self.seen[kind] <= WARM_UP or len(self.captured) >= self.most or not self._capture(kind, inputs):
                return self._plain(inputs)
        static, replay = self.captured[kind]
        for old, new in zip(static, inputs):
            if torch.is_tensor(new):
                old.copy_(new, non_blocking=True)
        return replay()

    def _plain(self, inputs):
        """The step as it is; without the graphs if there is no memory for both, which they keep to themselves.

        What a step had changed before it found none, it then changes twice.
        """
        try:
            return self.graphs.warm_up(self.step, *inputs)
        except torch.OutOfMemoryError as error:
            if not self.captured:
                raise
            self._give_up(error)
        return self.graphs.warm_up(self.step, *inputs)  # here, where nothing holds the tensors of the step that failed

    def _give_up(self, error):
        """Go on without graphs: of what cannot be captured, or has no room while they are there."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()  # memory of a graph
        self.captured, self.most = {}, 0  # where one failed, earlier ones draw from the generator that it leaves behind
        _say(self.what, f"is no CUDA graph: {_line(error)}")

    def _capture(self, kind, inputs):
        """Whether the step can be captured; nothing of it is computed meanwhile."""
        start, static = time.perf_counter(), [value.clone() if torch.is_tensor(value) else value for value in inputs]
        try:
            self.captured[kind] = static, self.graphs.capture(self.step, *static)
        except Exception as error:  # what cannot be captured runs as it is
            self._give_up(error)
            return False
        if len(self.captured) == 1:
            _say(self.what, f"is one CUDA graph from here on, captured in {time.perf_counter() - start:.1f} s")
        return True


class CUDAGraphs:
    """Captures on a stream of its own; all graphs share a pool of memory, as never two of them run at once."""

    def __init__(self, device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.generator = torch.cuda.default_generators[device.index]

    def warm_up(self, function, *inputs):
        """The function's values, computed on the stream that captures, so that libraries make ready for it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            values = function(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return values

    def capture(self, function, *inputs):
        """What replays the function on these very inputs, and returns its values, the same tensors each time."""
        graph, before = torch.cuda.CUDAGraph(), self.generator.clone_state()
        try:
            # Other threads, which decode and send images, may go on meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                values = function(*inputs)
        except Exception:
            self.generator.graphsafe_set_state(before)  # the one now may still count for the capture
            raise

        def replay():
            graph.replay()
            return values
        return replay


def _kind(inputs):
    """What must be the same for a graph, or compiled code, to do for other inputs."""
    return tuple((value.shape, value.stride(), value.dtype) if torch.is_tensor(value) else value for value in inputs)


def _line(error):
    error = getattr(error, "inner_exception", error)  # of what the compiler calls
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
