"""Runs killed at random moments and resumed end as if nothing had happened; `make soak` kills many times."""
import json
import os
import random
import signal
import subprocess
from contextlib import suppress

import pytest
import torch
from conftest import call, start, write_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness import checkpoint

KILLS = int(os.environ.get("SOAK_KILLS", 2))  # of each script
EPOCHS = 8 * (KILLS + 1)  # so many that a run outlives all its kills
LONGEST = 0.3  # seconds from the last epoch that is waited for to the kill
COMMON = ["--batch-size", "8", "--log-every", "2", "--device", "cpu", "--precision", "fp32"]
VQVAE = [*COMMON, "--dataset", "folder", "--data-folder", "images", "--hidden-size", "4", "--k", "8", "--flip",
         "--num-epochs", str(EPOCHS)]
LATENTS = [*COMMON, "--model", "models/first", "--hidden-size-prior", "4", "--num-layers", "2", "--num-epochs",
           str(EPOCHS)]
SCRIPTS = {
    "vqvae.py": ("vqvae", [*VQVAE, "--average-weights", "0.9"]),
    "vqgan.py": ("vqvae", [*VQVAE, "--disc-start", "6", "--disc-layers", "1", "--disc-hidden-size", "4"]),
    "pixelcnn_prior.py": ("prior", LATENTS),
    "stacked_vqvae.py": ("stacked", [*LATENTS, "--codes", "2"]),
    "video_prior.py": ("video", LATENTS),
}


def kill(process, epochs, seconds):
    """Kill a run some seconds after it has printed so many epochs; counted in epochs, a slow machine kills as late."""
    for line in process.stdout:
        epochs -= line.startswith("epoch")
        if epochs <= 0:
            break
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "the run ended before it was killed"


def outcome(folder, kind, name):
    """Checkpoints, results and curves of a run, time aside."""
    run, events = folder / "models" / name, EventAccumulator(str(folder / "logs" / name))
    events.Reload()
    results = json.loads((run / "results.json").read_text())
    for cost in ("train_seconds", "ms_per_step", "peak_memory_mb"):
        del results[cost]
    del results["run"]
    checkpoints = [checkpoint.load(run / file, kind) for file in ("last.pt", "best.pt")]
    for contents in checkpoints:
        del contents["args"], contents["command"], contents["path"], contents["run"], contents["counters"]["seconds"]
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
    for path in sorted((tmp_path / "images").iterdir()):  # ten clips, or classes
        clip = path.parent / f"clip{int(path.stem) // 6}"
        clip.mkdir(exist_ok=True)
        path.rename(clip / path.name)
    kind, flags = SCRIPTS[script]
    if kind != "vqvae":
        assert call(tmp_path, "vqvae.py", *VQVAE[:-1], "1", "--output-folder", "first")[0] == 0
    assert call(tmp_path, script, *flags, "--output-folder", "whole")[0] == 0
    moments = random.Random(os.environ.get("SOAK_SEED", "0"))
    cut = tmp_path / "models" / "cut"
    for number in range(KILLS):
        epochs = 0 if number % 4 == 3 else moments.randint(1, 3)  # 0: while it starts or is taken up again
        kill(start(tmp_path, script, *flags, "--output-folder", "cut", "--resume"), epochs, LONGEST * moments.random())
        for file in cut.glob("*.pt"):
            checkpoint.load(file, "latents" if file.stem == "latents" else kind)
    assert 0 < checkpoint.load(cut / "last.pt", kind)["counters"]["epoch"] < EPOCHS, "no kill hit the training"
    code, _, err = call(tmp_path, script, *flags, "--output-folder", "cut", "--resume")
    assert code == 0, err
    assert equal(outcome(tmp_path, kind, "whole"), outcome(tmp_path, kind, "cut"))
    assert not list(cut.glob(".*.tmp"))
