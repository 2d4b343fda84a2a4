"""Checkpoints and other files of a run: written whole or not at all, read safely."""
import fcntl
import hashlib
import io
import json
import os
import reprlib
import zipfile
from contextlib import contextmanager, suppress
from functools import cache, partial
from itertools import count
from pathlib import Path

import torch

from harness import distributed
from harness.errors import UserError

FORMAT = 1
TEMPORARY = ".vqvae.tmp"  # ending of what is being written
_number = count()
saved = []  # paths of a run's checkpoints that are written for sure, for what is said when this process fails
FOLDER = 0x10  # the bit of a zip entry's attributes that makes it one


def write_atomic(path, data):
    """Write bytes so that `path` holds the old or the new content, whenever the process or the machine stops.

    Of many processes, rank 0 alone writes.

    Raises:
        OSError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    if distributed.rank():
        return
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}-{next(_number)}{TEMPORARY}")
    _remove_temporary_once(path.parent.resolve())
    try:
        with open(temporary, "wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error.strerror}; the file before it is kept: make room or mend the "
                      "folder, and run again (with --resume where it was training)") from error
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_with(path, write):
    """Write what write(file) puts into a file of bytes, as `write_atomic` does."""
    buffer = io.BytesIO()
    write(buffer)
    write_atomic(path, buffer.getbuffer())


def save(path, kind, contents):
    """Save a dict of tensors and plain values as a checkpoint of `kind` ("vqvae", "prior", ...), atomically."""
    write_with(path, partial(torch.save, {"format": FORMAT, "kind": kind, **contents}))


def resolve(path):
    """The checkpoint that a path means: the file, or the best.pt of a run's folder.

    Raises:
        FileNotFoundError: there is none.
    """
    file = Path(path) / "best.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint at {file}: train one first, or give a run's folder or the path of its "
                                "best.pt or last.pt")
    return file


def load(path, kind, facts=None, remedy=None):
    """Load a checkpoint of `kind` to the CPU, executing nothing that is in it; `path` is as `resolve` takes it.

    Args:
        facts: what `check` demands of what the caller reads. remedy: what to do where it is damaged (by default, use
            another).
    Returns:
        what `save` was given, and its "path".
    Raises:
        FileNotFoundError: there is none. UserError: it is damaged, newer than this program, not of this kind, or lacks
            some of the facts.
    """
    path = resolve(path)
    with open(path, "rb") as file:
        try:
            contents = _read(file)
        except MemoryError:
            raise
        except Exception as error:  # of many kinds: what is damaged says anything
            others = (path.with_name(name) for name in ("best.pt", "last.pt"))
            other = next((f"use another, such as {other}" for other in others if other != path and other.exists()),
                         "use another")
            raise UserError(f"{path} is damaged or is no checkpoint ({type(error).__name__}): "
                            f"{remedy or other}") from error
    if not isinstance(contents, dict) or contents.get("kind") != kind:
        held = contents.get("kind") if isinstance(contents, dict) else None
        raise UserError(f"{path} is a checkpoint of {f'a {held}' if held else 'something else'}, not of a {kind}")
    if type(contents.get("format")) is not int or not 1 <= contents["format"] <= FORMAT:
        raise UserError(f"{path} has format {contents.get('format')}, this program reads up to {FORMAT}: use the "
                        "version that wrote it, or a newer one")
    with complete(path):
        check(contents, facts or {})
    return contents | {"path": str(path)}


def check(value, right, name="content"):
    """TypeError where a value that was read, called `name`, is not as it must be.

    right: its type; a function that says whether it is right; {name: such} of what is in it; a list of all these.
    """
    if isinstance(right, dict):
        check(value, dict, name)
        for inner, of_inner in right.items():
            if inner not in value:
                raise TypeError(f"its {name} has no {inner}")
            check(value[inner], of_inner, inner)
    elif isinstance(right, list):
        for one in right:
            check(value, one, name)
    elif not (isinstance(value, right) if isinstance(right, type) else right(value)):
        raise TypeError(f"its {name} is {reprlib.repr(value)}")


def _read(file):
    with zipfile.ZipFile(file) as archive:
        # Checksums, which torch.load leaves alone; and of what is marked as a folder it would read nothing.
        if archive.testzip() or any(entry.external_attr & FOLDER for entry in archive.infolist()):
            raise zipfile.BadZipFile
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


@contextmanager
def complete(path):
    """Within it, what a checkpoint lacks is a UserError that names the file."""
    try:
        yield
    except torch.OutOfMemoryError:  # no fault of the file
        raise
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not hold all that it should ({' '.join(str(error).split())[:200]}): it is "
                        "damaged or was made by another program, use another") from error


def kind_of(path):
    """Kind of the checkpoint at a path; None where there is none that can be read."""
    try:
        with open(path, "rb") as file:
            contents = _read(file)
    except MemoryError:
        raise
    except Exception:
        return None
    return contents.get("kind") if isinstance(contents, dict) else None


def remove_temporary(folder):
    """Remove what writes that were killed left in a folder; those at work hold their file."""
    for file in Path(folder).glob(f".[0-9]*{TEMPORARY}"):
        with suppress(OSError), open(file, "r+b") as left:
            fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.unlink()


_remove_temporary_once = cache(remove_temporary)  # for each folder that this process writes to


def digest(path):
    """SHA-256 of a checkpoint, which names the exact model another run was built on."""
    return hashlib.sha256(resolve(path).read_bytes()).hexdigest()


def save_json(path, values):
    write_atomic(path, (json.dumps(values, indent=2, default=str) + "\n").encode())


def load_json(path, right=dict):
    """Read a JSON file. UserError where it is damaged or is not as `check` demands."""
    try:
        values = json.loads(Path(path).read_text())
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}")
        check(values, right)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it and run again") from error
    return values


def state_of(parts):
    """A dict of anything, with the state_dict of everything in it that has one; dicts within it likewise."""
    if isinstance(parts, dict):
        return {name: state_of(part) for name, part in parts.items()}
    return parts.state_dict() if hasattr(parts, "state_dict") else parts


def restore(parts, saved):
    """Load what `state_of` made of a dict into everything in it that takes a state_dict."""
    for name, part in parts.items():
        if isinstance(part, dict):
            restore(part, saved[name])
        elif hasattr(part, "load_state_dict"):
            part.load_state_dict(saved[name])


def random_state():
    """States of the generators that training draws from, the same on every process: the CPU's and the device's."""
    return {"cpu": torch.get_rng_state()} | {name: generators.get_rng_state() for name, generators in _devices()}


def set_random_state(state):
    """Go on drawing from a `random_state`; a device that it does not name is left as it is."""
    torch.set_rng_state(state["cpu"])
    for name, generators in _devices():
        if name in state:
            generators.set_rng_state(state[name])


def _devices():
    """(name, module) of what this process computes with besides the CPU."""
    if torch.cuda.is_initialized():
        yield "cuda", torch.cuda
    if torch.backends.mps.is_available():
        yield "mps", torch.mps
