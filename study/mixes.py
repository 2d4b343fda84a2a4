"""Mixes of losses as text, "mse=1,ssim=0.5,lr=1e-3", and the command that trains one."""
import argparse
import os

from experiment import RECIPES
from harness import cli, fields
from harness.errors import UserError
from losses import TERMS, ReconstructionLoss
from quantizers import QUANTIZERS

BASE = "mse"  # the recipe whose schedule every mix has that is no recipe itself
VQGAN, RECIPE, SHARPEN = "vqgan", "recipe", "sharpen"


def quantizer(text):
    if text not in QUANTIZERS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(QUANTIZERS)}, got {text}")
    return text


# What a mix may name besides loss terms, each of which stands for one flag: (flag, type, value where none is given).
FLAGS = {
    VQGAN: ("--disc-weight", cli.positive, 0.8),  # and for vqgan.py instead of vqvae.py
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
    "fine-blocks": ("--fine-blocks", cli.at_most(fields.MOST_BLOCKS, 0), None),
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
        if name in RECIPES and name not in TERMS and not value and not mix:
            mix[RECIPE] = name
            continue
        if name not in TERMS and name not in FLAGS:
            named = sorted(set(RECIPES) - set(TERMS))
            near = cli.nearest([name], [*TERMS, *FLAGS, *named])
            raise UserError(f"no loss term {name!r} in {text!r}{near or ':'} the terms are {', '.join(TERMS)}; further "
                            f"names are {', '.join(FLAGS)} and, first, the recipes {', '.join(named)}")
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
    flags = given(command_of(mix, 0, [], []))
    weights = {name: float(flags.get(f"--{name}-weight", name == "mse")) for name in TERMS}
    try:  # what the loss refuses fails before anything is trained
        ReconstructionLoss(weights, sharpen=float(flags.get("--sharpen", 0)))
    except UserError as error:
        raise UserError(f"the mix {text!r}: {error}") from error
    return mix


def parse_rate(text):
    """"k=64" or "k=512,downsample=8" -> {name: value}. UserError where it names anything but flags of the model."""
    if not {part.partition("=")[0] for part in text.split(",")} <= {"k", "downsample", "hidden-size", "quantizer"}:
        raise UserError(f"--rates takes k and downsample, hidden-size and quantizer, got {text!r}")
    return parse_mix(text)


def mix_name(mix):
    """A mix as text, which `parse_mix` reads: {"mse": 1, "ssim": 0.5, "lr": 1e-3} -> "mse,ssim=0.5,lr=0.001".

    It names the mix in tables and its runs' folders: letters, digits and ",.=+-", safe in paths and in a shell.
    """
    parts = []
    if RECIPE not in mix and not any(name in TERMS for name in mix):
        parts.append("mse")
    for name, value in mix.items():
        usual = FLAGS.get(name, (None, None, 1.))[2]
        parts.append(value if name == RECIPE else name if value == usual else f"{name}={_text(value)}")
    return ",".join(parts)


def _text(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def report_mixes():
    """Those of the original report: each term alone, and at three weights with MSE."""
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
    weights = {name: value for name, value in mix.items() if name in TERMS}
    if RECIPE not in mix:  # where MSE has a weight that nobody gave
        weights = {"mse": 0.} | weights if weights else {"mse": 1.}
    weights = [part for name, value in weights.items() for part in (f"--{name}-weight", _text(value))]
    more = [part for name in FLAGS if name in mix for part in (FLAGS[name][0], _text(mix[name]))]
    script, own = ("vqgan.py", vqgan_flags) if VQGAN in mix else ("vqvae.py", [])
    # What the recipe stands for today, so that a run of another day is recognised.
    recipe = RECIPES[mix.get(RECIPE, BASE)].split()
    return [script, *recipe, *flags, *own, *weights, *more, "--seed", str(seed)]


def given(command):
    """{flag: its text} of a command of `command_of`, the later one where a flag stands twice; "" where it has none.

    Of numbers the value and of folders the place counts, not how they are written.
    """
    flags, last = {}, None
    for word in command[1:]:
        if word.startswith("--"):
            last, _, word = word.partition("=")
        flags[last] = os.path.realpath(word) if last == "--data-folder" else _number(word)
    return flags


def _number(text):
    try:
        return float(text)
    except ValueError:
        return text
