"""Mixes of losses as text, and the commands that they stand for."""
import argparse
import re

import pytest

import experiment
from losses import TERMS
from study import mixes


@pytest.mark.parametrize("text, mix, name", [
    ("ssim", {"ssim": 1.}, "ssim"), ("mse=1,ssim=0.5", {"mse": 1., "ssim": 0.5}, "mse,ssim=0.5"),
    ("mse=20", {"mse": 20.}, "mse=20"), ("tuned-mse", {"recipe": "tuned-mse"}, "tuned-mse"),
    ("l1,ms-ssim=.25", {"l1": 1., "ms-ssim": 0.25}, "l1,ms-ssim=0.25"), ("vqgan", {"vqgan": 0.8}, "mse,vqgan"),
    ("l1,vqgan=0.1", {"l1": 1., "vqgan": 0.1}, "l1,vqgan=0.1"),
    ("ssim,sharpen=0.1", {"ssim": 1., "sharpen": 0.1}, "ssim,sharpen=0.1"), ("mse=", {"mse": 1.}, "mse"),
    ("mse=5,lr=1e-3", {"mse": 5., "lr": 1e-3}, "mse=5,lr=0.001"),
    ("l1,k=4096,quantizer=cosine", {"l1": 1., "k": 4096, "quantizer": "cosine"}, "l1,k=4096,quantizer=cosine"),
    ("k=64", {"k": 64}, "mse,k=64"), ("mse,vqgan,perceptual", {"mse": 1., "vqgan": 0.8, "perceptual": 1.},
                                     "mse,vqgan,perceptual"),
    ("recommended,vqgan,disc-start=0.8", {"recipe": "recommended", "vqgan": 0.8, "disc-start": 0.8},
     "recommended,vqgan,disc-start=0.8"),
    ("recommended,psnr=0,l1,sharpen=0", {"recipe": "recommended", "psnr": 0., "l1": 1., "sharpen": 0.},
     "recommended,psnr=0,l1,sharpen=0")])
def test_mixes_and_their_names_which_mean_the_same(text, mix, name):
    assert mixes.parse_mix(text) == mix and mixes.mix_name(mix) == name
    assert mixes.mix_name(mixes.parse_mix(name)) == name and re.fullmatch(r"[a-z0-9,.=+-]+", name)
    assert trained(name) == trained(text)


@pytest.mark.parametrize("text, says", [
    ("sharp", "no loss term 'sharp' in 'sharp': did you mean sharpen[?] the terms"), ("mse=nan", "weight of mse"),
    ("mse=-1", "weight of mse"), ("qqq", "no loss term 'qqq' in 'qqq': the terms"),
    ("mse=0", "weight of mse"), ("ssim,sharpen=0", "value of sharpen"),
    ("recommended,root-ssim=0", "recommended,root-ssim=0.*structural"),
    ("mse,quantizer=none", "must be one of ema"), ("mse;ssim", "no loss term"),
    ("mse=1,,ssim", "no loss term ''"),
    ("sharpen=0.3", "structural"), ("ssim=1,ssim=2", "ssim stands twice"), ("mse,lr=fast", "value of lr"),
    ("mse,k=1.5", "value of k"), ("mse,lr", "value of lr"), ("mse,disc-start=0.5", "add vqgan"),
    ("mse,recommended", "no loss term 'recommended'"), ("recommended=2", "no loss term 'recommended'")])
def test_wrong_mixes_are_named(text, says):
    with pytest.raises(ValueError, match=says):
        mixes.parse_mix(text)


def test_rates_name_the_model_alone():
    assert mixes.parse_rate("k=64,downsample=8") == {"k": 64, "downsample": 8}
    with pytest.raises(ValueError, match="--rates takes"):
        mixes.parse_rate("k=64,ssim=1")


def test_presets():
    report = mixes.PRESETS["report"]()
    assert len(report) == 28 and {"mse": 1., "haarpsi": 0.25} in report and {"gmsd": 1.} in report
    baselines = mixes.PRESETS["baselines"]()
    assert len(baselines) == 18 and {"l1": 20., "lr": 4e-3} in baselines
    assert len({mixes.mix_name(mix) for mix in baselines}) == 18


def trained(text, seed=0, flags=(), vqgan_flags=()):
    """What the script of a mix would see."""
    return seen(mixes.command_of(mixes.parse_mix(text), seed, flags, vqgan_flags))


def seen(command):
    """What the script would see of a command: its name, and the values of all flags."""
    script, *words = command
    parser = argparse.ArgumentParser(allow_abbrev=False)
    experiment.add_arguments(parser, output_folder="run")
    for name in ("disc-weight", "disc-start", "disc-lr", "disc-layers", "disc-hidden-size", "perceptual-weight"):
        parser.add_argument(f"--{name}", type=float)
    return script, vars(experiment.parse_args(parser, words))


def weights(flags):
    return {name: flags[f"{name.replace('-', '_')}_weight"] for name in TERMS}


def test_a_command_trains_what_the_mix_says_and_a_mix_wins_over_the_flags():
    script, flags = trained("ssim=0.5,sharpen=0.3,lr=1e-3", 3, ["--lr", "1e-2", "--beta", "0.7"],
                            ["--disc-start", "1"])
    assert script == "vqvae.py" and weights(flags) == dict.fromkeys(TERMS, 0.) | {"ssim": 0.5}
    assert (flags["sharpen"], flags["lr"], flags["beta"], flags["seed"]) == (0.3, 1e-3, 0.7, 3)
    assert flags["lr_schedule"] == "cosine" and flags["flip"] and flags["disc_start"] is None


def test_a_part_of_a_recipe_is_taken_out_and_the_rest_stays():
    _, flags = trained("recommended,psnr=0,l1,sharpen=0")
    assert weights(flags) == dict.fromkeys(TERMS, 0.) | {"l1": 1., "root-ssim": 0.4, "chroma": 1.}
    assert flags["sharpen"] == 0


@pytest.mark.parametrize("recipe", sorted(set(experiment.RECIPES) - set(TERMS)))
def test_a_recipe_as_a_mix_is_the_script_with_that_recipe(recipe):
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser, output_folder="run")
    plain = vars(experiment.parse_args(parser, ["--recipe", recipe, "--lr", "1e-3"]))
    assert plain.items() - trained(f"{recipe},lr=1e-3")[1].items() == {("recipe", recipe)}


def test_what_the_discriminator_needs_goes_to_vqgan_alone():
    script, flags = trained("l1,vqgan=0.1,disc-start=0.8,perceptual=2", 0, ["--k", "64"], ["--disc-layers", "3"])
    assert script == "vqgan.py" and flags["k"] == 64 and flags["disc_layers"] == 3
    assert (flags["disc_weight"], flags["disc_start"], flags["perceptual_weight"]) == (0.1, 0.8, 2.)
    assert trained("l1", 0, [], ["--disc-layers", "3"])[1]["disc_layers"] is None
    assert trained("l1,vqgan", 0, ["--minutes", "10"], ["--minutes", "5"])[1]["minutes"] == 5


def test_flags_are_read_whatever_their_order_and_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = mixes.given(["vqvae.py", "--lr", "2e-3", "--flip", "--k=64", "--lr", "1e-3", "--data-folder", "images/"])
    assert given == {"--lr": 0.001, "--flip": "", "--k": 64., "--data-folder": str(tmp_path / "images")}
    assert given == mixes.given(["vqvae.py", "--data-folder=./images", "--k", "64", "--flip", "--lr=.001"])
    assert mixes.given(["vqvae.py", "--quantizer", "ema", "--random-crop", "--n", "-1"]) == {
        "--quantizer": "ema", "--random-crop": "", "--n": -1.}
