"""Train a VQ-VAE whose reconstruction loss is a weighted mix of image-quality terms."""
import argparse

import torch
import torch.nn.functional as F

import checkpoint
import datasets
import metrics
import report
import training
from losses import TERMS, ReconstructionLoss, ms_ssim_weights
from modules import CODEBOOK_LEARNERS, VectorQuantizedVAE

MONITORS = {"loss": False, "mse": False, "psnr": True, "ssim": True}  # name -> larger is better
TABLE = ("mse", "psnr", "ssim", "gradient_ratio", "high_frequency_ratio", "perplexity", "used_codes")
PICTURES = 12
ADAM_BETAS = (0.9, 0.99)  # a second moment that forgets the steep first steps: +0.3 dB in 4 epochs of CIFAR-10


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    training.add_dataset_arguments(parser)
    group = parser.add_argument_group("reconstruction loss: weight of each term")
    for name in TERMS:
        group.add_argument(f"--{name}-weight", type=training.not_negative, default=float(name == "mse"), metavar="W",
                           help=TERMS[name].__doc__.split(":")[0] + " (default %(default)g)")
    group.add_argument("--balance", choices=("gradient",), help="rescale each term so that the norm of its gradient "
                       "at the reconstruction is its weight times that of MSE")
    group = parser.add_argument_group("model")
    group.add_argument("--hidden-size", type=training.positive_int, default=256, help="(default %(default)s)")
    group.add_argument("--k", type=training.positive_int, default=512, help="number of codes (default %(default)s)")
    group.add_argument("--beta", type=training.not_negative, default=1.0, help="weight of the commitment loss")
    group.add_argument("--codebook", choices=CODEBOOK_LEARNERS, default="ema", help="how codes learn: moving averages "
                       "of encoder outputs, or gradient descent (default %(default)s)")
    group.add_argument("--codebook-decay", type=training.not_negative, default=0.99, help="(default %(default)s)")
    group.add_argument("--no-codebook-init", action="store_true", help="start from random codes, not encoder outputs")
    group.add_argument("--restart-below", type=training.not_negative, default=0.02, metavar="SHARE",
                       help="restart codes used less than this share of uniform usage; 0 never (default %(default)s)")
    training.add_arguments(parser, output_folder="vqvae", lr=2e-4)
    parser.add_argument("--monitor", choices=MONITORS, default="loss",
                        help="validation value that decides which epoch best.pt keeps (default %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    device = training.pick_device(args.device)
    autocast = training.autocast(device, args.precision)
    weights = {name: getattr(args, f"{name.replace('-', '_')}_weight") for name in TERMS}

    # Data, loss and model fail here, before anything is written.
    ReconstructionLoss(weights, args.balance)
    data = datasets.load(args.dataset, training.source_of(args), args.batch_size, device, args.flip, args.seed,
                         args.limit, args.num_workers)
    VectorQuantizedVAE.check_size(data.size)
    criterion = ReconstructionLoss(weights, args.balance, (data.channels, *data.size)).to(device)
    torch.manual_seed(args.seed)
    model_args = {"input_dim": data.channels, "dim": args.hidden_size, "K": args.k, "learner": args.codebook,
                  "decay": args.codebook_decay, "data_init": not args.no_codebook_init,
                  "restart_below": args.restart_below}
    model = VectorQuantizedVAE(**model_args).to(device, memory_format=torch.channels_last)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learnt, lr=args.lr, betas=ADAM_BETAS, fused=device.type != "mps")

    # Resume.
    run = training.Run("vqvae", args, device)
    loss_facts = {"weights": criterion.weights, "balance": args.balance}
    if "ms-ssim" in criterion.weights:
        loss_facts["ms_ssim_scales"] = list(ms_ssim_weights(*data.size))
        print(f"ms-ssim at {data.size[0]}x{data.size[1]}: {len(loss_facts['ms_ssim_scales'])} scales of weights "
              + ", ".join(f"{weight:.3f}" for weight in loss_facts["ms_ssim_scales"]))
    run.contents = lambda: {
        "model_args": model_args, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
        "loss": loss_facts | {"state": criterion.state_dict()}, "data": data.facts()}
    if run.resumed:
        model.load_state_dict(run.resumed["model"])
        optimizer.load_state_dict(run.resumed["optimizer"])
        criterion.load_state_dict(run.resumed["loss"]["state"])
        checkpoint.set_random_state(run.resumed["random"])
    if args.compile:
        model.compile()

    total_steps = args.num_epochs * len(data.train)
    shown = data.valid.examples(PICTURES)
    for _ in run.epochs():
        for x, _ in run.batches(data.train):
            training.schedule_lr(optimizer, args, run.step, total_steps)
            with autocast():
                x_tilde, z_e, z_q = model(x)

            # Reconstruction, codes towards the encoder's outputs, and those towards their codes.
            loss_reconstruction, parts = criterion(x_tilde, x)
            loss_quantization = F.mse_loss(z_q, z_e.detach().float())
            loss_commitment = F.mse_loss(z_e.float(), z_q.detach())
            loss = loss_reconstruction + loss_quantization + args.beta * loss_commitment
            run.check_finite(loss, parts)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            if run.log_now():
                run.log({"loss/train/reconstruction": loss_reconstruction, "loss/train/quantization": loss_quantization,
                         "lr": optimizer.param_groups[0]["lr"]} | criterion.curves(parts))
                run.show(loss=loss)

        # Validate: the same metrics whatever was trained.
        values = metrics.evaluate(model, data.valid, criterion, autocast)
        improved = run.improved(values[args.monitor], MONITORS[args.monitor])
        run.log({"loss/valid/reconstruction": values["loss"], "loss/valid/quantization": values["quantization"]})
        run.log({f"valid/{name}": value for name, value in values.items()})
        run.writer.add_image("original", report.image_rows([metrics.as_8bit(shown)]), run.step)
        run.writer.add_image("reconstruction", report.image_rows([reconstruct(model, shown)]), run.step)
        run.print_epoch({name: values[name] for name in ("loss", *TABLE)}, improved)

    # The best epoch, once, on the test split.
    model.load_state_dict(checkpoint.load(run.models / "best.pt", "vqvae")["model"])
    values = metrics.evaluate(model, data.test, criterion)
    run.log({"loss/test/reconstruction": values["loss"], "loss/test/quantization": values["quantization"]})
    x = data.test.examples(PICTURES)
    picture = report.save_picture(run.models / "reconstructions.png", [metrics.as_8bit(x), reconstruct(model, x)])
    results = run.finish(vars(args), values)
    print("\n" + report.markdown_table(["test split", "value"], [[name, results[name]] for name in TABLE]))
    print(f"\n{results['ms_per_step']:.4g} ms a step, {results['train_seconds']:.4g} s of training on {device}")
    print(f"picture (original above, reconstruction below): {picture}\ncurves: tensorboard --logdir {run.logs}")


@torch.no_grad()
def reconstruct(model, x):
    """Reconstructions of x (B, C, H, W) in [-1, 1] as an image file would hold them: in [0, 1], 8 bits."""
    was_training = model.training
    x_tilde = model.eval()(x)[0]
    model.train(was_training)
    return metrics.as_8bit(x_tilde)


if __name__ == "__main__":
    training.cli(main)
