"""Steps of training as `gpu_day.py` times them: the plain loop, and those of vqvae.py, vqgan.py and the prior."""
import functools

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import experiment
import vqgan
from benchmarks.steps import CODES, HIDDEN, Training, flags_of, noise
from harness.device import adam, allow_tf32, autocast_of, one_step
from modules import GatedPixelCNN, VectorQuantizedVAE
from quantizers import filled


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


class Adversarial(Training):
    """A step of vqgan.py once its discriminator has started: the decoder against it, and it against the decoder."""

    def __init__(self, batches, *flags):
        super().__init__(batches, *flags)
        args, model, criterion = flags_of(*flags), self.model, self.criterion
        device = next(self.images).device
        half, optimizer = autocast_of(device, args.precision), experiment.build_optimizer(args, model)
        discriminator = vqgan.PatchDiscriminator(3).to(device, memory_format=torch.channels_last)
        disc_optimizer = adam(discriminator.parameters(), args.lr, vqgan.DISCRIMINATOR_BETAS)
        last_layer = model.decoder[-2].weight

        def step(x):
            with half():
                x_tilde, z_e, z_q = model(x)
            reconstruction = criterion(x_tilde, x)[0]
            generator = vqgan.generator_loss(discriminator, x_tilde, half)
            weight = vqgan.adaptive_weight(reconstruction, generator, last_layer)
            loss = (reconstruction + F.mse_loss(z_q, z_e.detach().float())
                    + args.beta * F.mse_loss(z_e.float(), z_q.detach()) + 0.1 * weight * generator)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            judged = vqgan.discriminator_loss(discriminator, x, x_tilde, half)[0]
            judged.backward()
            disc_optimizer.step()
            disc_optimizer.zero_grad()
            return {"loss": loss.detach()}
        self.step = one_step(step, device, optimizer, disc_optimizer, graph=not args.no_graph,
                             ready=functools.partial(filled, model))


def prior_step(device, count, graph=True, small=False):
    """A step of pixelcnn_prior.py at its defaults on latents 8x8."""
    width, layers = (16, 3) if small else (64, 15)
    model = GatedPixelCNN(512, width, layers, 10).to(device, memory_format=torch.channels_last)
    half, optimizer = autocast_of(device, "auto"), adam(model.parameters(), 3e-4)
    latents = torch.randint(512, (count, 8, 8), device=device)
    label = torch.randint(10, (count,), device=device)

    def step(latents, label):
        with half():
            logits = model(latents, label)
        loss = F.cross_entropy(logits.float(), latents)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.detach()}
    step = one_step(step, device, optimizer, graph=graph)
    return lambda: step(latents, label)


def sample_plainly(prior, label, shape):
    """Grids of latents, a full forward pass a position, as the ancestor samples."""
    latents = torch.zeros(len(label), *shape, dtype=torch.int64, device=label.device)
    for i in range(shape[0]):
        for j in range(shape[1]):
            latents[:, i, j] = prior(latents, label)[:, :, i, j].softmax(1).multinomial(1)[:, 0]
    return latents


def flops_of(side, device, *flags):
    """Operations of a step of vqvae.py with these flags, for an image."""
    images = noise(2, side, device)
    step = Training(images, *flags)
    with FlopCounterMode(display=False) as counted:
        step()
    return counted.get_total_flops() / len(images[0][0])
