"""Checkpoints and files of runs that lack what a script reads of them: one line that names the file, no traceback.

As test_bad_input.py, and in its folder.
"""
import shutil

import pytest
import torch
from conftest import call
from test_bad_input import EVALUATE, RECONSTRUCT, SMALL, check, folder, trained  # noqa: F401 (fixtures)

from study import measuring

BEST = "models/a/best.pt"
PRIOR = ("pixelcnn_prior.py", *SMALL[4:], "--output-folder", "prior", "--model", "models/a/best.pt")
AGREE = ("evaluate.py", "--model", "models/a", "--prior")
STACKED, VIDEO = ((f"{name}.py", *SMALL[4:], "--model", "models/a") for name in ("stacked_vqvae", "video_prior"))
READERS = {"evaluate": (*EVALUATE, "models/a"), "prior": PRIOR, "stacked": STACKED, "video": VIDEO,
           "agreement": (*AGREE, "models/a")}
MISSING = object()


def change(where, keys, value, file=BEST):
    """Give a checkpoint another entry under "outer.inner", or take it out."""
    contents = torch.load(where / file, weights_only=True)
    *outer, last = keys.split(".")
    inner = contents
    for name in outer:
        inner = inner[name]
    if value is MISSING:
        del inner[last]
    else:
        inner[last] = value
    torch.save(contents, where / file)


@pytest.mark.parametrize("keys, value", [
    ("data", MISSING), ("data", None), ("data", [1]), ("data.name", MISSING), ("data.channels", MISSING),
    ("data.channels", "3"), ("data.size", MISSING), ("data.size", None), ("data.classes", MISSING), ("args", MISSING),
    ("args.skip_broken", MISSING), ("args.data_folder", MISSING), ("args.data_folder", 7)])
def test_a_checkpoint_that_lacks_a_fact(folder, keys, value):  # noqa: F811
    change(folder, keys, value)
    for command in READERS.values():
        check(folder, command, f"{BEST} does not hold all that it should")
    if keys in ("data", "data.channels"):
        check(folder, (*RECONSTRUCT, "images/7.png"), f"{BEST} does not hold all that it should")


@pytest.mark.parametrize("name", ["evaluate", "prior", "stacked", "video"])
def test_a_checkpoint_of_an_unknown_data_set(folder, name):  # noqa: F811
    change(folder, "data.name", "sunsets")
    check(folder, READERS[name], "the data set 'sunsets' is not known")


@pytest.fixture
def prior(folder):  # noqa: F811
    """The folder, with a prior in models/prior."""
    code, _, err = call(folder, *PRIOR, "--num-layers", 1, "--hidden-size-prior", 4, "--num-epochs", 1)
    assert code == 0, err
    return folder


@pytest.mark.parametrize("value", [MISSING, None, {"path": "models/a"}])
def test_a_prior_that_does_not_say_of_which_codes(prior, value):
    change(prior, "vqvae", value, "models/prior/best.pt")
    check(prior, (*PRIOR, "--sample", "1"), "models/prior/best.pt does not hold all that it should")
    change(prior, "data.classes", ["cat"])
    check(prior, (*AGREE, "models/prior"), "models/prior/best.pt does not hold all that it should")


def test_more_samples_than_any_memory(prior):
    check(prior, (*PRIOR, "--sample", "100000000000000"), "too little memory")


@pytest.mark.parametrize("keys", ["key", "splits", "splits.train"])
def test_latents_that_lack_an_entry(prior, keys):
    change(prior, keys, MISSING, "models/prior/latents.pt")
    check(prior, (*PRIOR, "--overwrite"), "models/prior/latents.pt is damaged: delete it")


def test_results_that_are_a_list(folder):  # noqa: F811
    (folder / "models" / "a" / "results.json").write_text("[1]")
    check(folder, READERS["evaluate"], "models/a/results.json is damaged (it holds a list)")


def test_a_folder_that_gained_an_image_holds_out_others(folder):  # noqa: F811
    images, changed = folder / "images", "since the model was trained, so that others are held out"
    shutil.copytree(folder / "models" / "a", folder / "models" / "old")
    change(folder, "data.carved", "", "models/old/best.pt")
    shutil.copytree(images, folder / "moved")
    shutil.copy(images / "7.png", images / "70.png")
    resumed = ("vqvae.py", *SMALL, "--data-folder", "images", "--output-folder", "a", "--resume", "--num-epochs", "2")
    for command in (READERS["evaluate"], (*READERS["evaluate"], "--data-folder", "./images/"), PRIOR, STACKED, resumed):
        check(folder, command, changed)
    check(folder, (*EVALUATE, "models/old", "models/a"), changed)
    change(folder, "args.data_folder", "moved", "models/old/best.pt")
    assert call(folder, *EVALUATE, "models/old", "models/a")[0] == 0  # on another folder than that of the digest
    check(folder, (*EVALUATE, "models/old", "models/a", "--data-folder", "images"), changed)
    assert call(folder, *READERS["evaluate"], "--data-folder", "moved")[0] == 0
    fresh = ("vqvae.py", *SMALL, "--data-folder", "images", "--output-folder")
    check(folder, ("vqvae.py", *SMALL, *resumed[-5:]), "was trained with")  # another data set, not other files
    check(folder, (*fresh, "frozen", "--frozen-codebook", BEST), "hold out other images")
    assert call(folder, *fresh, "b")[0] == 0
    check(folder, (*EVALUATE, "models/b", "models/a"), "were trained on other files, of one folder or of two")
    for run in "ab":
        shutil.copytree(folder / "models" / run, folder / "models" / "sweep" / run)
    with pytest.raises(ValueError, match="were trained on other files"):
        measuring.open_split([folder / "models" / "sweep" / run for run in "ba"], "valid", [], "cpu")
