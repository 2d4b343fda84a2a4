"""Steps of training as subjects of benchmark.py: ours as the flags of vqvae.py say, next to plain ones.

A step is a callable of its own model and optimizer. Where it has `images` and `flops`, of all the steps that one call
makes, the table says images per second and the share of the device's peak.
"""
import functools
import io
import time

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import experiment
from datasets import Source, load
from harness import cli
from harness.batches import Batches
from harness.device import allow_tf32, autocast_of, compiled, keep_freed_memory, one_step
from losses import ReconstructionLoss
from modules import VectorQuantizedVAE
from quantizers import filled

SIDE = 32  # of CIFAR-sized images
RECOMMENDED = ("--recipe", "recommended")
STEPS_A_CALL = 10  # of throughput: nobody waits for a GPU after each step
PRODUCT, PRODUCTS = 4096, 10  # side of the matrices, and how many products, that tell the peak
BEFORE_KEPT = 2 ** 24  # bytes: glibc's own threshold settles at twice the size of the largest tensors


def flags_of(*flags):
    """args of vqvae.py with these flags."""
    parser = cli.Parser()
    experiment.add_arguments(parser, output_folder="benchmark")
    return experiment.parse_args(parser, [str(flag) for flag in flags])


DEFAULTS = flags_of()
HIDDEN, CODES, BATCH = DEFAULTS.hidden_size, DEFAULTS.k, DEFAULTS.batch_size


class Training:
    """The step of vqvae.py with these flags, on batches (x, labels) of 3 channels; a call makes one."""

    def __init__(self, batches, *flags):
        self.args = args = flags_of(*flags)
        self.device = device = next(iter(batches))[0].device
        half = autocast_of(device, args.precision)
        criterion = ReconstructionLoss(experiment.weights_of(args), sharpen=args.sharpen).to(device)
        model = VectorQuantizedVAE(**experiment.model_args_of(args, 3))
        self.model = model = model.to(device, memory_format=torch.channels_last).train()
        self.optimizer = experiment.build_optimizer(args, model)
        self.averaged = experiment.average_of(model, self.optimizer, args.average_weights)
        self.batches, self.ready = endless(batches), functools.partial(filled, model)

        def losses(x):
            with half():
                x_tilde, z_e, z_q = model(x)
            reconstruction = criterion(x_tilde, x)[0]
            return x_tilde, reconstruction, (reconstruction + F.mse_loss(z_q, z_e.detach().float())
                                             + args.beta * F.mse_loss(z_e.float(), z_q.detach()))
        self.losses = compiled(losses, self.ready) if args.compile else losses
        criterion.check(next(self.batches))
        self.step = self.one_step(self.update, self.optimizer)

    def one_step(self, step, *optimizers):
        return one_step(step, self.device, *optimizers, graph=not self.args.no_graph, ready=self.ready)

    def update(self, x):
        loss = self.losses(x)[2]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.detach()}

    def __call__(self):
        return self.step(next(self.batches))

    def weights(self):
        """Copies of all that has learned."""
        state = [*self.model.state_dict().values()] + [*(self.averaged.state_dict().values() if self.averaged else ())]
        return [value.detach().float().clone() for value in state]


def endless(batches):
    while True:
        for x, _ in batches:
            yield x


def plain_step(images, device, hidden=HIDDEN, downsample=4, compile=False):
    """The ancestor's way: float32 (TF32 on a GPU), channels first, all N x K distances; `images()` makes a batch."""
    model = VectorQuantizedVAE(3, hidden, CODES, downsample).to(device).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-4)

    def losses(x):
        z_e = model.encoder(x)
        vectors, (codes,) = z_e.permute(0, 2, 3, 1).contiguous(), model.codebook.parameters()
        flat = vectors.detach().view(-1, hidden)
        distances = torch.addmm((codes ** 2).sum(1) + (flat ** 2).sum(1, keepdim=True), flat, codes.t(), alpha=-2.)
        z_q = codes.index_select(0, distances.argmin(1)).view_as(vectors).permute(0, 3, 1, 2).contiguous()
        x_tilde = model.decoder(z_e + (z_q - z_e).detach())
        return F.mse_loss(x_tilde, x) + F.mse_loss(z_q, z_e.detach()) + F.mse_loss(z_e, z_q.detach())
    losses = torch.compile(losses) if compile else losses

    def step():
        allow_tf32(True)
        optimizer.zero_grad()
        losses(images()).backward()
        optimizer.step()
        allow_tf32(False)
    return step


def photos(device):
    """Batches of the built-in photographs, in the default size of a batch."""
    return load("photos", Source(image_size=(SIDE, SIDE)), BATCH, device, flip=True).train


def noise(count, side, device):
    """One batch of `count` images, for speed alone."""
    images = torch.randint(256, (count, side, side, 3), dtype=torch.uint8)
    return list(Batches(images, torch.zeros(count, dtype=torch.int64), count, device))


def training_step(device):
    """Forward, backward and update of the default model on a batch, loading of the images included."""
    import torchvision.transforms as T
    transform = T.Compose([T.ToTensor(), T.Normalize((0.5,) * 3, (0.5,) * 3)])
    batches, files = photos(device), []
    for image in batches.images[:BATCH].cpu():
        buffer = io.BytesIO()
        Image.fromarray(image.numpy()).save(buffer, "JPEG")
        files.append(buffer.getvalue())

    def decoded():
        return torch.stack([transform(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]).to(device)
    return {"plain float32 loop, PIL decoding": plain_step(decoded, device),
            "vqvae.py": Training(batches),
            "vqvae.py --ssim-weight 0.5": Training(batches, "--ssim-weight", 0.5),
            "vqvae.py --recipe recommended": Training(batches, *RECOMMENDED)}


def compiled_step(device):
    """The same with --compile, which needs a C++ compiler."""
    batches = photos(device)
    return {"vqvae.py": Training(batches), "vqvae.py --compile": Training(batches, "--compile")}


def training_step_64(device):
    """A step at hidden size 64, against one that returns the memory of freed tensors to the system."""
    step = _times(Training(photos(device), "--hidden-size", 64))

    def returning_memory():
        keep_freed_memory(BEFORE_KEPT)
        step()
        keep_freed_memory()
    return {"memory returned": (returning_memory, 1 / STEPS_A_CALL),
            "vqvae.py --hidden-size 64": (step, 1 / STEPS_A_CALL)}


def recipes(width):
    """Subject: a step of the recipes at this hidden size."""
    def subject(device):
        batches = noise(16, 128, device)
        return {f"--recipe {name}": Training(batches, "--recipe", name, "--hidden-size", width)
                for name in ("tuned-mse", "recommended", "recommended-photos")}
    subject.__doc__ = f"A step of the recipes at hidden size {width}, on 16 images of 128x128."
    return subject


def _times(step, images=0, flops=0):
    """A call that makes `STEPS_A_CALL` steps on so many images and of so many operations each."""
    def call():
        for _ in range(STEPS_A_CALL):
            step()
    if images:
        call.images, call.flops = images, flops
    return call


def throughput(side, count, *flags):
    """Subject: steps of the default model with these flags on images that lie on the device."""
    def subject(device):
        batches = noise(count, side, device)
        args = flags_of(*flags)
        plain = plain_step(lambda: batches[0][0].contiguous(), device, args.hidden_size, args.downsample)
        steps = {"plain float32 loop": (plain, flops_of(side, device, *flags))} | {
            f"vqvae.py {' '.join([*flags, *more])}".strip(): (Training(batches, *flags, *more),
                                                             flops_of(side, device, *flags, *recipe))
            for more, recipe in (((), ()), (("--compile",), ()), (RECOMMENDED, RECOMMENDED))}
        return {label: (_times(step, count, flops * count), 1 / STEPS_A_CALL)
                for label, (step, flops) in steps.items()}
    subject.__doc__ = (f"Steps of training on {count} images of {side}x{side} that lie on the device, none decoded; "
                       "the plain loop has what is chosen for the device, TF32 on a GPU, as the others have.")
    return subject


def flops_of(side, device, *flags):
    """Operations of a step of vqvae.py with these flags, for an image."""
    images = noise(2, side, device)
    step = Training(images, *flags)
    with FlopCounterMode(display=False) as counted:
        step()
    return counted.get_total_flops() / len(images[0][0])


@functools.cache
def bf16_peak(device):
    """Operations per second of large products of bfloat16 matrices on a device: the best that a step could reach."""
    a = torch.randn(PRODUCT, PRODUCT, device=device).bfloat16()

    def seconds(count):
        start = time.perf_counter()
        for _ in range(count):
            product = a @ a
        product.sum().item()  # waits for the device
        return time.perf_counter() - start
    seconds(1)
    return 2 * PRODUCT ** 3 * PRODUCTS / seconds(PRODUCTS)


def growth_sides(device):
    """A step of training at the same number of pixels a batch, per pixel."""
    return {f"{count} images of {side}x{side}": Training(noise(count, side, device), *RECOMMENDED)
            for side in (32, 64, 128, 256) for count in [BATCH * SIDE ** 2 // side ** 2]}
