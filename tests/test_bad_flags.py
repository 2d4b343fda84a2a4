"""Models, images and flags that a script cannot work with, reported as bad_input.py says."""
# ruff: noqa: F401, F811 (fixtures)
import shutil

import pytest
import torch
from bad_input import BENCHMARK, EVALUATE, IMAGES, RECONSTRUCT, check, empty, folder, ids, nothing, trained, vqvae
from conftest import call
from PIL import Image
from test_bad_data import bomb, broken, file_data, pipes

# --- what is done to the folder

def another_ending(folder):
    Image.open(folder / "images/7.png").save(folder / "images/7.jpg")


def same_stem(folder):
    for path in ("x/same/a.png", "y/same/a.png"):
        (folder / path).parent.mkdir(parents=True)
        shutil.copy(folder / "images" / "0.png", folder / path)


TRAINED = [
    ("evaluate: no folder", nothing, (*EVALUATE, "models/a/best.pt", "--data-folder", "nowhere"), "nowhere does not"),
    ("evaluate: colour for a grey model", nothing, (*EVALUATE, "models/grey/best.pt", "--data-folder", "images"),
     "colour image"),
    ("evaluate: over a run", nothing, (*EVALUATE, "models/a", "--output", "models/grey"), "--output models/grey"),
    ("reconstruct: a pipe", pipes, (*RECONSTRUCT, "data/a.png"), "data/a.png does not exist or is no regular file"),
    ("reconstruct: no file", nothing, (*RECONSTRUCT, "nowhere.png"), "nowhere.png does not exist"),
    ("reconstruct: empty folder", empty, (*RECONSTRUCT, "data"), "no images under data"),
    ("reconstruct: broken", broken(b""), (*RECONSTRUCT, "images/7.png"), "images/7.png does not decode"),
    ("reconstruct: too large", bomb, (*RECONSTRUCT, "images/7.png"), "images/7.png does not decode"),
    ("reconstruct: two of one name", same_stem, (*RECONSTRUCT, "x/same", "y/same"), "y/same/a.png"),
    ("reconstruct: next to its input", another_ending, (*RECONSTRUCT, "images/7.jpg", "--output", "images"),
     "images/7.png exists: pass --overwrite"),
    ("reconstruct: one file twice", nothing, (*RECONSTRUCT, "images/7.png", "images/7.png"), "images/7.png"),
    ("reconstruct: onto itself", nothing, (*RECONSTRUCT, "images", "--output", "."), "images/0.png"),
    ("reconstruct: a file for a folder", file_data, (*RECONSTRUCT, "images/7.png", "--output", "data"), "data"),
    ("reconstruct: no pixels a tile", nothing, (*RECONSTRUCT, "images/7.png", "--tile", "0"), "--tile"),
]


def best(content=None, **entries):
    """models/a/best.pt holds other bytes, or other entries, None for none."""
    def spoil(folder):
        path = folder / "models" / "a" / "best.pt"
        if content is not None:
            path.write_bytes(content)
        else:
            kept = torch.load(path, weights_only=True) | entries
            torch.save({name: value for name, value in kept.items() if value is not None}, path)
    return spoil


def half(folder):
    path = folder / "models" / "a" / "best.pt"
    path.write_bytes(path.read_bytes()[:5000])


def a_file_for_models(folder):
    shutil.rmtree(folder / "models")
    (folder / "models").write_text("no folder")


COMPARE = ("compare.py", "--losses")

CHECKPOINTS = [
    ("model: nothing there", nothing, (*EVALUATE, "models/b/best.pt"), "no checkpoint at models/b/best.pt"),
    ("model: a folder of something else", nothing, (*EVALUATE, "images"), "no checkpoint at images/best.pt"),
    ("model: an image", nothing, (*EVALUATE, "images/7.png"), "images/7.png is damaged or is no checkpoint"),
    ("model: empty", best(b""), (*EVALUATE, "models/a"), "models/a/best.pt is damaged"),
    ("model: cut", half, (*EVALUATE, "models/a"), "models/a/best.pt is damaged"),
    ("model: of another kind", best(kind="prior"), (*EVALUATE, "models/a"), "a checkpoint of a prior, not of a vqvae"),
    ("model: of no kind", best(kind=None), (*EVALUATE, "models/a"), "a checkpoint of something else"),
    ("model: of the future", best(format=2), (*EVALUATE, "models/a"), "models/a/best.pt has format 2"),
    ("model: no weights", best(model=None), (*EVALUATE, "models/a"), "models/a/best.pt does not hold all"),
    ("model: other weights", best(model={}), (*EVALUATE, "models/a"), "models/a/best.pt does not hold all"),
    ("models of two data sets", nothing, (*EVALUATE, "models/a", "models/grey"), "evaluate them apart"),
    ("codes of an empty path", nothing, (*IMAGES, "--frozen-codebook", ""), "--frozen-codebook: must be a path"),
    ("codes of nowhere", nothing, (*IMAGES, "--frozen-codebook", "models/b"), "no checkpoint at models/b"),
    ("codes of another width", nothing, (*IMAGES, "--hidden-size", "4", "--frozen-codebook", "models/a"), "dim 8"),
    ("codes from its own folder", nothing, (*IMAGES, "--frozen-codebook", "models/a", "--output-folder", "a",
                                            "--overwrite"), "which this run reads"),
]

RUN_FLAGS = [
    ("taken", nothing, (*IMAGES, "--output-folder", "a"), "models/a already holds a run"),
    ("taken, by its path", nothing, (*IMAGES, "--output-folder", "models/a/"), "models/a already holds a run"),
    ("resumed otherwise", nothing, (*IMAGES, "--output-folder", "a", "--resume", "--beta", "7"), "--beta 1.0 (now 7"),
    ("models is a file", a_file_for_models, IMAGES, "models"),
    ("absolute output", nothing, (*IMAGES, "--output-folder", "/tmp/x"), "--output-folder"),
    ("output upwards", nothing, (*IMAGES, "--output-folder", "../x"), "--output-folder"),
    ("negative weight", nothing, (*IMAGES, "--ssim-weight", "-1"), "--ssim-weight"),
    ("no number for a weight", nothing, (*IMAGES, "--ssim-weight", "nan"), "--ssim-weight"),
    ("no weight", nothing, (*IMAGES, "--mse-weight", "0"), "all loss weights are zero"),
    ("nothing to sharpen", nothing, (*IMAGES, "--sharpen", "0.3"), "--sharpen"),
    ("colour of grey", nothing, (*vqvae(data="grey"), "--mse-weight", "0", "--chroma-weight", "1"), "chroma"),
    ("too small for a term", nothing, (*IMAGES, "--image-size", "8", "--ssim-weight", "1"), "at least 11"),
    ("no codes", nothing, (*IMAGES, "--k", "0"), "--k"),
    ("half an epoch", nothing, (*IMAGES, "--num-epochs", "0.5"), "--num-epochs"),
    ("endless rate", nothing, (*IMAGES, "--lr", "inf"), "--lr"),
    ("negative seed", nothing, (*IMAGES, "--seed", "-1"), "--seed"),
    ("huge seed", nothing, (*IMAGES, "--seed", str(2 ** 64)), "--seed"),
    ("more than an integer", nothing, (*IMAGES, "--batch-size", "1" + 22 * "0"), "--batch-size"),
    ("more than a float", nothing, (*IMAGES, "--ssim-weight", "1", "--sharpen", "1e300"), "--sharpen"),
    ("more than any memory", nothing, (*IMAGES, "--k", "1" + 12 * "0"), "too little memory"),
    ("more than can be counted", nothing, (*IMAGES, "--k", str(2 ** 63 - 1)), "too little memory"),
    ("a device of a package", nothing, (*IMAGES, "--device", "hpu"), "--device hpu"),
    ("no device", nothing, (*IMAGES, "--device", "warp"), "--device warp"),
    ("a device without numbers", nothing, (*IMAGES, "--device", "meta"), "--device meta"),
    ("unknown quantizer", nothing, (*IMAGES, "--quantizer", "magic"), "--quantizer"),
    ("unknown recipe", nothing, (*IMAGES, "--recipe", "soup"), "--recipe"),
    ("unknown flag", nothing, (*IMAGES, "--sim-weight", "1"), "--sim-weight"),
    ("discriminator too deep", nothing, ("vqgan.py", *IMAGES[1:], "--disc-layers", "5"), "--disc-layers"),
    ("compare: no such term", nothing, (*COMPARE, "sim"), "no loss term 'sim'"),
    ("compare: no weight", nothing, (*COMPARE, "ssim=x"), "the weight of ssim"),
    ("compare: what it sets itself", nothing, (*COMPARE, "ssim", "--seed", "3"), "--seed is set by this script"),
    ("compare: flags for nobody", nothing, (*COMPARE, "mse", "--vqgan-flags", "--nonsense 3"), "--vqgan-flags are for"),
    *((f"compare: --output {name!r}", nothing, (*COMPARE, "mse", "--output", name), "--output: must be the name")
      for name in ("/tmp/x", "../x", ".", "", "models")),
    ("evaluation into a file", nothing, (*EVALUATE, "models/a", "--output", "images/7.png"), "7.png is no folder"),
    *((f"benchmark: --output {name}", nothing, (BENCHMARK, "losses", "--output", name), "in a folder that exists")
      for name in ("nowhere/x", "images")),
    ("benchmark: no such subject", nothing, (BENCHMARK, "juggling"), "no such subject: juggling"),
]

CASES = TRAINED + CHECKPOINTS + RUN_FLAGS


@pytest.mark.parametrize("spoil, command, culprit", [case[1:] for case in CASES], ids=ids(CASES))
def test_bad_input_is_one_line(folder, spoil, command, culprit):
    spoil(folder)
    check(folder, command, culprit)


@pytest.mark.parametrize("environment", [*({"WORLD_SIZE": text} for text in ("abc", "0", "-1", "1.5", "", "9" * 5000)),
                                         {"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "abc"},
                                         {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"},
                                         {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost",
                                          "MASTER_PORT": "abc"},
                                         {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost",
                                          "MASTER_PORT": "99999999"}], ids=lambda of: " ".join(of.values())[:25])
@pytest.mark.parametrize("script", ["vqvae.py", "reconstruct.py"])
def test_an_environment_of_other_processes_than_torchrun_starts(tmp_path, script, environment):
    flags = ("--data-folder", "images") if script == "vqvae.py" else ("--model", "models/a", "images")
    code, out, err = call(tmp_path, script, *flags, **environment)
    assert code == 2 and err.count("\n") == 1 and not out and "torchrun" in err and not list(tmp_path.iterdir()), err
