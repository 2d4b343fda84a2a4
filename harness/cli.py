"""What the scripts share at their command line: flags, and how errors are reported.

Errors a user can mend are UserError or OSError; `run` prints them as one line.
"""
import argparse
import difflib
import math
import sys
from concurrent.futures import BrokenExecutor
from functools import partial
from pathlib import Path

import torch

from harness import checkpoint, distributed, streams
from harness.device import keep_freed_memory
from harness.errors import UserError

# --- flags

LARGEST = torch.finfo(torch.float32).max
LARGEST_WHOLE = 2 ** 63 - 1
MOST_PIXELS, MOST_WORKERS = 2 ** 14, 1024  # of a side of an image; processes


changed = {}  # {name: value} of this command line's flags that differ from their defaults


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and shows the default of every flag that has one."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=_Defaults, allow_abbrev=False, **kwargs)

    def parse_known_args(self, *args, **kwargs):
        found = super().parse_known_args(*args, **kwargs)
        changed.clear()
        changed.update((name, value) for name, value in vars(found[0]).items() if value != self.get_default(name))
        return found

    def error(self, message):
        unknown = [word.partition("=")[0] for word in message.partition("unrecognized arguments: ")[2].split()]
        near = nearest([word for word in unknown if len(word) > 2], self._option_string_actions)
        self.exit(2, f"{self.prog}: error: {message}{near} ({self.prog} --help shows all flags)\n")


def nearest(given, words):
    """": did you mean X?" for the first of the given that is nearly one of the words, else nothing."""
    close = (difflib.get_close_matches(one, words, 1) for one in given)
    return next((f": did you mean {word}?" for found in close for word in found), "")


class _Defaults(argparse.HelpFormatter):
    def _get_help_string(self, action):
        default = action.default
        shown = action.option_strings and default not in (None, argparse.SUPPRESS) and default is not False
        return action.help + " (default %(default)s)" if shown and "(default" not in action.help else action.help


def run_name(text):
    """Name of a run under models/ and logs/; "models/x" is the run x."""
    path = Path(text)
    parts = path.parts[1:] if path.parts[:1] == ("models",) else path.parts
    if path.is_absolute() or not parts or ".." in parts:
        raise argparse.ArgumentTypeError(f"must be the name of a folder under models/, got {text!r}: train in another "
                                         "working directory to keep runs elsewhere")
    return str(Path(*parts))


def path(text):
    """The path of a file or folder; "", which a variable that is not set leaves, is none."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, got '': give one, or leave the flag out")
    return text


def whole(text, low=0, high=LARGEST_WHOLE):
    if not (text.isdecimal() and len(text) < 100 and low <= int(text) <= high):
        raise argparse.ArgumentTypeError(f"must be a whole number from {low} to "
                                         f"{'2^63 - 1' if high == LARGEST_WHOLE else high}, got {text}")
    return int(text)


def at_most(high, low=1):
    """The type of a flag that is a whole number within a range."""
    return partial(whole, low=low, high=high)


positive_int = partial(whole, low=1)


def not_negative(text, low=0., strict=False):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not low <= value <= LARGEST or (strict and value == low):
        raise argparse.ArgumentTypeError(f"must be a finite number {'above' if strict else 'of at least'} {low:g}, at "
                                         f"most {LARGEST:.2g}, got {text}")
    return value


positive = partial(not_negative, strict=True)


def share(text):
    value = not_negative(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"must be a share below 1, got {text}")
    return value


def steps_or_share(text):
    """A whole number of steps, or a share of all of them below 1."""
    value = not_negative(text)
    return value if value < 1 else whole(text)


def image_size(text):
    """"64" or "48x64" (height x width) -> (H, W)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 10 and 0 < int(side) <= MOST_PIXELS
                                 for side in sides):
        raise argparse.ArgumentTypeError(f"must be N or HxW in pixels, at most {MOST_PIXELS}, got {text}")
    return int(sides[0]), int(sides[-1])


def add_arguments(parser, output_folder, lr):
    """The flags that every training script has."""
    group = parser.add_argument_group("optimization")
    group.add_argument("--batch-size", type=positive_int, default=128, help="images of a batch, of each process")
    group.add_argument("--accumulate", type=positive_int, default=1, metavar="N",
                       help="update the weights on the mean gradient of N batches")
    group.add_argument("--num-epochs", type=positive_int, default=100, help="passes over the training images")
    group.add_argument("--minutes", type=positive, metavar="M",
                       help="train for M minutes instead of --num-epochs; the schedule follows the clock")
    group.add_argument("--lr", type=positive, default=lr, help="learning rate of Adam")
    group.add_argument("--lr-schedule", choices=("constant", "cosine"), default="constant",
                       help="learning rate after the warm-up: constant, or half a cosine down to zero")
    group.add_argument("--warmup-steps", type=steps_or_share, default=0, metavar="N",
                       help="steps in which the learning rate rises to --lr; below 1, a share of the training")
    group.add_argument("--seed", type=whole, default=0, help="seed of initial weights, the order of the images, "
                       "flips and draws")

    group = parser.add_argument_group("run")
    group.add_argument("--output-folder", type=run_name, default=output_folder,
                       help="name of the run: its folder under models/ and logs/")
    old = group.add_mutually_exclusive_group()
    old.add_argument("--resume", action="store_true", help="go on with the run in the output folder, or start it "
                     "where there is none")
    old.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    group.add_argument("--device", default="auto", help="device to train on: auto, cpu, cuda, cuda:1, mps")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                       help="precision of the networks; auto is bf16 where the device is faster with it (tensor cores, "
                       "AMX, AVX-512 of AMD)")
    group.add_argument("--compile", action="store_true", help="compile forward pass and loss, which takes minutes")
    group.add_argument("--no-graph", action="store_true", help="on a GPU, launch each kernel of a step by itself and "
                       "not the whole step as one CUDA graph")
    group.add_argument("--log-every", type=positive_int, metavar="STEPS",
                       help="steps from one training value of a curve to the next (default 50, and fewer where a "
                       "curve would have less than 20 points)")


def run(main, many=True):
    """Run a script's main, one process of many where torchrun started it; without `many` that is refused.

    What a user can mend is one line on stderr and exit status 2.
    """
    keep_freed_memory()
    with streams.lasting():
        _run(main, many)


def _run(main, many):
    try:
        if not many and distributed.asked() > 1:
            raise UserError("this script is one process: start it with python, not with torchrun")
        distributed.start()
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are not text
        main()
        streams.check()
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if distributed.is_failure(error):
            last = f"{checkpoint.saved[-1]} is good, go on with --resume" if checkpoint.saved else "start again"
            text = f"process {distributed.rank()} lost the others ({str(error).strip().splitlines()[0]}): {last}"
        elif _is_lack_of_memory(error):
            text = f"there is too little memory for this ({text}): ask for less, say a smaller model, batch or image"
        elif isinstance(error, BrokenExecutor) or "DataLoader worker (pid" in text:
            text = ("a process of this one was killed, perhaps for want of memory: run again (with --resume where it "
                    "was training), with fewer --num-workers or --jobs")
        elif isinstance(error, RuntimeError):
            raise
        elif isinstance(error, OSError) and error.filename and error.strerror:  # Python's own words
            text = f"cannot use {error.filename} ({error.strerror}): mend that, or name another path"
        print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        distributed.stop()


def _is_lack_of_memory(error):
    """Whether an error says that the GPU or the machine has no room for a tensor, or that no machine has."""
    if isinstance(error, UserError):  # which may quote such an error of something else
        return False
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("can't allocate memory", "Storage size calculation overflowed",
                                          "integer multiplication overflow", "_STATUS_ALLOC_FAILED"))
