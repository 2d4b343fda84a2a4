"""Speed and memory of this project as ratios against plain references, measured alternately in one run.

To add a subject: write a function that returns {label: callable} with the reference first, and give it a row in
`SUBJECTS` at the end of this file.
"""
import ctypes
import importlib
import io
import os
import re
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from datasets import Source, load
from functions import cross_entropy, vq
from harness import checkpoint, cli, report
from harness.batches import Batches
from losses import TERMS, ReconstructionLoss
from modules import GatedPixelCNN, VectorQuantizedVAE, draw

HIDDEN, CODES, BATCH, SIDE = 256, 512, 128, 32  # the default model on CIFAR-sized images
RECOMMENDED, SHARPEN = {"psnr": 1., "root-ssim": 0.4, "chroma": 1.}, 0.3
RECOMMENDED_FLAGS = " ".join(f"--{name}-weight {weight:g}" for name, weight in ({"mse": 0.} | RECOMMENDED).items()
                             ) + f" --sharpen {SHARPEN:g}"
FILES, FILE_SIDE = 2048, 96  # of the image folder


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


# --- one step of training, images included

def _plain_step(files):
    """The ancestor's way: PIL decoding of every image, float32, channels first, all N x K distances."""
    import torchvision.transforms as T
    transform = T.Compose([T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])
    model = VectorQuantizedVAE(3, HIDDEN, CODES).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)

    def step():
        x = torch.stack([transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
        z_e = model.encoder(x)
        vectors, (codes,) = z_e.permute(0, 2, 3, 1).contiguous(), model.codebook.parameters()
        flat = vectors.detach().view(-1, HIDDEN)
        distances = torch.addmm((codes ** 2).sum(1) + (flat ** 2).sum(1, keepdim=True), flat, codes.t(), alpha=-2.)
        z_q = codes.index_select(0, distances.argmin(1)).view_as(vectors).permute(0, 3, 1, 2).contiguous()
        x_tilde = model.decoder(z_e + (z_q - z_e).detach())
        loss = F.mse_loss(x_tilde, x) + F.mse_loss(z_q, z_e.detach()) + F.mse_loss(z_e, z_q.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def _our_step(batches, weights, sharpen=0., compiled=False):
    """The step of vqvae.py with its default flags."""
    device = batches.device
    autocast, criterion = cli.autocast(device, "auto"), ReconstructionLoss(weights, sharpen=sharpen)
    model = VectorQuantizedVAE(3, HIDDEN, CODES, quantizer="ema", data_init=True, restart_below=0.02)
    model = model.to(device, memory_format=torch.channels_last).train()
    if compiled:
        model.compile_networks()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-4, fused=True)

    def step():
        x, _ = next(iter(batches))
        with autocast():
            x_tilde, z_e, z_q = model(x)
        loss = criterion(x_tilde, x)[0] + F.mse_loss(z_q, z_e.detach().float()) + F.mse_loss(z_e.float(), z_q.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def _photos(device):
    return load("photos", Source(image_size=(SIDE, SIDE)), BATCH, device, flip=True).train


def training_step(device):
    """Forward, backward and update of the default model on a batch, loading of the images included."""
    batches, files = _photos(device), []
    for image in batches.images[:BATCH].cpu():
        buffer = io.BytesIO()
        Image.fromarray(image.numpy()).save(buffer, "JPEG")
        files.append(buffer.getvalue())
    return {"plain float32 loop, PIL decoding": _plain_step(files),
            "vqvae.py": _our_step(batches, {"mse": 1.}),
            "vqvae.py --ssim-weight 0.5": _our_step(batches, {"mse": 1., "ssim": 0.5}),
            f"vqvae.py {RECOMMENDED_FLAGS}": _our_step(batches, RECOMMENDED, SHARPEN)}


def compiled_step(device):
    """The same with --compile, which needs a C++ compiler."""
    batches = _photos(device)
    return {"vqvae.py": _our_step(batches, {"mse": 1.}),
            "vqvae.py --compile": _our_step(batches, {"mse": 1.}, compiled=True)}


def _pair(count, side, device):
    x = load("photos", Source(image_size=(side, side)), count, device).train.examples(count)
    return (x + 0.1 * torch.randn_like(x)).clamp(-1, 1).requires_grad_(), x


def _differentiate(term, x_tilde, x):
    return lambda: torch.autograd.grad(term(x_tilde, x), x_tilde)


def loss_terms(device):
    """Value and gradient of each term, beside a whole step of the default model."""
    pair = _pair(BATCH, SIDE, device)
    return {"vqvae.py step": _our_step(_photos(device), {"mse": 1.})} | {
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


def growth_sides(device):
    """A step of training at the same number of pixels a batch, per pixel."""
    callables = {}
    for side in (32, 64, 128, 256):
        count = BATCH * SIDE ** 2 // side ** 2
        images = torch.randint(256, (count, side, side, 3), dtype=torch.uint8)
        batches = Batches(images, torch.zeros(count, dtype=torch.int64), count, device)
        callables[f"{count} images of {side}x{side}"] = _our_step(batches, RECOMMENDED, SHARPEN)
    return callables


# --- the prior

def _plain_logits(model, latents, label):
    """The ancestor's forward: masks written into the weights, rows and columns computed and cropped again."""
    height, width = latents.shape[1:]
    x_v = x_h = model.embedding(latents).permute(0, 3, 1, 2)
    for layer in model.layers:
        if layer.hidden:
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
    codes, label = torch.randint(CODES, (BATCH, 8, 8), device=device), torch.randint(10, (BATCH,), device=device)
    x = next(iter(_photos(device)))[0].contiguous()
    vqvae, autocast = VectorQuantizedVAE(3, HIDDEN, CODES).to(device).eval(), cli.autocast(device, "auto")
    plain, ours = GatedPixelCNN(CODES).to(device), GatedPixelCNN(CODES).to(device, memory_format=torch.channels_last)
    plain_optimizer = torch.optim.Adam(plain.parameters())
    our_optimizer = torch.optim.Adam(ours.parameters(), fused=True)

    def plain_step():
        with torch.no_grad():
            latents = vqvae.encode(x)
        logits = _plain_logits(plain, latents, label)
        loss = F.cross_entropy(logits.permute(0, 2, 3, 1).contiguous().view(-1, CODES), latents.flatten())
        plain_optimizer.zero_grad()
        loss.backward()
        plain_optimizer.step()

    def our_step():
        with autocast():
            logits = ours(codes, label)
        loss = cross_entropy(logits, codes)
        our_optimizer.zero_grad()
        loss.backward()
        our_optimizer.step()
    return {"encode the batch, plain float32 prior": plain_step, "pixelcnn_prior.py, cached latents": our_step}


def _sampling(count, side, forwards):
    def subject(device):
        model = GatedPixelCNN(CODES).to(device).eval()
        latents, label = torch.zeros(count, side, side, dtype=torch.int64, device=device), torch.zeros(
            count, dtype=torch.int64, device=device)

        @torch.no_grad()
        def naive():
            for position in range(forwards):
                row, column = divmod(position, side)
                latents[:, row, column] = draw(model(latents, label)[:, :, row, column])
        return {"a full forward a position": (naive, side * side / forwards),
                "generate": lambda: model.generate(label, (side, side), count)}
    subject.__doc__ = f"Sample {count} grids of {side}x{side}; the naive loop is timed on {forwards} of its positions."
    return subject


SUBJECTS = {
    "vq-512x64": _search(131072, 512, 64),
    "vq-512x256": _search(131072, 512, 256),
    "vq-16384x64": _search(16384, 16384, 64),
    "training-step": training_step,
    "compiled-step": compiled_step,
    "loss-terms": loss_terms,
    "ssim-32": _similarity("ssim", 128, 32),
    "ssim-256": _similarity("ssim", 16, 256),
    "ms-ssim-256": _similarity("ms-ssim", 16, 256),
    "folder": folder,
    "prior-step": prior_step,
    "sampling-8x8": _sampling(64, 8, 8),
    "sampling-32x32": _sampling(16, 32, 2),
    "growth-codes": growth_codes,
    "growth-images": growth_images,
    "growth-sides": growth_sides,
}


def main():
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)} (default all)")
    parser.add_argument("--repeats", type=cli.positive_int, default=7, help="(default %(default)s)")
    parser.add_argument("--device", default="auto", help="(default %(default)s)")
    parser.add_argument("--output", default="benchmark.json", help="JSON file (default %(default)s)")
    args = parser.parse_args()
    device, results = cli.pick_device(args.device), {}
    unknown = set(args.subjects) - set(SUBJECTS)
    if unknown:
        raise ValueError(f"no such subject: {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    for subject in args.subjects or SUBJECTS:
        callables = SUBJECTS[subject](device)
        seconds = alternate(callables, args.repeats)
        reference = next(iter(seconds.values()))
        memory = {label: extra_memory_mb(call[0] if isinstance(call, tuple) else call, device)
                  for label, call in callables.items()}
        results[subject] = {label: {"ms": 1000 * value, "speed_ratio": reference / value, "extra_mb": memory[label]}
                            for label, value in seconds.items()}
        print(SUBJECTS[subject].__doc__)
        print(report.markdown_table([subject, "ms (median)", "times as fast", "extra memory (MB)"], [
            [label, 1000 * value, reference / value, "" if memory[label] is None else memory[label]]
            for label, value in seconds.items()]) + "\n", flush=True)
    checkpoint.save_json(args.output, {"device": str(device), "threads": torch.get_num_threads(),
                                       "torch": torch.__version__, "repeats": args.repeats, "results": results})


if __name__ == "__main__":
    cli.run(main)
