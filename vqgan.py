"""Train the same VQ-VAE the VQGAN way (Esser et al. 2020, arXiv 2012.09841): a discriminator judges its images."""
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

import experiment
from harness import cli, distributed
from harness.device import adam, autocast_of, compiled, one_step, pick_device, set_lr
from harness.distributed import BatchNorm2d
from harness.errors import UserError
from quantizers import filled
from study.distances import paired_distance
from study.judges import FEATURES, PERCEPTUAL

DISCRIMINATOR_BETAS = (0.5, 0.9)
LARGEST_WEIGHT = 1e4  # of the adversarial loss
MOST_HALVINGS = 16
EPS = 1e-4  # keeps the adaptive weight finite where the adversarial gradient vanishes


def parse_args():
    parser = cli.Parser(description=__doc__)
    experiment.add_arguments(parser, output_folder="vqgan")
    group = parser.add_argument_group("adversarial and perceptual loss")
    group.add_argument("--disc-weight", type=cli.not_negative, default=0.8, metavar="W",
                       help="weight of the adversarial loss, times its adaptive weight")
    group.add_argument("--disc-start", type=cli.steps_or_share, default=0.5, metavar="N", help="step at which the "
                       "discriminator starts; below 1, a share of the training")
    group.add_argument("--disc-hidden-size", type=cli.positive_int, default=64, help="width of the discriminator")
    group.add_argument("--disc-layers", type=cli.at_most(MOST_HALVINGS), default=2,
                       help="halvings of the image by the discriminator; 2 suits 32x32, the paper has 3")
    group.add_argument("--disc-lr", type=cli.positive, help="learning rate of the discriminator (default --lr)")
    group.add_argument("--perceptual-weight", type=cli.not_negative, default=0., metavar="W",
                       help="weight of a distance between features of a pretrained EfficientNet-Lite0")
    parser.set_defaults(monitor="last")  # no fixed metric sees what a discriminator adds: keep all of the training
    return experiment.parse_args(parser)


def main():
    args = parse_args()
    device = pick_device(args.device)
    args = experiment.settle(args, device)
    autocast = autocast_of(device, args.precision)
    experiment.check_flags(args)

    # The VQ-VAE and its loss, as in vqvae.py.
    data = experiment.load_data(args, device)
    PatchDiscriminator.check_size(data.size, args.disc_layers)
    torch.manual_seed(args.seed)
    model = experiment.build_model(args, data).to(device, memory_format=torch.channels_last)
    criterion = experiment.build_loss(args, data).to(device)
    optimizer = experiment.build_optimizer(args, model)
    average = experiment.average_of(model, optimizer, args.average_weights)
    judged = average.module if average else model  # what is measured and kept in best.pt

    # The discriminator and the perceptual network.
    with torch.random.fork_rng([]):  # the VQ-VAE draws the same random numbers as in vqvae.py
        discriminator = PatchDiscriminator(data.channels, args.disc_hidden_size, args.disc_layers)
    discriminator = discriminator.to(device, memory_format=torch.channels_last)
    disc_optimizer = adam(discriminator.parameters(), args.disc_lr or args.lr, DISCRIMINATOR_BETAS)
    perceptual = PerceptualLoss().to(device, memory_format=torch.channels_last) if args.perceptual_weight else None

    state = {"model": model, "optimizer": optimizer, "average": average, "discriminator": discriminator,
             "disc_optimizer": disc_optimizer}
    run = experiment.open_run(args, device, data, state | experiment.facts_of(args, data, model, criterion))
    network, judge = distributed.wrap(model, device), distributed.wrap(discriminator, device)
    last_layer, ready = model.decoder[-2].weight, partial(filled, model)

    def forward(x, apart):
        with autocast():
            x_tilde, z_e, z_q = network(x)

        # Reconstruction, codes towards the encoder's outputs, and those towards their codes.
        loss_reconstruction, parts = criterion(x_tilde, x, apart)
        loss_quantization = F.mse_loss(z_q, z_e.detach().float())
        loss_commitment = F.mse_loss(z_e.float(), z_q.detach())
        curves = {"loss/train/reconstruction": loss_reconstruction.detach(),
                  "loss/train/quantization": loss_quantization.detach()}
        curves |= criterion.curves(parts) if apart else {}
        loss_seen = loss_reconstruction
        if perceptual:
            with autocast():
                distance = perceptual(x_tilde, x)
            parts["perceptual"] = curves["loss/train/perceptual"] = distance.detach()
            loss_seen = loss_reconstruction + args.perceptual_weight * distance
        return x_tilde, loss_seen, loss_seen + loss_quantization + args.beta * loss_commitment, parts, curves

    forward = compiled(forward, ready) if args.compile else forward

    def step(x, apart, adversarial):
        x_tilde, loss_seen, loss, parts, curves = forward(x, apart)

        # The decoder against the discriminator, weighted so that both pull at its last layer alike.
        if adversarial:
            loss_generator = generator_loss(discriminator, x_tilde, autocast)
            weight = adaptive_weight(loss_seen, loss_generator, last_layer)
            loss = loss + args.disc_weight * weight * loss_generator
            curves |= {"vqgan/lambda": weight, "loss/train/generator": loss_generator}
        run.check_finite({"loss": loss, **parts})

        run.backward(loss)
        run.update(optimizer)

        # The discriminator against the decoder.
        if adversarial:
            loss_discriminator, logits = discriminator_loss(judge, x, x_tilde, autocast)
            run.check_finite({"discriminator": loss_discriminator})
            run.backward(loss_discriminator)
            run.update(disc_optimizer)
            curves |= {"loss/train/discriminator": loss_discriminator} | logits
        return {tag: value.detach() for tag, value in curves.items()}

    step = one_step(step, device, optimizer, disc_optimizer, graph=not args.no_graph, accumulate=args.accumulate,
                    ready=ready)
    for _ in run.epochs():
        model.train()
        for x, _ in run.batches(data.train):
            scale = run.lr_scale(data.train)
            set_lr(optimizer, args.lr * scale)
            set_lr(disc_optimizer, (args.disc_lr or args.lr) * scale)
            adversarial = bool(disc_optimizer.state) or has_started(run, data.train, args.disc_start)
            values = step(x, run.log_now(), adversarial)  # once started it stays, where --resume trains for longer too
            if run.log_now():
                run.log(values | {"lr": args.lr * scale})
        experiment.validate(run, judged, data, criterion, autocast, args.monitor)
    experiment.report(run, judged, data, criterion)


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


def adaptive_weight(loss_reconstruction, loss_generator, last_layer):
    """Ratio of the gradient norms of both losses at the decoder's last layer (Esser et al., eq. 7)."""
    gradients = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0]
                 for loss in (loss_reconstruction, loss_generator)]
    norms = [distributed.total(gradient).norm() / distributed.world_size() for gradient in gradients]
    return (norms[0] / (norms[1] + EPS)).clamp(max=LARGEST_WEIGHT).detach()


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
            layers += [nn.Conv2d(width, wider, 4, stride, 1, bias=False), BatchNorm2d(wider),
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
