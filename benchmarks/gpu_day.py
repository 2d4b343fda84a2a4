"""All that a GPU should be asked, in one script: exactness, graphs against plain steps, speed against others.

    python -m benchmarks.gpu_day                        at most 6 minutes; writes gpu_day.json and gpu_day.md
    python -m benchmarks.gpu_day --device cpu --dry-run all of it in small, without a GPU

What is compared is timed alternately. A part that fails is reported and the rest goes on. After 5 minutes nothing new
begins: what is missing then is named, and `--parts` runs it by itself. Each row is written as soon as it is found, so
that nothing is lost where the script is killed, as it is by itself after 6 minutes.
To add a part: write a function (device, small) -> rows, each a dict of plain values, and give it a row in `PARTS`.
"""
import gc
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial

import torch

from benchmarks import gpu_steps, peers, steps
from benchmarks.exactness import search_errors
from functions import vq
from harness import checkpoint, cli, report
from harness.device import WARM_UP, pick_device
from kernels.nearest import blocked_nearest, nearest, triton_nearest
from kernels.ssim import mean_ssim
from modules import GatedPixelCNN

ROUNDS, SECONDS = 5, 0.1  # of each thing that is timed: how often, and about how long each time
SETTLED = WARM_UP + 2  # calls until a step is a graph: it also fills the codebook first, and is captured
TEST_SECONDS, ALL_SECONDS = 200, 310  # what the tests may take, and when nothing new begins
MOST_SECONDS = 350  # when the script ends, whatever a compiler is at
START = time.perf_counter()
SEARCHES = (131072, 512, 64), (16384, 16384, 64), (8192, 512, 256), (32768, 1024, 256)  # N, K, D
STEPS = (32, 128), (32, 1024), (128, 32, "--hidden-size", 64), (256, 16, "--hidden-size", 64)  # side, images, flags
RECIPES = {"recommended": steps.RECOMMENDED, "recommended-photos": ("--recipe", "recommended-photos")}
SMALL_STEPS = (16, 4, "--hidden-size", 16),
SMALL_SEARCHES = (512, 64, 16),
# Rows and codes of a tile, warps, stages.
TILES = ((32, 128, 4, 3), (64, 64, 4, 2), (64, 128, 4, 3), (128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3))


def main():
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="use tiny sizes, to see that every part runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
                        help=f"run these alone, of {', '.join(PARTS)} (default all)")
    parser.add_argument("--output", type=cli.path, default="gpu_day", metavar="NAME",
                        help="write the tables to NAME.json and NAME.md (default %(default)s)")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.dry_run:
        steps.PRODUCT = 64  # the peak of a CPU takes minutes to measure
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = {"device": name, "torch": torch.__version__, "seconds": {}, "failed": {}}
    for part in args.parts:
        start = time.perf_counter()
        try:
            if late():
                raise TimeoutError(f"{ALL_SECONDS} s were over before it began: run --parts {part}")
            for row in PARTS[part](device, args.dry_run):
                found.setdefault(part, []).append(row)
                _write(args.output, found)
        except Exception:  # the next parts may still be well
            found["failed"][part] = traceback.format_exc()
        found["seconds"][part] = round(time.perf_counter() - start, 1)
        _write(args.output, found)
        print(f"{_page(found, part)}\n({found['seconds'][part]} s)\n", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _write(output, found):
    """What was found so far, to two files."""
    pages = [f"# {found['device']}, torch {found['torch']}",
             *(_page(found, part) for part in PARTS if part in found or part in found["failed"])]
    checkpoint.write_atomic(f"{output}.json", json.dumps(found, indent=1).encode())
    checkpoint.write_atomic(f"{output}.md", "\n\n".join(pages).encode())


def _page(found, part):
    """The table of a part, and what it failed with."""
    table, failed = _table(found[part]) if part in found else "", found["failed"].get(part)
    return "\n\n".join(filter(None, (f"## {part}", table, failed and f"failed:\n\n```\n{failed}```")))


def _table(rows):
    header = list(dict.fromkeys(key for row in rows for key in row))
    return report.markdown_table(header, [["" if row.get(key) is None else row[key] for key in header] for row in rows])


# --- timing

def late():
    return time.perf_counter() - START > ALL_SECONDS


def timed(calls, device):
    """{label: median milliseconds} of calls made in turn; one that fails, or for which it is too late, is None."""
    milliseconds = {}
    for label, call in list(calls.items()):
        try:
            if late():
                raise TimeoutError(f"{ALL_SECONDS} s are over")
            _milliseconds(call, SETTLED, device)
            once = _milliseconds(call, 3, device)
            milliseconds[label] = (max(1, round(1000 * SECONDS / max(once, 1e-3))), [])
        except Exception as error:
            print(f"{label} failed: {repr(error)[:200]}", flush=True)
    for _ in range(ROUNDS):
        for label, (count, seen) in milliseconds.items():
            seen.append(_milliseconds(calls[label], count, device))
    return {label: statistics.median(milliseconds[label][1]) if label in milliseconds else None for label in calls}


def _milliseconds(call, count, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / count


def rows_of(what, calls, device, images=0, flops=None):
    """A row a call: milliseconds, times the first call's speed, images a second and share of the chip's bf16 peak."""
    rows, milliseconds = [], timed(calls, device)
    first = next(iter(milliseconds.values()))
    for label, ms in milliseconds.items():
        row = {"what": what, "which": label, "ms": ms and round(ms, 4), "speed": ms and first and round(first / ms, 2)}
        if images:
            row["images/s"] = ms and round(1000 * images / ms)
        if flops:
            row["% of bf16 peak"] = ms and round(100 * flops * images / (ms / 1000) / steps.bf16_peak(device), 1)
        rows.append(row)
    return rows


# --- right?

def tests(device, small):
    """The tests that need a GPU: how many passed, which failed, and the last that began where time ran out."""
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-rfE", "-vv",
               "-p", "no:cacheprovider"]
    with tempfile.TemporaryFile("w+") as file:
        try:
            subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=TEST_SECONDS)
        except subprocess.TimeoutExpired:
            file.write(f"\nstopped after {TEST_SECONDS} s")
        file.seek(0)
        lines = file.read().strip().splitlines()
    print("\n".join(lines)[-6000:], flush=True)
    passed = sum(" PASSED" in line for line in lines)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]  # a summary, for which time may run out
    failed = failed or [line for line in lines if " FAILED" in line]
    return [{"tests": line[:200]} for line in (f"{passed} passed", lines[-1].strip("= "), *failed)]


def exactness(device, small):
    """Codes of the search that are wrong, against float64; and which of equal codes it names."""
    for shape in ((500, 70, 16),) if small else ((131072, 512, 64), (8192, 512, 256), (16384, 16384, 64),
                                                 (5000, 777, 300), (5000, 100, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            yield {"N x K x D": " x ".join(map(str, shape)), "inputs": str(dtype)[6:]} | search_errors(
                nearest, *shape, device, dtype)


def graph_against_eager(device, small):
    """Largest relative difference of weights after 50 steps, as a graph and as they are, and of the latter repeated."""
    count = 6 if small else 50
    for flags in ((), ("--recipe", "recommended"), ("--recipe", "recommended-photos"),
                  ("--recipe", "recommended", "--quantizer", "gradient"),
                  ("--average-weights", "0.99", "--restart-below", "0.1")):
        weights = []
        for more in ((), ("--no-graph",), ("--no-graph",)):
            torch.manual_seed(0)
            step = steps.Training(steps.noise(32, 32, device), "--hidden-size", "64", *flags, *more)
            for _ in range(count):
                step()
            weights.append(step.weights())
        yield {"flags": " ".join(flags) or "default", "graph - eager": _difference(weights[0], weights[1]),
               "eager - eager": _difference(weights[2], weights[1])}


def _difference(a, b):
    return float(max((p - q).norm() / q.norm().clamp(min=1e-12) for p, q in zip(a, b)))


# --- fast?

def search(device, small):
    """The nearest code: ours, its blocks without Triton, the plain way and other libraries."""
    for count, codes, width in SMALL_SEARCHES if small else SEARCHES:
        x, book = torch.randn(count, width, device=device), torch.randn(codes, width, device=device)

        def plain(x=x, book=book):
            return torch.addmm(book.square().sum(1), x, book.t(), alpha=-2).argmin(1)
        calls = {"addmm + argmin": plain, "addmm + argmin, in a graph": in_graph(plain, device),
                 "vq": partial(vq, x, book), "vq, in a graph": in_graph(partial(vq, x, book), device)}
        calls["blocks"] = partial(blocked_nearest, x, book)
        calls |= peers.quantizers(x, book)
        yield from rows_of(f"{count} x {codes} x {width}", calls, device)


def tiles(device, small):
    """The kernel of the search, in a graph, with other tiles than the ones it chooses, which come first."""
    if device.type != "cuda":
        yield {"what": "no GPU"}
        return
    for count, codes, width in SEARCHES:
        x, book = torch.randn(count, width, device=device), torch.randn(codes, width, device=device)
        calls = {"as chosen": in_graph(partial(triton_nearest, x, book), device)}
        step = 64 if width <= 64 else 32
        for inputs, columns, warps, stages in TILES:
            calls[f"{inputs} x {columns} x {step}, {warps} warps, {stages} stages"] = in_graph(partial(
                triton_nearest, x, book, BN=inputs, BK=columns, BD=step, num_warps=warps, num_stages=stages), device)
        yield from rows_of(f"{count} x {codes} x {width}", calls, device)


def in_graph(call, device):
    """The call as it runs within a training step: replayed as a CUDA graph, without the cost of its launches."""
    if device.type != "cuda":
        return call
    graphs = []

    def replay():
        if not graphs:
            graphs.append(_captured(call, device))
        graphs[0].replay()
    return replay


def _captured(call, device):
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph


def ssim(device, small):
    """Value and gradient of SSIM: the kernel and other libraries."""
    for count, side in ((2, 32),) if small else ((16, 256), (128, 32), (32, 128)):
        b = torch.rand(count, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)
        a = (b + 0.1 * torch.randn_like(b)).clamp(0, 1).requires_grad_()  # as they lie in a step
        values = {"pytorch-msssim": peers.pytorch_msssim, "fussim": peers.fussim,
                  "ours": lambda a, b: mean_ssim(a, b, 11, 1.5),
                  "ours, root, 3 pixels": lambda a, b: mean_ssim(a, b, 3, 0.75, True)}
        calls = {name: partial(_gradient, value, a, b) for name, value in values.items()}
        for name in ("ours", "ours, root, 3 pixels"):  # pytorch-msssim copies from the CPU, which no graph can
            calls[f"{name}, in a graph"] = in_graph(calls[name], device)
        yield from rows_of(f"{count} x {side} x {side}", calls, device)


def _gradient(value, a, b):
    return torch.autograd.grad(value(a, b), a)


def training(device, small):
    """A step of vqvae.py and of the recipes against the plain loop."""
    for size in SMALL_STEPS if small else STEPS:
        yield from step_rows(size, device, {"vqvae.py --no-graph": ("--no-graph",), "vqvae.py": ()} | RECIPES)


def compiled(device, small):
    """The same of the first size, compiled, which takes a while: each by itself, so that it is kept."""
    for label, flags in ({"vqvae.py": ()} | RECIPES).items():
        calls = {f"{label} --compile": (*flags, "--compile")}
        yield from step_rows((SMALL_STEPS if small else STEPS)[0], device, calls, compile=True)


def step_rows(size, device, calls, **of_plain):
    """Rows of training steps with these flags {label: flags}, against the plain loop, as it is or compiled."""
    side, count, *flags = size
    images, hidden = steps.noise(count, side, device), steps.flags_of(*flags).hidden_size
    plain = steps.plain_step(images[0][0].contiguous, device, hidden, **of_plain)
    yield from rows_of(f"{count} of {side}x{side}, hidden {hidden}", {
        "plain loop, compiled" if of_plain else "plain loop, TF32": plain,
        **{label: steps.Training(images, *flags, *more) for label, more in calls.items()}}, device, count,
        steps.flops_of(side, device, *flags))


def others(device, small):
    """A step of vqgan.py and of the prior, and sampling of 64 grids of 8x8."""
    count, hidden = (4, 16) if small else (128, 128)
    images = steps.noise(count, 32, device)
    yield from rows_of("vqgan.py step", {
        label: gpu_steps.Adversarial(images, "--hidden-size", hidden, *flags)
        for label, flags in (("--no-graph", ("--no-graph",)), ("graph", ()))}, device, count)
    yield from rows_of("prior step, 8x8", {
        label: gpu_steps.prior_step(device, count, graph=graph, small=small)
        for label, graph in (("--no-graph", False), ("graph", True))}, device, count)
    prior = GatedPixelCNN(512, 16 if small else 64, 3 if small else 15, 10).to(device).eval()
    label = torch.zeros(4 if small else 64, dtype=torch.int64, device=device)
    shape = (3, 3) if small else (8, 8)
    yield from rows_of("64 grids of 8x8", {
        "a full forward a position": partial(gpu_steps.sample_plainly, prior, label, shape),
        "generate": partial(prior.generate, label, shape, len(label))}, device, len(label))


def memory(device, small):
    """Peak memory of a step, in MB."""
    if device.type != "cuda":
        yield {"what": "no GPU"}
        return
    step = None
    for side, count, *flags in STEPS[0], STEPS[2]:
        for more in (("--no-graph",), ()) + (("--compile",),) * (not flags):
            del step
            gc.collect()  # the step before would count as freed
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            step = steps.Training(steps.noise(count, side, device), *flags, *more)
            for _ in range(6):
                step()
            yield {"what": f"{count} of {side}x{side} {' '.join(more)}",
                   "MB": round((torch.cuda.max_memory_allocated(device) - before) / 2 ** 20)}


def profile(device, small):
    """The kernels that take most of a step, as it runs."""
    for flags in ((), *RECIPES.values()):
        step = steps.Training(steps.noise(4 if small else 128, 32, device), *flags)
        for _ in range(8):
            step()
        with torch.profiler.profile() as seen:
            for _ in range(5):
                step()
            if device.type == "cuda":
                torch.cuda.synchronize()
        key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        events = [event for event in seen.key_averages() if getattr(event, key) > 0 and (
            device.type != "cuda" or event.device_type == torch.autograd.DeviceType.CUDA)]
        total = sum(getattr(event, key) for event in events)
        yield {"flags": " ".join(flags) or "default", "kernel": "all", "us a step": round(total / 5, 1),
               "calls": sum(event.count for event in events) // 5, "%": 100}
        for event in sorted(events, key=lambda event: -getattr(event, key))[:12]:
            yield {"flags": " ".join(flags) or "default", "kernel": event.key[:80],
                   "us a step": round(getattr(event, key) / 5, 1), "calls": event.count // 5,
                   "%": round(100 * getattr(event, key) / total, 1)}


PARTS = {
    "tests": tests,
    "exactness": exactness,
    "graph_against_eager": graph_against_eager,
    "training": training,
    "ssim": ssim,
    "search": search,
    "others": others,
    "profile": profile,
    "tiles": tiles,
    "memory": memory,
    "compiled": compiled,  # last: it may take minutes
}

if __name__ == "__main__":
    signal.alarm(MOST_SECONDS)
    cli.run(main, many=False)
