"""Runs killed at random moments and resumed end as if nothing had happened; `make soak` kills many times."""
import json
import os
import random
import signal
import subprocess
from contextlib import suppress

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import call, start, write_images
from harness import checkpoint

KILLS = int(os.environ.get("SOAK_KILLS", 2))  # of each script
LONGEST = 2.  # seconds from the first word of a run to its end by a kill
COMMON = ["--batch-size", "8", "--log-every", "2", "--device", "cpu", "--precision", "fp32"]
VQVAE = [*COMMON, "--dataset", "folder", "--data-folder", "images", "--hidden-size", "4", "--k", "8", "--flip",
         "--num-epochs", "12"]
SCRIPTS = {
    "vqvae.py": ("vqvae", [*VQVAE, "--average-weights", "0.9"]),
    "vqgan.py": ("vqvae", [*VQVAE, "--disc-start", "6", "--disc-layers", "1", "--disc-hidden-size", "4"]),
    "pixelcnn_prior.py": ("prior", [*COMMON, "--model", "models/first", "--hidden-size-prior", "4", "--num-layers", "2",
                                    "--num-epochs", "12"]),
}


def killed(process, seconds):
    """Kill a run some seconds after it has said something; whether it had not ended by itself."""
    process.stdout.readline()
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def outcome(folder, kind, name):
    """Checkpoints, results and curves of a run, time aside."""
    run, events = folder / "models" / name, EventAccumulator(str(folder / "logs" / name))
    events.Reload()
    results = json.loads((run / "results.json").read_text())
    for cost in ("train_seconds", "ms_per_step", "peak_memory_mb"):
        del results[cost]
    checkpoints = [checkpoint.load(run / file, kind) for file in ("last.pt", "best.pt")]
    for contents in checkpoints:
        del contents["args"], contents["path"], contents["counters"]["seconds"]
    points = {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return checkpoints, results, points


def equal(one, two):
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(equal, one, two))
    return torch.equal(one, two) if torch.is_tensor(one) else one == two


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_at_random_and_resumed_is_uninterrupted(tmp_path, script):
    write_images(tmp_path, 60)
    kind, flags = SCRIPTS[script]
    if kind != "vqvae":
        assert call(tmp_path, "vqvae.py", *VQVAE[:-1], "1", "--output-folder", "first")[0] == 0
    assert call(tmp_path, script, *flags, "--output-folder", "whole")[0] == 0
    moments = random.Random(os.environ.get("SOAK_SEED", "0"))
    for _ in range(KILLS):
        if killed(start(tmp_path, script, *flags, "--output-folder", "cut", "--resume"), LONGEST * moments.random()):
            for file in (tmp_path / "models" / "cut").glob("*.pt"):
                checkpoint.load(file, "latents" if file.stem == "latents" else kind)
    code, _, err = call(tmp_path, script, *flags, "--output-folder", "cut", "--resume")
    assert code == 0, err
    assert equal(outcome(tmp_path, kind, "whole"), outcome(tmp_path, kind, "cut"))
    assert not list((tmp_path / "models" / "cut").glob(".*.tmp"))
