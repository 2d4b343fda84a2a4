"""What a long job says of itself: how much is done, and how long the rest takes."""
import io
import itertools
import re
from contextlib import redirect_stderr

import pytest
import torch
from conftest import call, updates_take
from torch import nn

from harness import progress, report
from harness.run import Run
from modules import GatedPixelCNN, VectorQuantizedVAE
from quantizers import VQEmbedding

SMALL = ["--data-folder", "images", "--hidden-size", "4", "--k", "8", "--batch-size", "8", "--device", "cpu"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that `progress` reads, in seconds: `clock[0] += 5`."""
    now = [0.]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (5400, "90 min"),
                                           (9000, "2.5 h")])
def test_a_duration_has_the_unit_that_suits_it(seconds, text):
    assert progress.duration(seconds) == text


def test_without_a_terminal_there_is_a_line_a_minute(clock, capsys):
    with progress.Progress("encoding train", 1000) as job:
        for _ in range(10):
            clock[0] += 30
            job.add(100)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"encoding train: {n} of 1000 images, about {left} to go"
                     for n, left in ((200, "4 min"), (400, "3 min"), (600, "2 min"), (800, "60 s"), (1000, "0 s"))]


def test_a_job_that_goes_on_is_judged_by_what_it_has_done_itself(clock, capsys):
    with progress.Progress("job", 1000, done=900) as job:
        clock[0] += 100
        job.add(50)
    assert "950 of 1000 images, about 2 min to go" in capsys.readouterr().out  # 100 s for 50: 100 s for the other 50


def test_on_a_terminal_there_is_a_bar_and_no_line(clock, capsys):
    with redirect_stderr(Terminal()) as err, progress.Progress("encoding train", 1000) as job:
        clock[0] += 1000
        job.add(400, "loss 0.5")
        job._bar.refresh()
    assert "encoding train:  40%" in err.getvalue() and "loss 0.5" in err.getvalue()
    assert capsys.readouterr().out == ""


def test_pace_leaves_out_the_first_steps_and_counts_what_comes_between():
    now = [0.]
    pace = progress.Pace(lambda: now[0])
    for seconds in (100., 50., 50., 1., 1., 1., 1.):
        assert pace.seconds() is None or now[0] > 202
        now[0] += seconds
        pace.step()
    assert pace.seconds() == 1 and pace.timed() == 4
    now[0] += 4  # of validation
    assert pace.seconds() == 2


def test_a_run_says_its_updates_and_warns_of_few(folder):
    code, out, err = call(folder, "vqvae.py", *SMALL, "--num-epochs", "2", "--accumulate", "3")
    assert code == 0, err
    plan, warning = out.splitlines()[2:4]  # 32 images: 4 batches
    assert plan == "2 updates an epoch x 2 epochs = 4 updates" and "--num-epochs 500" in warning and \
        "--batch-size" in warning and warning.startswith("warning: 4 updates are few")
    code, out, _ = call(folder, "vqvae.py", *SMALL, "--num-epochs", "3", "--accumulate", "3", "--resume")
    assert "2 updates an epoch x 3 epochs = 6 updates, 4 of them done" in out
    assert "--warmup-steps" not in out
    assert "warning: --warmup-steps 12 leaves nothing of the 12 steps" in call(
        folder, "vqvae.py", *SMALL, "--num-epochs", "3", "--warmup-steps", "12", "--overwrite")[1]
    assert "warning" not in progress.plan(100, 10) and "warning" in progress.plan(99, 10)


def test_epoch_lines_and_minute_lines_have_the_time_that_the_whole_run_has_left(folder, monkeypatch):
    now = itertools.count(0., 1.)
    monkeypatch.setattr(progress.time, "monotonic", now.__next__)
    monkeypatch.setattr(progress, "LINE_EVERY", 2.)
    monkeypatch.setattr(Run, "_seconds_left", lambda run: 60. * (8 - run.step))
    code, out, err = call(folder, "vqvae.py", *SMALL, "--num-epochs", "2", "--log-every", "8")
    assert code == 0, err
    for epoch, left in ((1, 6), (2, 2)):  # in the second too it is the training loss that stands there
        line = rf"^epoch {epoch}/2: 16 of 32 images, reconstruction [\d.]+, about {left} min to go$"
        assert re.search(line, out, re.M), out
    first, second = re.findall(r"^epoch ./2  .*", out, re.M)
    assert first.endswith("  about 4 min to go") and "to go" not in second


def test_the_time_left_is_that_of_the_steps_left(folder, monkeypatch):
    updates_take(monkeypatch, 2)
    update, seen = Run.update, []

    def watched(run, optimizer):
        update(run, optimizer)
        seen.append((run.step + 1, run._seconds_left()))
    monkeypatch.setattr(Run, "update", watched)
    code, out, err = call(folder, "vqvae.py", *SMALL, "--num-epochs", "3")
    assert code == 0, err
    assert "about 12 s to go, 2 s an update" in out  # once 6 of 12 steps are done: 12 s are more than `SOON`
    assert [left for _, left in seen[:5]] == [0.] * 5 and seen[-1][1] < 6


def test_a_run_of_minutes_warns_once_it_knows_its_pace(folder, monkeypatch):
    updates_take(monkeypatch, 2)
    code, out, err = call(folder, "vqvae.py", *SMALL, "--minutes", "0.5")
    assert code == 0, err
    assert "4 updates an epoch, for 0.5 minutes\n" in out
    assert "about 18 s to go, 2 s an update\nwarning: 15 updates are few" in out and "--minutes" in out


# --- what a model costs

def test_parameters_and_multiply_adds_are_those_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ConvTranspose2d(5, 2, 4, 2, 1))
    parameters = 3 * 5 * 9 + 5 + 10 + 5 * 2 * 16 + 2
    products = 64 * 64 * 3 * 5 * 9 + 64 * 64 * 5 * 2 * 16
    line = report.size_of(model.train(), torch.zeros(1, 3, 64, 64))
    assert line == f"model: {parameters} parameters, {products / 1e6:.2g} million multiply-adds an image"
    assert model.training and model[1].num_batches_tracked == 0
    assert " 2.0 million multiply-adds" in report.size_of(VQEmbedding(125, 64), torch.zeros(1, 64, 10, 25))


@pytest.mark.parametrize("model, inputs", [
    (VectorQuantizedVAE(3, 8, 16, quantizer="ema"), (torch.zeros(1, 3, 16, 16),)),
    (GatedPixelCNN(16, 8, 2, 3), (torch.zeros(1, 4, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)))])
def test_to_count_changes_nothing_and_draws_nothing(model, inputs):
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    report.size_of(model, *inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.training
