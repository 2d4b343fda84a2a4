"""The prior: causality, sampling, its script, and what it says of bad input."""
import argparse
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, start, stop_after
from PIL import Image

from harness import checkpoint
from modules import GatedPixelCNN, draw
from priors.latents import split_latents

FIXTURE = Path(__file__).parent / "fixtures" / "upstream_compat.pt"


def prior(n_classes=0, n_layers=4, codes=20, dim=8, seed=0):
    torch.manual_seed(seed)
    return GatedPixelCNN(codes, dim, n_layers, n_classes).eval()


def test_public_checkpoints_load_and_give_the_same_logits():
    upstream = torch.load(FIXTURE, weights_only=True)
    model = GatedPixelCNN(**upstream["prior_args"])
    model.load_state_dict(upstream["prior_state"])
    with torch.no_grad():
        logits = model(upstream["latents"], upstream["labels"])
    torch.testing.assert_close(logits, upstream["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 5), (6, 2)])
def test_logits_depend_on_earlier_positions_alone_and_on_all_of_them(shape):
    height, width = shape
    model = prior(n_layers=7).double()
    latents = torch.randint(20, (1, height, width))
    inputs = model.embedding(latents).detach().requires_grad_()
    model.embedding = torch.nn.Identity()
    jacobian = torch.autograd.functional.jacobian(lambda e: model(e).sum(1).flatten(), inputs)  # (hw, 1, h, w, dim)
    depends = jacobian.abs().sum((1, 4)).view(height * width, height * width) > 0
    earlier = torch.ones_like(depends).tril(-1)
    assert not (depends & ~earlier).any()
    assert torch.equal(depends, earlier)  # small enough a grid that nothing is out of reach


@pytest.mark.parametrize("shape", [(4, 6), (5, 3)])
@pytest.mark.parametrize("n_classes", [0, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 5}])
def test_cached_sampling_is_naive_sampling(shape, n_classes, options):
    model, label = prior(n_classes), torch.tensor([0, 1, 2, 1, 0]) if n_classes else None
    cached = model.generate(label, shape, 5, generator=torch.Generator().manual_seed(1), **options)
    generator, naive = torch.Generator().manual_seed(1), torch.zeros(5, *shape, dtype=torch.int64)
    with torch.no_grad():
        for i in range(shape[0]):
            for j in range(shape[1]):
                naive[:, i, j] = draw(model(naive, label)[:, :, i, j], generator=generator, **options)
    assert torch.equal(cached, naive) and len(naive.unique()) > 3


def test_draw_follows_the_distribution_and_its_options():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(20000, 4)
    generator = torch.Generator().manual_seed(0)
    shares = torch.bincount(draw(logits, generator=generator), minlength=4) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02, rtol=0)
    assert set(draw(logits, top_k=2, generator=generator).tolist()) == {2, 3}
    assert (draw(logits, temperature=0.01, generator=generator) == 3).all()
    for options in ({"temperature": 0.}, {"top_k": 0}):
        with pytest.raises(ValueError):
            draw(logits, **options)


def test_masks_survive_an_optimizer_step_and_forward_changes_no_weight():
    model = prior()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer, latents = torch.optim.Adam(model.parameters(), lr=0.1), torch.randint(20, (2, 4, 5))
    loss = F.cross_entropy(model(latents), latents)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    loss.backward()
    optimizer.step()
    changed = latents.clone()
    changed[:, 2, 3] = (changed[:, 2, 3] + 1) % 20
    one, two = model(latents).flatten(2), model(changed).flatten(2)
    assert torch.equal(one[:, :, :14], two[:, :, :14]) and not torch.equal(one[:, :, 14:], two[:, :, 14:])
    assert torch.equal(model.layers[0].vert_stack.weight[:, :, -1], before["layers.0.vert_stack.weight"][:, :, -1])


def test_overfits_a_few_grids_and_samples_them_back():
    torch.manual_seed(0)
    model, label = GatedPixelCNN(10, 16, 4, 3), torch.arange(3)
    grids = torch.randint(10, (3, 4, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(300):
        loss = F.cross_entropy(model(grids, label), grids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.01
    assert torch.equal(model.generate(label, (4, 5), 3), grids)


def test_labels_are_checked():
    with pytest.raises(ValueError, match="out of|must lie in"):
        prior(3).generate(torch.tensor([3]), (2, 2), 1)
    with pytest.raises(ValueError, match="needed"):
        prior(3)(torch.zeros(1, 2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="of no use"):
        prior(0).generate(torch.tensor([0]), (2, 2), 1)
    with pytest.raises(ValueError, match="1 labels for 2"):
        prior(3).generate(torch.tensor([0]), (2, 2), 2)


# --- the script

SMALL = ["--hidden-size-prior", "8", "--num-layers", "3", "--batch-size", "8", "--lr", "3e-3", "--device", "cpu"]


def train(folder, *flags):
    return call(folder, "pixelcnn_prior.py", "--model", "models/vqvae/best.pt", *SMALL, *flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with 90 images 12x16 of three classes, and a VQ-VAE of them."""
    path, random = tmp_path_factory.mktemp("prior"), np.random.default_rng(0)
    for i in range(90):
        pixels = random.integers(0, 60, (12, 16, 3)) + 80 * (np.arange(3) == i % 3)
        (path / "images" / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path / "images" / "abc"[i % 3] / f"{i}.png")
    vqvae = ("--dataset", "folder", "--data-folder", "images", "--hidden-size", "8", "--k", "16", "--batch-size", "8",
             "--num-epochs", "3", "--lr", "1e-3", "--device", "cpu")
    for name in ("vqvae", "other1"):
        code, _, err = call(path, "vqvae.py", *vqvae, "--output-folder", name, "--seed", len(name))
        assert code == 0, err
    return path


def test_a_run_leaves_its_table_pictures_and_latents_and_samples(folder):
    code, out, err = train(folder, "--num-epochs", "3", "--sample-every", "2")
    assert code == 0, err
    models = folder / "models" / "prior"
    results = json.loads((models / "results.json").read_text())
    assert 0 < results["nats_per_latent"] < np.log(16) and results["perplexity"] > 1
    assert results["perplexity"] == pytest.approx(np.exp(results["nats_per_latent"]))
    assert 1 < results["codebook_perplexity"] <= 16
    assert results["bits_per_latent"] == pytest.approx(results["nats_per_latent"] / np.log(2))
    assert results["bits_per_dim"] == pytest.approx(results["bits_per_latent"] * 12 / (3 * 12 * 16))
    assert "samples, a row a class" in out
    rows = Image.open(models / "samples.png").size[1] / Image.open(models / "samples_uniform.png").size[1]
    assert rows == pytest.approx(3 / 10, abs=0.02)

    kept = os.stat(models / "latents.pt").st_mtime_ns
    assert train(folder, "--num-epochs", "4", "--resume")[0] == 0
    assert os.stat(models / "latents.pt").st_mtime_ns == kept
    code, out, err = train(folder, "--sample", "7", "--label", "2", "--temperature", "0.9", "--top-k", "5")
    assert code == 0 and (models / "sample-2-temperature0.9-top5.png").exists(), err

    for flags, message in (
            (("--sample", "4", "--label", "3"), "a number from 0 to 2"), (("--k", "32"), "contradicts"),
            (("--dataset", "mnist"), "contradicts"), (("--hidden-size-vae", "16"), "contradicts"),
            (("--sample", "4", "--model", "models/other1/best.pt"), "another VQ-VAE"),
            (("--num-epochs", "9", "--resume", "--model", "models/other1/best.pt"), "another VQ-VAE"),
            (("--model", "nowhere.pt"), "no checkpoint at nowhere.pt"),
            (("--model", "models/prior/best.pt"), "checkpoint of a prior"),
            (("--num-epochs", "1", "--overwrite", "--data-folder", "nowhere"), "nowhere does not exist"),
            (("--sample", "4", "--output-folder", "untrained"), "no checkpoint at")):
        code, _, err = train(folder, *flags)
        assert code != 0 and message in err and len(err.strip().splitlines()) == 1, (flags, err)
        assert (models / "best.pt").exists()


def test_latents_are_encoded_again_when_the_vqvae_or_the_data_changes(folder):
    flags = ("--num-epochs", "1", "--output-folder", "cache", "--overwrite")
    path = folder / "models" / "cache" / "latents.pt"
    keys, contents = [], []
    for change in ((), (), ("--model", "models/other1/best.pt"), None):
        if change is None:
            os.utime(folder / "images" / "a" / "0.png", ns=(0, 1))
        code, _, err = train(folder, *flags, *(change or ()))
        assert code == 0, err
        kept = checkpoint.load(path, "latents")
        keys.append(kept["key"]), contents.append(kept["splits"]["train"][0])
    assert keys[0] == keys[1] and len(set(keys)) == 3
    assert torch.equal(contents[0], contents[3]) and not torch.equal(contents[0], contents[2])
    path.write_bytes(b"corrupt")
    code, _, err = train(folder, *flags)
    assert code != 0 and "latents.pt is damaged: delete it" in err


def test_a_resumed_prior_is_refused_other_images_and_takes_the_same_elsewhere(folder):
    flags = ("--output-folder", "moves")
    assert train(folder, *flags, "--num-epochs", "1")[0] == 0
    shutil.copytree(folder / "images", folder / "moved")
    assert train(folder, *flags, "--num-epochs", "2", "--resume", "--data-folder", "moved")[0] == 0
    Image.new("RGB", (16, 16)).save(folder / "moved" / "a" / "more.png")
    code, _, err = train(folder, *flags, "--num-epochs", "3", "--resume", "--data-folder", "moved")
    assert code != 0 and "models/moves/last.pt was trained on other images" in err


def test_killed_and_resumed_equals_uninterrupted(folder):
    flags = ("--num-epochs", "5")
    assert train(folder, *flags, "--output-folder", "whole")[0] == 0
    process = start(folder, "pixelcnn_prior.py", "--model", "models/vqvae/best.pt", *SMALL, *flags,
                    "--output-folder", "cut")
    stop_after(process, "epoch 2/", signal.SIGKILL)
    assert train(folder, *flags, "--output-folder", "cut", "--resume")[0] == 0
    one, two = (checkpoint.load(folder / "models" / run / "last.pt", "prior")["model"] for run in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_splits_without_the_training_classes_are_carved_from_train(folder, capsys):
    grids = torch.arange(40).view(40, 1, 1)
    splits = {"train": (grids, torch.arange(40) % 4), "valid": (grids[:4], torch.full((4,), 4)),
              "test": (grids[:4], torch.full((4,), 5))}
    args = argparse.Namespace(batch_size=8, seed=0, limit=None)
    of = split_latents(splits, args, "cpu", of_classes=True)
    parts = [set(batches.images.flatten().tolist()) for batches in of]
    assert "carved from train" in capsys.readouterr().out
    assert [len(part) for part in parts] == [32, 4, 4] and len(set.union(*parts)) == 40
    with pytest.raises(ValueError, match="1 training images are too few"):
        split_latents(splits | {"train": (grids[:1], torch.zeros(1))}, args, "cpu", of_classes=True)


def test_the_two_commands_of_mini_imagenet(tmp_path):
    random, root = np.random.default_rng(0), tmp_path / "X"
    (root / "images").mkdir(parents=True)
    for split, names in (("train", ["wolf", "ant", "wolf", "bee"] * 4), ("val", ["cow"] * 3), ("test", ["dog", "auk"])):
        listed = []
        for i, name in enumerate(names):  # as there: photographs of any size, in each split classes of its own
            image = Image.fromarray(random.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8))
            image.save(root / "images" / f"{split}{i:03}.jpg")
            listed.append(f"{split}{i:03}.jpg,{name}\n")
        (root / f"{split}.csv").write_text("filename,label\n" + "".join(listed))
    code, out, err = call(tmp_path, "vqvae.py", "--data-folder", "X", "--output-folder", "models/vqvae",
                          "--hidden-size", "8", "--k", "16", "--batch-size", "8", "--device", "cpu",
                          "--num-epochs", "1")
    assert code == 0 and "data: miniimagenet, images: 16 train, 3 valid, 2 test, size: 128x128" in out, err
    code, out, err = call(tmp_path, "pixelcnn_prior.py", "--data-folder", "X", "--model", "models/vqvae",
                          "--output-folder", "models/pixelcnn_prior", *SMALL, "--num-epochs", "1")
    assert code == 0 and "both are carved from train" in out, err
    run = tmp_path / "models" / "pixelcnn_prior"
    assert checkpoint.load(run, "prior")["data"]["classes"] == ["ant", "auk", "bee", "cow", "dog", "wolf"]
    kept = checkpoint.load(run / "latents.pt", "latents")["splits"]
    assert kept["train"][0].shape == (16, 32, 32) and kept["test"][1].tolist() == [4, 1]
    assert sorted(kept["train"][1].tolist()) == [0] * 4 + [2] * 4 + [5] * 8
    assert json.loads((run / "results.json").read_text())["nats_per_latent"] > 0
    assert Image.open(run / "samples.png").height == 3 * 132 + 4  # rows: ant, bee, wolf
    flags = ("--model", "models/vqvae", "--output-folder", "models/pixelcnn_prior", *SMALL, "--sample", "4", "--label")
    for label in ("5", "wolf"):
        code, out, _ = call(tmp_path, "pixelcnn_prior.py", *flags, label)
        assert code == 0 and "samples of the class wolf: models/pixelcnn_prior/sample-5.png" in out
    code, _, err = call(tmp_path, "pixelcnn_prior.py", *flags, "4")
    assert code != 0 and "--label dog is a class without training images: this prior knows ant, bee, wolf" in err


def test_a_prior_without_classes_trains_unconditionally(folder):
    flat = folder / "flat"
    flat.mkdir()
    for path in (folder / "images").rglob("*.png"):
        os.link(path, flat / path.name)
    flags = ("--dataset", "folder", "--data-folder", "flat", "--hidden-size", "8", "--k", "16", "--batch-size", "8",
             "--num-epochs", "1", "--output-folder", "flat", "--device", "cpu")
    assert call(folder, "vqvae.py", *flags)[0] == 0
    flags = ("--model", "models/flat/best.pt", "--output-folder", "flat-prior", *SMALL)
    code, _, err = call(folder, "pixelcnn_prior.py", *flags, "--num-epochs", "1")
    assert code == 0, err
    assert call(folder, "pixelcnn_prior.py", *flags, "--sample", "3")[0] == 0
    code, _, err = call(folder, "pixelcnn_prior.py", *flags, "--sample", "3", "--label", "0")
    assert code != 0 and "no classes" in err
