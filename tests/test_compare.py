"""compare.py: sweeps that go on where they stopped, figures that are never stale, and tables."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call, write_images
from PIL import Image

import compare
from harness import checkpoint
from harness.batches import Batches
from losses import TERMS
from metrics import IMAGE_METRICS
from study.runs import Sweep

FLAGS = ("--dataset", "folder", "--data-folder", "images", "--hidden-size", "8", "--k", "16", "--batch-size", "16",
         "--num-epochs", "1", "--device", "cpu", "--output", "sweep")


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A working directory with 60 images of two classes and a sweep over two mixes, one seed."""
    path = tmp_path_factory.mktemp("sweep")
    write_images(path, 60)
    code, out, err = call(path, "compare.py", "--losses", "mse", "l1=1,ssim=0.5", *FLAGS)
    assert code == 0, err
    return path


@pytest.fixture
def folder(swept, tmp_path):
    """A copy of `swept`, to be changed."""
    return Path(shutil.copytree(swept, tmp_path / "copy"))


def test_a_sweep_trains_each_run_once_and_goes_on_where_it_stopped(folder):
    sweep = folder / "models" / "sweep"
    runs = {name: sweep / f"{name}-seed0" for name in ("mse", "l1+0.5ssim")}
    written = {name: os.stat(run / "best.pt").st_mtime_ns for name, run in runs.items()}
    one, two = (checkpoint.load(run / "best.pt", "vqvae") for run in runs.values())
    assert two["loss"]["weights"] == {"l1": 1., "ssim": 0.5}
    assert one["args"]["seed"] == two["args"]["seed"] and one["counters"]["step"] == two["counters"]["step"]

    # A second sweep over more repeats nothing; a run that was cut off goes on.
    (runs["l1+0.5ssim"] / "results.json").unlink()
    code, out, err = call(folder, "compare.py", "--losses", "l1=1,ssim=0.5", "--seeds", "2", "--jobs", "2", *FLAGS,
                          "--output", "models/sweep/")
    assert code == 0, err
    assert {name: os.stat(run / "best.pt").st_mtime_ns for name, run in runs.items()} == written
    table = json.loads((sweep / "table.json").read_text())
    assert [row["loss"] for row in table["table"]] == ["mse", "l1+0.5ssim"] and len(table["runs"]) == 4
    assert "±" in table["table"][1]["psnr"] and "[" in table["against"][1]["psnr - baseline"]
    assert table["against"][0]["psnr - baseline"] == "+0 [+0, +0]" and "valid: 6 images" in out
    assert table["against"][0]["frechet_distance/effnet-lite0 / baseline"] == "1 [1, 1]"
    assert "report FID / mse" not in table["against"][0]  # but with --preset report
    assert (sweep / "table.csv").read_text().startswith("loss,mse,psnr")
    assert "| l1+0.5ssim" in (sweep / "table.md").read_text()
    assert Image.open(sweep / "picture.png").size[1] > 6 * 96 and Image.open(sweep / "pareto.png").size[0] > 1000
    assert all(value == "1.000" for term, value in table["matrix"][0].items() if term != "loss")
    assert "ms-ssim" not in table["matrix"][0]  # images of 16 pixels are too small for it
    assert "epoch 1/1" in (runs["mse"] / "output.txt").read_text()


def test_what_another_command_trained_is_refused(folder):
    code, _, err = call(folder, "compare.py", "--losses", "mse", *FLAGS, "--k", "32")
    assert code == 2 and "other flags" in err
    code, _, err = call(folder, "compare.py", "--losses", "mse", *FLAGS)
    assert code == 2 and "a comparison that has l1+0.5ssim: give another --output" in err
    code, _, err = call(folder, "compare.py", "--losses", "mse", *FLAGS, "--output", "bad", "--lr", "0")
    assert code == 2 and "--lr" in err
    code, _, err = call(folder, "compare.py", "--losses", "l1=1,ssim=0.5", *FLAGS, "--features", "classifier")
    assert code == 2 and "--features classifier needs a data set with at least two classes" in err


@pytest.mark.parametrize("flags, says", [
    (("--seed", "3"), "--seed is set by this script"), (("--recipe", "mse"), "--recipe is set by this script"),
    (("--ssim-weight", "3"), "--losses mse=1,ssim=3"), (("--ssim-weight=3",), "--losses mse=1,ssim=3"),
    (("--ssim-w", "3"), "unrecognized arguments"), (("--vqgan-flags", "--mse-weight 2"), "weights stand in a mix"),
    (("--vqgan-flags", "--disc-weight 0.1"), "weights stand in a mix"),
    (("--rates", "ssim=1"), "--rates takes"),
    (("--baseline", "vqgan", "--vqgan-flags", "--disc-starts 1"), "unrecognized arguments: --disc-starts"),
    (("--dataset", "photos", "--image-size", "16", "--features", "classifier"), "at least two classes"),
    (("--rates", "k=8"), "two or more different rates"),
    (("--rates", "k=8", "k=8"), "two or more different rates"),
    (("--baseline", "mse,k=4", "--rates", "k=8", "k=9"), "k stands in the mix mse,k=4 and in --rates"),
    (("--baseline", "nothing"), "no loss term"),
    (("--split", "test", "--baseline", "mse", "l1=1"), "name the one that valid chose")])
def test_flags_that_would_be_ignored_are_refused_before_anything_is_trained(tmp_path, flags, says):
    code, _, err = call(tmp_path, "compare.py", "--losses", "mse", *flags)
    assert code == 2 and says in err and not (tmp_path / "models").exists()


def test_kept_figures_never_survive_a_change(folder, monkeypatch):
    measured, measure_run = [], compare.measure_run
    monkeypatch.setattr(compare, "measure_run", lambda run: measured.append(run.name) or measure_run(run))

    def compared(*flags):
        measured.clear()
        code, out, err = call(folder, "compare.py", "--losses", "l1=1,ssim=0.5", *FLAGS, *flags)
        assert code == 0, err
        tables = folder / "models" / "sweep" / ("test" if "test" in flags else "")
        return sorted(measured), {row["loss"]: row for row in json.loads((tables / "table.json").read_text())["runs"]}
    both = ["l1+0.5ssim-seed0", "mse-seed0"]
    nothing, valid = compared()
    assert nothing == []
    again, test = compared("--split", "test")
    assert again == both and test["mse"]["psnr"] != valid["mse"]["psnr"] and compared() == ([], valid)
    trained = json.loads((folder / "models/sweep/mse-seed0/results.json").read_text())
    assert test["mse"]["psnr"] == pytest.approx(trained["psnr"], abs=1e-4)

    best = folder / "models/sweep/mse-seed0/best.pt"
    contents = checkpoint.load(best, "vqvae")
    contents["model"]["encoder.0.weight"] += 0.1
    checkpoint.save(best, "vqvae", contents)
    assert compared()[0] == ["mse-seed0"]
    monkeypatch.setattr(compare, "VERSION", compare.VERSION + 1)
    assert compared()[0] == both
    (folder / "images" / "0.png").touch()
    assert compared()[0] == both
    monkeypatch.setitem(IMAGE_METRICS, "toy", IMAGE_METRICS["mse"])
    assert compared()[0] == both


def test_rates_and_several_judges(tmp_path):
    write_images(tmp_path, 60)
    for name in "ab":
        (tmp_path / "images" / name).mkdir()
    for i in range(60):
        (tmp_path / "images" / f"{i}.png").rename(tmp_path / "images" / "ab"[i % 2] / f"{i}.png")
    code, out, err = call(tmp_path, "compare.py", "--losses", "mse=5,lr=1e-3", "--baseline", "mse=5,lr=1e-3", "--rates",
                          "k=4", "k=32", "--features", "effnet-lite0", "classifier", *FLAGS)
    assert code == 0, err
    table = json.loads((tmp_path / "models/sweep/table.json").read_text())
    names = ["5mse,lr=0.001,k=4", "5mse,lr=0.001,k=32"]
    assert [row["loss"] for row in table["table"]] == [row["baseline"] for row in table["against"]] == names
    found = checkpoint.load(tmp_path / f"models/sweep/{names[0]}-seed0/best.pt", "vqvae")
    assert found["args"]["lr"] == 1e-3 and found["loss"]["weights"] == {"mse": 5.} and found["model_args"]["K"] == 4
    judged = {"frechet_distance/effnet-lite0", "frechet_distance/classifier", "sliced_wasserstein/effnet-lite0"}
    assert judged | {"accuracy/classifier"} < set(table["table"][0])
    assert [row["loss"] for row in table["rates"]] == ["5mse,lr=0.001"]
    assert Image.open(tmp_path / "models/sweep/rates.png").size == (5 * 450, 450) and "rates.png" in out
    assert all("one seed" in value or "none: " in value for name, value in table["rates"][0].items() if name != "loss")
    assert all(row[key] > 0 for row in table["runs"] for key in judged)
    assert all(row["frechet_distance"] == row["frechet_distance/effnet-lite0"] for row in table["runs"])


def test_delta_rates_are_those_of_the_curves():
    sweep = Sweep([{"l1": 1.}], [{"mse": 1.}], ["k=4", "k=16", "k=64"], 2)
    figures = {}
    for seed in sweep.seeds:
        for bits, rate in enumerate(sweep.rates, 1):  # quality b at rate b: 90% of the bits, and one unit of distance
            figures[f"mse,{rate}", seed] = {"bits_per_pixel": bits, "psnr": 20 + bits, "ssim": bits / 9,
                                            "saturation_ratio": bits / 3, "d": 1 / bits}
            figures[f"l1,{rate}", seed] = figures[f"mse,{rate}", seed] | {"bits_per_pixel": (0.9 - seed / 10) * bits,
                                                                          "ssim": 2 + bits}
    row = compare.delta_rates(sweep, figures, ["d"])[1]
    half = 12.706 * 5  # Student's t at one degree of freedom, of -10 and -20
    for key in ("psnr", "saturation_ratio", "d"):
        assert row["loss"] == "l1" and row[f"% bits at equal {key}"] == f"-15 [{-15 - half:+.3g}, {-15 + half:+.3g}]"
    assert "do not overlap" in row["% bits at equal ssim"]


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
        trained, results = checkpoint.load(run / "best.pt", kind), json.loads((run / "results.json").read_text())
        assert trained["args"]["minutes"] == 0.02 and results["train_seconds"] >= 1.2
        assert ("discriminator" in trained) == (name == "vqgan")
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
