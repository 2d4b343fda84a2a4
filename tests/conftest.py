"""How tests run the scripts."""
import importlib
import io
import signal
import subprocess
import sys
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness import cli

HERE = Path(__file__).parent.parent
THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def same_threads():
    """Sums depend on the number of threads, which compare.py sets where it measures."""
    torch.set_num_threads(THREADS)


def write_images(folder, count, side=16):
    """Write `count` images of side x side pixels, two colours each, to <folder>/images."""
    (folder / "images").mkdir()
    random = np.random.default_rng(0)
    for i in range(count):
        halves = Image.fromarray(random.choice([20, 120, 220], (1, 2, 3)).astype(np.uint8))
        halves.resize((side, side), Image.Resampling.BICUBIC).save(folder / "images" / f"{i}.png")


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
    return subprocess.Popen([sys.executable, str(HERE / script), *map(str, flags)], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextmanager
def at_work(folder):
    """Another process holds the lock of a run's folder."""
    code = "import sys\nfrom pathlib import Path\nfrom harness.folder import lock\nheld = lock(Path(sys.argv[1]))\n" \
        "print('held', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code, str(Path(folder).resolve())], cwd=HERE, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield
        finally:
            process.communicate("\n")


def stop_after(process, line_start, number):
    """Send a signal once a line of output starts so; returns what was left of stdout, and stderr."""
    for line in process.stdout:
        if line.startswith(line_start):
            break
    process.send_signal(number)
    return process.communicate(timeout=60)
