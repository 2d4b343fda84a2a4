"""Whose folder a run may use: what is refused, what a run goes on from, and what keeps other processes out."""
import fcntl
import os
import platform
import re
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

from harness import checkpoint, cli, distributed, fields
from harness.errors import UserError
from harness.images import RUN_FOLDERS

DAMAGED = "--overwrite starts anew, and best.pt goes with it"  # what to do where last.pt is
WHERE = ("data_folder",)  # flags that say where the data of a run are, which is nobody's business but its own


def run_folder(parent, name):
    """Where the run of a name keeps its files under models or logs.

    In a SLURM job the job's id is added, unless the name is that of an earlier job's run.
    """
    job, earlier = os.environ.get("SLURM_JOB_ID"), re.search(r"-\d+$", name) and holds_run(Path("models") / name)
    return Path(parent) / (name + (f"-{job}" if job and not earlier else ""))


def trained_folder(name):
    """Where a run of a name, that something reads, keeps its files: a SLURM job's own, or one without a job's id."""
    plain_one = Path("models") / name
    return plain_one if holds_run(plain_one) else run_folder("models", name)


def holds_run(folder):
    """Whether a folder is a run's, even of one that has lost some of its files."""
    return any((folder / name).exists() for name in ("args.json", "last.pt", "best.pt"))


def check_folder(folder, kind, resume=False, overwrite=False, reads=()):
    """UserError where a run of `kind` cannot use the folder: it is taken, or holds what the run `reads`.

    Args:
        resume, overwrite: the flags that allow a folder that holds a run. reads: paths of checkpoints; None is none.
    """
    another = "give another --output-folder"
    for path in filter(None, reads):
        if checkpoint.resolve(path).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder} holds {path}, which this run reads: {another}")
    last, best = folder / "last.pt", folder / "best.pt"
    if (folder / "results.json").exists() and not holds_run(folder) and not overwrite:
        raise UserError(f"{folder} holds the results.json of something else: pass --overwrite to replace it, or "
                        f"{another}")
    if holds_run(folder) and not (resume or overwrite):
        raise UserError(f"{folder} already holds a run: pass --resume to go on with it, --overwrite to replace it, or "
                        f"{another}")
    held = checkpoint.kind_of(last) or checkpoint.kind_of(best)
    if held not in (None, kind):
        raise UserError(f"{folder} holds the run of a {held}, not of a {kind}: {another}")
    if resume and best.exists() and not last.exists():
        raise UserError(f"{folder} holds a best.pt but no last.pt to go on from: pass --overwrite to replace the run, "
                        f"or {another}")


def check_data(data, name):
    """UserError where the folder `data`, None for none, and those of the run of a name would share files.

    Else the run would replace what is in it, and its own pictures would become data.
    """
    for parent in RUN_FOLDERS if data else ():
        inner, own = Path(data).resolve(), run_folder(parent, name).resolve()
        if inner.is_relative_to(own) or (own.is_relative_to(inner) and inner.is_relative_to(Path(parent).resolve())):
            raise UserError(f"--data-folder {data} would share files with {run_folder(parent, name)}, where this run "
                            "keeps its own pictures: move the images elsewhere, or give another --output-folder")


def last_checkpoint(folder, kind, flags, may_change):
    """The checkpoint that a run with these flags goes on from; None where the folder has none.

    Args:
        flags: {name: value}. may_change: names of those that may differ from the run's; another number of processes may
            also have another batch size.
    Raises:
        UserError: the checkpoint is damaged, or another flag differs.
    """
    path = folder / "last.pt"
    if not path.exists():
        print(f"nothing to resume in {folder}: starting anew")
        return None
    contents = checkpoint.load(path, kind, fields.RUN, DAMAGED)
    before = contents["args"]
    if contents["counters"]["world"] != distributed.world_size():
        may_change = may_change | {"batch_size"}
    now, may_change = plain(flags), may_change | {"output_folder"}  # the folder may have another name by now
    differ = [f"--{name.replace('_', '-')} {before.get(name)} (now {now.get(name)})"
              for name in sorted(before.keys() | now.keys())
              if name not in may_change and before.get(name) != now.get(name)
              and (name in before or name in cli.changed)]  # a flag that was added since, at its default
    if differ:
        raise UserError(f"{folder} was trained with {', '.join(differ)}: --resume needs the same flags. It last ran "
                        f"as: {shlex.join(contents['command'])}")
    own = re.escape(before["output_folder"]) + r"(-\d+)?"  # with the id of a job
    if not re.fullmatch(own, now["output_folder"]):
        print(f"{folder} was {run_folder('models', before['output_folder'])} before: its curves so far stay in "
              f"{run_folder('logs', before['output_folder'])}")
    return contents


def made_with():
    """What a run depends on besides its flags: {"python", "torch": versions, "commit": of this project, None where
    that is unknown; it ends in -dirty where files were changed since}.
    """
    project = Path(__file__).resolve().parent.parent
    git = ["git", f"--git-dir={project / '.git'}", f"--work-tree={project}", "describe", "--always", "--dirty",
           "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True, timeout=10,
                                env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"}).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        commit = None
    return {"python": platform.python_version(), "torch": torch.__version__, "commit": commit}


def lost_best(folder, last):
    """What has become of the best.pt of a run; None where it goes with last.pt, or none was kept yet.

    last: contents of its last.pt.
    Raises:
        UserError: it is there, but of another run or of another epoch than the best one of the run.
    """
    path = folder / "best.pt"
    if last["best"] is None:
        return None
    if not path.exists():
        return "is gone"
    try:
        best = checkpoint.load(path, last["kind"])
    except UserError:
        return "is damaged"
    with checkpoint.complete(path):
        ahead = best["counters"]["step"] > (last["counters"].get("best_step") or last["counters"]["step"])
        same = best.get("run") == last.get("run") and (ahead or best["best"] == last["best"])
    if not same:
        raise UserError(f"{path} is not the one that {folder / 'last.pt'} goes with, but of another run or epoch: put "
                        "its own back, or delete it")
    if ahead:  # the run was killed before it saved last.pt, and may go on otherwise
        return "is ahead of last.pt"
    return None if _alike(best.get("model"), last["model"]) else "is damaged"


def _alike(weights, others):
    """Whether these are finite weights with the names and shapes of the others."""
    return isinstance(weights, dict) and weights.keys() == others.keys() and all(
        torch.is_tensor(weights[name]) and weights[name].shape == value.shape and bool(weights[name].isfinite().all())
        for name, value in others.items())


def shared(args, command):
    """Flags and command line of a run without those that say where its data are: what best.pt has, which is shared."""
    flags, kept, words = [f"--{name.replace('_', '-')}" for name in WHERE], [], iter(command)
    for word in words:
        if word in flags:
            next(words, None)
        elif word.partition("=")[0] not in flags:
            kept.append(word)
    return {name: value for name, value in args.items() if name not in WHERE}, kept


def plain(flags):
    """Flags as a checkpoint keeps them: tuples as lists."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}


def lock(folder):
    """An open file that keeps other processes out of a run's folder until this one ends, however it ends.

    Raises:
        UserError: another process holds it.
    """
    file = open(folder / ".lock", "a+")  # noqa: SIM115 (for as long as the process lives)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        raise UserError(f"{folder} is in use by process {file.read().strip() or 'of another machine'}: wait for it, "
                        "stop it, or give another --output-folder") from None
    except OSError:
        return file  # a file system without locks
    with suppress(OSError):  # a full disk, which is reported where something is lost
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file
