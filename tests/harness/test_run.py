"""A run where something goes wrong, through the training script: its folder, its schedule, what stops it."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import HERE, call, start, updates_take, write_images
from small_runs import SMALL, curves, fails, run, run_altered

import experiment
from harness import checkpoint, cli
from harness.folder import lock
from harness.schedule import lr_scale, update_of
from harness.tally import Tally

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


# --- the schedule

def rates(*progress, lr_schedule="cosine", warmup_steps=0, minutes=None):
    """Factors of the learning rate at (epoch, batch) of 4 epochs of 10 batches; by a clock, an epoch is a quarter."""
    return [lr_scale(lr_schedule, warmup_steps, min(1, epoch / 4 if minutes else (10 * epoch + batch) / 40),
                     10 * epoch + batch, None if minutes else 40) for epoch, batch in progress]


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
    # Past the end, in an epoch that was begun: --resume with fewer epochs.
    assert rates((4, 0), (9, 9)) == pytest.approx([0, 0])
    assert rates((3, 9), (4, 0), warmup_steps=40) == pytest.approx([40 / 41, 1])


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


@pytest.mark.parametrize("step", [2, 4])
def test_a_signal_in_the_last_batch_stops_before_the_validation_and_resumes_to_the_same(folder, step):
    flags = ("--num-epochs", "2", "--batch-size", "16")  # two steps an epoch
    code = ("import os, signal, sys, experiment, vqvae; from harness import cli, run\n"
            "real = run.Run.update\n"
            "def stop(self, optimizer):\n"
            f"    os.kill(os.getpid(), signal.SIGTERM) if self.step == {step} - 1 else None\n"
            "    return real(self, optimizer)\n"
            "run.Run.update = stop\nsys.argv[0] = 'vqvae.py'\ncli.run(vqvae.main)")
    assert run(folder, *flags, "--output-folder", "whole")[0] == 0
    done, out, err = run_altered(folder, code, *flags, "--output-folder", "cut")
    assert done == 143 and "stopped by SIGTERM" in err and out.count(" psnr ") == step // 2 - 1
    assert run(folder, *flags, "--output-folder", "cut", "--resume")[0] == 0
    one, two = (checkpoint.load(folder / "models" / name / "last.pt", "vqvae") for name in ("whole", "cut"))
    assert one["counters"]["step"] == two["counters"]["step"] == 4 and one["best"] == two["best"]
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())


def test_the_clock_counts_what_the_device_has_yet_to_do(folder, monkeypatch):
    """Reading the losses waits for the device: it takes 100 s here, and everything else none."""
    clock, first_bad = [0.], Tally.first_bad

    def wait(tally):
        clock[0] += 100
        return first_bad(tally)
    monkeypatch.setattr(Tally, "first_bad", wait)
    monkeypatch.setattr("harness.run.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert run(folder, "--num-epochs", "1", "--log-every", "1000")[0] == 0
    results = json.loads((folder / "models" / "vqvae" / "results.json").read_text())
    assert results["train_seconds"] == 200  # the first step is logged, and the epoch ends


def test_the_test_split_is_measured_in_whole_float32(folder, monkeypatch):
    seen, measure = [], experiment.measure

    def look(*args):
        seen.append(torch.get_float32_matmul_precision())
        return measure(*args)
    monkeypatch.setattr(experiment, "measure", look)
    torch.set_float32_matmul_precision("high")
    assert run(folder, "--num-epochs", "1", "--precision", "fp32")[0] == 0
    assert seen == ["high", "highest"]
