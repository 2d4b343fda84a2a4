"""Steps of training as `gpu_day.py` times them: the plain loop, and those of vqvae.py, vqgan.py and the prior."""
import functools

import torch
import torch.nn.functional as F

import experiment
import vqgan
from benchmarks.steps import Training, flags_of
from harness.device import adam, autocast_of, one_step
from modules import GatedPixelCNN
from quantizers import filled


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
