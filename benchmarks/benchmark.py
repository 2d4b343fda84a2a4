"""Speed and memory of this project as ratios against plain references, measured alternately in one run.

To add a subject: write a function that returns {label: callable} with the reference first, and give it a row in
`SUBJECTS` at the end of this file.
"""
import ctypes
import importlib
import math
import os
import re
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks import gpu_steps, steps
from benchmarks.steps import BATCH, CODES, HIDDEN, SIDE
from benchmarks.streams import stream
from datasets import Source, load
from functions import vq
from harness import checkpoint, cli, report
from harness.batches import Batches
from harness.device import pick_device
from harness.errors import UserError
from losses import TERMS
from modules import GatedPixelCNN, VectorQuantizedVAE

FILES, FILE_SIDE = 2048, 96  # of the image folder
FED = 10_000  # images a second that a GPU takes


def alternate(callables, repeats):
    """{label: median seconds} of calls made in turn, after one of each to warm up.

    A callable may come as (callable, times): one share of a longer whole, whose seconds are multiplied.
    """
    shares = {label: call if isinstance(call, tuple) else (call, 1) for label, call in callables.items()}
    seconds = {label: [] for label in callables}
    for repeat in range(repeats + 1):
        for label, (call, _) in shares.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                seconds[label].append(time.perf_counter() - start)
    return {label: shares[label][1] * statistics.median(values) for label, values in seconds.items()}


def extra_memory_mb(call, device):
    """Most memory that a call holds above what was held before it, or None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2 ** 20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later would count as held before
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status_mb("VmRSS")
        call()
        return _status_mb("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _status_mb(name):
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


def peer(package):
    """A package to compare with, or None, and a note, where it is not installed."""
    try:
        return importlib.import_module(package.replace("-", "_"))
    except ImportError:
        print(f"left out: {package} (pip install {package})")


# --- value and gradient of the loss terms

def _pair(count, side, device):
    x = load("photos", Source(image_size=(side, side)), count, device).train.examples(count)
    return (x + 0.1 * torch.randn_like(x)).clamp(-1, 1).requires_grad_(), x


def _differentiate(term, x_tilde, x):
    return lambda: torch.autograd.grad(term(x_tilde, x), x_tilde)


def loss_terms(device):
    """Value and gradient of each term, next to a whole step of the default model."""
    pair = _pair(BATCH, SIDE, device)
    return {"vqvae.py step": steps.Training(steps.photos(device))} | {
        name: _differentiate(term, *pair) for name, term in TERMS.items()}


def _similarity(name, count, side):
    def subject(device):
        import pytorch_msssim
        theirs, images, callables = getattr(pytorch_msssim, name.replace("-", "_")), _pair(count, side, device), {}
        for layout in (torch.contiguous_format, torch.channels_last):
            x_tilde, x = (image.detach().contiguous(memory_format=layout) for image in images)
            pair, order = (x_tilde.requires_grad_(), x), "channels last" * (layout is torch.channels_last)
            callables |= {f"pytorch-msssim {order}": _differentiate(
                lambda a, b: 1 - theirs((a + 1) / 2, (b + 1) / 2, 1.), *pair),
                f"losses.py {order}": _differentiate(TERMS[name], *pair)}
        return callables
    subject.__doc__ = f"Value and gradient of {name} on {count} images of {side}x{side}, in both orders of memory."
    return subject


# --- the nearest code

def _search(count, codes, width):
    def subject(device):
        z, codebook = torch.randn(count, width, device=device), torch.randn(codes, width, device=device)

        def full_matrix():
            distances = torch.addmm((codebook ** 2).sum(1) + (z ** 2).sum(1, keepdim=True), z, codebook.t(), alpha=-2.)
            return distances.argmin(1)
        callables = {"addmm + argmin": full_matrix, "vq": lambda: vq(z, codebook)}
        package = peer("vector-quantize-pytorch")
        if package:
            module = package.VectorQuantize(dim=width, codebook_size=codes).to(device).eval()
            callables["vector-quantize-pytorch"] = torch.no_grad()(lambda: module(z.unsqueeze(0)))
        return callables
    subject.__doc__ = f"Nearest of {codes:,} codes of width {width} to {count:,} vectors."
    return subject


# --- images from disk

def folder(device):
    """All images of a folder once: files of 96x96 to batches of 64x64, in the first epoch and in later ones."""
    import torchvision.transforms as T
    from torchvision.datasets import ImageFolder
    directory = tempfile.TemporaryDirectory()
    crops = load("photos", Source(image_size=(FILE_SIDE, FILE_SIDE)), BATCH).train.images[:FILES]
    (Path(directory.name) / "photos").mkdir()
    for i, image in enumerate(crops):
        Image.fromarray(image.numpy()).save(Path(directory.name) / "photos" / f"{i}.jpg")
    transform = T.Compose([T.Resize(64), T.CenterCrop(64), T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])
    loader = torch.utils.data.DataLoader(ImageFolder(directory.name, transform), BATCH, shuffle=True,
                                         num_workers=os.cpu_count() or 1)
    source, kept = Source(directory.name, (64, 64)), []

    def plain_epoch():
        for x, _ in loader:
            x.to(device)

    def first_epoch():
        data = load("folder", source, BATCH, device)
        kept[:] = [directory, data]  # the folder lives as long as the callables do
        later_epoch()

    def later_epoch():
        data = kept[1]
        for split in (data.train, data.valid, data.test):
            for _ in split:
                pass
    return {"ImageFolder, transforms, DataLoader": plain_epoch, "datasets.py, first epoch": first_epoch,
            "datasets.py, later epochs": later_epoch}


# --- growth: time per unit of work

def growth_codes(device):
    """Nearest code of 16,384 vectors of width 64, per code and vector."""
    z, fewest = torch.randn(16384, 64, device=device), 512
    books = {count: torch.randn(count, 64, device=device) for count in (fewest, 4096, 65536)}
    return {f"{count:,} codes": (lambda book=book: vq(z, book), fewest / count) for count, book in books.items()}


def growth_images(device):
    """An epoch of batches from memory, per image."""
    callables, fewest = {}, 5000
    for count in (fewest, 50000):
        images = torch.randint(256, (count, SIDE, SIDE, 3), dtype=torch.uint8)
        batches = Batches(images, torch.zeros(count, dtype=torch.int64), BATCH, device, shuffle=True, flip=True)
        callables[f"{count:,} images"] = (lambda batches=batches: [None for _ in batches], fewest / count)
    return callables


# --- the prior

def _plain_logits(model, latents, label):
    """The ancestor's forward: masks written into the weights, rows and columns computed and cropped again."""
    height, width = latents.shape[1:]
    x_v = x_h = model.embedding(latents).permute(0, 3, 1, 2)
    for layer in model.layers:
        if layer.masked:
            layer.vert_stack.weight.data[:, :, -1].zero_()
            layer.horiz_stack.weight.data[:, :, :, -1].zero_()
        condition = layer.class_cond_embedding(label)[:, :, None, None]
        v, h = layer.vert_stack(x_v)[:, :, :height], layer.horiz_stack(x_h)[:, :, :, :width]
        a, b = (v + condition).chunk(2, 1)
        c, d = (layer.vert_to_horiz(v) + h + condition).chunk(2, 1)
        out = layer.horiz_resid(torch.tanh(c) * torch.sigmoid(d))
        x_v, x_h = torch.tanh(a) * torch.sigmoid(b), out + x_h if layer.residual else out
    return model.output_conv(x_h)


def prior_step(device):
    """Update of the default prior on a batch of 8x8 latents: an epoch is as many of them."""
    label = torch.randint(10, (BATCH,), device=device)
    x = next(iter(steps.photos(device)))[0].contiguous()
    vqvae = VectorQuantizedVAE(3, HIDDEN, CODES).to(device).eval()
    plain = GatedPixelCNN(CODES).to(device)
    optimizer = torch.optim.Adam(plain.parameters())

    def plain_step():
        with torch.no_grad():
            latents = vqvae.encode(x)
        logits = _plain_logits(plain, latents, label)
        loss = F.cross_entropy(logits.permute(0, 2, 3, 1).contiguous().view(-1, CODES), latents.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {"encode the batch, plain float32 prior": plain_step,
            "pixelcnn_prior.py, cached latents": gpu_steps.prior_step(device, BATCH)}


def _sampling(count, side, forwards):
    def subject(device):
        model = GatedPixelCNN(CODES).to(device).eval()
        label = torch.zeros(count, dtype=torch.int64, device=device)
        naive = partial(gpu_steps.sample_plainly, model, label, (side, side), forwards)
        return {"a full forward a position": (naive, side * side / forwards),
                "generate": lambda: model.generate(label, (side, side), count)}
    subject.__doc__ = f"Sample {count} grids of {side}x{side}; the naive loop is timed on {forwards} of its positions."
    return subject


SUBJECTS = {
    "vq-512x64": _search(131072, 512, 64),
    "vq-512x256": _search(131072, 512, 256),
    "vq-16384x64": _search(16384, 16384, 64),
    "training-step": steps.training_step,
    "training-step-64": steps.training_step_64,
    "recipes-32": steps.recipes(32),
    "recipes-64": steps.recipes(64),
    "recipes-128": steps.recipes(128),
    "compiled-step": steps.compiled_step,
    "throughput-32x128": steps.throughput(32, 128),
    "throughput-32x1024": steps.throughput(32, 1024),
    "throughput-256x128": steps.throughput(256, 128, "--downsample", "16"),
    "throughput-256x1024": steps.throughput(256, 1024, "--downsample", "16"),
    "loss-terms": loss_terms,
    "ssim-32": _similarity("ssim", 128, 32),
    "ssim-256": _similarity("ssim", 16, 256),
    "ms-ssim-256": _similarity("ms-ssim", 16, 256),
    "folder": folder,
    "stream-128": stream(128, 1.15, (224, 224)),
    "stream-256": stream(256, 1.15, (375, 500)),
    "prior-step": prior_step,
    "sampling-8x8": _sampling(64, 8, 8),
    "sampling-32x32": _sampling(16, 32, 2),
    "growth-codes": growth_codes,
    "growth-images": growth_images,
    "growth-sides": steps.growth_sides,
}


COLUMNS = {"ms": "ms (median)", "speed_ratio": "times as fast", "extra_mb": "extra memory (MB)",
           "images_per_s": "images per second", "workers": f"processes for {FED:,} images/s",
           "peak_share": "share of the bf16 peak"}


def measure(callables, repeats, device):
    """{label: its row of the table} for a subject's callables, the first being the reference."""
    if device.type == "cuda":
        callables = {label: call for label, call in callables.items() if fits(label, call)}
    seconds, rows = alternate(callables, repeats), {}
    for label, value in seconds.items():
        call = callables[label][0] if isinstance(callables[label], tuple) else callables[label]
        rows[label] = {"ms": 1000 * value, "speed_ratio": next(iter(seconds.values())) / value,
                       "extra_mb": extra_memory_mb(call, device)}
        if hasattr(call, "images"):
            rows[label]["images_per_s"] = rate = call.images / value
            if hasattr(call, "flops"):
                rows[label]["peak_share"] = call.flops / value / steps.bf16_peak(device)
            elif call.is_worker:
                rows[label]["workers"] = math.ceil(FED / rate)
    return rows


def fits(label, call):
    """Whether a call finds the memory that it needs; says so where it does not."""
    try:
        (call[0] if isinstance(call, tuple) else call)()
        return True
    except torch.OutOfMemoryError:
        print(f"left out: {label}, which needs more memory than there is")
        torch.cuda.empty_cache()
        return False


def main():
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT",
                        help=f"of {', '.join(SUBJECTS)} (default all, those of throughput on a GPU alone)")
    parser.add_argument("--repeats", type=cli.positive_int, default=7, help="(default %(default)s)")
    parser.add_argument("--device", default="auto", help="(default %(default)s)")
    parser.add_argument("--output", type=cli.path, default="benchmark.json", help="JSON file (default %(default)s)")
    args = parser.parse_args()
    device, results = pick_device(args.device), {}
    if not Path(args.output).parent.is_dir() or Path(args.output).is_dir():
        raise UserError(f"--output {args.output} must be a file in a folder that exists")
    unknown = set(args.subjects) - set(SUBJECTS)
    if unknown:
        raise UserError(f"no such subject: {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    for subject in args.subjects or [name for name in SUBJECTS if device.type == "cuda" or "throughput" not in name]:
        print(SUBJECTS[subject].__doc__)
        results[subject] = measure(SUBJECTS[subject](device), args.repeats, device)
        columns = list(dict.fromkeys(name for row in results[subject].values() for name in row))
        print(report.markdown_table([subject, *(COLUMNS[name] for name in columns)], [
            [label, *("" if row.get(name) is None else row[name] for name in columns)]
            for label, row in results[subject].items()]) + "\n", flush=True)
    checkpoint.save_json(args.output, {"device": str(device), "threads": torch.get_num_threads(),
                                       "torch": torch.__version__, "repeats": args.repeats, "results": results})


if __name__ == "__main__":
    cli.run(main, many=False)
