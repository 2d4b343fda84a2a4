"""Mixes of losses as text, "mse=1,ssim=0.5,lr=1e-3", and the command that trains one."""
import argparse
from functools import cache

import experiment
from harness import cli
from harness.errors import UserError
from losses import TERMS, ReconstructionLoss
from quantizers import QUANTIZERS

BASE = "mse"  # the recipe whose schedule every mix has that is no recipe itself
VQGAN, RECIPE, SHARPEN = "vqgan", "recipe", "sharpen"


def quantizer(text):
    if text not in QUANTIZERS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(QUANTIZERS)}, got {text}")
    return text


# What a mix may name beside loss terms, each of which stands for one flag: (flag, type, value where none is given).
# Those with such a value read as part of the sum in a mix's name.
FLAGS = {
    VQGAN: ("--disc-weight", cli.positive, experiment.DISC_WEIGHT),  # and for vqgan.py instead of vqvae.py
    "perceptual": ("--perceptual-weight", cli.positive, 1.),
    SHARPEN: ("--sharpen", cli.positive, 1.),
    "disc-start": ("--disc-start", cli.steps_or_share, None),
    "disc-lr": ("--disc-lr", cli.positive, None),
    "lr": ("--lr", cli.positive, None),
    "beta": ("--beta", cli.not_negative, None),
    "quantizer": ("--quantizer", quantizer, None),
    "k": ("--k", cli.positive_int, None),
    "downsample": ("--downsample", cli.positive_int, None),
    "hidden-size": ("--hidden-size", cli.positive_int, None),
    "fine-blocks": ("--fine-blocks", cli.whole, None),
    "average-weights": ("--average-weights", cli.share, None),
}
OF_VQGAN = ("perceptual", "disc-start", "disc-lr")

REPORT_TERMS = ("psnr", "ssim", "ms-ssim", "gradient", "gmsd", "ms-gmsd", "haarpsi")
REPORT_WEIGHTS = (1., 0.5, 0.25)
BASELINE_WEIGHTS, BASELINE_RATES = (1., 5., 20.), (1e-3, 2e-3, 4e-3)


def parse_mix(text):
    """"ssim", "mse=1,ssim=0.5,lr=1e-3", "l1=1,vqgan=0.1" or "recommended,chroma=0,k=64" -> {name: value}.

    Raises:
        UserError: it is none of them, or names something twice.
    """
    mix = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name in experiment.RECIPES and name not in TERMS and not value and not mix:
            mix[RECIPE] = name
            continue
        if name not in TERMS and name not in FLAGS:
            named = sorted(set(experiment.RECIPES) - set(TERMS))
            raise UserError(f"no loss term {name!r} in {text!r}: the terms are {', '.join(TERMS)}; further names are "
                            f"{', '.join(FLAGS)} and, first, the recipes {', '.join(named)}")
        if name in mix:
            raise UserError(f"{name} stands twice in {text!r}: give it once")
        flag, kind, usual = FLAGS.get(name, (None, cli.positive, 1.))
        if RECIPE in mix and name in (*TERMS, SHARPEN):
            kind = cli.not_negative  # 0 takes it out of the recipe
        try:
            mix[name] = usual if not value and usual else kind(value)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"the {'value' if flag else 'weight'} of {name} in {text!r} {error}") from None
    alone = set(OF_VQGAN) & set(mix) if VQGAN not in mix else ()
    if alone:
        raise UserError(f"{', '.join(sorted(alone))} in {text!r} is for vqgan.py: add vqgan to the mix")
    flags = meaning(command_of(mix, 0, [], []))[1]  # what the loss refuses fails before anything is trained
    try:
        ReconstructionLoss(experiment.weights_of(argparse.Namespace(**flags)), sharpen=flags[SHARPEN])
    except UserError as error:
        raise UserError(f"the mix {text!r}: {error}") from error
    return mix


def parse_rate(text):
    """"k=64" or "k=512,downsample=8" -> {name: value}. UserError where it names anything but flags of the model."""
    if not {part.partition("=")[0] for part in text.split(",")} <= {"k", "downsample", "hidden-size", "quantizer"}:
        raise UserError(f"--rates takes k and downsample, hidden-size and quantizer, got {text!r}")
    return parse_mix(text)


def terms_of(mix):
    """The loss terms of a mix and their weights; MSE where it names none."""
    return {name: weight for name, weight in mix.items() if name in TERMS} or {"mse": 1.}


def mix_name(mix):
    """{"mse": 1, "ssim": 0.5, "lr": 1e-3} -> "mse+0.5ssim,lr=0.001"."""
    added, set_apart = [], []
    for name, value in mix.items():
        usual = FLAGS.get(name, (None, None, 1.))[2]
        if name == RECIPE:
            added.append(value)
        elif usual is None:
            set_apart.append(f",{name}={_text(value)}")
        else:
            added.append(("" if value == usual else _text(value)) + name)
    return ("+".join(added) or "mse") + "".join(set_apart)


def _text(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def report_mixes():
    """Those of the original report: each term alone, and at three weights beside MSE."""
    return [{term: 1.} for term in REPORT_TERMS] + [
        {"mse": 1., term: weight} for term in REPORT_TERMS for weight in REPORT_WEIGHTS]


def baseline_mixes():
    """The pixel losses that a mix has to beat, each at its best: MSE and L1 at three weights and three rates."""
    return [{term: weight, "lr": rate} for term in ("mse", "l1") for weight in BASELINE_WEIGHTS
            for rate in BASELINE_RATES]


PRESETS = {"report": report_mixes, "baselines": baseline_mixes}


# --- commands

def command_of(mix, seed, flags, vqgan_flags):
    """Command line of the run of a mix and a seed, the script first; later ones win: flags, vqgan_flags, the mix."""
    terms = terms_of(mix) if RECIPE not in mix else {}
    named = TERMS if terms else [name for name in mix if name in TERMS]
    weights = [part for name in named for part in (f"--{name}-weight", _text(terms.get(name, mix.get(name, 0.))))]
    more = [part for name in FLAGS if name in mix for part in (FLAGS[name][0], _text(mix[name]))]
    script, own = ("vqgan.py", vqgan_flags) if VQGAN in mix else ("vqvae.py", [])
    # What the recipe stands for today, so that a run of another day is told.
    recipe = experiment.RECIPES[mix.get(RECIPE, BASE)].split()
    return [script, *recipe, *flags, *own, *weights, *more, "--seed", str(seed)]


@cache
def _parser(script):
    parser = cli.Parser(prog=script, allow_abbrev=False)
    experiment.add_arguments(parser, output_folder="run")
    if script == "vqgan.py":
        experiment.add_adversarial_arguments(parser)
    return parser


def meaning(command):
    """What a command of `command_of` trains: script, {flag: value}. A wrong flag ends the script.

    Commands that mean the same are told apart by no way of writing them.
    """
    script, *flags = command
    args = vars(experiment.parse_args(_parser(script), flags))
    del args["recipe"]
    return script, args
