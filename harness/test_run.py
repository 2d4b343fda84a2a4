"""A run's folder, curves and checkpoints where something goes wrong, through the training script."""
import json
import os
import signal
import subprocess
import sys
import zipfile

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import HERE, call, start, stop_after, write_images
from harness import checkpoint, cli
from harness.run import lock

SMALL = ["--dataset", "folder", "--data-folder", "images", "--hidden-size", "4", "--k", "8", "--batch-size", "8",
         "--log-every", "2", "--device", "cpu", "--precision", "fp32", "--seed", "1"]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path, 40)
    return tmp_path


def run(folder, *flags, script="vqvae.py"):
    return call(folder, script, *SMALL, *flags)


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
    left = folder / "models" / "vqvae" / ".last.pt.4711.tmp"
    left.write_bytes(b"half")
    assert run(folder, "--num-epochs", "1")[0] == 0 and not left.exists()


# --- what is not finite

def test_a_validation_that_is_not_finite_leaves_the_last_good_state(folder):
    assert run(folder, "--num-epochs", "1")[0] == 0
    before = {name: (folder / "models" / "vqvae" / name).read_bytes() for name in ("last.pt", "best.pt")}
    code = ("import sys, torch, vqvae, experiment; from harness import cli\n"
            "real = experiment.measure\n"
            "def broken(*a, **k):\n    v, f = real(*a, **k)\n    return v, f | {'loss': float('nan')}\n"
            "experiment.measure = broken\nsys.argv[0] = 'vqvae.py'\ncli.run(vqvae.main)")
    done = subprocess.run([sys.executable, "-c", code, *SMALL, "--num-epochs", "3", "--resume"], cwd=folder, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    fails((done.returncode, done.stdout, done.stderr), "not finite at step 8", "--resume", "--lr", "--precision fp32")
    assert before == {name: (folder / "models" / "vqvae" / name).read_bytes() for name in before}
    assert run(folder, "--num-epochs", "3", "--resume", "--lr", "1e-5", "--precision", "bf16")[0] == 0


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
    assert whole == cut and [step for step, _ in whole["valid/psnr"]] == [3, 7, 11, 15]
    assert [step for step, _ in whole["loss/train/reconstruction"]] == list(range(0, 16, 2))


def test_only_a_few_test_figures_are_shown(folder):
    assert run(folder, "--num-epochs", "1")[0] == 0
    shown = curves(folder, "vqvae/hparams")
    assert 3 < len(shown) < 10 and all(tag.startswith("test/") for tag in shown)
    assert not any(tag.startswith("final/") for tag in curves(folder))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_curves_ends_the_run_in_one_line(folder):
    code = ("import sys, vqvae; from harness import cli, curves\n"
            "real = curves.EventsWriter\n"
            "class Full(real):\n    def __init__(self, *a):\n        super().__init__(*a)\n"
            "        self._py_recordio_writer._writer = open('/dev/full', 'wb')\n"
            "curves.EventsWriter = Full\nsys.argv[0] = 'vqvae.py'\ncli.run(vqvae.main)")
    done = subprocess.run([sys.executable, "-c", code, *SMALL, "--num-epochs", "3"], cwd=folder, text=True, timeout=120,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(HERE)})
    fails((done.returncode, done.stdout, done.stderr), "cannot write the curves", "No space left")
    checkpoint.load(folder / "models" / "vqvae" / "last.pt", "vqvae")


def test_curves_in_a_folder_that_cannot_be_made(folder):
    (folder / "logs").write_text("a file")
    fails(run(folder), "cannot write the curves in logs/vqvae")


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
        raise ValueError("first\n  second: not to lose")
    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr().err.endswith("error: first second: not to lose\n")
