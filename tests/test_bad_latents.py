"""Bad input to the scripts that go on from a trained VQ-VAE, reported as bad_input.py says.

To add a case: one row, (name, what is done to the folder, script and flags, what the line must name). The folder holds
clips/ of cat and dog, numbered frames 16x16 of each split, models/a trained on it and models/prior on the latents of a.
"""
import shutil
from pathlib import Path

import pytest
import torch
from bad_input import SMALL, check, empty, nothing
from conftest import call
from test_datasets import pictures

LATENT = (*SMALL[4:], "--hidden-size-prior", "8", "--num-layers", "2")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    for seed, split in enumerate(("train", "valid", "test")):
        for name in ("cat", "dog"):
            pictures(folder / "clips" / split / name, 8, (16, 16), seed=seed)
    for script, *flags in (("vqvae.py", *SMALL, "--data-folder", "clips", "--output-folder", "a"),
                           ("pixelcnn_prior.py", *LATENT, "--model", "models/a", "--output-folder", "prior")):
        code, _, err = call(folder, script, *flags)
        assert code == 0, err
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "work"))


# --- what is done to the folder

def other_classes(folder):
    for name in ("x", "y"):
        pictures(folder / "data" / name, 12, (16, 16))


def elsewhere(folder):
    (folder / "models" / "a").rename(folder / "models" / "moved")


def without_classes(folder):
    pictures(folder / "data", 24, (16, 16))


def unnumbered(folder):
    (folder / "clips" / "train" / "cat" / "003.png").rename(folder / "clips" / "train" / "cat" / "third.png")


def numbered(digits):
    def spoil(folder):
        (folder / "clips/train/cat/003.png").rename(folder / f"clips/train/cat/{'9' * digits}.png")
    return spoil


def two_clips(folder):
    for split in ("valid", "test"):
        shutil.rmtree(folder / "clips" / split)


def change(path, **entries):
    """A checkpoint has other entries."""
    def spoil(folder):
        torch.save(torch.load(folder / path, weights_only=True) | entries, folder / path)
    return spoil


def no_classes(folder):
    path = folder / "models" / "a" / "best.pt"
    contents = torch.load(path, weights_only=True)
    change("models/a/best.pt", data=contents["data"] | {"classes": []})(folder)


# --- the tables

PRIOR = ("pixelcnn_prior.py", *LATENT, "--model", "models/a", "--output-folder", "new")
STACKED, VIDEO = (("stacked_vqvae.py", *PRIOR[1:]), ("video_prior.py", *PRIOR[1:]))
AGREE = ("evaluate.py", "--device", "cpu", "--samples", "2", "--model", "models/a",
         "--prior", "models/prior")

ALL = [(f"{script[0]}: {name}", spoil, (*script, *flags), culprit) for script in (PRIOR, STACKED, VIDEO)
       for name, spoil, flags, culprit in [
    ("no model", nothing, ("--model", "models/b"), "no checkpoint at models/b"),
    ("an image for a model", nothing, ("--model", "clips/train/cat/000.png"), "000.png is damaged or is no checkpoint"),
    ("a prior for a model", nothing, ("--model", "models/prior"), "a checkpoint of a prior, not of a vqvae"),
    ("an empty path for a model", nothing, ("--model", ""), "--model: must be a path"),
    ("no folder", nothing, ("--data-folder", "nowhere"), "nowhere does not exist"),
    ("empty folder", empty, ("--data-folder", "data"), "no images under data"),
    ("an empty path for a folder", nothing, ("--data-folder", ""), "--data-folder: must be a path"),
    ("other data set", nothing, ("--dataset", "photos"), "--dataset photos contradicts"),
    ("other width", nothing, ("--hidden-size-vae", "9"), "--hidden-size-vae 9 contradicts"),
    ("other number of codes", nothing, ("--k", "9"), "--k 9 contradicts"),
    ("over its model", nothing, ("--output-folder", "a", "--overwrite"), "which this run reads"),
    ("output upwards", nothing, ("--output-folder", "../x"), "--output-folder"),
    ("no layers", nothing, ("--num-layers", "0"), "--num-layers"),
    ("no width", nothing, ("--hidden-size-prior", "0"), "--hidden-size-prior"),
    ("no heat", nothing, ("--temperature", "0"), "--temperature"),
    ("none to draw from", nothing, ("--top-k", "0"), "--top-k"),
    ("endless rate", nothing, ("--lr", "inf"), "--lr"),
    ("no device", nothing, ("--device", "warp"), "--device warp"),
]]

OWN = [
    ("prior: other classes", other_classes, (*PRIOR, "--data-folder", "data"), "has the classes ['x', 'y']"),
    ("prior: no such class", nothing, (*PRIOR, "--label", "2"), "--label 2 is no class: give a name, such as"),
    ("prior: a class to train", nothing, (*PRIOR, "--label", "1", "--overwrite"), "is for samples, training takes all"),
    ("prior: a class of none", no_classes, (*PRIOR, "--label", "0"), "--label 0 is no class: this data set has no"),
    ("prior: nothing to sample from", nothing, (*PRIOR, "--sample", "1"), "no checkpoint at models/new/best.pt"),
    ("stacked: taken", nothing, (*STACKED, "--output-folder", "prior"), "models/prior already holds a run"),
    ("stacked: over a prior", nothing, (*STACKED, "--output-folder", "prior", "--overwrite"), "the run of a prior"),
    ("stacked: other classes", other_classes, (*STACKED, "--data-folder", "data"), "has the classes ['x', 'y']"),
    ("stacked: nothing to sample from", nothing, (*STACKED, "--sample", "1"), "no checkpoint at models/new/best.pt"),
    ("stacked: no codes", nothing, (*STACKED, "--codes", "0"), "--codes"),
    ("stacked: more codes than latents", nothing, (*STACKED, "--codes", "17"), "17 codes are more than the 4x4"),
    ("stacked: no image with codes", nothing, (*STACKED, "--without-codes", "1"), "--without-codes"),
    ("stacked: negative weight", nothing, (*STACKED, "--alone-weight", "-1"), "--alone-weight"),
    ("stacked: no draws", nothing, (*STACKED, "--draws", "0"), "--draws"),
    ("video: frames without numbers", unnumbered, VIDEO, "clips/train/cat/third.png has no number"),
    *((f"video: frames numbered with {digits} digits", numbered(digits), VIDEO, "digits for a name")
      for digits in (19, 20, 200)),
    ("video: too few clips", two_clips, VIDEO, "2 clips are too few to carve valid and test from"),
    ("video: other classes", other_classes, (*VIDEO, "--data-folder", "data"), "too few to carve"),
    ("video: no context", nothing, (*VIDEO, "--context", "0"), "--context"),
    ("video: a context beyond memory", nothing, (*VIDEO, "--context", "1000"),
     "--context: must be a whole number from 1 to 32, got 1000"),
    ("video: too fast", nothing, (*VIDEO, "--rollout", "2", "--fps", "51"),
     "--fps: must be a whole number from 1 to 50, got 51"),
    ("video: an action in training", nothing, (*VIDEO, "--action", "jump"), "--action jump is for a rollout"),
    ("video: hot training", nothing, (*VIDEO, "--temperature", "2"), "--temperature 2.0 is for a rollout"),
    ("video: no such action", nothing, (*VIDEO, "--rollout", "2", "--action", "jump"), "this data set has no actions"),
    ("video: nothing to roll out", nothing, (*VIDEO, "--rollout", "2"), "no checkpoint at models/new/best.pt"),
    ("video: no starts", nothing, (*VIDEO, "--rollout", "2", "--starts", "0"), "--starts"),
    ("video: no speed", nothing, (*VIDEO, "--rollout", "2", "--fps", "0"), "--fps"),
    ("agreement: no model", nothing, (*AGREE, "--model", "models/b"), "no checkpoint at models/b"),
    ("agreement: no prior", nothing, (*AGREE, "--prior", "models/b"), "no checkpoint at models/b"),
    ("agreement: a model for a prior", nothing, (*AGREE, "--prior", "models/a"), "a vqvae, not of a prior"),
    ("agreement: a prior for a model", nothing, (*AGREE, "--model", "models/prior"), "a prior, not of a vqvae"),
    ("agreement: another model's prior", change("models/a/best.pt", best=7.), AGREE, "is another VQ-VAE"),
    ("agreement: a model without classes", no_classes, AGREE, "a data set without classes"),
    ("agreement: codes that are elsewhere", elsewhere, (*AGREE[:-4], "--prior", "models/prior"),
     "draws the codes of models/a, which is not there: pass --model"),
    ("agreement: no folder", nothing, (*AGREE, "--data-folder", "nowhere"), "nowhere does not exist"),
    ("agreement: an empty path", nothing, (*AGREE, "--data-folder", ""), "--data-folder: must be a path"),
    ("agreement: other classes", other_classes, (*AGREE, "--data-folder", "data"), "has the classes ['x', 'y']"),
    ("agreement: no classes", without_classes, (*AGREE, "--data-folder", "data"), "data has the classes []"),
    ("agreement: no samples", nothing, (*AGREE, "--samples", "0"), "--samples"),
    ("agreement: no heat", nothing, (*AGREE, "--temperature", "0"), "--temperature"),
    ("agreement: negative seed", nothing, (*AGREE, "--seed", "-1"), "--seed"),
]


@pytest.mark.parametrize("spoil, command, culprit", [case[1:] for case in ALL + OWN],
                         ids=[case[0] for case in ALL + OWN])
def test_bad_input_is_one_line(folder, spoil, command, culprit):
    spoil(folder)
    check(folder, command, culprit)
