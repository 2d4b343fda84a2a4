"""What surrounds a training loop: flags, device, precision, schedule, and `Run`, which keeps a run's files.

The same for every script that trains. Errors a user can mend are ValueError or OSError; `cli` prints them as one line.
"""
import argparse
import math
import os
import resource
import signal
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from tensorboardX import SummaryWriter
from tqdm import tqdm

import checkpoint
import distributed
from datasets import DATASETS, Source

# What may change between a run and its resumption: all other flags define the run.
FREE_ARGS = {"num_epochs", "minutes", "num_workers", "device", "resume", "overwrite", "log_every", "compile",
             "data_folder", "no_download", "model", "sample", "label", "temperature", "top_k", "sample_every"}


# --- flags

def whole(text, low=0):
    if not text.isdecimal() or int(text) < low:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}, got {text}")
    return int(text)


positive_int = partial(whole, low=1)


def not_negative(text, low=0., strict=False):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < low or (strict and value == low):
        raise argparse.ArgumentTypeError(f"must be a finite number {'above' if strict else 'of at least'} {low:g}, "
                                         f"got {text}")
    return value


positive = partial(not_negative, strict=True)


def image_size(text):
    """"64" or "48x64" (height x width) -> (H, W)."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"must be N or HxW in pixels, got {text}")
    return int(sides[0]), int(sides[-1])


def add_arguments(parser, output_folder, lr):
    """The flags that every training script has."""
    group = parser.add_argument_group("data")
    group.add_argument("--data-folder", default="data", help="where the data set is, or is downloaded to")
    group.add_argument("--no-download", action="store_true", help="fail where the data set is not on disk")
    group.add_argument("--skip-broken", action="store_true", help="go on without images that do not decode")
    group.add_argument("--limit", type=positive_int, metavar="N", help="use N training images, for quick looks")
    cores = (os.cpu_count() or 2) // distributed.local_world_size()
    group.add_argument("--num-workers", type=whole, default=max(1, cores - 1),
                       help="processes that decode images where a data set streams from disk (default %(default)s)")

    group = parser.add_argument_group("optimization")
    group.add_argument("--batch-size", type=positive_int, default=128, help="of each process (default %(default)s)")
    group.add_argument("--accumulate", type=positive_int, default=1, metavar="N",
                       help="update on the mean gradient of N batches, each of which moves the codebook's averages")
    group.add_argument("--num-epochs", type=positive_int, default=100, help="(default %(default)s)")
    group.add_argument("--minutes", type=positive, metavar="M",
                       help="train for so long, whatever --num-epochs says; the schedule follows the clock")
    group.add_argument("--lr", type=positive, default=lr, help="Adam's learning rate (default %(default)s)")
    group.add_argument("--lr-schedule", choices=("constant", "cosine"), default="constant", help="after the warm-up")
    group.add_argument("--warmup-steps", type=whole, default=0, metavar="N", help="of linear rise of the learning rate")
    group.add_argument("--seed", type=int, default=0, help="of initial weights, order and flips (default %(default)s)")

    group = parser.add_argument_group("run")
    group.add_argument("--output-folder", default=output_folder,
                       help="name of the run under models/ and logs/ (default %(default)s)")
    group.add_argument("--resume", action="store_true", help="go on with the run in the output folder")
    group.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default %(default)s)")
    group.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto",
                       help="auto is bf16 where the device has it in hardware")
    group.add_argument("--compile", action="store_true", help="torch.compile the network")
    group.add_argument("--log-every", type=positive_int, default=50, metavar="STEPS", help="(default %(default)s)")


def add_dataset_arguments(parser):
    group = parser.add_argument_group("data set")
    group.add_argument("--dataset", choices=DATASETS, default="photos", help="(default %(default)s)")
    group.add_argument("--image-size", type=image_size, metavar="N|HxW", help="resize and center-crop the images")
    group.add_argument("--flip", action="store_true", help="mirror half of the training images")


def source_of(args):
    return Source(args.data_folder, args.image_size, not args.no_download, args.skip_broken)


def cli(main):
    """Run a script's main, one process of many where torchrun started it.

    What a user can mend is one line on stderr and exit status 2.
    """
    try:
        distributed.start()
        main()
    except (ValueError, OSError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if distributed.is_failure(error):
            message = (f"process {distributed.rank()} lost the others ({lines[0]}): the run's last.pt is good, go on "
                       "with --resume")
        elif isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise
        else:
            message = lines[-1]
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        distributed.stop()


# --- device, precision

def pick_device(name):
    """torch.device of a name; auto is cuda, then mps, then cpu. ValueError where the machine has no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and distributed.world_size() > 1:
        name = f"cuda:{distributed.local_rank()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not to be had here ({str(error).splitlines()[0]}): "
                         "use --device auto or cpu") from error
    return device


def autocast(device, precision):
    """A function that makes the context of the forward pass."""
    if precision == "auto":
        precision = "bf16" if _has_bf16(device) else "fp32"
    return partial(torch.autocast, device.type, torch.bfloat16) if precision == "bf16" else nullcontext


def _has_bf16(device):
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def peak_memory_mb(device):
    """Most memory held at once so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    unit = 1 if sys.platform == "darwin" else 2 ** 10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 20


# --- a run

def run_folder(parent, args):
    """Where a run keeps its files under models or logs: its name and, in a SLURM job, the job's id."""
    job = os.environ.get("SLURM_JOB_ID")
    return Path(parent) / (args.output_folder + (f"-{job}" if job else ""))


def refuse_taken(args):
    """ValueError where the output folder holds a run and neither --resume nor --overwrite is given."""
    folder = run_folder("models", args)
    if (folder / "args.json").exists() and not (args.resume or args.overwrite):
        raise ValueError(f"{folder} already holds a run: pass --resume to go on with it, --overwrite to replace it, or "
                         "another --output-folder")


class Run:
    """Folders, counters, curves, checkpoints and signals of one training run.

    models/<output folder>/ holds args.json, last.pt, best.pt and results.json; logs/<output folder>/ the curves.
    Set `contents`, a function that returns what a checkpoint holds of the models, before the first batch.

    Raises:
        ValueError: the output folder holds a run and neither --resume nor --overwrite is given, or a flag that
            defines the run differs from the run's.
    """

    def __init__(self, kind, args, device):
        self.kind, self.args, self.device = kind, args, device
        self.models, self.logs = run_folder("models", args), run_folder("logs", args)
        self.epoch = self.batch = self.step = 0
        self.seconds, self.best, self.contents = 0., None, dict  # seconds of training, validation left aside
        self.resumed = self._open()
        self.signal, self._started, self._bar = None, None, None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._catch)
        self.writer = SummaryWriter(str(self.logs), purge_step=self.step if self.resumed else None,
                                    write_to_disk=not distributed.rank())

    def _open(self):
        """The checkpoint to go on from, or None."""
        last, args = self.models / "last.pt", vars(self.args)
        refuse_taken(self.args)
        distributed.barrier()  # all have looked before one writes
        self.models.mkdir(parents=True, exist_ok=True)
        if self.args.resume and last.exists():
            found = checkpoint.load(last, self.kind)
            moved = found["counters"].get("world", 1) != distributed.world_size()
            for name in sorted(set(found["args"]) | set(args)):
                old, new = found["args"].get(name), _plain(args.get(name))
                if name not in FREE_ARGS and old != new and not (moved and name == "batch_size"):
                    raise ValueError(f"{self.models} was trained with {name} {old}, now it is {new}: "
                                     "--resume needs the same flags")
            self.epoch, self.batch, self.step = (found["counters"][name] for name in ("epoch", "batch", "step"))
            self.seconds, self.best = found["counters"]["seconds"], found["best"]
            if moved:  # batches of another size: go on at the first that is not all done
                done = self.batch * found["args"]["batch_size"] * found["counters"].get("world", 1)
                self.batch = done // (args["batch_size"] * distributed.world_size())
            print(f"resuming {last} at epoch {self.epoch + 1}, step {self.step}")
            return found
        if self.args.resume:
            print(f"nothing to resume in {self.models}: starting anew")
        if not distributed.rank():
            for file in [self.models / name for name in ("last.pt", "best.pt", "results.json")] + list(
                    self.logs.glob("events.out.tfevents.*")):
                file.unlink(missing_ok=True)
        checkpoint.save_json(self.models / "args.json", args)
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

    def batches(self, loader):
        """Batches of the current epoch still to do, with a progress bar on a terminal; stops on SIGINT and SIGTERM."""
        self._started, sizes = time.perf_counter(), loader.sizes()
        with tqdm(total=len(loader.labels), initial=self.batch * loader.batch_size, unit="img", leave=False,
                  disable=True if distributed.rank() else None, desc=self._epoch_name()) as self._bar:
            for x, label in loader.epoch(self.epoch, self.batch):
                # The share of this process in the mean over an update's images, times the number of processes.
                window = self.batch // self.args.accumulate * self.args.accumulate
                window = sizes[window:window + self.args.accumulate]
                self._share = len(x) * distributed.world_size() / sum(window)
                self._due = (self.batch + 1) % self.args.accumulate == 0 or self.batch + 1 == len(sizes)
                yield x, label
                self.batch, self.step = self.batch + 1, self.step + 1
                self._bar.update(sizes[self.batch - 1])
                if self._out_of_time():
                    break
                if self._due and self.batch < len(sizes):
                    self._stop_if_asked()
        self._clock()

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

    def schedule_lr(self, optimizer, loader):
        """Set the learning rate of this step: linear warm-up, then constant or half a cosine down to zero at the end.

        The end is that of the last epoch of `loader`, or of the time where --minutes sets one.
        """
        args, warmup = self.args, self.args.warmup_steps
        scale = min(1., (self.step + 1) / (warmup + 1))
        if args.lr_schedule == "cosine" and self.step >= warmup:
            if args.minutes:
                share = min(1., self._time_share())
            else:
                share = (self.step - warmup) / max(1, args.num_epochs * len(loader) - warmup)
            scale = 0.5 * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = args.lr * scale

    def _stop_if_asked(self):
        if distributed.mean(self.signal is not None):  # on any process: all leave the loop at the same batch
            number = self.signal or signal.SIGTERM
            self._clock()
            self.save("last.pt")
            self.writer.close()
            if not distributed.rank():
                print(f"stopped by {signal.Signals(number).name} and saved {self.models / 'last.pt'}: "
                      "go on with --resume", file=sys.stderr)
            sys.exit(128 + number)

    def check_finite(self, loss, parts):
        """Raise ValueError, naming the terms, where the loss of this step is not finite."""
        if not torch.isfinite(loss):
            bad = [name for name, value in parts.items() if not torch.isfinite(value)]
            raise ValueError(f"the loss is not finite at step {self.step} (epoch {self.epoch + 1}): "
                             f"{', '.join(bad) or 'the sum'}; {self.models / 'last.pt'} keeps the last good state, "
                             "try a lower --lr or --precision fp32")

    def log_now(self):
        return self.step % self.args.log_every == 0

    def log(self, values):
        """Add scalars {tag: value}, means over all processes, to the curves at the current step."""
        for tag, value in values.items():
            value = distributed.mean(value.item() if torch.is_tensor(value) else value)
            self.writer.add_scalar(tag, value, self.step)

    def show(self, **values):
        """Values beside the progress bar."""
        self._bar.set_postfix({name: f"{value.item():.4g}" for name, value in values.items()}, refresh=False)

    def print_epoch(self, values, improved):
        """One line of validation values."""
        print(f"{self._epoch_name()}  " + "  ".join(
            f"{name} {value:.4g}" for name, value in values.items()) + ("  best" if improved else ""), flush=True)

    def save(self, name):
        counters = {"epoch": self.epoch, "batch": self.batch, "step": self.step, "seconds": self.seconds,
                    "world": distributed.world_size()}
        checkpoint.save(self.models / name, self.kind, {
            "args": {name: _plain(value) for name, value in vars(self.args).items()}, "counters": counters,
            "best": self.best, "random": checkpoint.random_state(), **self.contents()})
        distributed.barrier()

    def improved(self, value, larger_is_better):
        """Keep a validation value if it is the best so far, and the models with it in best.pt."""
        better = self.best is None or (value > self.best if larger_is_better else value < self.best)
        if better:
            self.best = value
            self.save("best.pt")
        return better

    def finish(self, hparams, results):
        """Write results.json and the hyper-parameters; returns the results with the run's cost."""
        results = results | {"epochs": self.epoch, "steps": self.step, "train_seconds": round(self.seconds, 2),
                             "ms_per_step": round(1000 * self.seconds / max(1, self.step), 3),
                             "peak_memory_mb": round(peak_memory_mb(self.device), 1), "device": str(self.device)}
        checkpoint.save_json(self.models / "results.json", results)
        numbers = {f"final/{name}": value for name, value in results.items() if isinstance(value, (int, float))}
        self.writer.add_hparams({name: value if isinstance(value, (int, float, str, bool)) else str(value)
                                 for name, value in hparams.items()}, numbers, name="hparams", global_step=self.step)
        self.writer.close()
        return results


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
