"""Train a VQ-VAE whose reconstruction loss is a weighted mix of image-quality terms."""

import torch.nn.functional as F

import experiment
from harness import cli


def main():
    parser = cli.Parser(description=__doc__)
    experiment.add_arguments(parser, output_folder="vqvae")
    args = experiment.parse_args(parser)

    setup = experiment.Experiment(args)
    run, model, optimizer, criterion = setup.start(), setup.network, setup.optimizer, setup.criterion
    for _ in run.epochs():
        model.train()
        for x, _ in run.batches(setup.data.train):
            run.schedule_lr(optimizer, setup.data.train)
            with setup.autocast():
                x_tilde, z_e, z_q = model(x)

            # Reconstruction, codes towards the encoder's outputs, and those towards their codes.
            loss_reconstruction, parts = criterion(x_tilde, x, apart=run.log_now())
            loss_quantization = F.mse_loss(z_q, z_e.detach().float())
            loss_commitment = F.mse_loss(z_e.float(), z_q.detach())
            loss = loss_reconstruction + loss_quantization + args.beta * loss_commitment
            run.check_finite(loss, parts)

            run.backward(loss)
            run.update(optimizer)

            if run.log_now():
                run.log({"loss/train/reconstruction": loss_reconstruction, "loss/train/quantization": loss_quantization,
                         "lr": optimizer.param_groups[0]["lr"]} | criterion.curves(parts))
                run.show(loss=loss)
        setup.validate()
    setup.report()


if __name__ == "__main__":
    cli.run(main)
