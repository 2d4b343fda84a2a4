"""compare.py: mixes, sweeps that go on where they stopped, and tables."""
import json
import os

import pytest
import torch
from PIL import Image

import compare
from conftest import call, write_images
from harness import checkpoint
from harness.batches import Batches
from losses import TERMS

FLAGS = ("--dataset", "folder", "--data-folder", "images", "--hidden-size", "8", "--k", "16", "--batch-size", "16",
         "--num-epochs", "1", "--device", "cpu", "--output", "sweep")


@pytest.mark.parametrize("text, mix, name", [
    ("ssim", {"ssim": 1.}, "ssim"), ("mse=1,ssim=0.5", {"mse": 1., "ssim": 0.5}, "mse+0.5ssim"),
    ("l1,ms-ssim=.25", {"l1": 1., "ms-ssim": 0.25}, "l1+0.25ms-ssim"), ("vqgan", {"vqgan": 0.8}, "vqgan"),
    ("l1,vqgan=0.1", {"l1": 1., "vqgan": 0.1}, "l1+0.1vqgan"),
    ("ssim,sharpen=0.1", {"ssim": 1., "sharpen": 0.1}, "ssim+0.1sharpen")])
def test_mixes(text, mix, name):
    assert compare.parse_mix(text) == mix and compare.mix_name(mix) == name


@pytest.mark.parametrize("text", ["sharp", "mse=", "mse=-1", "mse=nan", "mse=0", "mse;ssim", "mse=1,,ssim",
                                  "sharpen=0.3"])
def test_wrong_mixes_are_named(text):
    if text == "mse=":
        assert compare.parse_mix(text) == {"mse": 1.}
        return
    with pytest.raises(ValueError, match=text.split(",")[0].split("=")[0]):
        compare.parse_mix(text)


def test_the_reports_mixes_are_seven_terms_alone_and_with_three_weights():
    mixes = compare.report_mixes()
    assert len(mixes) == 28 and {"mse": 1., "haarpsi": 0.25} in mixes and {"gmsd": 1.} in mixes


def test_differences_are_paired_students_intervals():
    assert compare.difference([0.5]) == "+0.5"
    assert compare.difference([0.5, -0.5, 0.1]) == "no difference"
    # t(0.975, 2) = 4.303, sd = 0.1: 1 ± 4.303 * 0.1 / sqrt(3)
    assert compare.difference([0.9, 1., 1.1]) == "+1 [+0.752, +1.25]"


def test_a_sweep_trains_each_run_once_and_goes_on_where_it_stopped(tmp_path):
    write_images(tmp_path, 60)
    sweep = tmp_path / "models" / "sweep"
    code, out, err = call(tmp_path, "compare.py", "--losses", "mse", "l1=1,ssim=0.5", *FLAGS)
    assert code == 0, err
    runs = {name: sweep / f"{name}-seed0" for name in ("mse", "l1+0.5ssim")}
    written = {name: os.stat(run / "best.pt").st_mtime_ns for name, run in runs.items()}
    one, two = (checkpoint.load(run / "best.pt", "vqvae") for run in runs.values())
    assert two["loss"]["weights"] == {"l1": 1., "ssim": 0.5}
    assert one["args"]["seed"] == two["args"]["seed"] and one["counters"]["step"] == two["counters"]["step"]

    # A second sweep over more repeats nothing; a run that was cut off goes on.
    (runs["l1+0.5ssim"] / "results.json").unlink()
    code, out, err = call(tmp_path, "compare.py", "--losses", "l1=1,ssim=0.5", "--seeds", "2", "--jobs", "2", *FLAGS)
    assert code == 0, err
    assert {name: os.stat(run / "best.pt").st_mtime_ns for name, run in runs.items()} == written
    table = json.loads((sweep / "table.json").read_text())
    assert [row["loss"] for row in table["table"]] == ["mse", "l1+0.5ssim"] and len(table["runs"]) == 4
    assert "±" in table["table"][1]["psnr"] and table["table"][0]["psnr - mse"] == "no difference"
    assert (sweep / "table.csv").read_text().startswith("loss,psnr")
    assert "| l1+0.5ssim" in (sweep / "table.md").read_text()
    assert Image.open(sweep / "picture.png").size[1] > 6 * 96 and Image.open(sweep / "pareto.png").size[0] > 1000
    assert all(value == "1.000" for term, value in table["matrix"][0].items() if term != "loss")
    assert "ms-ssim" not in table["matrix"][0]  # images of 16 pixels are too small for it
    assert "epoch 1/1" in (runs["mse"] / "output.txt").read_text()

    code, _, err = call(tmp_path, "compare.py", "--losses", "mse", *FLAGS, "--k", "32")
    assert code == 2 and "other flags" in err
    code, _, err = call(tmp_path, "compare.py", "--losses", "mse", *FLAGS, "--output", "bad", "--lr", "0")
    assert code == 2 and "--lr" in err
    code, _, err = call(tmp_path, "compare.py", "--losses", "mse", "--seed", "3")
    assert code == 2 and "--seed is set by this script" in err


def test_gradient_cosines_are_those_of_the_pixel_terms():
    # d mse ~ x_tilde - x, d l1 ~ its sign: at x = 0 and x_tilde = v, cos = sum |v| / sqrt(n sum v^2).
    v = torch.rand(4, 3, 24, 24) * 0.8 + 0.1
    batches = Batches(torch.zeros(4, 24, 24, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), 4)
    rows = compare.gradient_cosines(lambda x: (x + v,), batches)
    flat = v.flatten(1)
    expected = (flat.sum(1) / (flat.shape[1] * flat.square().sum(1)).sqrt()).mean()
    assert float(rows[0]["l1"]) == pytest.approx(float(expected), abs=0.006) and rows[1]["l1"] == "1.00"
    assert [row["cosine"] for row in rows] == list(rows[0])[1:] == list(TERMS)


def test_vqgan_is_a_mix_and_time_a_budget(tmp_path):
    write_images(tmp_path, 60)
    code, out, err = call(tmp_path, "compare.py", "--losses", "vqgan", *FLAGS, "--minutes", "0.02", "--vqgan-flags",
                          "--disc-start 1 --disc-hidden-size 8")
    assert code == 0, err
    for name, kind in (("mse", "vqvae"), ("vqgan", "vqvae")):
        run = tmp_path / "models" / "sweep" / f"{name}-seed0"
        assert 1.2 <= json.loads((run / "results.json").read_text())["train_seconds"] < 10
        assert ("discriminator" in checkpoint.load(run / "best.pt", kind)) == (name == "vqgan")
    assert "epoch 1 " in (run / "output.txt").read_text()


def test_mixes_of_a_seed_share_initial_weights_and_order(tmp_path):
    write_images(tmp_path, 40)
    first = {}
    for name, flags in (("mse", ()), ("ssim", ("--ssim-weight", "1", "--mse-weight", "0"))):
        code, _, err = call(tmp_path, "vqvae.py", *FLAGS[:-2], "--output-folder", name, "--lr", "1e-12", *flags)
        assert code == 0, err
        first[name] = checkpoint.load(tmp_path / "models" / name / "last.pt", "vqvae")["model"]
    # With next to no learning rate, weights stay as they began and the codebook sees the same batches.
    for name, value in first["mse"].items():
        torch.testing.assert_close(value.float(), first["ssim"][name].float(), atol=1e-4, rtol=1e-3)
