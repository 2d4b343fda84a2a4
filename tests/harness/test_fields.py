"""The table of fields: what is whole passes, a value of another type or beyond its range is refused in every field."""
import copy
import math

import pytest
import torch

from harness import checkpoint, fields

# Values that are wrong almost everywhere; where one is right, its field says so below.
POOL = [None, True, -1, 0, 1, 2.5, math.nan, math.inf, 2 ** 63, 10 ** 30, "", "x", b"x", [], ["x"], [1, 2, 3], [16, 16],
        [16], [0, 0], [-16, 16], ["a", "b"], [16.5, 16], [16, 2 ** 40], (), {}, {"x": 1}, torch.zeros(2), object]
TEXT, COUNT, NUMBER = ["", "x"], [0, 1], [0, 1, 2.5]
DATA = ({"name": "folder", "channels": 3, "size": [16, 24], "classes": ["cat"], "carved": "",
         "images": {"train": 8, "valid": 1, "test": 1}},
        {"name": [], "channels": [], "size": [[16, 16]], "classes": [["x"], [], ["a", "b"], ()], "carved": TEXT,
         "images": [], "images.train": [1], "images.test": [1]})


def nested(rows, under):
    return {f"{under}.{name}": right for name, right in rows.items()}


TABLES = {
    "vqvae": (fields.VQVAE, {
        "data": DATA[0], "counters": {"epoch": 3, "step": 7}, "model_args": {"input_dim": 3, "dim": 8},
        "args": {"skip_broken": False, "dataset": "folder"}},
        nested(DATA[1], "data") | {"counters.epoch": COUNT, "counters.step": COUNT, "model_args.input_dim": [],
                                   "args.skip_broken": [True], "data": [], "args": [], "counters": []}),
    "resumed": (fields.RUN, {
        "args": {"output_folder": "a"}, "best": 0.5, "command": ["vqvae.py"],
        "counters": {"epoch": 3, "batch": 0, "step": 7, "seconds": 1.5, "world": 1}},
        {"args": [], "args.output_folder": TEXT, "command": [[], ["x"], ["a", "b"], ()],
         "best": [None, -1, math.nan, math.inf, 2 ** 63, 10 ** 30, *NUMBER],
         "counters.batch": COUNT, "counters.seconds": [2 ** 63, 10 ** 30, *NUMBER], "counters.world": [1]}),
    "prior": (fields.PRIOR, {
        "vqvae": {"path": "a", "digest": "b"}, "images": [8, 1, 1], "model_args": {"n_classes": 3},
        "data": DATA[0] | {"classes": ["a", "b", "c"], "labels": [0, 2]}},
        {"vqvae.path": TEXT, "vqvae.digest": TEXT, "vqvae": [], "images": [[1, 2, 3]], "model_args.n_classes": [],
         "data.labels": [[0, 0]]}),
    "trained": (fields.TRAINED, {"command": ["vqvae.py", "--k", "8"], "args": {}, "counters": {"step": 3}},
                {"command": [[], ["x"], ["a", "b"], ()], "args": [{}, {"x": 1}], "counters.step": COUNT}),
    "results": (fields.RESULTS, {"epochs": 1, "steps": 3, "ms_per_step": 1.5, "peak_memory_mb": 3, "train_seconds": 0.},
                {"epochs": COUNT, "steps": COUNT, "ms_per_step": [2 ** 63, 10 ** 30, *NUMBER],
                 "train_seconds": [2 ** 63, 10 ** 30, *NUMBER]}),
    "figures": (fields.FIGURES, {
        "key": {"figures": ["psnr"]}, "by_image": {"psnr": torch.zeros(4)},
        "figures": {"psnr": 1.5, "terms": {"mse": 1.}, "trained_through": None, "ms_per_step": 1., "peak_memory_mb": 2.,
                    "train_seconds": 3.}},
        {"key.figures": [[], ["x"], ["a", "b"], ()], "figures": [], "by_image": [], "by_image.psnr": [torch.zeros(2)],
         "figures.psnr": [-1, math.nan, math.inf, 2 ** 63, 10 ** 30, *NUMBER], "figures.terms": [{}, {"x": 1}],
         "figures.trained_through": [None, *TEXT]}),
    "latents": (fields.LATENTS, {"key": "k", "splits": dict.fromkeys(("train", "valid", "test"), (
        torch.zeros(3, 2, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)))},
        {"key": TEXT, "splits": [], "splits.train": [], "splits.test": []}),
    "VectorQuantizedVAE": (fields.MODEL_ARGS["VectorQuantizedVAE"], {
        "input_dim": 3, "dim": 8, "K": 16, "downsample": 8, "quantizer": "ema", "fine_blocks": 0, "decay": 0.9,
        "data_init": True, "restart_below": 0.}, {
        "input_dim": [1], "dim": [1], "K": [1], "downsample": [], "quantizer": TEXT, "fine_blocks": COUNT,
        "decay": COUNT[:1], "data_init": [True], "restart_below": COUNT[:1]}),
    "GatedPixelCNN": (fields.MODEL_ARGS["GatedPixelCNN"], {
        "input_dim": 16, "dim": 8, "n_layers": 15, "n_classes": 0, "condition_dim": 0}, {
        "input_dim": [1], "dim": [1], "n_layers": [1], "n_classes": COUNT, "condition_dim": COUNT}),
    "StackedVQVAE": (fields.MODEL_ARGS["StackedVQVAE"], {
        "K": 16, "D": 8, "shape": (4, 4), "n_codes": 3, "dim": 8, "n_layers": 4}, {
        "K": [1], "D": [1], "shape": [[16, 16]], "n_codes": [1], "dim": [1], "n_layers": [1]}),
    "VideoPrior": (fields.MODEL_ARGS["VideoPrior"], {
        "K": 16, "context": 2, "n_actions": 0, "dim": 8, "n_layers": 4}, {
        "K": [1], "context": [1], "n_actions": COUNT, "dim": [1], "n_layers": [1]}),
}


def same(one, two):
    if torch.is_tensor(one) or torch.is_tensor(two):
        return torch.is_tensor(one) and torch.is_tensor(two) and torch.equal(one, two)
    return type(one) is type(two) and (one == two or one != one and two != two)


@pytest.mark.parametrize("name", TABLES)
def test_what_is_whole_passes_and_what_is_lacking_is_named(name):
    table, whole, rows = TABLES[name]
    checkpoint.check(whole, table)
    for keys in rows:
        contents = copy.deepcopy(whole)
        *outer, last = keys.split(".")
        inner = contents
        for key in outer:
            inner = inner[key]
        del inner[last]
        if keys not in ("by_image.psnr", "figures.psnr"):  # others stand for them
            with pytest.raises(TypeError, match=f"has no {last}$"):
                checkpoint.check(contents, table)


@pytest.mark.parametrize("name, keys", [(name, keys) for name, (_, _, rows) in TABLES.items() for keys in rows])
def test_a_value_beyond_a_field_is_refused(name, keys):
    table, whole, rows = TABLES[name]
    *outer, last = keys.split(".")
    for value in POOL:
        contents = copy.deepcopy(whole)
        inner = contents
        for key in outer:
            inner = inner[key]
        inner[last] = value
        if any(same(value, right) for right in rows[keys]):
            checkpoint.check(contents, table)
        else:
            with pytest.raises(TypeError):
                checkpoint.check(contents, table)
