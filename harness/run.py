"""One training run: its folders, counters, schedule, curves, checkpoints and signals."""
import fcntl
import math
import os
import resource
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from harness import checkpoint, cli, curves, distributed
from harness.device import set_lr
from harness.errors import UserError

# All other flags define a run, but for those a script names.
MAY_CHANGE_ON_RESUME = {"num_epochs", "minutes", "device", "resume", "overwrite", "log_every", "compile",
                        "no_graph", "lr", "precision"}


def peak_memory_mb(device):
    """Most memory held at once so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    unit = 1 if sys.platform == "darwin" else 2 ** 10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


def run_folder(parent, args):
    """Where a run keeps its files under models or logs: its name and, in a SLURM job, the job's id."""
    job = os.environ.get("SLURM_JOB_ID")
    return Path(parent) / (args.output_folder + (f"-{job}" if job else ""))


def holds_run(folder):
    """Whether a folder is a run's, even of one that has lost some of its files."""
    return any((folder / name).exists() for name in ("args.json", "last.pt", "best.pt"))


def check_folder(args, kind, reads=()):
    """UserError where a run of `kind` cannot go to the output folder: it is taken, or holds what the run `reads`.

    Args:
        reads: paths of checkpoints, None among them for none.
    """
    folder = run_folder("models", args)
    for path in filter(None, reads):
        if checkpoint.resolve(path).resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{folder} holds {path}, which this run reads: give another --output-folder")
    last, best = folder / "last.pt", folder / "best.pt"
    if (folder / "results.json").exists() and not holds_run(folder) and not args.overwrite:
        raise UserError(f"{folder} holds the results.json of something else: pass --overwrite to replace it, or "
                        "another --output-folder")
    if holds_run(folder) and not (args.resume or args.overwrite):
        raise UserError(f"{folder} already holds a run: pass --resume to go on with it, --overwrite to replace it, or "
                        "another --output-folder")
    held = checkpoint.kind_of(last) or checkpoint.kind_of(best)
    if held not in (None, kind):
        raise UserError(f"{folder} holds the run of a {held}, not of a {kind}: give another --output-folder")
    if args.resume and best.exists() and not last.exists():
        raise UserError(f"{folder} holds a best.pt but no last.pt to go on from: pass --overwrite to replace the run, "
                        "or give another --output-folder")


class Run:
    """Folders, counters, curves, checkpoints and signals of one training run.

    models/<output folder>/ holds args.json, last.pt, best.pt and results.json; logs/<output folder>/ the curves.

    Args:
        kind: of its checkpoints, "vqvae", "prior", ... args: the script's flags. device: torch.device.
        state: what a checkpoint holds, a dict by name of anything with a state_dict (saved, and restored here where the
            run goes on) and of plain values (saved), dicts of them included.
        may_change: flags of the script's own that may change on --resume, beside `MAY_CHANGE_ON_RESUME`.
        reads: paths of checkpoints that the run reads, which its folder must not hold.
        renamed: {old: new} names of flags that older runs knew by another.
    Raises:
        UserError: as `check_folder`, another process is at work in the folder, or a flag that defines the run differs
            from the run's.
    """

    def __init__(self, kind, args, device, state, may_change=(), reads=(), renamed=None):
        self.kind, self.args, self.device, self.state = kind, args, device, state
        self.models, self.logs = run_folder("models", args), run_folder("logs", args)
        self.see_curves = f"tensorboard --logdir {shlex.quote(str(self.logs))}"
        self.epoch = self.batch = self.step = 0
        self.seconds, self.best = 0., None  # seconds of training, validation left aside
        check_folder(args, kind, reads)
        distributed.barrier()  # all have looked before one writes
        if not distributed.rank():
            self.models.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.models)
            checkpoint.remove_temporary(self.models)
        with checkpoint.complete(self.models / "last.pt"):
            self.resumed = self._open(MAY_CHANGE_ON_RESUME | set(may_change), renamed or {})
            if self.resumed:
                _restore(state, self.resumed)
                checkpoint.set_random_state(self.resumed["random"])
        self.signal, self._started, self._bar = None, None, None
        self._first_bad = {}  # names of losses -> step at which each was first not finite, -1 for never, on the device
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._catch)
        self._logged = max(0, self.step - 1)  # step that curves are at: of the batch at hand, or of the last one
        self.curves = None
        if not distributed.rank():
            old = [] if self.resumed else [*(self.models / name for name in ("last.pt", "best.pt", "results.json")),
                                           *curves.files_of(self.logs)]
            self.curves = curves.Curves(self.logs, self.step if self.resumed else None)
            for file in old:  # now that nothing fails
                file.unlink(missing_ok=True)
        args.precision = cli.pick_precision(device, args.precision)  # as the run's file and its checkpoints say
        if not self.resumed:
            checkpoint.save_json(self.models / "args.json", vars(args))

    def _open(self, may_change, renamed):
        """The checkpoint to go on from, or None."""
        last, args = self.models / "last.pt", vars(self.args)
        if self.args.resume and last.exists():
            resumed = checkpoint.load(last, self.kind, remedy="--overwrite starts anew, and best.pt goes with it")
            counters, world = resumed["counters"], resumed["counters"].get("world", 1)
            moved = world != distributed.world_size()
            before = {renamed.get(name, name): value for name, value in resumed["args"].items()}
            differ = []
            for name in sorted(set(before) | set(args)):
                old, new = before.get(name), _plain(args.get(name))
                young = name not in before and not new  # a flag that the run was older than, and that is off
                if name not in may_change and old != new and not young and not (moved and name == "batch_size"):
                    differ.append(f"--{name.replace('_', '-')} {old} (now {new})")
            if differ:
                raise UserError(f"{self.models} was trained with {', '.join(differ)}: --resume needs the same flags")
            self.epoch, self.batch, self.step = (counters[name] for name in ("epoch", "batch", "step"))
            self.seconds, self.best = counters["seconds"], resumed["best"]
            if moved:  # batches of another size: go on at the first that is not all done
                done = self.batch * resumed["args"]["batch_size"] * world
                self.batch = done // (args["batch_size"] * distributed.world_size())
                self.batch -= self.batch % self.args.accumulate
            print(f"resuming {last} at epoch {self.epoch + 1}, step {self.step}")
            return resumed
        if self.args.resume:
            print(f"nothing to resume in {self.models}: starting anew")
        return None

    def _catch(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def epochs(self):
        """Numbers of the epochs still to do; each one done is saved."""
        if not self.resumed:
            self.save("last.pt")
        while not self._out_of_time() if self.args.minutes else self.epoch < self.args.num_epochs:
            yield self.epoch
            self.epoch, self.batch = self.epoch + 1, 0
            self.save("last.pt")
            self._stop_if_asked()
        self._logged = self.step  # of the last report: taken back, as is all from here on, where the run goes on

    def batches(self, loader):
        """Batches of the current epoch still to do, with a progress bar on a terminal; stops on SIGINT and SIGTERM."""
        accumulate, last = self.args.accumulate, len(loader)
        self._started = time.perf_counter()
        with tqdm(total=len(loader.labels), initial=self.batch * loader.batch_size, unit="img", leave=False,
                  disable=True if distributed.rank() else None, desc=self._epoch_name()) as self._bar:
            for x, label in loader.epoch(self.epoch, self.batch):
                # An update takes the mean over `accumulate` batches of one size, over fewer at the end of an epoch; the
                # processes' shares of a batch, whose gradients are averaged, may differ in size.
                first = self.batch - self.batch % accumulate
                self._share = len(x) * distributed.world_size() / loader.sizes()[0] / min(accumulate, last - first)
                self._due = self.batch + 1 in (first + accumulate, last)
                self._logged = self.step
                yield x, label
                self.batch, self.step = self.batch + 1, self.step + 1
                self._bar.update(loader.batch_size)
                if self._out_of_time():
                    break
                if self._due and self.batch < last:
                    self._stop_if_asked()
        self._clock()
        self._raise_if_not_finite()

    def backward(self, loss):
        """Add the gradient of a batch's mean loss to that of the update it belongs to."""
        (loss * self._share).backward()

    def update(self, optimizer):
        """Step, once all batches of the update are in."""
        if self._due:
            optimizer.step()
            optimizer.zero_grad()

    def _elapsed(self):
        return self.seconds + (time.perf_counter() - self._started if self._started else 0.)

    def _clock(self):
        self.seconds, self._started = self._elapsed(), None

    def _out_of_time(self):
        return self.args.minutes is not None and self._time_share() >= 1

    def _time_share(self):
        return distributed.mean(self._elapsed() / (60 * self.args.minutes))  # the same on every process

    def _epoch_name(self):
        return f"epoch {self.epoch + 1}" + ("" if self.args.minutes else f"/{self.args.num_epochs}")

    def progress(self, loader):
        """Share of the training that is done, in [0, 1]: of the batches of all epochs, or of the time of --minutes."""
        if self.args.minutes:
            return min(1., self._time_share())
        return (self.epoch * len(loader) + self.batch) / (self.args.num_epochs * len(loader))

    def schedule_lr(self, optimizer, loader, lr=None):
        """Set the learning rate of this step: linear warm-up, then constant or half a cosine down to zero at the end.

        The end is that of the last epoch of `loader`, or of the time where --minutes sets one. Steps are counted by
        epoch and batch, so that the schedule fits where a run goes on with batches of another size.
        lr: the rate that is scheduled, --lr by default.
        """
        args, warmup = self.args, self.args.warmup_steps
        step, steps = self.epoch * len(loader) + self.batch, args.num_epochs * len(loader)
        if args.minutes:
            done = self.progress(loader)
            rise = done / warmup if 0 < warmup < 1 else (step + 1) / (warmup + 1)
            share = max(0., done - warmup) / (1 - warmup) if warmup < 1 else done
        else:
            warmup = round(warmup * steps) if warmup < 1 else warmup
            rise, share = (step + 1) / (warmup + 1), (step - warmup) / max(1, steps - warmup)
        scale = min(1., rise)
        if args.lr_schedule == "cosine" and rise >= 1:
            scale = 0.5 * (1 + math.cos(math.pi * share))
        set_lr(optimizer, (lr or args.lr) * scale)

    def _stop_if_asked(self):
        if distributed.mean(self.signal is not None):  # on any process: all leave the loop at the same batch
            number = self.signal or signal.SIGTERM
            self._clock()
            self.save("last.pt")
            if not distributed.rank():
                print(f"stopped by {signal.Signals(number).name} and saved {self.models / 'last.pt'}: "
                      "go on with --resume", file=sys.stderr)
            sys.exit(128 + number)

    def check_finite(self, loss, parts):
        """Note where the loss of this step or a part of it, scalars by name, is not finite.

        The note stays on the device, so that no step waits; it is read, and a UserError raised that names the step and
        the parts, before anything is logged or saved.
        """
        names, values = tuple(parts), torch.stack([loss.detach(), *(part.detach() for part in parts.values())])
        seen = self._first_bad.get(names)
        if seen is None:
            seen = torch.full_like(values, -1)
        self._first_bad[names] = torch.where((seen < 0) & ~values.isfinite(), self.step, seen)

    def _raise_if_not_finite(self):
        for names, steps in self._first_bad.items():
            loss, *parts = steps.tolist()
            if max(loss, *parts) >= 0:
                first = min(step for step in (loss, *parts) if step >= 0)
                bad = [name for name, step in zip(names, parts) if step == first]
                raise UserError(self._not_finite("the loss", int(first), f": {', '.join(bad) or 'the sum'}"))

    def _not_finite(self, what, step, terms=""):
        return (f"{what} is not finite at step {step} (epoch {self.epoch + 1}){terms}; "
                f"{self.models / 'last.pt'} keeps the last good state, go on from it with --resume and a lower --lr or "
                "--precision fp32")

    def log_now(self):
        return self.step % self.args.log_every == 0

    def log(self, values):
        """Add scalars {tag: value}, means over all processes, to the curves at the step of the last batch."""
        self._raise_if_not_finite()
        values = {tag: distributed.mean(value.item() if torch.is_tensor(value) else value)
                  for tag, value in values.items()}
        if self.curves:
            self.curves.scalars(values, self._logged)

    def log_picture(self, tag, picture):
        """Add a picture (C, H, W) in [0, 1] to the curves."""
        if self.curves:
            self.curves.image(tag, picture, self._logged)

    def show(self, **values):
        """Values beside the progress bar."""
        self._bar.set_postfix({name: f"{value.item():.4g}" for name, value in values.items()}, refresh=False)

    def print_epoch(self, values, improved):
        """One line of validation values."""
        print(f"{self._epoch_name()}  " + "  ".join(
            f"{name} {value:.4g}" for name, value in values.items()) + ("  best" if improved else ""), flush=True)

    def save(self, name, **instead):
        """Save the state as models/<output folder>/<name>; `instead` replaces entries of it."""
        self._raise_if_not_finite()
        for part in self.state.values():  # a finite loss may have a gradient that is not
            if isinstance(part, nn.Module) and not all(bool(weight.isfinite().all()) for weight in part.parameters()):
                raise UserError(self._not_finite("a weight", self.step))
        counters = {"epoch": self.epoch, "batch": self.batch, "step": self.step, "seconds": self.seconds,
                    "world": distributed.world_size()}
        checkpoint.save(self.models / name, self.kind, {
            "args": {name: _plain(value) for name, value in vars(self.args).items()}, "counters": counters,
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]], "best": self.best,
            "random": checkpoint.random_state(), **_saved(self.state | instead)})
        distributed.barrier()
        checkpoint.saved.append(self.models / name)  # rank 0 has written it, and so came to the barrier

    def improved(self, values, monitored, larger_is_better, **instead):
        """Keep the monitored one of validation values {name: number} if it is the best so far, and the state with it,
        as in `save`, in best.pt. UserError where any of them is not finite.
        """
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise UserError(self._not_finite("the validation", self.step, f": {', '.join(bad)}"))
        value = values[monitored]
        better = self.best is None or (value > self.best if larger_is_better else value < self.best)
        if better:
            self.best = value
            self.save("best.pt", **instead)
        return better

    def finish(self, results, shown):
        """Write results.json, and the figures named `shown` as test/... beside the flags; returns results and cost."""
        results = results | {"epochs": self.epoch, "steps": self.step, "train_seconds": round(self.seconds, 2),
                             "ms_per_step": round(1000 * self.seconds / max(1, self.step), 3),
                             "peak_memory_mb": round(peak_memory_mb(self.device), 1), "device": str(self.device)}
        if self.resumed and self.resumed["counters"]["step"] == self.step and (self.models / "results.json").exists():
            before = checkpoint.load_json(self.models / "results.json")  # this process trained nothing
            results["peak_memory_mb"] = before.get("peak_memory_mb", results["peak_memory_mb"])
        checkpoint.save_json(self.models / "results.json", results)
        if self.curves:
            self.curves.hparams(vars(self.args), {f"test/{name}": results[name] for name in shown}, self._logged)
            self.curves.close()
        return results


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
    with suppress(OSError):  # a full disk, which is told where something is lost
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    return file


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def _saved(state):
    """A state with the state_dict of everything that has one."""
    if isinstance(state, dict):
        return {name: _saved(part) for name, part in state.items()}
    return state.state_dict() if hasattr(state, "state_dict") else state


def _restore(state, saved):
    """Load into everything of a state that takes a state_dict what `_saved` made of it."""
    for name, part in state.items():
        if isinstance(part, dict):
            _restore(part, saved[name])
        elif hasattr(part, "load_state_dict"):
            part.load_state_dict(saved[name])
