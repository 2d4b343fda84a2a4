"""compare.py: sweeps that go on where they stopped, figures that are never stale, and tables."""
import csv
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import call, write_images
from PIL import Image
from processes import ForkedPopen

from harness import checkpoint
from losses import TERMS
from metrics import IMAGE_METRICS
from study import measuring, runs
from study.tables import MEAN_OF_JUDGES

FLAGS = ("--dataset", "folder", "--data-folder", "images", "--hidden-size", "8", "--k", "16", "--batch-size", "16",
         "--num-epochs", "1", "--device", "cpu", "--output", "sweep")


@pytest.fixture(scope="module", autouse=True)
def forks():
    """Runs are trained in forks, which start sooner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "subprocess", SimpleNamespace(Popen=ForkedPopen, PIPE=subprocess.PIPE))
        yield


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
    runs = {name: sweep / f"{name}-seed0" for name in ("mse", "l1,ssim=0.5")}
    written = {name: os.stat(run / "best.pt").st_mtime_ns for name, run in runs.items()}
    one, two = (checkpoint.load(run / "best.pt", "vqvae") for run in runs.values())
    assert two["loss"]["weights"] == {"l1": 1., "ssim": 0.5}
    assert one["args"]["seed"] == two["args"]["seed"] and one["counters"]["step"] == two["counters"]["step"]

    # A second sweep over more repeats nothing; a run that was cut off goes on.
    (runs["l1,ssim=0.5"] / "results.json").unlink()
    code, out, err = call(folder, "compare.py", "--losses", "l1=1,ssim=0.5", "--seeds", "2", "--jobs", "2", *FLAGS,
                          "--output", "models/sweep/")
    assert code == 0, err
    assert {name: os.stat(run / "best.pt").st_mtime_ns for name, run in runs.items()} == written
    table = json.loads((sweep / "table.json").read_text())
    assert [row["loss"] for row in table["table"]] == ["mse", "l1,ssim=0.5"] and len(table["runs"]) == 4
    of_baseline, of_mix = table["against"]
    assert of_baseline["psnr - baseline"] == {"mean": 0, "sd": 0, "low": 0, "high": 0, "n": 2, "images low": 0,
                                              "images high": 0}
    assert of_baseline["frechet_distance/effnet-lite0 / baseline"]["low"] == of_baseline[MEAN_OF_JUDGES]["mean"] == 1
    psnr = of_mix["psnr - baseline"]
    assert psnr["n"] == 2 and psnr["low"] < psnr["mean"] < psnr["high"] and psnr["images low"] < psnr["images high"]
    by_seed = {(row["loss"], row["seed"]): row["psnr"] for row in table["runs"]}
    assert psnr["mean"] == pytest.approx(sum(by_seed["l1,ssim=0.5", i] - by_seed["mse", i] for i in (0, 1)) / 2)
    assert "report FID / mse" not in of_mix  # but with --preset report
    for name in ("table", "matrix", "cosines"):
        for row in csv.DictReader((sweep / f"{name}.csv").read_text().splitlines()):
            assert all(math.isfinite(float(value)) for column, value in row.items() if column not in ("loss", "cosine"))
    text = (sweep / "table.md").read_text()
    assert re.search(r"^warning: \d+ updates are few: ", out, re.M)
    assert text in out and "| l1,ssim=0.5" in text and " ± " in text and "valid: 6 images" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert max(map(len, tables)) <= 120
    assert Image.open(sweep / "picture.png").size[1] > 6 * 96 and Image.open(sweep / "pareto.png").size[0] > 1000
    assert all(value == 1 for term, value in table["matrix"][0].items() if term != "loss")
    assert "ms-ssim" not in table["matrix"][0] and "Loss terms not measured: ms-ssim needs sides" in text
    assert "epoch 1/1" in (runs["mse"] / "output.txt").read_text()


def test_runs_of_several_versions_of_the_program_are_said(folder):
    path = folder / "models/sweep/mse-seed0/args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"made_with": {"commit": "of old"}}))
    code, out, err = call(folder, "compare.py", "--losses", "mse", "l1=1,ssim=0.5", *FLAGS)
    assert code == 0, err
    assert "trained by several versions of this program" in out and "of old" in out


def test_what_another_command_trained_is_refused(folder):
    code, _, err = call(folder, "compare.py", "--losses", "mse", *FLAGS, "--k", "32")
    assert code == 2 and "other flags (--k 16, now 32)" in err
    code, _, err = call(folder, "compare.py", "--losses", "mse", *FLAGS)
    assert code == 2 and "a comparison that has l1,ssim=0.5: give another --output" in err
    (folder / "models" / "damaged").mkdir()
    (folder / "models" / "damaged" / "table.json").write_text('{"runs": [1]}')
    code, _, err = call(folder, "compare.py", "--losses", "mse", *FLAGS, "--output", "damaged")
    assert code == 2 and "table.json does not hold all that it should" in err and err.count("\n") == 1, err
    code, _, err = call(folder, "compare.py", "--losses", "l1=1,ssim=0.5", *FLAGS, "--features", "classifier")
    assert code == 2 and "a classifier needs a data set with at least two classes" in err
    write_images(folder / "few", 30)
    code, _, err = call(folder / "few", "compare.py", "--losses", "mse", *FLAGS)
    assert code == 2 and "need a split of 4 images or more, this one has 3" in err
    assert not (folder / "few/models").exists()


@pytest.mark.parametrize("flags, says", [
    (("--seed", "3"), "--seed is set by this script"), (("--recipe", "mse"), "--recipe is set by this script"),
    (("--ssim-weight", "3"), "--losses mse=1,ssim=3"), (("--ssim-weight=3",), "--losses mse=1,ssim=3"),
    (("--vqgan-flags", "--mse-weight 2"), "weights stand in a mix"),
    (("--vqgan-flags", "--disc-weight 0.1"), "weights stand in a mix"),
    (("--rates", "ssim=1"), "--rates takes"),
    (("--dataset", "photos", "--image-size", "16", "--features", "classifier"), "at least two classes"),
    (("--rates", "k=8"), "two or more different rates"),
    (("--rates", "k=8", "k=8"), "two or more different rates"),
    (("--baseline", "mse,k=4", "--rates", "k=8", "k=9"), "k stands in the mix mse,k=4 and in --rates"),
    (("--baseline", "nothing"), "no loss term"),
    (("--split", "test", "--baseline", "mse", "l1=1"), "name the one that valid chose")])
def test_flags_that_would_be_ignored_are_refused_before_anything_is_trained(tmp_path, flags, says):
    code, _, err = call(tmp_path, "compare.py", "--losses", "mse", *flags)
    assert code == 2 and says in err and not (tmp_path / "models").exists()


@pytest.mark.parametrize("flags, says", [
    (("--ssim-w", "3"), "vqvae.py: error: unrecognized arguments: --ssim-w 3"), (("--lr", "0"), "argument --lr"),
    (("--baseline", "mse", "mse,vqgan", "--vqgan-flags", "--disc-starts 1"),
     "models/sweep/mse,vqgan-seed0: vqgan.py: error: unrecognized arguments: --disc-starts")])
def test_flags_that_a_script_refuses_end_the_first_run(tmp_path, flags, says):
    write_images(tmp_path, 60)
    code, _, err = call(tmp_path, "compare.py", "--losses", "mse", *FLAGS, *flags)
    assert code == 2 and says in err and err.count("\n") == 1, err
    assert not list(tmp_path.rglob("best.pt"))


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_a_term_with_a_bug_is_never_left_out(folder, monkeypatch, error):
    def buggy(x_tilde, x):
        raise error("my bug")
    monkeypatch.setitem(TERMS, "buggy", buggy)
    with pytest.raises(error, match="my bug"):
        call(folder, "compare.py", "--losses", "l1=1,ssim=0.5", *FLAGS)


def test_kept_figures_never_survive_a_change(folder, monkeypatch):
    measured, measure_run = [], measuring.measure_run
    monkeypatch.setattr(measuring, "measure_run",
                        lambda run, **how: measured.append(run.name) or measure_run(run, **how))

    def compared(*flags):
        measured.clear()
        code, out, err = call(folder, "compare.py", "--losses", "l1=1,ssim=0.5", *FLAGS, *flags)
        assert code == 0, err
        tables = folder / "models" / "sweep" / ("test" if "test" in flags else "")
        return sorted(measured), {row["loss"]: row for row in json.loads((tables / "table.json").read_text())["runs"]}
    both = ["l1,ssim=0.5-seed0", "mse-seed0"]
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
    monkeypatch.setattr(measuring, "VERSION", measuring.VERSION + 1)
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
    names = ["mse=5,lr=0.001,k=4", "mse=5,lr=0.001,k=32"]
    assert [row["loss"] for row in table["table"]] == [row["baseline"] for row in table["against"]] == names
    found = checkpoint.load(tmp_path / f"models/sweep/{names[0]}-seed0/best.pt", "vqvae")
    assert found["args"]["lr"] == 1e-3 and found["loss"]["weights"] == {"mse": 5.} and found["model_args"]["K"] == 4
    judged = {"frechet_distance/effnet-lite0", "frechet_distance/classifier", "sliced_wasserstein/effnet-lite0"}
    assert judged | {"kernel_distance/effnet-lite0", "accuracy/classifier"} < set(table["table"][0])
    assert [row["loss"] for row in table["rates"]] == ["mse=5,lr=0.001"]
    assert Image.open(tmp_path / "models/sweep/rates.png").size[0] >= 4 * 450 and "rates.png" in out
    assert all(saved["n"] < 2 and saved["sd"] is None for name, saved in table["rates"][0].items() if name != "loss")
    assert all(row[key] > 0 for row in table["runs"] for key in judged)
    assert all(row["frechet_distance"] == row["frechet_distance/effnet-lite0"] for row in table["runs"])


def test_vqgan_is_a_mix_and_time_a_budget(tmp_path):
    write_images(tmp_path, 60)
    code, out, err = call(tmp_path, "compare.py", "--losses", "vqgan", *FLAGS, "--minutes", "0.02", "--vqgan-flags",
                          "--disc-start 1 --disc-hidden-size 8")
    assert code == 0, err
    for name, kind in (("mse", "vqvae"), ("mse,vqgan", "vqvae")):
        run = tmp_path / "models" / "sweep" / f"{name}-seed0"
        trained, results = checkpoint.load(run / "best.pt", kind), json.loads((run / "results.json").read_text())
        assert trained["args"]["minutes"] == 0.02 and results["train_seconds"] >= 1.2
        assert ("discriminator" in checkpoint.load(run / "last.pt", kind)) == (name != "mse")
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
