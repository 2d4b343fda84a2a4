"""Checkpoints of a run: damaged ones, those of another make, and when one is good."""
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import call
from small_runs import fails, run

from harness import checkpoint, distributed


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


def test_a_checkpoint_is_good_once_all_processes_say_so(folder, monkeypatch):
    # The process that is to write it is gone: it came to the barriers of the data and of the folder, and to no more.
    monkeypatch.setattr(checkpoint, "saved", [])
    calls = iter([None, None])

    def barrier():
        if next(calls, "lost") == "lost":
            raise RuntimeError("gloo: connection closed")
    monkeypatch.setattr(distributed, "barrier", barrier)
    with pytest.raises(RuntimeError, match="connection closed"):
        run(folder, "--num-epochs", "1")
    assert (folder / "models" / "vqvae" / "last.pt").exists() and not checkpoint.saved
    monkeypatch.undo()
    assert run(folder, "--num-epochs", "1", "--overwrite")[0] == 0
    assert Path("models/vqvae/last.pt") in checkpoint.saved
