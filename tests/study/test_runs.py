"""Runs of a comparison: baselines, times, and training that ends with whoever started it."""
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Semaphore
from types import SimpleNamespace

import pytest
from conftest import HERE, at_work, write_images

import experiment
from harness import checkpoint
from harness.errors import UserError
from study import mixes, runs


def test_each_rate_has_the_best_of_the_baselines_at_that_rate():
    planned = runs.Sweep([{"ssim": 1.}], [{"mse": 1.}, {"mse": 5.}], ["k=8", "k=16"], 2)
    assert list(planned.mixes) == ["mse,k=8", "mse,k=16", "mse=5,k=8", "mse=5,k=16", "ssim,k=8", "ssim,k=16"]
    assert planned.mixes["ssim,k=8"] == {"ssim": 1., "k": 8} and planned.baseline_of("ssim,k=16") == "mse,k=16"
    figures = {(name, seed): {"frechet_distance": 10. + seed, "other": 1.}
               for name in planned.mixes for seed in planned.seeds}
    figures["mse=5,k=16", 0]["frechet_distance"] = 5.
    figures["ssim,k=16", 0]["frechet_distance"] = 2.
    planned.choose_baselines(figures, ["frechet_distance", "other"])
    assert planned.baseline_of("ssim,k=8") == "mse,k=8" and planned.baseline_of("mse,k=16") == "mse=5,k=16"
    assert planned.against_baseline(figures, "ssim,k=16", "frechet_distance", lambda a, b: a / b) == [0.4, 1.]


def test_what_is_done_is_told_with_the_time_that_is_left(monkeypatch):
    clock, lines, told = [0.], [], Semaphore()
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(runs, "print", lambda line, **_: (lines.append(line), told.release()), raising=False)

    def sleep(taken):
        told.acquire()  # what was done before
        clock[0] += taken
    seconds = {("a", 0): 90., ("b", 0): 0., ("c", 0): 30.}
    runs.in_turn(ThreadPoolExecutor(1), 1, "slept", seconds, lambda key: (sleep, seconds[key]))
    assert lines == ["slept 1/3: a, seed 0 (90 s so far, 3 min to go)",
                     "slept 2/3: b, seed 0 (90 s so far, 90 s to go)", "slept 3/3: c, seed 0 (2 min so far)"]


def test_one_failure_ends_the_rest():
    def fail(key):
        raise ValueError(key[0])
    with pytest.raises(ValueError, match="bad"):
        runs.in_turn(ThreadPoolExecutor(1), 1, "x", {("bad", 0): 1, ("b", 0): 2}, lambda key: (fail, key))


def test_one_that_diverges_ends_the_rest_no_earlier_than_they_are_done(capsys):
    done, keys = [], {("bad", 0): 1, ("b", 0): 2, ("c", 0): 3}

    def work(key):
        if key[0] == "bad":
            raise runs.Diverged("bad: the loss is not finite")
        done.append(key)
    with pytest.raises(runs.Diverged, match="diverged: bad, seed 0. "):
        runs.in_turn(ThreadPoolExecutor(1), 1, "trained", keys, lambda key: (work, key))
    assert done == [("b", 0), ("c", 0)]
    out = capsys.readouterr().out
    assert "bad: the loss is not finite; the others go on\n" in out and "trained 2/3: c" in out and "3/3" not in out


def test_a_mix_that_diverges_is_told_what_to_change(tmp_path, monkeypatch):
    script = "raise SystemExit('vqvae.py: error: the loss is not finite at step 3; go on with --resume')"
    (tmp_path / "diverges.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "HERE", tmp_path)
    with pytest.raises(runs.Diverged, match="not finite at step 3: give this mix a lower lr") as raised:
        runs.train(Path("models/mse-seed0"), ["diverges.py"], 1)
    assert "--resume" not in str(raised.value)


def began(path, command, step=1, **args):
    checkpoint.save(path, "vqvae", {"counters": {"step": step}, "command": command, "args": args})


def test_a_command_that_never_trained_locks_nothing(tmp_path):
    one, two = (mixes.command_of({"mse": 1.}, 0, ["--lr", lr], []) for lr in ("1e-3", "2e-3"))
    runs.check(tmp_path, two)
    for step in (0, 1):
        began(tmp_path / "last.pt", one, step)
        runs.check(tmp_path, one)
        if not step:
            runs.check(tmp_path, two)
    with pytest.raises(ValueError, match="other flags .--lr 0.001, now 0.002.: give another --output"):
        runs.check(tmp_path, two)


def test_what_a_command_does_not_say_is_compared_by_its_value(tmp_path):
    began(tmp_path / "last.pt", mixes.command_of({"mse": 1.}, 0, ["--compile"], []), k=512, compile=True)
    for flags, says in (([], "--compile , now not given"), (["--compile", "--k", "64"], "--k 512, now 64"),
                        (["--compile", "--minutes", "1"], "--minutes None, now 1")):
        with pytest.raises(ValueError, match=says):
            runs.check(tmp_path, mixes.command_of({"mse": 1.}, 0, flags, []))
    runs.check(tmp_path, mixes.command_of({"mse": 1.}, 0, ["--compile", "--k", "512", "--output-folder", "x"], []))
    with pytest.raises(ValueError, match="vqvae.py, now vqgan.py"):
        runs.check(tmp_path, mixes.command_of({"vqgan": 1.}, 0, ["--compile"], []))


def test_a_best_checkpoint_of_another_run_is_noticed(tmp_path):
    one, two = (mixes.command_of({"mse": 1.}, seed, [], []) for seed in (0, 1))
    began(tmp_path / "last.pt", one)
    began(tmp_path / "best.pt", two)
    with pytest.raises(ValueError, match="best.pt was trained with other flags .--seed 1"):
        runs.check(tmp_path, one)


def test_a_run_of_a_recipe_that_has_changed_since_is_another(tmp_path, monkeypatch):
    def command():
        return mixes.command_of({"recipe": "recommended"}, 0, [], [])
    began(tmp_path / "best.pt", command())  # the last one removed to free the disk
    (tmp_path / "results.json").write_text("{}")
    runs.check(tmp_path, command())
    monkeypatch.setitem(experiment.RECIPES, "recommended", f"{experiment.RECIPES['recommended']} --batch-size 32")
    with pytest.raises(ValueError, match="other flags"):
        runs.check(tmp_path, command())


def test_a_bug_in_a_run_keeps_its_traceback_and_what_a_user_can_mend_is_a_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "HERE", tmp_path)
    (tmp_path / "vqvae.py").write_text("def loss():\n    raise ValueError('my bug')\nloss()")
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*vqvae.py\", line 2, in loss.*ValueError: my bug"):
        runs.train(Path("models/a/mse-seed0"), ["vqvae.py"], 1)
    (tmp_path / "vqvae.py").write_text("import sys\nsys.exit('warning: x\\nvqvae.py: error: too small\\nbye')")
    with pytest.raises(UserError, match="^models/a/mse-seed0: vqvae.py: error: too small$"):
        runs.train(Path("models/a/mse-seed0"), ["vqvae.py"], 1)


def test_a_command_that_is_refused_leaves_known_what_was_trained(tmp_path, monkeypatch):
    write_images(tmp_path, 40)
    monkeypatch.chdir(tmp_path)
    run = Path("models/comparison/mse-seed0")
    flags = ("--dataset", "folder", "--data-folder", "images", "--hidden-size", "8", "--batch-size", "8", "--device",
             "cpu", "--num-epochs", "1")
    one, two = (mixes.command_of({"mse": 1.}, 0, [*flags, "--k", k], []) for k in ("16", "32"))
    runs.train(run, one, 1)
    (run / "results.json").unlink()  # as in its last epoch
    contents = checkpoint.load(run / "last.pt", "vqvae")
    checkpoint.save(run / "last.pt", "vqvae", contents | {"counters": contents["counters"] | {"step": 0}})
    best = (run / "best.pt").rename(tmp_path / "best.pt")
    runs.check(run, two)
    with at_work(run), pytest.raises(ValueError, match="in use"):
        runs.train(run, two, 1)
    checkpoint.save(run / "last.pt", "vqvae", contents)
    best.rename(run / "best.pt")
    runs.check(run, one)
    runs.check(run, ["images/" if part == "images" else part for part in one])
    with pytest.raises(ValueError, match="other flags"):
        runs.check(run, two)
    (run / "last.pt").unlink()
    with pytest.raises(ValueError, match="lost its last.pt: remove it"):
        runs.check(run, one)


def test_runs_have_the_same_names_in_a_job_of_slurm(tmp_path, monkeypatch):
    write_images(tmp_path, 40)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    run = Path("models/comparison/mse-seed0")
    runs.train(run, mixes.command_of({"mse": 1.}, 0, ["--data-folder", "images", "--hidden-size", "4", "--k", "8",
                                                       "--device", "cpu", "--num-epochs", "1"], []), 1)
    assert (run / "results.json").exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells a child that its parent is gone")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_training_ends_with_the_comparison_that_started_it(tmp_path, number):
    write_images(tmp_path, 40)
    process = subprocess.Popen([sys.executable, str(HERE / "compare.py"), "--losses", "mse", "--dataset", "folder",
                                "--data-folder", "images", "--hidden-size", "8", "--batch-size", "8", "--device",
                                "cpu", "--num-epochs", "100000"], cwd=tmp_path, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    run = tmp_path / "models" / "comparison" / "mse-seed0"
    try:
        wait_for(lambda: (run / "output.txt").exists() and "epoch 1/" in (run / "output.txt").read_text())
        trained = [int(child) for children in Path(f"/proc/{process.pid}/task").glob("*/children")
                   for child in children.read_text().split()]
        assert trained
    finally:
        process.send_signal(number)
        status = process.wait()
    wait_for(lambda: not any(alive(child) for child in trained))
    assert status == {signal.SIGKILL: -9, signal.SIGTERM: 143}[number]
    assert ("the same command goes on" in process.stderr.read()) == (number == signal.SIGTERM)
    left = checkpoint.load(run / "last.pt", "vqvae")["counters"]
    assert left["epoch"] < 100000 and (left["step"] >= 4 or number == signal.SIGKILL)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone tells a child that its parent is gone")
def test_measuring_ends_with_the_comparison_that_started_it():
    code = """if True:
        import os, time
        from concurrent.futures import ProcessPoolExecutor
        from types import SimpleNamespace
        from unittest import mock
        from pathlib import Path
        import torch
        from study import measuring

        def measure(pool, jobs, *_):
            for process in [pool.submit(os.getpid) for _ in range(jobs)]:
                process.result()
            print(*pool._processes, flush=True)
            time.sleep(600)

        if __name__ == "__main__":
            with mock.patch.object(measuring, "in_turn", measure), \\
                    mock.patch.object(measuring.checkpoint, "digest", lambda _: ""):
                split = SimpleNamespace(device=torch.device("cpu"))
                measuring.measure_runs({("a", 0): Path("a")}, split, {}, {"split": "valid"}, 2, 1)"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=HERE, text=True, stdout=subprocess.PIPE)
    measuring = [int(number) for number in process.stdout.readline().split()]
    process.kill()
    process.wait()
    assert measuring
    try:
        wait_for(lambda: not any(alive(child) for child in measuring))
    finally:
        for child in filter(alive, measuring):
            os.kill(child, signal.SIGKILL)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
