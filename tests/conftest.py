"""How tests run the scripts."""
import importlib
import io
import signal
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import CONTEXT, HERE, Forked

from harness import cli
from harness.folder import lock
from harness.run import Run

THREADS = torch.get_num_threads()
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore


@pytest.fixture(autouse=True)
def same_threads():
    """Sums depend on the number of threads, which compare.py sets where it measures."""
    torch.set_num_threads(THREADS)


def write_images(folder, count, side=16):
    """Write `count` images of side x side pixels, two colours each, to <folder>/images."""
    (folder / "images").mkdir(parents=True)
    random, drawn = np.random.default_rng(0), {}
    while len(drawn) < count:  # each image once: copies are left out
        halves = random.choice([20, 120, 220], (1, 2, 3)).astype(np.uint8)
        drawn.setdefault(halves.tobytes(), Image.fromarray(halves))
    for i, halves in enumerate(drawn.values()):
        halves.resize((side, side), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.png")


@pytest.fixture
def folder(tmp_path):
    """A working directory with 40 images 16x16."""
    write_images(tmp_path, 40)
    return tmp_path


def call(folder, script, *flags, **environment):
    """Run a script's command line in a folder, within this process: exit status, stdout, stderr."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out, \
            redirect_stderr(io.StringIO()) as err:
        patch.chdir(folder)
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        for name, value in environment.items():
            patch.setenv(name, value)
        try:
            cli.run(importlib.import_module(script.removesuffix(".py").replace("/", ".")).main)
            code = 0
        except SystemExit as stop:
            code = stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return code, out.getvalue(), err.getvalue()


def start(folder, script, *flags):
    """Start a script as a process of its own, to be killed."""
    return Forked(folder, HERE / script, *flags)


def _hold(folder, asked):
    held = lock(Path(folder))
    asked.send("held")
    asked.recv()
    held.close()


@contextmanager
def at_work(folder):
    """Another process holds the lock of a run's folder."""
    told, asked = CONTEXT.Pipe()
    process = CONTEXT.Process(target=_hold, args=(str(Path(folder).resolve()), asked))
    process.start()
    assert told.recv() == "held"
    try:
        yield
    finally:
        told.send("enough")
        process.join()


def stop_after(process, line_start, number):
    """Send a signal once a line of output starts so; returns what was left of stdout, and stderr."""
    for line in process.stdout:
        if line.startswith(line_start):
            break
    process.send_signal(number)
    return process.communicate(timeout=60)


def updates_take(monkeypatch, seconds):
    """Let each update of a run take so many seconds, by a clock that stands still otherwise."""
    clock, update = [100.], Run.update

    def slow(run, optimizer):
        clock[0] += seconds
        update(run, optimizer)
    monkeypatch.setattr(Run, "update", slow)
    monkeypatch.setattr("harness.run.time", SimpleNamespace(perf_counter=lambda: clock[0]))
