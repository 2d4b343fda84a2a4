"""What --resume goes on from, refuses, and mends: other images, a best.pt that was lost, a folder that was renamed."""
import json
import shutil

import pytest
import torch
from conftest import call
from test_datasets import pictures

from harness import checkpoint
from harness.folder import shared

SMALL = ("--hidden-size", "8", "--k", "16", "--batch-size", "8", "--device", "cpu", "--precision", "fp32",
         "--num-workers", "0")
RUN = (*SMALL, "--data-folder", "images", "--output-folder")
PRIOR = (*SMALL[4:], "--model", "models/first", "--hidden-size-prior", "8", "--num-layers", "2", "--output-folder", "a")
LATENT = ("pixelcnn_prior.py", "stacked_vqvae.py", "video_prior.py")


def draw(folder, size, **how):
    """images/ of two classes or clips, numbered frames, in splits."""
    for seed, split in enumerate(("train", "valid", "test")):
        for name in ("cat", "dog"):
            pictures(folder / "images" / split / name, 6, size, seed=seed, **how)


@pytest.fixture
def folder(tmp_path):
    draw(tmp_path, (16, 16))
    return tmp_path


def train(folder, script="vqvae.py", *flags, epochs=1):
    """Train or resume models/a, of a script with its usual flags."""
    usual = PRIOR if script in LATENT else (*RUN, "a")
    return call(folder, script, *usual, "--resume", "--num-epochs", epochs, *flags)


def start(folder, script, epochs=1, *flags):
    """A run of a script in models/a, of latents of models/first."""
    if script in LATENT:
        assert call(folder, "vqvae.py", *RUN, "first", "--num-epochs", 1)[0] == 0
    code, out, err = train(folder, script, *flags, epochs=epochs)
    assert code == 0, err
    return folder / "models" / "a"


def refuses(result, *words):
    code, _, err = result
    assert code == 2 and err.count("\n") == 1 and all(word in err for word in words), err


# --- other images

def other_size(folder):
    shutil.rmtree(folder / "images")
    draw(folder, (24, 24))


def grey(folder):
    shutil.rmtree(folder / "images")
    draw(folder, (16, 16), mode="L")


def renamed_class(folder):
    for split in ("train", "valid", "test"):
        (folder / "images" / split / "cat").rename(folder / "images" / split / "bird")


def one_less(folder):
    (folder / "images" / "train" / "cat" / "000.png").unlink()


@pytest.mark.parametrize("script", ["vqvae.py", "vqgan.py"])
def test_other_images_are_refused(folder, script):
    run = start(folder, script)
    whole, best = folder / "whole", (run / "best.pt").read_bytes()
    shutil.copytree(folder / "images", whole)
    for change, fact in ((other_size, "size [16, 16] (now [24, 24])"), (grey, "channels 3 (now 1)"),
                         (renamed_class, "classes ['cat', 'dog'] (now ['bird', 'dog'])"), (one_less, "'train': 12")):
        shutil.rmtree(folder / "images")
        shutil.copytree(whole, folder / "images")
        change(folder)
        refuses(train(folder, script, epochs=2), "models/a/last.pt was trained on other images", fact)
    assert (run / "best.pt").read_bytes() == best


@pytest.mark.parametrize("script", LATENT)
def test_other_images_are_refused_by_models_of_latents(folder, script):
    start(folder, script)
    whole = folder / "whole"
    shutil.copytree(folder / "images", whole)
    changes = [(one_less, "trained on other images")]
    changes += [(renamed_class, "has the classes ['bird', 'dog']")] if script != "video_prior.py" else []
    for change, words in changes:
        shutil.rmtree(folder / "images")
        shutil.copytree(whole, folder / "images")
        change(folder)
        refuses(train(folder, script, epochs=2), words)


# --- a best.pt that was lost, or is another's

def lose(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:3000])


def change(**entries):
    """Give a checkpoint other entries."""
    return lambda path: torch.save(torch.load(path) | entries, path)


def diverge(path):
    contents = torch.load(path)
    contents["model"]["encoder.0.bias"][0] = torch.nan
    torch.save(contents, path)


def get_ahead(path):
    """As where the run was killed before it saved last.pt."""
    contents = torch.load(path)
    change(counters=contents["counters"] | {"step": contents["counters"]["step"] + 1}, best=-1.)(path)


WHAT = {lose: "gone", get_ahead: "ahead of last.pt"}  # else damaged


@pytest.mark.parametrize("script, damage", [
    ("vqvae.py", lose), ("vqvae.py", cut), ("vqgan.py", lose), *((script, empty) for script in LATENT),
    ("vqvae.py", get_ahead), ("vqvae.py", diverge), ("vqvae.py", change(model=None)),
    *((script, change(model={"x": torch.zeros(1)})) for script in LATENT)])
def test_a_lost_best_epoch_is_saved_anew_where_it_is_the_last(folder, script, damage):
    run = start(folder, script, 1, *(("--average-weights", "0.9") if script == "vqvae.py" else ()))
    kind = torch.load(run / "last.pt")["kind"]
    before = checkpoint.load(run / "best.pt", kind)
    damage(run / "best.pt")
    code, out, err = train(folder, script, *(("--average-weights", "0.9") if script == "vqvae.py" else ()))
    assert code == 0 and f"best.pt is {WHAT.get(damage, 'damaged')}: it" in out and "saved anew" in out, err
    after = checkpoint.load(run / "best.pt", kind)
    assert after.keys() == before.keys() and after["counters"] == before["counters"]
    assert all(torch.equal(after["model"][name], value) for name, value in before["model"].items())


def test_a_lost_best_epoch_before_the_last_is_replaced_by_one_to_come(folder):
    run = start(folder, "vqvae.py", 2)
    last = torch.load(run / "last.pt")
    last["best"] -= 1
    last["counters"]["best_step"] = last["counters"]["step"] // 2  # the first epoch was better than any
    torch.save(last, run / "last.pt")
    lose(run / "best.pt")
    before = {path: path.read_bytes() for path in run.glob("*.*")}
    refuses(train(folder, epochs=2), "best.pt is gone, last.pt is not of the best epoch, and none is left to train")
    assert before == {path: path.read_bytes() for path in run.glob("*.*")}
    code, out, err = train(folder, epochs=3)
    assert code == 0 and "best.pt is gone, and last.pt is not of the best epoch: the best from epoch 3 on" in out, err
    assert checkpoint.load(run / "best.pt", "vqvae")["counters"]["epoch"] == 2


@pytest.mark.parametrize("script", ["vqvae.py", "pixelcnn_prior.py"])
def test_the_best_epoch_of_another_run_is_refused(folder, script):
    run = start(folder, script)
    kind = torch.load(run / "last.pt")["kind"]
    last = torch.load(run / "best.pt") | {"run": "another"}
    torch.save(last, run / "best.pt")
    refuses(train(folder, script, epochs=2), "best.pt is not the one that models/a/last.pt goes with")
    assert checkpoint.load(run / "best.pt", kind)["run"] == "another"


def test_an_evaluation_notices_the_best_epoch_of_another_run(folder):
    start(folder, "vqvae.py")
    assert call(folder, "vqvae.py", *RUN, "b", "--num-epochs", 1, "--seed", 1)[0] == 0
    one, two = (folder / "models" / name / "best.pt" for name in "ab")
    one.rename(folder / "kept"), two.rename(one), (folder / "kept").rename(two)
    evaluate = ("evaluate.py", "--no-features", "--device", "cpu", "--model")
    refuses(call(folder, *evaluate, "models/a"), "models/a/best.pt is of another run than models/a/results.json")
    one.rename(folder / "elsewhere.pt")
    assert call(folder, *evaluate, "elsewhere.pt", "--data-folder", "images")[0] == 0


# --- a last.pt that would train otherwise than the run did

@pytest.mark.parametrize("keys, value, words", [
    ("optimizer.state", {}, "its optimizer has no state"), ("optimizer.state.0.exp_avg", torch.zeros(3), "(3,)"),
    ("counters.batch", 9, "goes on at batch 9 of 1"), ("counters.step", 2 ** 63 - 1, "its step is"),
    ("args.3", 4, "its args is")])
def test_a_forged_last_epoch(folder, keys, value, words):
    run = start(folder, "vqvae.py")
    contents = inner = torch.load(run / "last.pt")
    *outer, last = (int(key) if key.isdecimal() else key for key in keys.split("."))
    for key in outer:
        inner = inner[key]
    inner[last] = value
    torch.save(contents, run / "last.pt")
    refuses(train(folder, epochs=2), "models/a/last.pt", words)


# --- what best.pt says, and what it does not

def test_what_is_shared_has_no_optimizer_and_no_path_of_the_data(folder):
    secret = folder / "images"
    assert call(folder, "vqvae.py", *SMALL, f"--data-folder={secret}", "--output-folder", "a", "--average-weights",
                "0.5", "--num-epochs", 1)[0] == 0
    for script in LATENT:
        assert call(folder, script, *PRIOR[:-4], "--num-layers", 2, "--model", "models/a", "--num-epochs", 1,
                    "--output-folder", script, "--data-folder", secret)[0] == 0
    for name in ("a", *LATENT):
        best, last = ((folder / "models" / name / file).read_bytes() for file in ("best.pt", "last.pt"))
        contents = torch.load(folder / "models" / name / "best.pt", weights_only=True)
        assert str(secret).encode() in last and str(secret).encode() not in best
        assert {"model", "model_args", "args"} <= contents.keys()
        assert not {"optimizer", "average", "random"} & contents.keys()


def test_flags_that_say_where_the_data_are_are_left_out():
    args, command = shared({"data_folder": "x", "k": 8}, ["a.py", "--data-folder", "x", "--k", "8", "--data-folder=y"])
    assert args == {"k": 8} and command == ["a.py", "--k", "8"]


def test_a_best_epoch_alone_is_told_where_its_data_are(folder):
    start(folder, "vqvae.py")
    shutil.copy(folder / "models" / "a" / "best.pt", folder / "shared.pt")
    evaluate = ("evaluate.py", "--no-features", "--device", "cpu", "--model")
    refuses(call(folder, *evaluate, "shared.pt"), "pass --data-folder")
    assert call(folder, *evaluate, "shared.pt", "--data-folder", "images")[0] == 0
    assert call(folder, *evaluate, "models/a")[0] == 0
    (folder / "images").rename(folder / "moved")
    assert train(folder, "vqvae.py", "--data-folder", "moved", epochs=2)[0] == 0
    flags = json.loads((folder / "models" / "a" / "args.json").read_text())
    assert flags["data_folder"] == "moved" and flags["num_epochs"] == 1  # where they were last; else as it started
    assert call(folder, *evaluate, "models/a")[0] == 0
    (folder / "elsewhere").mkdir()
    refuses(call(folder / "elsewhere", *evaluate, "../models/a"), "moved", "--data-folder")


# --- other flags, another name

def test_a_flag_that_was_added_since_is_no_difference_at_its_default(folder):
    run = start(folder, "vqvae.py")
    contents = torch.load(run / "last.pt")
    for flag in ("ssim_weight", "average_weights", "flip", "codebook_decay"):
        del contents["args"][flag]
    torch.save(contents, run / "last.pt")
    refuses(train(folder, "vqvae.py", "--ssim-weight", 1, epochs=2), "--ssim-weight None (now 1.0)")
    refuses(train(folder, "vqvae.py", "--codebook-decay", 0.9, epochs=2), "--codebook-decay None (now 0.9)")
    code, _, err = train(folder, epochs=2)
    assert code == 0, err


def test_a_renamed_folder_goes_on(folder):
    run = start(folder, "vqvae.py")
    run.rename(folder / "models" / "b")
    code, out, err = train(folder, "vqvae.py", "--output-folder", "b", epochs=2)
    assert code == 0 and "models/b was models/a before: its curves so far stay in logs/a" in out, err
    assert checkpoint.load(folder / "models" / "b" / "last.pt", "vqvae")["counters"]["epoch"] == 2
    code, out, _ = train(folder, "vqvae.py", "--output-folder", "b", epochs=3)
    assert code == 0 and "before" not in out
