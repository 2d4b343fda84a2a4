"""What the scripts that train a VQ-VAE share: recipes, and the average of the weights."""
import argparse
import json

import pytest
import torch
from conftest import call
from PIL import Image
from torch import nn

import datasets
import experiment
from harness import checkpoint

SMALL = ["--dataset", "folder", "--data-folder", "images", "--hidden-size", "8", "--k", "16", "--batch-size", "8",
         "--lr", "1e-2", "--device", "cpu", "--precision", "fp32"]


def parse(*argv):
    parser = argparse.ArgumentParser()
    experiment.add_arguments(parser, "x")
    return experiment.parse_args(parser, list(argv))


# --- recipes

@pytest.mark.parametrize("name", experiment.RECIPES)
def test_a_recipe_is_its_flags_and_each_can_be_overridden(name):
    stated = vars(parse(*experiment.RECIPES[name].split())) | {"recipe": name}
    assert vars(parse("--recipe", name)) == stated
    for argv in (("--recipe", name, "--lr", "0.5", "--no-flip"), ("--lr", "0.5", "--no-flip", "--recipe", name)):
        assert vars(parse(*argv)) == stated | {"lr": 0.5, "flip": False}
    assert parse("--lr", "0.5").recipe is None


def test_help_and_args_json_show_what_a_recipe_stands_for(folder):
    code, out, _ = call(folder, "vqvae.py", "--help", COLUMNS="1000")
    assert code == 0 and all(f"{name}: {flags}" in out for name, flags in experiment.RECIPES.items())
    code, _, err = call(folder, "vqvae.py", *SMALL, "--recipe", "recommended", "--num-epochs", "1")
    assert code == 0, err
    args = json.loads((folder / "models" / "vqvae" / "args.json").read_text())
    assert args["recipe"] == "recommended" and args["mse_weight"] == 0 and args["lr"] == 0.01
    assert args["lr_schedule"] == "cosine" and args["warmup_steps"] == 0.1


@pytest.mark.parametrize("recipe, terms, left", [("recommended", "chroma", {"root-ssim": 0.4, "psnr": 1}), (
    "recommended-photos", "chroma and coarse-chroma", {"mse": 5, "psnr": 1, "root-ssim": 0.6, "gabor": 1.2})])
def test_grey_images_go_without_the_colour_terms_of_a_recipe(folder, recipe, terms, left):
    for path in (folder / "images").iterdir():
        Image.open(path).convert("L").save(path)
    code, out, err = call(folder, "vqvae.py", *SMALL, "--recipe", recipe, "--num-epochs", "1")
    assert code == 0, err
    assert out.count(f"the images are grey: {terms} left out of the loss\n") == 1
    weights = checkpoint.load(folder / "models" / "vqvae", "vqvae")["loss"]["weights"]
    assert weights == left


# --- averaged weights

def test_the_average_follows_its_formula():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averaged, expected = experiment.average_of(model, optimizer, 0.5).module, None
    for update in range(6):
        loss = model(torch.randn(8, 3)).square().mean() + model[0].weight.square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        decay = min(0.5, (1 + update) / (10 + update))
        expected = state if not update else {
            name: decay * expected[name] + (1 - decay) * value if value.is_floating_point() else value
            for name, value in state.items()}
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert averaged[1].num_batches_tracked == 6


def state(run, name, entry):
    return {key.removeprefix("module."): value for key, value in checkpoint.load(run / name, "vqvae")[entry].items()}


def equal(one, two):
    return all(torch.equal(value, two[key]) for key, value in one.items())


def test_best_holds_the_average_and_a_resumed_run_goes_on_with_it(folder):
    flags, parts, whole = (*SMALL, "--average-weights", "0.9"), folder / "models" / "parts", folder / "models" / "whole"
    assert call(folder, "vqvae.py", *flags, "--num-epochs", "1", "--output-folder", "parts")[0] == 0
    best, average = state(parts, "best.pt", "model"), state(parts, "last.pt", "average")
    assert equal(best, average) and not equal(best, state(parts, "last.pt", "model"))
    model = experiment.VectorQuantizedVAE.rebuild(checkpoint.load(parts / "best.pt", "vqvae"))
    data = datasets.load("folder", datasets.Source(folder / "images"), 8)
    results = json.loads((parts / "results.json").read_text())
    assert experiment.measure(model, data.test)[1]["psnr"] == pytest.approx(results["psnr"], abs=1e-4)

    assert call(folder, "vqvae.py", *flags, "--num-epochs", "2", "--output-folder", "whole")[0] == 0
    assert call(folder, "vqvae.py", *flags, "--num-epochs", "2", "--output-folder", "parts", "--resume")[0] == 0
    assert equal(state(whole, "last.pt", "average"), state(parts, "last.pt", "average"))


@pytest.mark.parametrize("decay", ["1", "-0.1", "nan"])
def test_a_decay_outside_0_to_1_is_refused(folder, decay):
    code, _, err = call(folder, "vqvae.py", *SMALL, "--average-weights", decay)
    assert code == 2 and "--average-weights" in err
