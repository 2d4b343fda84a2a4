"""Files are written whole or not at all, and read safely."""
import fcntl
import io
import os
import zipfile
from pathlib import Path

import pytest
import torch

from harness import checkpoint


class Payload:
    """An object that would run a command if it were unpickled."""

    def __reduce__(self):
        return os.system, ("false",)


def test_round_trip(tmp_path):
    checkpoint.save(tmp_path / "a.pt", "vqvae", {"model": {"w": torch.arange(3)}, "args": {"k": 512, "size": [28, 28]}})
    found = checkpoint.load(tmp_path / "a.pt", "vqvae")
    assert torch.equal(found["model"]["w"], torch.arange(3)) and found["args"] == {"k": 512, "size": [28, 28]}


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "a.pt", "vqvae", {"value": 1})

    def full(descriptor):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left.*kept"):
        checkpoint.save(tmp_path / "a.pt", "vqvae", {"value": 2})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "a.pt", "vqvae")["value"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_what_killed_writes_left_is_removed_and_what_is_being_written_is_not(tmp_path, monkeypatch):
    left, held, others = (tmp_path / name for name in (".4711-1.vqvae.tmp", ".4712-1.vqvae.tmp", ".notes.2024.tmp"))
    left.write_bytes(b"half"), others.write_bytes(b"whatever a user keeps")
    with open(held, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        checkpoint.save_json(tmp_path / "results.json", {})
    assert set(tmp_path.iterdir()) == {held, others, tmp_path / "results.json"}
    monkeypatch.setattr(os, "fsync", lambda descriptor: checkpoint.remove_temporary(tmp_path))
    checkpoint.save_json(tmp_path / "results.json", {"written": "while another process starts"})
    assert checkpoint.load_json(tmp_path / "results.json") and not held.exists()


def _pickled(code):
    """A checkpoint whose checksums are right and whose pickle is this."""
    def forge(_):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in (("data.pkl", code), ("version", b"3\n"), ("byteorder", b"little")):
                archive.writestr(f"archive/{name}", data)
        return file.getvalue()
    return forge


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:len(data) // 2], lambda data: b"nothing",
                                    _pickled(b"\x80\x02."), _pickled(b"\x80\x02h\x05.")])  # without a value
def test_missing_damaged_or_foreign_files(tmp_path, damage):
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        checkpoint.load(path, "vqvae")
    checkpoint.save(path, "vqvae", {"value": 1})
    with pytest.raises(ValueError, match="checkpoint of a vqvae, not of a prior"):
        checkpoint.load(path, "prior")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(path, "vqvae")


def test_a_flipped_bit_in_the_list_of_contents_is_noticed_or_changes_nothing(tmp_path):
    path, model = tmp_path / "a.pt", {name: torch.randn(5) for name in "ab"}
    checkpoint.save(path, "vqvae", {"model": model})
    data = path.read_bytes()
    name = b"archive/data/0"  # of a tensor, last in its row of 46 bytes and a name
    start, end = data.rindex(name) - 46, data.rindex(name) + len(name)
    noticed = 0
    for bit in range(8 * start, 8 * end):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = checkpoint.load(path, "vqvae")["model"]
            assert all(torch.equal(found[name], value) for name, value in model.items()), bit
        except ValueError as error:
            assert "damaged" in str(error), bit
            noticed += 1
    assert noticed > 200


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    torch.save({"kind": "vqvae", "payload": Payload()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="damaged or is no checkpoint"):
        checkpoint.load(tmp_path / "a.pt", "vqvae")


def test_a_lack_of_memory_is_no_damage():
    with pytest.raises(torch.OutOfMemoryError), checkpoint.complete("last.pt"):
        raise torch.OutOfMemoryError


def test_digest_names_the_content(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"a"), two.write_bytes(b"a")
    assert checkpoint.digest(one) == checkpoint.digest(two)
    Path(two).write_bytes(b"b")
    assert checkpoint.digest(one) != checkpoint.digest(two)


def test_random_state_goes_on_where_it_was():
    state = checkpoint.random_state()
    drawn = torch.rand(3)
    checkpoint.set_random_state(state)
    assert torch.equal(torch.rand(3), drawn)
