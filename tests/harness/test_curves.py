"""Curves, tables and reports of a run: those of one that was cut off and resumed are those of one that was not."""
import csv
import json
import os
import re
import shutil
import signal
import sys

import pytest
import torch
from conftest import call, start, stop_after
from small_runs import SMALL, curves, fails, run, run_altered
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from harness import checkpoint
from harness.curves import Curves
from harness.folder import made_with


def test_a_killed_and_resumed_run_shows_the_curves_of_one_that_was_not(folder):
    assert run(folder, "--num-epochs", "4", "--output-folder", "whole")[0] == 0
    stop_after(start(folder, "vqvae.py", *SMALL, "--num-epochs", "4", "--output-folder", "cut"), "epoch 2/",
               signal.SIGKILL)
    assert run(folder, "--num-epochs", "4", "--output-folder", "cut", "--resume")[0] == 0
    whole, cut = curves(folder, "whole"), curves(folder, "cut")
    assert whole == cut and [step for step, _ in whole["1_valid/psnr"]] == [3, 7, 11, 15]
    assert [step for step, _ in whole["loss/train/reconstruction"]] == list(range(0, 16, 2))


def table(folder, name="vqvae"):
    """Rows of a run's metrics.csv as numbers."""
    with open(folder / "models" / name / "metrics.csv", newline="") as file:
        return [{column: float(value) for column, value in row.items()} for row in csv.DictReader(file)]


def test_metrics_csv_has_a_row_an_epoch_as_the_curves_have_them(folder):
    assert run(folder, "--num-epochs", "3", "--log-every", "1", "--ssim-weight", "1")[0] == 0
    rows, shown = table(folder), curves(folder)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 4), (2, 8), (3, 12)]
    for column, tag in (("valid/psnr", "1_valid/psnr"), *((name, name) for name in ("valid/loss", "valid/used_codes"))):
        assert [row[column] for row in rows] == pytest.approx([value for _, value in shown[tag]])
    for column, tag in (("train/mse", "term/mse/raw"), ("train/ssim", "term/ssim/raw")):
        means = [sum(value for _, value in shown[tag][start:start + 4]) / 4 for start in (0, 4, 8)]
        assert [row[column] for row in rows] == pytest.approx(means)


def test_metrics_csv_of_a_resumed_run_is_that_of_one_that_was_not_cut(folder):
    assert run(folder, "--num-epochs", "3", "--output-folder", "whole")[0] == 0
    assert run(folder, "--num-epochs", "2", "--output-folder", "cut")[0] == 0
    path = folder / "models" / "cut" / "metrics.csv"
    header, first, second = path.read_text().splitlines()
    path.write_text("\n".join([header, first, second, second.replace("2,8,", "3,12,")]))  # killed before it was saved
    assert run(folder, "--num-epochs", "3", "--output-folder", "cut", "--resume")[0] == 0
    assert path.read_text() == (folder / "models" / "whole" / "metrics.csv").read_text()
    path.write_text("epoch\nx\n")
    fails(run(folder, "--num-epochs", "4", "--output-folder", "cut", "--resume"), "metrics.csv is damaged")


def test_a_finished_run_that_goes_on_shows_its_report_once(folder):
    for epochs in (1, 1, 2):
        assert run(folder, "--num-epochs", epochs, "--output-folder", "parts", "--resume")[0] == 0
    assert run(folder, "--num-epochs", "2", "--output-folder", "whole")[0] == 0
    assert curves(folder, "parts") == curves(folder, "whole")
    for tag in ("loss/test/reconstruction", "test/psnr"):
        assert [step for step, _ in curves(folder, "parts")[tag]] == [8]


def test_a_new_run_leaves_the_curves_of_runs_in_folders_below(folder):
    assert run(folder, "--num-epochs", "1", "--output-folder", "a/b")[0] == 0
    before = curves(folder, "a/b")
    assert run(folder, "--num-epochs", "1", "--output-folder", "a")[0] == 0
    assert before and curves(folder, "a/b") == before


def test_a_finished_run_keeps_the_memory_that_its_training_took(folder):
    assert run(folder, "--num-epochs", "1")[0] == 0
    path = folder / "models" / "vqvae" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peak_memory_mb": 12345.6}))
    assert run(folder, "--num-epochs", "1", "--resume")[0] == 0
    assert json.loads(path.read_text())["peak_memory_mb"] == 12345.6


def hparams(folder, name="vqvae"):
    """{flag: value} of a run under HParams."""
    found = EventAccumulator(str(folder / "logs" / name)).Reload()
    kept = plugin_data_pb2.HParamsPluginData.FromString(
        found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content).session_start_info.hparams
    return {flag: value.string_value or value.number_value or value.bool_value for flag, value in kept.items()}


def test_hparams_are_the_flags_that_differ_from_their_defaults(folder):
    assert run(folder, "--num-epochs", "1", "--recipe", "tuned-mse", "--k", "512", "--output-folder", "a")[0] == 0
    assert hparams(folder, "a") == {
        "dataset": "folder", "data_folder": "images", "hidden_size": 4, "batch_size": 8, "precision": "fp32", "seed": 1,
        "num_epochs": 1, "recipe": "tuned-mse", "lr": 2e-3, "lr_schedule": "cosine", "warmup_steps": 0.1, "beta": 0.1,
        "codebook_decay": 0.97, "flip": True, "mse_weight": 20}


@pytest.mark.parametrize("epochs, points", [(1, 4), (10, 20), (13, 26)])  # of 4 steps: every step, second, second
def test_a_curve_has_20_points_however_short_the_run(folder, epochs, points):
    code, _, err = call(folder, "vqvae.py", "--data-folder", "images", "--hidden-size", "4", "--k", "8", "--batch-size",
                        "8", "--device", "cpu", "--num-epochs", epochs)
    assert code == 0, err
    assert len(curves(folder)["loss/train/reconstruction"]) == points


def test_args_json_says_what_made_the_run_and_another_torch_goes_on(folder):
    assert run(folder, "--num-epochs", "1")[0] == 0
    path = folder / "models" / "vqvae" / "args.json"
    args = json.loads(path.read_text())
    made = args["made_with"]
    assert made["torch"] == torch.__version__ and sys.version.startswith(made["python"])
    assert made["commit"] is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", made["commit"])
    path.write_text(json.dumps(args | {"made_with": {"torch": "1.0", "python": "3.6", "commit": None}}))
    assert run(folder, "--num-epochs", "2", "--resume")[0] == 0


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert made_with()["commit"] is None


def test_only_a_few_test_figures_are_shown(folder):
    assert run(folder, "--num-epochs", "1")[0] == 0
    assert 3 < sum(tag.startswith("test/") for tag in curves(folder)) < 10
    assert not [path for path in (folder / "logs" / "vqvae").iterdir() if path.is_dir()]  # no second run of its name


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_curves_ends_the_run_in_one_line(folder):
    code = ("import sys, vqvae; from harness import cli, curves\n"
            "real = curves.EventsWriter\n"
            "class Full(real):\n    def __init__(self, *a):\n        super().__init__(*a)\n"
            "        self._py_recordio_writer._writer = open('/dev/full', 'wb')\n"
            "curves.EventsWriter = Full\nsys.argv[0] = 'vqvae.py'\ncli.run(vqvae.main)")
    fails(run_altered(folder, code, "--num-epochs", "3"), "cannot write the curves", "No space left")
    checkpoint.load(folder / "models" / "vqvae" / "last.pt", "vqvae")


def test_curves_in_a_folder_that_cannot_be_made_lose_no_earlier_run(folder):
    assert run(folder, "--num-epochs", "1")[0] == 0
    kept = {path.name: path.read_bytes() for path in (folder / "models" / "vqvae").iterdir() if path.name != ".lock"}
    shutil.rmtree(folder / "logs")
    (folder / "logs").write_text("a file")
    fails(run(folder, "--overwrite"), "cannot write the curves in logs/vqvae")
    assert all((folder / "models" / "vqvae" / name).read_bytes() == data for name, data in kept.items())


def test_a_resumed_run_is_refused_other_images(folder):
    for name, numbers in (("train", range(12)), ("valid", range(13, 16)), ("test", range(16, 19))):
        (folder / "split" / name).mkdir(parents=True)
        for i in numbers:
            shutil.copy(folder / "images" / f"{i}.png", folder / "split" / name)
    flags = ("--data-folder", "split", "--output-folder", "a")
    assert run(folder, *flags, "--num-epochs", "1")[0] == 0
    shutil.copy(folder / "images" / "12.png", folder / "split" / "train")
    fails(run(folder, *flags, "--num-epochs", "2", "--resume"), "trained on other images")


def test_an_evaluation_is_not_replaced_by_a_run_nor_anothers_file_by_an_evaluation(folder):
    (folder / "models" / "ev").mkdir(parents=True)
    results = folder / "models" / "ev" / "results.json"
    results.write_text('{"mine": 1}')
    for how in ((), ("--resume",)):
        fails(run(folder, "--output-folder", "ev", *how), "holds the results.json of something else")
    assert run(folder, "--num-epochs", "1")[0] == 0
    evaluation = ("evaluate.py", "--model", "models/vqvae", "--no-features", "--device", "cpu", "--output")
    fails(call(folder, *evaluation, "models/ev"), "results.json is of no evaluation")
    assert results.read_text() == '{"mine": 1}'
    for _ in range(2):
        assert call(folder, *evaluation, "evaluation")[0] == 0


def test_a_flag_whose_text_is_not_utf_8_is_kept_with_the_figures(tmp_path):
    written = Curves(tmp_path)
    written.hparams({"data_folder": "caf\udce9", "lr": 0.5}, {"test/psnr": 1.}, 1)
    written.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    kept = plugin_data_pb2.HParamsPluginData.FromString(
        found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content).session_start_info.hparams
    assert kept["data_folder"].string_value == "caf?" and kept["lr"].number_value == 0.5
    assert [event.value for event in found.Scalars("test/psnr")] == [1]
