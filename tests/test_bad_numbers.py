"""Numbers of flags: every one has bounds, and what is beyond them is refused before anything is read or built."""
import argparse
import importlib

import pytest
from conftest import HERE, call

from harness import cli

SCRIPTS = sorted(path.stem for path in HERE.glob("*.py") if "cli.run(main" in path.read_text())
BEYOND = [str(2 ** 63), "1" + 20 * "0", "9" * 5000, "-1", "1.5", "1e3", "0x10", "", " ", "nan", "inf", "true", "٣x"]
# Flags of which any number is fine: it counts what the run does anyway, or is no more than there is.
COUNTS = {"seed", "num_epochs", "log_every", "sample_every", "limit", "batch_size", "accumulate", "tile", "top_k"}
SIZES = {"k", "hidden_size", "hidden_size_vae", "hidden_size_prior", "disc_hidden_size"}  # what does not fit is said


def numbers(script, monkeypatch):
    """{flag: its parser} of the flags of a script that take whole numbers."""
    parsers = []
    monkeypatch.setattr(cli.Parser, "parse_known_args", lambda self, *_: parsers.append(self) or self.exit(0))
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_args()
    monkeypatch.undo()
    return {action.dest: action.type for action in parsers[0]._actions
            if getattr(action.type, "func", action.type) is cli.whole}


@pytest.mark.parametrize("script", SCRIPTS)
def test_whole_numbers_have_bounds(script, monkeypatch):
    found = numbers(script, monkeypatch)
    assert found
    for name, take in found.items():
        for text in BEYOND:
            with pytest.raises(argparse.ArgumentTypeError, match="must be a whole number from [01] to"):
                take(text)
        if name not in COUNTS | SIZES:
            for text in (str(2 ** 63 - 1), str(2 ** 40)):
                with pytest.raises(argparse.ArgumentTypeError, match="to [0-9]{2,7}, got"):
                    take(text)


def test_numbers_of_other_kinds_have_bounds():
    for text in ("1" + 20 * "0", "0x0", "16385", "16x99999999999999999999", "9" * 5000, "٣x٣x٣", "-16"):
        with pytest.raises(argparse.ArgumentTypeError, match="in pixels, at most 16384"):
            cli.image_size(text)
    for take in (cli.not_negative, cli.positive, cli.share, cli.steps_or_share):
        for text in ("nan", "inf", "-inf", "1e39", "-1", "", "1_0x", "9" * 5000):
            with pytest.raises(argparse.ArgumentTypeError):
                take(text)


@pytest.mark.parametrize("command", [
    ("vqvae.py", "--image-size", "100000000000000000000"), ("vqvae.py", "--fine-blocks", "10000000"),
    ("vqgan.py", "--disc-layers", str(2 ** 40)), ("vqvae.py", "--num-workers", "1000000"),
    *((script, "--model", "m", "--num-layers", number) for script in (
        "pixelcnn_prior.py", "stacked_vqvae.py", "video_prior.py") for number in ("100000", str(2 ** 40))),
    *((script, "--model", "m", "--sample", str(2 ** 63 - 1)) for script in ("pixelcnn_prior.py", "stacked_vqvae.py")),
    ("stacked_vqvae.py", "--model", "m", "--draws", str(2 ** 63 - 1)),
    ("stacked_vqvae.py", "--model", "m", "--codes", str(2 ** 63 - 1)),
    ("video_prior.py", "--model", "m", "--rollout", str(2 ** 63 - 1)),
    ("video_prior.py", "--model", "m", "--starts", str(2 ** 63 - 1)),
    ("evaluate.py", "--prior", "m", "--samples", str(2 ** 63 - 1)), ("compare.py", "--losses", "ssim", "--seeds",
                                                                     str(2 ** 63 - 1)),
    ("compare.py", "--losses", "mse,fine-blocks=10000000")])
def test_a_number_beyond_its_bounds_is_one_line(tmp_path, command):
    script, *flags = command
    code, out, err = call(tmp_path, script, *flags)
    told = [line for line in err.splitlines() if ": error: " in line]
    assert code == 2 and len(told) == 1 and "Traceback" not in err and not out and not list(tmp_path.iterdir())
    assert flags[-2].lstrip("-") in told[0] or "fine-blocks" in told[0], told
