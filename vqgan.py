"""Train the same VQ-VAE the VQGAN way (Esser et al. 2020, arXiv 2012.09841): a discriminator judges its images."""

import torch
import torch.nn.functional as F
from torch import nn

import experiment
from harness import cli, distributed
from harness.errors import UserError
from study.distances import paired_distance
from study.judges import FEATURES, PERCEPTUAL

DISCRIMINATOR_BETAS = (0.5, 0.9)
EPS = 1e-4  # keeps the adaptive weight finite where the adversarial gradient vanishes


def main():
    parser = cli.Parser(description=__doc__)
    experiment.add_arguments(parser, output_folder="vqgan")
    experiment.add_adversarial_arguments(parser)
    args = experiment.parse_args(parser)

    setup = experiment.Experiment(args)
    optimizer, criterion, device = setup.optimizer, setup.criterion, setup.device
    PatchDiscriminator.check_size(setup.data.size, args.disc_layers)
    with torch.random.fork_rng([]):  # the VQ-VAE draws the same random numbers as in vqvae.py
        discriminator = PatchDiscriminator(setup.data.channels, args.disc_hidden_size, args.disc_layers)
    discriminator = discriminator.to(device, memory_format=torch.channels_last)
    disc_optimizer = cli.adam(discriminator.parameters(), args.disc_lr or args.lr, DISCRIMINATOR_BETAS)
    perceptual = PerceptualLoss().to(device, memory_format=torch.channels_last) if args.perceptual_weight else None
    run = setup.start(discriminator=discriminator, disc_optimizer=disc_optimizer)
    model, judge, last_layer = setup.network, distributed.wrap(discriminator, device), setup.model.decoder[-2].weight
    for _ in run.epochs():
        model.train()
        for x, _ in run.batches(setup.data.train):
            run.schedule_lr(optimizer, setup.data.train)
            run.schedule_lr(disc_optimizer, setup.data.train, args.disc_lr)
            adversarial = has_started(run, setup.data.train, args.disc_start)
            with setup.autocast():
                x_tilde, z_e, z_q = model(x)

            # Reconstruction, codes towards the encoder's outputs, and those towards their codes.
            loss_reconstruction, parts = criterion(x_tilde, x, apart=run.log_now())
            loss_seen, curves = loss_reconstruction, {}
            if perceptual:
                with setup.autocast():
                    parts["perceptual"] = perceptual(x_tilde, x)
                loss_seen = loss_reconstruction + args.perceptual_weight * parts["perceptual"]
                curves["loss/train/perceptual"] = parts["perceptual"]
            loss_quantization = F.mse_loss(z_q, z_e.detach().float())
            loss_commitment = F.mse_loss(z_e.float(), z_q.detach())
            loss = loss_seen + loss_quantization + args.beta * loss_commitment

            # The decoder against the discriminator, weighted so that both pull at its last layer alike.
            if adversarial:
                loss_generator = generator_loss(discriminator, x_tilde, setup.autocast)
                weight = adaptive_weight(loss_seen, loss_generator, last_layer, args.disc_cap)
                loss = loss + args.disc_weight * weight * loss_generator
                curves |= {"vqgan/lambda": weight, "loss/train/generator": loss_generator}
            run.check_finite(loss, parts)

            run.backward(loss)
            run.update(optimizer)

            # The discriminator against the decoder.
            if adversarial:
                loss_discriminator, logits = discriminator_loss(judge, x, x_tilde, setup.autocast)
                run.check_finite(loss_discriminator, {"discriminator": loss_discriminator})
                run.backward(loss_discriminator)
                run.update(disc_optimizer)
                curves |= {"loss/train/discriminator": loss_discriminator} | logits

            if run.log_now():
                run.log({"loss/train/reconstruction": loss_reconstruction, "loss/train/quantization": loss_quantization,
                         "lr": optimizer.param_groups[0]["lr"]} | criterion.curves(parts) | curves)
                run.show(loss=loss)
        setup.validate()
    setup.report()


def has_started(run, loader, start):
    """Whether the discriminator takes part at this step; `start` is in steps or, below 1, a share of the training."""
    return (run.progress(loader) if start < 1 else run.step) >= start


def generator_loss(discriminator, x_tilde, autocast):
    """Hinge loss of the decoder, -mean D(x_tilde); its gradient reaches x_tilde and never the discriminator."""
    discriminator.requires_grad_(False)
    with autocast():
        logits = discriminator(x_tilde)
    discriminator.requires_grad_(True)
    return -logits.float().mean()


def discriminator_loss(discriminator, x, x_tilde, autocast):
    """Hinge loss (mean max(0, 1 - D(x)) + mean max(0, 1 + D(x_tilde))) / 2, and {tag: mean logits}.

    Its gradient reaches the discriminator and never the VQ-VAE.
    """
    with autocast():
        real, made = discriminator(x).float(), discriminator(x_tilde.detach()).float()
    loss = (F.relu(1 - real).mean() + F.relu(1 + made).mean()) / 2
    return loss, {"vqgan/logits_real": real.mean(), "vqgan/logits_fake": made.mean()}


def adaptive_weight(loss_reconstruction, loss_generator, last_layer, cap):
    """Ratio of the gradient norms of both losses at the decoder's last layer, at most `cap` (Esser et al., eq. 7)."""
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                 for loss in (loss_reconstruction, loss_generator)]
    norms = [distributed.total(gradient).norm() / distributed.world_size() for gradient in gradients]
    return (norms[0] / (norms[1] + EPS)).clamp(max=cap).detach()


# --- networks

class PatchDiscriminator(nn.Module):
    """Judges overlapping patches of an image real or made (Isola et al. 2017, arXiv 1611.07004).

    Args:
        input_dim: channels C. dim: width of the first layer. n_layers: halvings of each side.
    """

    def __init__(self, input_dim, dim=64, n_layers=2):
        super().__init__()
        layers, width = [nn.Conv2d(input_dim, dim, 4, 2, 1), nn.LeakyReLU(0.2, True)], dim
        for i in range(1, n_layers + 1):
            wider, stride = dim * min(2 ** i, 8), 2 if i < n_layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), nn.BatchNorm2d(wider),
                       nn.LeakyReLU(0.2, True)]
            width = wider
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0., 0.02)

    @staticmethod
    def check_size(size, n_layers):
        """Raise UserError where images (H, W) are too small for so many halvings."""
        if min(size) // 2 ** n_layers < 3:
            raise UserError(f"images of {size[0]}x{size[1]} are too small for a discriminator of {n_layers} halvings: "
                            "pass a smaller --disc-layers or a larger --image-size")

    def forward(self, x):
        """Logits (B, 1, h, w) of the patches of images x (B, C, H, W) in [-1, 1]: positive is real."""
        return self.layers(x)


class PerceptualLoss(nn.Module):
    """The mean `paired_distance` through the network `PERCEPTUAL`, which then is no fair judge of what it trained.

    forward: x_tilde, x (B, 1 or 3, H, W) in [-1, 1] -> scalar in [0, 4]; differentiable in x_tilde.
    """

    def __init__(self):
        super().__init__()
        self.network = FEATURES[PERCEPTUAL](None, None)

    def forward(self, x_tilde, x):
        with torch.no_grad():
            originals = self.network.maps((x + 1) / 2)
        return paired_distance(self.network.maps((x_tilde + 1) / 2), originals).mean()


if __name__ == "__main__":
    cli.run(main)
