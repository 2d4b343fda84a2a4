"""Steps of training as `gpu_day.py` times them: the plain loop, and those of vqvae.py, vqgan.py and the prior."""
import torch
import torch.nn.functional as F

import vqgan
from benchmarks.steps import CODES, Training
from harness.device import adam, autocast_of, one_step
from modules import GatedPixelCNN, draw

DISC_WEIGHT = 0.1


class Adversarial(Training):
    """A step of vqgan.py once its discriminator has started: the decoder against it, and it against the decoder."""

    def __init__(self, batches, *flags):
        super().__init__(batches, *flags)
        self.half = autocast_of(self.device, self.args.precision)
        self.discriminator = vqgan.PatchDiscriminator(3).to(self.device, memory_format=torch.channels_last)
        self.disc_optimizer = adam(self.discriminator.parameters(), self.args.lr, vqgan.DISCRIMINATOR_BETAS)
        self.step = self.one_step(self.update_both, self.optimizer, self.disc_optimizer)

    def update_both(self, x):
        x_tilde, reconstruction, loss = self.losses(x)
        generator = vqgan.generator_loss(self.discriminator, x_tilde, self.half)
        weight = vqgan.adaptive_weight(reconstruction, generator, self.model.decoder[-2].weight)
        loss = loss + DISC_WEIGHT * weight * generator
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        vqgan.discriminator_loss(self.discriminator, x, x_tilde, self.half)[0].backward()
        self.disc_optimizer.step()
        self.disc_optimizer.zero_grad()
        return {"loss": loss.detach()}


def prior_step(device, count, graph=True, small=False):
    """A step of pixelcnn_prior.py at its defaults on latents 8x8."""
    width, layers = (16, 3) if small else (64, 15)
    model = GatedPixelCNN(CODES, width, layers, 10).to(device, memory_format=torch.channels_last)
    half, optimizer = autocast_of(device, "auto"), adam(model.parameters(), 3e-4)
    latents = torch.randint(CODES, (count, 8, 8), device=device)
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


@torch.no_grad()
def sample_plainly(prior, label, shape, positions=None):
    """Grids of latents, a full forward pass a position, as the ancestor samples; the first `positions` alone."""
    latents = torch.zeros(len(label), *shape, dtype=torch.int64, device=label.device)
    for position in range(positions or shape[0] * shape[1]):
        row, column = divmod(position, shape[1])
        latents[:, row, column] = draw(prior(latents, label)[:, :, row, column])
    return latents
