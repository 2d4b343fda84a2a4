"""What is read of the files that runs keep: each field by its type and its range, and the limits that flags share.

Whoever opens such a file has `harness.checkpoint` check it against its part of this table, before anything is built. It
is the format of these files, and all that the harness knows of what is trained.
"""
import math
import reprlib

import torch

from harness.checkpoint import check
from harness.cli import MOST_PIXELS

MOST_LAYERS, MOST_BLOCKS, MOST_CODES = 1000, 100, 1024  # of a PixelCNN; of a decoder's scale; for an image
MOST_CONTEXT = 32  # frames whose windows fit into memory
MOST_SAMPLES, MOST_DRAWS, MOST_FRAMES = 100_000, 1000, 100_000  # of a picture; of an image; of a rollout


# --- kinds of values, as `harness.checkpoint.check` takes them: whether a value is right

def whole(low=0, high=2 ** 63 - 1):
    return lambda value: type(value) is int and low <= value <= high


def one_of(*values):
    return lambda value: type(value) in set(map(type, values)) and value in values


def several(right, count=None):
    """A list of values that are all right, so many where that is said."""
    return lambda value: isinstance(value, (list, tuple)) and len(value) == (count or len(value)) and all(
        map(right, value))


def text(value):
    return isinstance(value, str)


def path(value):
    return text(value) and "\0" not in value


def names(value):
    return all(map(text, value))


def number(value):
    return type(value) in (int, float)


def cost(value):
    return number(value) and 0 <= value < math.inf


def share(value):
    return number(value) and 0 <= value < 1


def figures(value):
    """{name: number}, but for the terms, which are such a dict themselves, and the name of a judge or None."""
    return isinstance(value, dict) and all(
        all(map(number, part.values())) if name == "terms" and isinstance(part, dict)
        else part is None or text(part) if name == "trained_through" else number(part)
        for name, part in value.items())


def by_image(value):
    """{name: float32 (N,)}."""
    return isinstance(value, dict) and all(torch.is_tensor(part) and part.dtype == torch.float32 and part.ndim == 1
                                           for part in value.values()) and len(set(map(len, value.values()))) == 1


def latents(value):
    """A pair of latents (N, h, w) and labels (N,) or, of frames in order, (N, 4)."""
    if not (isinstance(value, tuple) and len(value) == 2 and all(map(torch.is_tensor, value))):
        return False
    codes, labels = value
    return (codes.dtype == torch.int32 and codes.ndim == 3 and labels.dtype == torch.int64
            and labels.shape[1:] in ((), (4,)) and len(codes) == len(labels) > 0)


# --- the table

SIZE, DOWNSAMPLE = several(whole(1, MOST_PIXELS), 2), one_of(4, 8, 16)
MODEL_ARGS = {  # of each network, where its constructor has such an argument
    "VectorQuantizedVAE": {
        "input_dim": one_of(1, 3), "dim": whole(1), "K": whole(1), "downsample": DOWNSAMPLE,
        "quantizer": text, "fine_blocks": whole(0, MOST_BLOCKS), "decay": share, "data_init": bool,
        "restart_below": share},
    "GatedPixelCNN": {"input_dim": whole(1), "dim": whole(1), "n_layers": whole(1, MOST_LAYERS), "n_classes": whole(),
                      "condition_dim": whole()},
    "StackedVQVAE": {"K": whole(1), "D": whole(1), "shape": SIZE, "n_codes": whole(1, MOST_CODES), "dim": whole(1),
                     "n_layers": whole(1, MOST_LAYERS)},
    "VideoPrior": {"K": whole(1), "context": whole(1, MOST_CONTEXT), "n_actions": whole(), "dim": whole(1),
                   "n_layers": whole(1, MOST_LAYERS)},
}

RUN = {  # of any kind, to go on from
    "args": [{"output_folder": text}, names], "best": lambda value: value is None or number(value),
    "command": several(text),
    "counters": {"epoch": whole(), "batch": whole(), "step": whole(0, 2 ** 62), "seconds": cost, "world": whole(1)}}
DATA = {"name": text, "channels": one_of(1, 3), "size": SIZE, "classes": several(text),
        "images": dict.fromkeys(("train", "valid", "test"), whole(1)), "carved": text}


def _placed(args):
    return path(args.get("data_folder", ""))  # which a best.pt lacks


def _agree(contents):
    """TypeError where what is said of a VQ-VAE's data contradicts its model or its flags."""
    data, model, asked = contents["data"], contents["model_args"], contents["args"].get("dataset")
    if data["channels"] != model["input_dim"] or asked not in (None, data["name"]):
        raise TypeError(f"its data are {data['name']} of {data['channels']} channels, it was trained on "
                        f"{asked or 'data'} of {model['input_dim']}")
    factor = model.get("downsample", 4)
    check(factor, DOWNSAMPLE, "downsample")
    if any(side % factor for side in data["size"]):
        raise TypeError(f"its size is {data['size']}, and its downsample {factor}")
    return True


def _labelled(contents):
    """TypeError where a prior's labels are not of its classes."""
    labels, count = contents["data"]["labels"], contents["model_args"]["n_classes"]
    if len(contents["data"]["classes"]) != count or bool(labels) != bool(count) or max(labels, default=-1) >= count:
        raise TypeError(f"its labels are {reprlib.repr(labels)} of {count} classes")
    return True


STEP = {"counters": {"epoch": whole(), "step": whole()}}
LAST = {"counters": {"epoch": whole(), "step": whole(), "seconds": cost}, "args": {
    "num_epochs": whole(1), "minutes": lambda value: value is None or cost(value)}}  # how far it is
VQVAE = [STEP | {"data": DATA, "args": [{"skip_broken": bool}, _placed], "model_args": {"input_dim": whole(1)}}, _agree]
OF_LATENTS = {"vqvae": {"path": path, "digest": text}, "images": several(whole(1), 3), "model_args": dict}
PRIOR = [OF_LATENTS | {"data": DATA | {"labels": several(whole())}, "model_args": {"n_classes": whole()}}, _labelled]
TRAINED = {"command": several(text), "args": dict, "counters": {"step": whole()}}  # what a comparison reads of its runs

LATENTS = {"key": text, "splits": dict.fromkeys(("train", "valid", "test"), latents)}
COST = dict.fromkeys(("ms_per_step", "peak_memory_mb", "train_seconds"), cost)
FIGURES = {"key": {"figures": several(text)}, "by_image": by_image, "figures": [
    figures, COST | {"terms": dict, "trained_through": object}]}
RESULTS = COST | {"epochs": whole(), "steps": whole()}  # results.json
