"""Checkpoints and files of runs that lack what a script reads of them: one line that names the file, no traceback.

As bad_input.py, and in its folder.
"""
import shutil

import pytest
import torch
from bad_input import EVALUATE, RECONSTRUCT, SMALL, check, folder, trained  # noqa: F401 (fixtures)
from conftest import call
from PIL import Image

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
    ("args.skip_broken", MISSING), ("args.data_folder", 7)])
def test_a_checkpoint_that_lacks_a_fact(folder, keys, value):  # noqa: F811
    change(folder, keys, value)
    for command in READERS.values():
        check(folder, command, f"{BEST} does not hold all that it should")


@pytest.mark.parametrize("keys, value, words", [
    ("data.size", [16], "its size is [16]"), ("data.size", [0, 0], "its size is [0, 0]"),
    ("data.size", ["a", "b"], "its size is ['a', 'b']"), ("data.size", [16.5, 16], "its size is [16.5, 16]"),
    ("data.size", [18, 16], "its size is [18, 16]"), ("data.size", [16, 10 ** 9], "its size is [16, 1"),
    ("data.channels", 2, "its channels is 2"),
    ("data.channels", 1, "its data are folder of 1 channels"), ("data.name", "mnist", "its data are mnist"),
    ("data.name", "photos", "its data are photos"), ("data.classes", ["x", 3], "its classes is"),
    ("data.images", {"train": 4}, "its images has no valid"), ("model_args.downsample", -4, "its downsample is -4"),
    ("model_args.downsample", 8, "it"), ("model_args.fine_blocks", 10 ** 7, "its fine_blocks is 10000000"),
    ("model_args.dim", 10 ** 9, "Storage size calculation overflowed"),
    ("model_args.K", 10 ** 12, "not (1000000000000,)"),
    ("model_args.K", 2 ** 63, "its K is"), ("model_args.input_dim", 4, "its data are folder"),
    ("model_args.quantizer", "magic", "the quantizer must be one of"), ("model_args.restart_below", 7, "restart_below"),
    ("model_args.decay", float("nan"), "its decay is nan"), ("counters.epoch", -1, "its epoch is -1"),
    ("counters.step", "many", "its step is 'many'"), ("counters", [], "its counters is []"),
    ("format", -5, "format -5"), ("format", True, "format True"), ("model", [], BEST), ("model", {}, "has no enc")])
def test_a_forged_checkpoint(folder, keys, value, words):  # noqa: F811
    change(folder, keys, value)
    for name in ("evaluate", "prior"):
        check(folder, READERS[name], words)


@pytest.mark.parametrize("name", ["evaluate", "prior", "stacked", "video"])
def test_a_checkpoint_of_an_unknown_data_set(folder, name):  # noqa: F811
    change(folder, "data.name", "sunsets")
    change(folder, "args.dataset", "sunsets")
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
    for number in ("100000000000000", str(2 ** 63 - 1)):
        check(prior, (*PRIOR, "--sample", number), "--sample: must be a whole number from 1 to 100000")


LATENTS = "models/prior/latents.pt"


def forge(make, split="train"):
    """latents.pt holds in a split what make(its latents, its labels) gives."""
    return lambda splits: splits | {split: make(*splits[split])}


@pytest.mark.parametrize("forged", [
    forge(lambda codes, labels: (codes + 1000, labels)), forge(lambda codes, labels: (-1 - codes, labels)),
    forge(lambda codes, labels: (codes.flatten(1), labels)), forge(lambda codes, labels: (codes[:2], labels[:2])),
    forge(lambda codes, labels: (codes[:2], labels)), forge(lambda codes, labels: (codes.float(), labels)),
    forge(lambda codes, labels: (codes, labels + 7)), forge(lambda codes, labels: (codes[:, :2], labels)),
    forge(lambda codes, labels: (codes[:0], labels[:0])), forge(lambda codes, labels: (codes,)),
    forge(lambda codes, labels: (codes, "labels")), forge(lambda codes, labels: None),
    lambda splits: splits | {"train": splits["test"], "test": splits["train"]}, lambda splits: [splits]])
def test_forged_latents(prior, forged):
    splits = torch.load(prior / LATENTS, weights_only=True)["splits"]
    change(prior, "splits", forged(splits), LATENTS)
    for command in ((*PRIOR, "--overwrite"), (*PRIOR, "--resume", "--num-epochs", "2")):
        check(prior, command, f"{LATENTS} ")


def test_latents_of_before_they_had_a_digest_are_encoded_anew(prior):
    change(prior, "digest", MISSING, LATENTS)
    assert call(prior, *PRIOR, "--num-layers", 1, "--hidden-size-prior", 4, "--num-epochs", 1, "--overwrite")[0] == 0
    assert "digest" in torch.load(prior / LATENTS, weights_only=True)


@pytest.mark.parametrize("keys", ["key", "splits", "splits.train"])
def test_latents_that_lack_an_entry(prior, keys):
    change(prior, keys, MISSING, "models/prior/latents.pt")
    check(prior, (*PRIOR, "--overwrite"), "models/prior/latents.pt is damaged: delete it")


DEEP = "[" * 100_000 + "]" * 100_000
JSON = {"null": "null", "a list": "[1]", "a number": "1", "nothing": "", "cut": '{"steps": 3', "deep": DEEP,
        "deep within": f'{{"steps": {DEEP}}}', "bytes": b"\xff\xfe{", "empty": "{}",
        "text": '{"steps": "3", "epochs": 1}',
        "nan": '{"steps": NaN, "epochs": 1}', "huge": '{"steps": 1e999, "epochs": 1}', "null within":
        '{"steps": null, "epochs": null}', "negative": '{"steps": -3, "epochs": 1}', "true": '{"steps": true}',
        "digits": '{"steps": ' + "9" * 5000 + "}", "no cost": '{"steps": 3, "epochs": 1}', "nan cost":
        '{"steps": 3, "epochs": 1, "ms_per_step": NaN, "peak_memory_mb": 1, "train_seconds": 1}'}


@pytest.mark.parametrize("text", JSON.values(), ids=JSON)
def test_damaged_results(folder, text):  # noqa: F811
    path = folder / "models" / "a" / "results.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    check(folder, READERS["evaluate"], "models/a/results.json is damaged (")


@pytest.mark.parametrize("text", [text for text in JSON.values() if text != "{}"])
def test_damaged_files_of_where_the_images_are(folder, text):  # noqa: F811
    (folder / "models" / "a" / "args.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    check(folder, READERS["evaluate"], "models/a/args.json is damaged (")


TABLE = '{"runs": [{"loss": %s, "seed": 0}], "against": []}'


@pytest.mark.parametrize("text", [*(text for name, text in JSON.items() if name != "empty"), "{}", '{"runs": 3}',
                                  '{"runs": [null]}', *(TABLE % loss for loss in ("3, \"x\": 1", "[]", "null", "{}"))])
@pytest.mark.parametrize("command", [
    ("compare.py", "--losses", "mse", "--output", "c", "--data-folder", "images"), ("study/lengths.py", "c")])
def test_damaged_tables(folder, text, command):  # noqa: F811
    (folder / "models" / "c").mkdir()
    (folder / "models" / "c" / "table.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    check(folder, command, "models/c/table.json ")


def test_a_folder_that_gained_an_image_holds_out_others(folder, monkeypatch):  # noqa: F811
    images, changed = folder / "images", "were added, removed or renamed since the model was trained"
    shutil.copytree(folder / "models" / "a", folder / "models" / "old")
    change(folder, "data.carved", "", "models/old/best.pt")
    shutil.copytree(images, folder / "moved")
    Image.new("RGB", (16, 16)).save(images / "70.png")
    resumed = ("vqvae.py", *SMALL, "--data-folder", "images", "--output-folder", "a", "--resume", "--num-epochs", "2")
    for command in (READERS["evaluate"], (*READERS["evaluate"], "--data-folder", "./images/"), PRIOR, STACKED, resumed):
        check(folder, command, changed)
    check(folder, (*EVALUATE, "models/old", "models/a"), changed)
    change(folder, "args.data_folder", "moved", "models/old/best.pt")
    assert call(folder, *EVALUATE, "models/old", "models/a")[0] == 0  # on another folder than that of the digest
    check(folder, (*EVALUATE, "models/old", "models/a", "--data-folder", "images"), changed)
    assert call(folder, *READERS["evaluate"], "--data-folder", "moved")[0] == 0
    fresh = ("vqvae.py", *SMALL, "--data-folder", "images", "--output-folder")
    for words in ("was trained with", "It last ran as: vqvae.py"):
        check(folder, ("vqvae.py", *SMALL, *resumed[-5:]), words)  # another data set, not other files
    check(folder, (*fresh, "frozen", "--frozen-codebook", BEST), "hold out other images")
    assert call(folder, *fresh, "b")[0] == 0
    check(folder, (*EVALUATE, "models/b", "models/a"), "were trained on other files and hold out other images")
    for run in "ab":
        shutil.copytree(folder / "models" / run, folder / "models" / "sweep" / run)
    with pytest.raises(ValueError, match="were trained on other files"):
        measuring.open_split([folder / "models" / "sweep" / run for run in "ba"], "valid", [], "cpu")
    change(folder, "data.images.valid", 99, "models/sweep/a/best.pt")
    change(folder, "data.carved", "", "models/sweep/a/best.pt")
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="were trained on different images"):
        measuring.open_split([folder / "models" / "sweep" / run for run in "ba"], "valid", [], "cpu")
