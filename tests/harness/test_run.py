"""A run's folder, curves and checkpoints where something goes wrong, through the training script."""
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest
import torch
from conftest import HERE, call, start, stop_after, updates_take, write_images
from processes import Forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from harness import checkpoint, cli, distributed
from harness.curves import Curves
from harness.errors import UserError
from harness.folder import lock, made_with
from harness.schedule import lr_scale, update_of

SMALL = ["--dataset", "folder", "--data-folder", "images", "--hidden-size", "4", "--k", "8", "--batch-size", "8",
         "--log-every", "2", "--device", "cpu", "--precision", "fp32", "--seed", "1"]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, 40)
    return tmp_path


def run(folder, *flags, script="vqvae.py"):
    return call(folder, script, *SMALL, *flags)


def run_altered(folder, code, *flags):
    """Run Python code in a process of its own, with what the flags of a small training are: status, stdout, stderr."""
    (folder / "altered.py").write_text(code)
    process = Forked(folder, folder / "altered.py", *SMALL, *flags)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def fails(result, *words):
    code, _, err = result
    assert code == 2 and err.count("\n") == 1 and "error: " in err, err
    assert all(word in err for word in words), err


def curves(folder, name="vqvae"):
    """{tag: [(step, value)]} as TensorBoard shows them."""
    events = EventAccumulator(str(folder / "logs" / name))
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# --- which folder

@pytest.mark.parametrize("name", ["deep/x", "models/deep/x", "./models/deep/x/"])
def test_the_output_folder_is_a_name_under_models_and_logs(folder, name):
    assert run(folder, "--num-epochs", "1", "--output-folder", name)[0] == 0
    assert (folder / "models" / "deep" / "x" / "best.pt").exists()
    assert list((folder / "logs" / "deep" / "x").glob("events*"))


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/../../x", "models", "", "."])
def test_an_output_folder_elsewhere_is_refused(folder, name):
    fails(run(folder, "--output-folder", name), "--output-folder", "under models/")


def test_what_a_run_reads_is_never_in_its_output_folder(folder):
    assert run(folder, "--num-epochs", "1")[0] == 0
    before = (folder / "models" / "vqvae" / "best.pt").read_bytes()
    for path in ("models/vqvae", "models/vqvae/best.pt", "models/../models/vqvae/last.pt"):
        fails(run(folder, "--frozen-codebook", path, "--output-folder", "vqvae", "--overwrite"), "which this run reads")
        fails(call(folder, "pixelcnn_prior.py", "--model", path, "--output-folder", "vqvae", "--overwrite"),
              "which this run reads")
    assert (folder / "models" / "vqvae" / "best.pt").read_bytes() == before


def test_a_run_of_another_kind_is_not_replaced(folder):
    assert run(folder, "--num-epochs", "1", "--output-folder", "a")[0] == 0
    assert run(folder, "--num-epochs", "1", "--output-folder", "b")[0] == 0
    for flag in ("--overwrite", "--resume"):
        fails(call(folder, "pixelcnn_prior.py", "--model", "models/a", "--output-folder", "b", flag), "vqvae", "prior")


def test_a_run_that_lost_a_file_is_still_one(folder):
    assert run(folder, "--num-epochs", "1", "--output-folder", "a")[0] == 0
    a, b = (folder / "models" / name for name in "ab")
    shutil.copytree(a, b)
    best = (b / "best.pt").read_bytes()
    prior = ("pixelcnn_prior.py", "--model", "models/a", "--output-folder", "b", "--overwrite", "--device", "cpu")
    (b / "last.pt").write_bytes(b"damaged")
    fails(call(folder, *prior), "holds the run of a vqvae")
    (b / "args.json").unlink()
    fails(run(folder, "--output-folder", "b"), "already holds a run")
    (b / "last.pt").unlink()
    fails(call(folder, *prior), "holds the run of a vqvae")
    fails(run(folder, "--output-folder", "b"), "already holds a run")
    fails(run(folder, "--output-folder", "b", "--resume"), "no last.pt to go on from")
    assert (b / "best.pt").read_bytes() == best
    assert run(folder, "--num-epochs", "1", "--output-folder", "b", "--overwrite")[0] == 0


def test_a_folder_in_use_is_refused_and_a_dead_owner_noticed(folder):
    process = start(folder, "vqvae.py", *SMALL, "--num-epochs", "500")
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    fails(run(folder, "--overwrite"), f"in use by process {process.pid}")
    process.kill()
    process.communicate()
    assert run(folder, "--num-epochs", "1", "--overwrite")[0] == 0


def test_a_file_system_without_locks_is_used_all_the_same(folder, monkeypatch):
    import fcntl
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(37, "No locks available")))
    lock(folder).close()


def test_what_a_killed_write_left_is_removed(folder):
    (folder / "models" / "vqvae").mkdir(parents=True)
    left = folder / "models" / "vqvae" / ".4711-1.vqvae.tmp"
    left.write_bytes(b"half")
    assert run(folder, "--num-epochs", "1")[0] == 0 and not left.exists()


# --- what is not finite

@pytest.mark.parametrize("name", ["loss", "psnr"])  # what is monitored, and what is not
def test_a_validation_that_is_not_finite_leaves_the_last_good_state(folder, name):
    assert run(folder, "--num-epochs", "1")[0] == 0
    before = {name: (folder / "models" / "vqvae" / name).read_bytes() for name in ("last.pt", "best.pt")}
    code = ("import sys, torch, vqvae, experiment; from harness import cli\n"
            "real = experiment.measure\n"
            f"def broken(*a, **k):\n    v, f = real(*a, **k)\n    return v, f | {{'{name}': float('nan')}}\n"
            "experiment.measure = broken\nsys.argv[0] = 'vqvae.py'\ncli.run(vqvae.main)")
    fails(run_altered(folder, code, "--num-epochs", "3", "--resume"), "not finite at step 8", name, "--resume", "--lr",
          "--precision fp32")
    assert before == {name: (folder / "models" / "vqvae" / name).read_bytes() for name in before}
    assert run(folder, "--num-epochs", "3", "--resume", "--lr", "1e-5", "--precision", "bf16")[0] == 0


def test_a_diverged_model_is_never_the_best_and_a_lower_rate_goes_on(folder):
    flags = (*SMALL, "--batch-size", "20", "--disc-hidden-size", "4", "--num-epochs", "1")  # one step, then validation
    fails(call(folder, "vqgan.py", *flags, "--lr", "1e10"), "not finite", "--resume", "--lr")
    assert not (folder / "models" / "vqgan" / "best.pt").exists()
    assert call(folder, "vqgan.py", *flags, "--lr", "1e-5", "--resume")[0] == 0


def test_a_gradient_that_is_not_finite_is_never_saved(folder):
    assert run(folder, "--num-epochs", "1")[0] == 0
    before = (folder / "models" / "vqvae" / "last.pt").read_bytes()
    code = ("import os, signal, sys, vqvae; from harness import cli, run\n"
            "real = run.Run.update\n"
            "def broken(self, optimizer):\n"
            "    for weight in optimizer.param_groups[0]['params']:\n        weight.grad.fill_(float('nan'))\n"
            "    os.kill(os.getpid(), signal.SIGTERM)\n    return real(self, optimizer)\n"
            "run.Run.update = broken\nsys.argv[0] = 'vqvae.py'\ncli.run(vqvae.main)")
    fails(run_altered(folder, code, "--num-epochs", "2", "--resume"), "a weight", "not finite at step 5")
    assert (folder / "models" / "vqvae" / "last.pt").read_bytes() == before


def test_under_balance_a_fixed_metric_decides(folder):
    assert run(folder, "--num-epochs", "1", "--balance", "gradient", "--l1-weight", "1")[0] == 0
    assert json.loads((folder / "models" / "vqvae" / "args.json").read_text())["monitor"] == "mse"


# --- curves

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


# --- the schedule

def rates(*progress, lr_schedule="cosine", warmup_steps=0, minutes=None):
    """Factors of the learning rate at (epoch, batch) of 4 epochs of 10 batches; by a clock, an epoch is a quarter."""
    return [lr_scale(lr_schedule, warmup_steps, epoch / 4 if minutes else (10 * epoch + batch) / 40, 10 * epoch + batch,
                     None if minutes else 40) for epoch, batch in progress]


def cosine(share):
    return 0.5 * (1 + math.cos(math.pi * share))


def test_the_learning_rate_at_every_kind_of_step():
    assert rates((0, 0), (3, 9), lr_schedule="constant") == [1, 1]
    assert rates((0, 0), (2, 0), (3, 9)) == pytest.approx([1, cosine(1 / 2), cosine(39 / 40)])
    warm = [1 / 5, 4 / 5, 1, cosine(16 / 36), cosine(35 / 36)]
    assert rates((0, 0), (0, 3), (0, 4), (2, 0), (3, 9), warmup_steps=4) == pytest.approx(warm)
    assert rates((0, 0), (0, 3), (0, 4), (2, 0), (3, 9), warmup_steps=0.1) == pytest.approx(warm)
    assert rates((0, 3), (2, 0), lr_schedule="constant", warmup_steps=4) == pytest.approx([4 / 5, 1])
    assert rates((0, 0), (2, 3), minutes=1) == pytest.approx([1, cosine(1 / 2)])
    assert rates((1, 0), (2, 0), minutes=1, warmup_steps=0.5) == pytest.approx([1 / 2, 1])
    assert rates((0, 3), (0, 4), (2, 0), minutes=1, warmup_steps=4) == pytest.approx([4 / 5, 1, cosine(1 / 2)])


def test_an_update_takes_the_batches_that_are_due():
    assert [update_of(batch, 5, 1) for batch in range(5)] == [(1, True)] * 5
    assert [update_of(batch, 5, 2) for batch in range(5)] == [(2, False), (2, True)] * 2 + [(1, True)]
    assert [update_of(batch, 2, 4) for batch in range(2)] == [(2, False), (2, True)]


def test_the_schedule_is_what_is_trained_with(folder):
    assert run(folder, "--num-epochs", "2", "--lr", "0.5", "--lr-schedule", "cosine", "--warmup-steps", "3",
               "--log-every", "1")[0] == 0
    assert [value for _, value in curves(folder)["lr"]] == pytest.approx(
        [0.5 * rate for rate in [1 / 4, 2 / 4, 3 / 4, *(cosine(step / 5) for step in range(5))]])


def test_the_monitor_decides_which_epoch_is_kept(folder):
    for name in ("mse", "loss", "last"):
        assert run(folder, "--num-epochs", "5", "--lr", "0.03", "--monitor", name, "--output-folder", name)[0] == 0
        kept = checkpoint.load(folder / "models" / name, "vqvae")
        if name == "last":
            assert kept["counters"]["epoch"] == 4 and kept["best"] == 20
        else:
            values = [value for _, value in curves(folder, name)["valid/" + name]]
            assert kept["counters"]["epoch"] == values.index(min(values)) and kept["best"] == pytest.approx(min(values))


def test_a_budget_of_time_ends_the_run_at_the_step_that_spends_it(folder, monkeypatch):
    updates_take(monkeypatch, 1)
    code, _, err = run(folder, "--minutes", "0.1", "--num-epochs", "1")
    assert code == 0, err
    results = json.loads((folder / "models" / "vqvae" / "results.json").read_text())
    assert results["steps"] == results["train_seconds"] == 6 and results["epochs"] == 2  # of 4 steps


def test_compile_compiles_forward_pass_and_loss_as_one(folder, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    assert run(folder, "--num-epochs", "1", "--compile")[0] == 0 and len(compiled) == 1


# --- folders that cannot be written, and Ctrl-C

def test_a_folder_that_cannot_be_written_is_one_line():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder, 40)
        (folder / "models").mkdir()
        for path in (folder, folder / "images", folder / "models"):
            path.chmod(0o555)
        # Root may write anywhere: it becomes nobody, once it has read what nobody may not be able to.
        code = ("import os, torchvision, vqvae; from harness import cli\n"
                "if not os.geteuid():\n    os.seteuid(65534)\ncli.run(vqvae.main)")
        done = subprocess.run([sys.executable, "-B", "-c", code, *SMALL], cwd=folder, text=True, capture_output=True,
                              env=os.environ | {"PYTHONPATH": str(HERE)})
        for path in (folder, folder / "images", folder / "models"):
            path.chmod(0o755)
    fails((done.returncode, done.stdout, done.stderr), "models/vqvae", "Permission denied")


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="nothing tells a process who sent a signal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_run_that_streams_saves_it(folder, number):
    code = ("import sys, datasets, vqvae; from harness import cli\ndatasets.IN_MEMORY_BYTES = 0\n"
            "sys.argv[0] = 'vqvae.py'\ncli.run(vqvae.main)")
    process = subprocess.Popen([sys.executable, "-c", code, *SMALL, "--num-epochs", "100000", "--num-workers", "2"],
                               cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    while not process.stdout.readline().startswith("epoch 2/"):
        pass
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=60)  # until every process has closed the pipe
    assert process.returncode == 128 + number and err.startswith(f"stopped by {number.name} and saved"), err
    assert checkpoint.load(folder / "models" / "vqvae" / "last.pt", "vqvae")["counters"]["epoch"] >= 2


def test_ctrl_c_before_training_is_silent(capsys):
    def main():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    assert stop.value.code == 130 and capsys.readouterr().err == ""


def test_ctrl_c_while_the_best_epoch_is_measured_ends_the_run(folder, monkeypatch):
    monkeypatch.setattr("experiment.report", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert run(folder, "--num-epochs", "1")[0] == 130


# --- checkpoints

@pytest.fixture
def trained(folder):
    assert run(folder, "--num-epochs", "1")[0] == 0
    return folder / "models" / "vqvae" / "best.pt"


def test_a_model_is_a_run_s_folder_or_its_checkpoint(folder, trained):
    assert checkpoint.resolve(trained.parent) == trained and checkpoint.resolve(trained) == trained
    for model in ("models/vqvae", "models/vqvae/best.pt"):
        assert call(folder, "evaluate.py", "--model", model, "--no-features")[0] == 0
    (folder / "empty").mkdir()
    fails(call(folder, "evaluate.py", "--model", "empty", "--no-features"), "no checkpoint at empty/best.pt")


def test_a_flipped_byte_is_noticed_wherever_it_matters(trained):
    data, path = trained.read_bytes(), trained.with_name("flipped.pt")
    with zipfile.ZipFile(trained) as archive:
        spans = [(info.header_offset + 30 + len(info.filename) + 128, info.file_size) for info in archive.infolist()
                 if info.file_size > 1000]
    assert spans
    for offset, size in spans:
        flipped = bytearray(data)
        flipped[offset + size // 2] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="damaged"):
            checkpoint.load(path, "vqvae")


def change(path, **entries):
    contents = torch.load(path, weights_only=True) | entries
    torch.save({name: value for name, value in contents.items() if value is not None}, path)


@pytest.mark.parametrize("entries, words", [
    ({"format": 99}, ["format 99"]), ({"format": None}, ["format"]), ({"model": None}, ["does not hold", "model"]),
    ({"model_args": {"unheard": 1}}, ["does not hold"]), ({"model": {"a": torch.zeros(1)}}, ["does not hold"])])
def test_checkpoints_of_another_make_are_one_line(folder, trained, entries, words):
    change(trained, **entries)
    fails(call(folder, "evaluate.py", "--model", "models/vqvae", "--no-features"), "best.pt", *words)
    change(trained.with_name("last.pt"), **entries)
    if "model_args" not in entries:  # on --resume the flags make the model
        fails(run(folder, "--num-epochs", "2", "--resume"), "last.pt", *words)


def test_weights_that_are_not_finite_are_refused(folder, trained):
    model = torch.load(trained, weights_only=True)["model"]
    model["decoder.0.block.1.bias"][0] = torch.nan
    change(trained, model=model)
    for script, *flags in (("evaluate.py", "--no-features"), ("pixelcnn_prior.py",)):
        fails(call(folder, script, "--model", "models/vqvae", *flags), "not finite", "best.pt")


def test_a_checkpoint_is_good_once_all_processes_say_so(folder, monkeypatch):
    # The process that is to write it is gone: it came to the barriers of the data and of the folder, and to no more.
    monkeypatch.setattr(checkpoint, "saved", [])
    calls = iter([None, None])

    def barrier():
        if next(calls, "lost") == "lost":
            raise RuntimeError("gloo: connection closed")
    monkeypatch.setattr(distributed, "barrier", barrier)
    with pytest.raises(RuntimeError, match="connection closed"):
        run(folder, "--num-epochs", "1")
    assert (folder / "models" / "vqvae" / "last.pt").exists() and not checkpoint.saved
    monkeypatch.undo()
    assert run(folder, "--num-epochs", "1", "--overwrite")[0] == 0
    assert Path("models/vqvae/last.pt") in checkpoint.saved


# --- the command line

@pytest.mark.parametrize("flags, word", [
    (["--seed", "-1"], "--seed"), (["--seed", str(2 ** 63)], "--seed"), (["--device", "meta"], "meta"),
    (["--k", "0"], "--k"), (["--nonsense"], "--nonsense"), (["--warmup-steps", "1.5"], "--warmup-steps")])
def test_usage_errors_are_one_line(folder, flags, word):
    fails(run(folder, *flags), word)


@pytest.mark.parametrize("script", [path.name for path in HERE.glob("*.py") if "cli.run(main)" in path.read_text()])
def test_help_explains_every_flag_and_shows_its_default(tmp_path, script, monkeypatch):
    parsers = []
    monkeypatch.setattr(cli.Parser, "print_help", lambda self, *_: parsers.append(self))
    assert call(tmp_path, script, "--help")[0] == 0
    parser, = parsers
    show = parser._get_formatter()._get_help_string
    for action in parser._actions:
        assert action.help, action.option_strings
        assert action.required or action.default in (None, False, "==SUPPRESS==", []) or "default" in show(action)
        assert "`" not in action.help
    titles = [group.title for group in parser._action_groups if group._group_actions]
    assert len(titles) == len(set(titles)) and sum("data" in title.lower().split() for title in titles) <= 1


def test_errors_of_many_lines_are_shown_whole(capsys):
    def main():
        raise UserError("first\n  second: not to lose")
    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err.endswith("error: first second: not to lose\n")


@pytest.mark.parametrize("error", [BrokenProcessPool("abruptly"), RuntimeError("DataLoader worker (pid 7) exited")])
def test_a_killed_helper_is_one_line(capsys, error):
    def main():
        raise error
    with pytest.raises(SystemExit):
        cli.run(main)
    err = capsys.readouterr().err
    assert "was killed" in err and err.count("\n") == 1


def test_a_flag_whose_text_is_not_utf_8_is_kept_with_the_figures(tmp_path):
    written = Curves(tmp_path)
    written.hparams({"data_folder": "caf\udce9", "lr": 0.5}, {"test/psnr": 1.}, 1)
    written.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    kept = plugin_data_pb2.HParamsPluginData.FromString(
        found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content).session_start_info.hparams
    assert kept["data_folder"].string_value == "caf?" and kept["lr"].number_value == 0.5
    assert [event.value for event in found.Scalars("test/psnr")] == [1]
