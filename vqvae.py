"""Train a VQ-VAE whose reconstruction loss is a weighted mix of image-quality terms."""
from functools import partial

import torch
import torch.nn.functional as F

import experiment
from harness import cli, distributed
from harness.device import autocast_of, compiled, one_step, pick_device, set_lr
from quantizers import filled


def parse_args():
    parser = cli.Parser(description=__doc__)
    experiment.add_arguments(parser, output_folder="vqvae")
    return experiment.parse_args(parser)


def main():
    args = parse_args()
    device = pick_device(args.device)
    args = experiment.settle(args, device)
    autocast = autocast_of(device, args.precision)
    experiment.check_flags(args)

    data = experiment.load_data(args, device)
    torch.manual_seed(args.seed)
    model = experiment.build_model(args, data).to(device, memory_format=torch.channels_last)
    criterion = experiment.build_loss(args, data).to(device)
    optimizer = experiment.build_optimizer(args, model)
    average = experiment.average_of(model, optimizer, args.average_weights)
    judged = average.module if average else model  # what is measured and kept in best.pt

    state = {"model": model, "optimizer": optimizer, "average": average}
    run = experiment.open_run(args, device, data, state | experiment.facts_of(args, data, model, criterion))
    network, ready = distributed.wrap(model, device), partial(filled, model)

    def forward(x, apart):
        with autocast():
            x_tilde, z_e, z_q = network(x)

        # Reconstruction, codes towards the encoder's outputs, and those towards their codes.
        loss_reconstruction, parts = criterion(x_tilde, x, apart)
        loss_quantization = F.mse_loss(z_q, z_e.detach().float())
        loss_commitment = F.mse_loss(z_e.float(), z_q.detach())
        loss = loss_reconstruction + loss_quantization + args.beta * loss_commitment
        curves = {"loss/train/reconstruction": loss_reconstruction.detach(),
                  "loss/train/quantization": loss_quantization.detach()}
        return loss, parts, curves | (criterion.curves(parts) if apart else {})

    forward = compiled(forward, ready) if args.compile else forward

    def step(x, apart):
        loss, parts, curves = forward(x, apart)
        run.check_finite({"loss": loss, **parts})
        run.backward(loss)
        run.update(optimizer)
        return curves

    step = one_step(step, device, optimizer, graph=not args.no_graph, accumulate=args.accumulate, ready=ready)
    for _ in run.epochs():
        model.train()
        for x, _ in run.batches(data.train):
            lr = args.lr * run.lr_scale(data.train)
            set_lr(optimizer, lr)
            values = step(x, run.log_now())
            if run.log_now():
                run.log(values | {"lr": lr})
        experiment.validate(run, judged, data, criterion, autocast, args.monitor)
    experiment.report(run, judged, data, criterion)


if __name__ == "__main__":
    cli.run(main)
