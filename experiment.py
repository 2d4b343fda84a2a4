"""What the scripts that train a VQ-VAE share: flags, construction, validation and the last report."""
import argparse
import sys
from dataclasses import replace

import torch
from torch.optim.swa_utils import AveragedModel

import datasets
import metrics
from datasets import check_alike, check_same
from harness import checkpoint, cli, distributed, fields
from harness.device import adam, allow_tf32, pick_precision
from harness.errors import UserError
from harness.folder import DAMAGED, check_data, check_folder, run_folder
from harness.report import image_rows, markdown_table, save_picture, size_of
from harness.run import Run
from losses import COLOUR_TERMS, TERMS, ReconstructionLoss
from metrics import measure, reported
from modules import VectorQuantizedVAE
from quantizers import QUANTIZERS, settings_of
from terms.structure import ms_ssim_weights

# Name -> larger is better. "last" is the number of steps: best.pt then holds the last epoch.
MONITORS = {"loss": False, "mse": False, "last": True}
PICTURES, COLUMNS = 12, 6
LEADING = ("psnr", "ssim", "gradient_ratio")  # of the validation values: the first that TensorBoard shows
ADAM_BETAS = (0.9, 0.99)  # a second moment that forgets the steep first steps: +0.3 dB in 4 epochs of CIFAR-10

# Recipes: sets of flags by name; `--recipe NAME` stands for them.
_SCHEDULE = "--batch-size 64 --lr 2e-3 --lr-schedule cosine --warmup-steps 0.1 --beta 0.1 --codebook-decay 0.97 --flip"

RECIPES = {
    "ancestor": "--quantizer gradient --no-codebook-init --restart-below 0 --lr 2e-4 --beta 1",
    "mse": _SCHEDULE,
    "tuned-mse": f"{_SCHEDULE} --mse-weight 20",  # the best pixel loss that was found: what a mix has to beat
    "recommended": f"{_SCHEDULE} --mse-weight 0 --psnr-weight 1 --chroma-weight 1 --sharpen 0.6 --root-ssim-weight 0.4",
    "recommended-photos": f"{_SCHEDULE} --mse-weight 5 --psnr-weight 1 --chroma-weight 2 --coarse-chroma-weight 40 "
                          "--sharpen 0.6 --root-ssim-weight 0.6 --gabor-weight 1.2",
}


def add_recipe_argument(parser):
    parser.add_argument("--recipe", choices=RECIPES, help="set of flags by name; a flag that is given as well wins. "
                        + "; ".join(f"{name}: {flags}" for name, flags in RECIPES.items()))


def parse_args(parser, argv=None):
    """The flags of a command line, the script's own by default, with those of its recipe; a flag that is given wins."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    return parser.parse_args([*RECIPES[args.recipe].split(), *argv]) if args.recipe else args


def add_arguments(parser, output_folder):
    """Flags of the recipe, the data set, the loss, the model and the run."""
    add_recipe_argument(parser)
    datasets.add_arguments(parser)
    group = parser.add_argument_group("reconstruction loss: weight of each term")
    for name in TERMS:
        group.add_argument(f"--{name}-weight", type=cli.not_negative, default=float(name == "mse"), metavar="W",
                           help=(TERMS[name].__doc__ or name).split(":")[0].replace("`", "") + " (default %(default)g)")
    group.add_argument("--balance", choices=("gradient",), help="rescale each term so that the norm of its gradient "
                       "at the reconstruction is its weight times that of MSE")
    group.add_argument("--sharpen", type=cli.not_negative, default=0., metavar="A", help="compare the structural "
                       "terms with originals after an unsharp mask of this amount")
    group = parser.add_argument_group("model")
    group.add_argument("--hidden-size", type=cli.positive_int, default=256, help="width of the layers and of a code")
    group.add_argument("--k", type=cli.positive_int, default=512, help="number of codes")
    group.add_argument("--downsample", type=int, choices=(4, 8, 16), default=4, help="pixels of an image for a "
                       "latent, along each side; the published model has 4")
    group.add_argument("--fine-blocks", type=cli.at_most(fields.MOST_BLOCKS, 0), default=0, metavar="N",
                       help="residual blocks of the decoder at each scale between latents and image; the published "
                       "model has none")
    group.add_argument("--beta", type=cli.not_negative, default=1.0, help="weight of the commitment loss")
    group.add_argument("--quantizer", choices=QUANTIZERS, default="ema", help="how encoder outputs become codes: "
                       "ema learns its codebook by moving averages, gradient by gradient descent, cosine compares "
                       "directions, fsq rounds to a fixed grid, rotation is ema with rotated gradients")
    group.add_argument("--codebook-decay", type=cli.share, default=0.99, help="decay of the moving averages "
                       "that a codebook learns by, each step")
    group.add_argument("--no-codebook-init", action="store_true", help="start with random codes instead of encoder "
                       "outputs")
    group.add_argument("--restart-below", type=cli.share, default=0.02, metavar="SHARE",
                       help="restart a code that is used less than this share of uniform usage; 0 restarts none")
    group.add_argument("--frozen-codebook", type=cli.path, metavar="PT", help="take encoder and codebook from this "
                       "checkpoint, say models/vqvae/best.pt, and train the decoder alone")
    group = parser.add_argument_group("averaged weights")
    group.add_argument("--average-weights", type=cli.share, default=0., metavar="DECAY", help="validate and keep a "
                       "moving average of the weights with this decay, say 0.999; 0 keeps the weights themselves")
    cli.add_arguments(parser, output_folder=output_folder, lr=2e-4)
    parser.add_argument("--monitor", choices=MONITORS, help="validation value whose best epoch best.pt keeps (default "
                        "loss; mse with --balance, which changes the unit of the loss; last, the latest, in vqgan.py)")


def weights_of(args):
    """{term: weight} that the flags give each term of the reconstruction loss."""
    return {name: getattr(args, f"{name.replace('-', '_')}_weight") for name in TERMS}


def model_args_of(args, channels):
    """Arguments of the `VectorQuantizedVAE` that the flags describe, for images of so many channels."""
    settings = {"decay": args.codebook_decay, "data_init": not args.no_codebook_init,
                "restart_below": args.restart_below}
    return {"input_dim": channels, "dim": args.hidden_size, "K": args.k, "downsample": args.downsample,
            "quantizer": args.quantizer, "fine_blocks": args.fine_blocks,
            **{name: settings[name] for name in settings if name in settings_of(args.quantizer)}}


# --- construction, in the order of the scripts

def settle(args, device):
    """The flags with what they leave open: data set and its folder, precision, monitor."""
    dataset, folder = datasets.find(args.dataset, args.data_folder)
    return argparse.Namespace(**vars(args) | {
        "dataset": dataset, "data_folder": folder, "precision": pick_precision(device, args.precision),
        "monitor": args.monitor or ("mse" if args.balance else "loss")})


def check_flags(args):
    """UserError where the loss or the output folder cannot work, before data is read."""
    ReconstructionLoss(weights_of(args), args.balance, sharpen=args.sharpen)
    check_folder(run_folder("models", args.output_folder), "vqvae", args.resume, args.overwrite, [args.frozen_codebook])
    check_data(args.data_folder, args.output_folder)


def load_data(args, device):
    """The data set, this process's share of it. UserError where the model cannot train on its images."""
    source = datasets.source_of(args)
    last = run_folder("models", args.output_folder) / "last.pt"
    if args.resume and last.exists():
        facts = checkpoint.load(last, "vqvae", fields.VQVAE, DAMAGED)["data"]
        source = replace(source, carved=facts["carved"] if facts["name"] == args.dataset else "")
    with distributed.rank_0_first():
        data = datasets.load(args.dataset, source, args.batch_size, device, args.flip, args.seed, args.num_workers)
    print(data)
    data.shard(distributed.rank(), distributed.world_size())
    VectorQuantizedVAE.check_size(data.size, args.downsample)
    if min(data.train.sizes()) == 1 and max(data.size) == args.downsample:
        raise UserError(f"an image of {data.size[0]}x{data.size[1]} is one latent, and one alone is too little for "
                        "batch norm: pass a --batch-size of 2 or more, or a larger --image-size")
    return data


def build_model(args, data):
    """The VQ-VAE, its encoder and codebook those of --frozen-codebook where that is given."""
    model = VectorQuantizedVAE(**model_args_of(args, data.channels))
    print(size_of(model, torch.zeros(1, data.channels, *data.size)))
    if model.codebook.extra_repr():
        print(f"--quantizer {args.quantizer} --k {args.k}: {model.codebook.extra_repr()}")
    if args.frozen_codebook:
        frozen = checkpoint.load(args.frozen_codebook, "vqvae", fields.VQVAE)
        check_alike({args.frozen_codebook: frozen, "this model": {"data": data.facts()}})
        model.freeze_codes(frozen)
    return model


def build_loss(args, data):
    """The weighted sum of loss terms for the images of a data set."""
    weights = weights_of(args)
    of_colour = [name for name in COLOUR_TERMS if weights[name]] if data.channels == 1 else []
    if of_colour and any(weights[name] for name in weights.keys() - COLOUR_TERMS):
        print(f"the images are grey: {' and '.join(sorted(of_colour))} left out of the loss")
        weights |= dict.fromkeys(of_colour, 0.)
    criterion = ReconstructionLoss(weights, args.balance, (data.channels, *data.size), args.sharpen)
    if "ms-ssim" in criterion.weights:
        scales = ms_ssim_weights(*data.size)
        print(f"ms-ssim at {data.size[0]}x{data.size[1]}: {len(scales)} scales of weights "
              + ", ".join(f"{weight:.3f}" for weight in scales))
    return criterion


def build_optimizer(args, model):
    """Adam for what a VQ-VAE learns by gradients."""
    return adam(model.parameters(), args.lr, ADAM_BETAS)


def facts_of(args, data, model, criterion):
    """What a checkpoint says of data, model and loss: enough to rebuild the model without flags."""
    loss = {"weights": criterion.weights, "balance": args.balance, "sharpen": args.sharpen, "state": criterion}
    if "ms-ssim" in criterion.weights:
        loss["ms_ssim_scales"] = list(ms_ssim_weights(*data.size))
    return {"model_args": model_args_of(args, data.channels) | {"K": model.K}, "data": data.facts(), "loss": loss}


def open_run(args, device, data, state):
    """The run of a VQ-VAE whose checkpoints hold `state`, new or resumed. UserError as `Run`, or on other images."""

    def check(contents):
        checkpoint.check(contents, fields.VQVAE)
        check_same(contents["path"], contents["data"], data.facts())

    return Run("vqvae", args, device, state, datasets.MAY_CHANGE_ON_RESUME | {"recipe"}, [args.frozen_codebook],
               check)


# --- validation and the report

def validate(run, model, data, criterion, autocast, monitor):
    """Measure the validation split, the same metrics whatever is trained; keep the best epoch."""
    values = measure(model, data.valid, criterion, autocast)[1]
    improved = run.improved(values | {"last": run.step}, monitor, MONITORS[monitor])
    x = data.valid.examples(PICTURES)
    run.log({"loss/valid/reconstruction": values["loss"], "loss/valid/quantization": values["quantization"]})
    pairs = zip(metrics.as_8bit(x).split(COLUMNS), reconstruct(model, x).split(COLUMNS))
    run.log_picture("original_above_reconstruction", image_rows([row for pair in pairs for row in pair]))
    run.log_validation(values, ("loss", *reported()), improved, LEADING)


def report(run, model, data, criterion):
    """Measure the best epoch, once, on the test split: results.json, a picture and a table."""
    run.take_best(model)
    allow_tf32(False)
    values = measure(model, data.test, criterion)[1]
    run.log({"loss/test/reconstruction": values["loss"], "loss/test/quantization": values["quantization"]})
    x = data.test.examples(PICTURES)
    picture = save_picture(run.models / "reconstructions.png", [metrics.as_8bit(x), reconstruct(model, x)])
    results = run.finish(values, reported())
    print("\n" + markdown_table(["test split", "value"], [[name, results[name]] for name in reported()]))
    print(f"{metrics.SHARPNESS}\n\n{results['ms_per_step']:.4g} ms a step, {run.seconds:.4g} s of training on "
          f"{run.device}")
    print(f"picture (original above, reconstruction below): {picture}\ncurves: {run.see_curves}")


@torch.no_grad()
def reconstruct(model, x):
    """Reconstructions of x (B, C, H, W) in [-1, 1] as an image file would hold them: in [0, 1], 8 bits."""
    was_training = model.training
    x_tilde = model.eval()(x)[0]
    model.train(was_training)
    return metrics.as_8bit(x_tilde)


# --- averaged weights

class WeightAverage(AveragedModel):
    """Exponential moving average of a model's weights and statistics, `module`; never waits for the device.

    The decay of update n is min(decay, (1 + n) / (10 + n)), so that the first random weights are soon forgotten. What
    is counted in whole numbers is copied.
    """

    def __init__(self, model, decay):
        super().__init__(model, next(model.parameters()).device, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model):
        share = (9 / (10 + self.n_averaged)).clamp(min=1 - self.decay)  # of the new values: 1 - decay
        share = torch.where(self.n_averaged > 0, share, 1.)
        for average, value in zip(self.module.state_dict().values(), model.state_dict().values()):
            if average.is_floating_point():
                average.lerp_(value, share)
            else:
                average.copy_(value)
        self.n_averaged.add_(1)


def average_of(model, optimizer, decay):
    """The `WeightAverage` of a model, brought up to date after each step of its optimizer; None without a decay."""
    if not decay:
        return None
    averaged = WeightAverage(model, decay)
    optimizer.register_step_post_hook(lambda *_: averaged.update_parameters(model))
    return averaged
