"""Speed and memory of this project as ratios against plain references, measured alternately in one run.

To add a subject: write a function that returns {label: callable} with the reference first, and give it a row in
`SUBJECTS` at the end of this file.
"""
import argparse
import io
import statistics
import time

import torch
import torch.nn.functional as F
from PIL import Image

import checkpoint
import report
import training
from datasets import Source, load
from losses import TERMS, ReconstructionLoss
from modules import GatedPixelCNN, VectorQuantizedVAE, cross_entropy, draw

HIDDEN, CODES, BATCH, SIDE = 256, 512, 128, 32  # the default model on CIFAR-sized images


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
        vectors, codes = z_e.permute(0, 2, 3, 1).contiguous(), model.codebook.embedding.weight
        flat = vectors.detach().view(-1, HIDDEN)
        distances = torch.addmm((codes ** 2).sum(1) + (flat ** 2).sum(1, keepdim=True), flat, codes.t(), alpha=-2.)
        z_q = codes.index_select(0, distances.argmin(1)).view_as(vectors).permute(0, 3, 1, 2).contiguous()
        x_tilde = model.decoder(z_e + (z_q - z_e).detach())
        loss = F.mse_loss(x_tilde, x) + F.mse_loss(z_q, z_e.detach()) + F.mse_loss(z_e, z_q.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def _our_step(batches, weights):
    """The step of vqvae.py with its default flags."""
    device = batches.device
    autocast, criterion = training.autocast(device, "auto"), ReconstructionLoss(weights)
    model = VectorQuantizedVAE(3, HIDDEN, CODES, learner="ema", data_init=True, restart_below=0.02)
    model = model.to(device, memory_format=torch.channels_last).train()
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
            "vqvae.py --ssim-weight 0.5": _our_step(batches, {"mse": 1., "ssim": 0.5})}


def loss_terms(device):
    """Value and gradient of each term, beside a whole step of the default model."""
    batches = _photos(device)
    x = next(iter(batches))[0]
    x_tilde = (x + 0.1 * torch.randn_like(x)).clamp(-1, 1).requires_grad_()

    def differentiate(term):
        return lambda: torch.autograd.grad(term(x_tilde, x), x_tilde)
    return {"vqvae.py step": _our_step(batches, {"mse": 1.})} | {
        name: differentiate(term) for name, term in TERMS.items()}


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
    vqvae, autocast = VectorQuantizedVAE(3, HIDDEN, CODES).to(device).eval(), training.autocast(device, "auto")
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
    "training-step": training_step,
    "loss-terms": loss_terms,
    "prior-step": prior_step,
    "sampling-8x8": _sampling(64, 8, 8),
    "sampling-32x32": _sampling(16, 32, 2),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(SUBJECTS)} (default all)")
    parser.add_argument("--repeats", type=training.positive_int, default=7, help="(default %(default)s)")
    parser.add_argument("--device", default="auto", help="(default %(default)s)")
    parser.add_argument("--output", default="benchmark.json", help="JSON file (default %(default)s)")
    args = parser.parse_args()
    device, results = training.pick_device(args.device), {}
    unknown = set(args.subjects) - set(SUBJECTS)
    if unknown:
        raise ValueError(f"no such subject: {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}")
    for subject in args.subjects or SUBJECTS:
        seconds = alternate(SUBJECTS[subject](device), args.repeats)
        reference = next(iter(seconds.values()))
        results[subject] = {label: {"ms": 1000 * value, "speed_ratio": reference / value}
                            for label, value in seconds.items()}
        rows = [[label, 1000 * value, reference / value] for label, value in seconds.items()]
        print(report.markdown_table([subject, "ms (median)", "times as fast"], rows) + "\n", flush=True)
    checkpoint.save_json(args.output, {"device": str(device), "threads": torch.get_num_threads(),
                                       "torch": torch.__version__, "repeats": args.repeats, "results": results})


if __name__ == "__main__":
    training.cli(main)
