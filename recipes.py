"""Recipes: sets of flags of the scripts that train a VQ-VAE, by name; `--recipe NAME` stands for them."""
import sys

_SCHEDULE = "--batch-size 64 --lr 2e-3 --lr-schedule cosine --warmup-steps 0.1 --beta 0.1 --codebook-decay 0.97 --flip"
_MIX = "--mse-weight 0 --root-ssim-weight 0.4 --fine-blocks 1"

RECIPES = {
    "ancestor": "--quantizer gradient --no-codebook-init --restart-below 0 --lr 2e-4 --beta 1",
    "mse": _SCHEDULE,
    "recommended": f"{_SCHEDULE} {_MIX} --psnr-weight 1 --chroma-weight 1 --sharpen 0.6",
    "recommended-photos": f"{_SCHEDULE} {_MIX} --l1-weight 1 --coarse-chroma-weight 40 --sharpen 0.3",
}


def add_argument(parser):
    parser.add_argument("--recipe", choices=RECIPES, help="stands for these flags; another value of one may be given "
                        "as well, and wins; " + "; ".join(f"{name}: {flags}" for name, flags in RECIPES.items()))


def parse_args(parser, argv=None):
    """The flags of a command line (default the script's own), behind those of its recipe."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    return parser.parse_args([*RECIPES[args.recipe].split(), *argv]) if args.recipe else args
