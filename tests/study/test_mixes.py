"""Mixes of losses as text, and the commands that they stand for."""
import argparse

import pytest

import experiment
from losses import TERMS
from study import mixes


@pytest.mark.parametrize("text, mix, name", [
    ("ssim", {"ssim": 1.}, "ssim"), ("mse=1,ssim=0.5", {"mse": 1., "ssim": 0.5}, "mse+0.5ssim"),
    ("l1,ms-ssim=.25", {"l1": 1., "ms-ssim": 0.25}, "l1+0.25ms-ssim"), ("vqgan", {"vqgan": 0.8}, "vqgan"),
    ("l1,vqgan=0.1", {"l1": 1., "vqgan": 0.1}, "l1+0.1vqgan"),
    ("ssim,sharpen=0.1", {"ssim": 1., "sharpen": 0.1}, "ssim+0.1sharpen"), ("mse=", {"mse": 1.}, "mse"),
    ("mse=5,lr=1e-3", {"mse": 5., "lr": 1e-3}, "5mse,lr=0.001"),
    ("l1,k=4096,quantizer=cosine", {"l1": 1., "k": 4096, "quantizer": "cosine"}, "l1,k=4096,quantizer=cosine"),
    ("k=64", {"k": 64}, "mse,k=64"), ("mse,vqgan,perceptual", {"mse": 1., "vqgan": 0.8, "perceptual": 1.},
                                     "mse+vqgan+perceptual"),
    ("recommended,vqgan,disc-start=0.8", {"recipe": "recommended", "vqgan": 0.8, "disc-start": 0.8},
     "recommended+vqgan,disc-start=0.8"),
    ("recommended,psnr=0,l1,sharpen=0", {"recipe": "recommended", "psnr": 0., "l1": 1., "sharpen": 0.},
     "recommended+0psnr+l1+0sharpen")])
def test_mixes(text, mix, name):
    assert mixes.parse_mix(text) == mix and mixes.mix_name(mix) == name


@pytest.mark.parametrize("text, says", [
    ("sharp", "no loss term 'sharp'"), ("mse=-1", "weight of mse"), ("mse=nan", "weight of mse"),
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


def test_a_command_trains_what_the_mix_says_and_a_mix_wins_over_the_flags():
    script, flags = mixes.meaning(mixes.command_of(
        mixes.parse_mix("ssim=0.5,sharpen=0.3,lr=1e-3"), 3, ["--lr", "1e-2", "--beta", "0.7"], ["--disc-start", "1"]))
    weights = {name: flags[f"{name.replace('-', '_')}_weight"] for name in TERMS}
    assert script == "vqvae.py" and weights == dict.fromkeys(TERMS, 0.) | {"ssim": 0.5}
    assert (flags["sharpen"], flags["lr"], flags["beta"], flags["seed"]) == (0.3, 1e-3, 0.7, 3)
    assert flags["lr_schedule"] == "cosine" and flags["flip"]


def test_a_part_of_a_recipe_is_taken_out_and_the_rest_stays():
    _, flags = mixes.meaning(mixes.command_of(mixes.parse_mix("recommended,psnr=0,l1,sharpen=0"), 0, [], []))
    weights = {name: flags[f"{name.replace('-', '_')}_weight"] for name in TERMS}
    assert weights == dict.fromkeys(TERMS, 0.) | {"l1": 1., "root-ssim": 0.4, "chroma": 1.} and flags["sharpen"] == 0


@pytest.mark.parametrize("recipe", sorted(set(experiment.RECIPES) - set(TERMS)))
def test_a_recipe_as_a_mix_is_the_script_with_that_recipe(recipe):
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser, output_folder="run")
    plain = vars(experiment.parse_args(parser, ["--recipe", recipe, "--lr", "1e-3"]))
    flags = mixes.meaning(mixes.command_of(mixes.parse_mix(f"{recipe},lr=1e-3"), 0, [], []))[1]
    assert flags == {name: value for name, value in plain.items() if name != "recipe"}


def test_what_the_discriminator_needs_goes_to_vqgan_alone():
    mix = mixes.parse_mix("l1,vqgan=0.1,disc-start=0.8,perceptual=2")
    command = mixes.command_of(mix, 0, ["--k", "64"], ["--disc-layers", "3"])
    script, flags = mixes.meaning(command)
    assert script == "vqgan.py" and flags["k"] == 64 and flags["disc_layers"] == 3
    assert (flags["disc_weight"], flags["disc_start"], flags["perceptual_weight"]) == (0.1, 0.8, 2.)
    assert "disc_layers" not in mixes.meaning(mixes.command_of({"l1": 1.}, 0, [], ["--disc-layers", "3"]))[1]


def test_flags_of_the_vqgan_alone_win_over_those_of_all():
    def trained(*flags):
        return mixes.meaning(mixes.command_of({"l1": 1., "vqgan": 0.1}, 0, ["--minutes", "10"], flags))
    assert trained("--minutes", "5")[1]["minutes"] == 5
    assert trained("--disc-layers=3", "--disc-lr", "0.8") == trained("--disc-lr", "0.8", "--disc-layers", "3")
    assert trained("--disc-layers", "3", "--disc-lr", "2") != trained("--disc-layers", "2", "--disc-lr", "3")


def reversed_pairs(flags):
    """The same flags, the last first."""
    starts = [i for i, part in enumerate(flags) if part.startswith("--")]
    return [part for start, stop in reversed(list(zip(starts, [*starts[1:], None]))) for part in flags[start:stop]]


def test_commands_are_equal_by_what_they_mean():
    old = ["vqvae.py", *reversed_pairs(experiment.RECIPES["mse"].split())]
    old += [part for name in TERMS for part in (f"--{name}-weight", "1" if name == "mse" else "0")]
    new = mixes.command_of({"mse": 1.}, 0, [], [])
    assert mixes.meaning([*old, "--seed", "0"]) == mixes.meaning(new)
    assert mixes.meaning([*old, "--seed", "1"]) != mixes.meaning(new)
    vqgan = mixes.command_of({"vqgan": 1.}, 0, [], ["--disc-start", "0.5"])
    assert mixes.meaning(vqgan) == mixes.meaning(mixes.command_of({"vqgan": 1.}, 0, [], []))
    for command in ([*new, "--nonsense", "1"], [*vqgan, "--disc-starts", "1"], [*vqgan, "--disc-start", "abc"]):
        with pytest.raises(SystemExit):
            mixes.meaning(command)
