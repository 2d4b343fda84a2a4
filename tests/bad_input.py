"""How bad input to the scripts is tested: one line that names what is wrong, nothing written, no hang.

A case is a row of a table: (name, what is done to the folder, script and flags, what the line must name). The folder
holds images/ (24 of colour, 16x16) and trained models/a (of these) and models/grey (of grey/, as many).
"""
import shutil
import signal
from pathlib import Path

import pytest
from conftest import call, write_images
from test_datasets import pictures

SECONDS = 60  # more is a hang
LONGEST = 1000  # characters of a line that is still read
SMALL = ("--hidden-size", "8", "--k", "16", "--batch-size", "8", "--num-epochs", "1", "--device", "cpu", "--precision",
         "fp32", "--no-download", "--num-workers", "0")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    write_images(folder, 24)
    pictures(folder / "grey", 24, (16, 16), mode="L")
    for name, images in (("a", "images"), ("grey", "grey")):
        code, _, err = call(folder, "vqvae.py", *SMALL, "--data-folder", images, "--output-folder", name)
        assert code == 0, err
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "work"))


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def check(folder, command, culprit):
    """Run a command line that must fail as every bad input must."""
    script, *flags = command
    before = files(folder)
    hang = signal.signal(signal.SIGALRM, lambda *_: pytest.fail(f"hangs for {SECONDS} s"))
    signal.alarm(SECONDS)
    try:
        code, out, err = call(folder, script, *flags)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, hang)
    lines = err.strip().splitlines()
    told = [line for line in lines if line.startswith(f"{Path(script).name}: error: ")]
    assert code == 2 and len(told) == 1 and "Traceback" not in err, (code, out, err)
    assert all(line.startswith(("usage:", " ")) for line in lines if line not in told), err  # of a wrong flag
    assert culprit in told[0] and len(told[0]) < LONGEST, told[0]
    assert files(folder) == before


# --- what is done to the folder

def nothing(folder):
    pass


def empty(folder):
    (folder / "data").mkdir()


# --- command lines

def vqvae(*flags, data="data"):
    return "vqvae.py", *SMALL, "--data-folder", data, *flags


IMAGES = vqvae(data="images")
BENCHMARK = "benchmarks/benchmark.py"
EVALUATE = ("evaluate.py", "--no-features", "--device", "cpu", "--model")
RECONSTRUCT = ("reconstruct.py", "--device", "cpu", "--model", "models/a/best.pt")


def ids(cases):
    """Names of the cases of a table, each its own."""
    names = [case[0] for case in cases]
    assert len(set(names)) == len(names)
    return names
