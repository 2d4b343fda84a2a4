"""The runs of a comparison: what is compared with what, and each trained once, resumed where it was cut off."""
import ctypes
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path

from harness import checkpoint
from harness.errors import UserError
from study import mixes

HERE = Path(__file__).parent.parent
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # opened here: a child that was just forked had better not
PLACE = ("output_folder", "resume", "overwrite")  # flags that `train` adds
_training = set()  # processes at work


class Sweep:
    """Every mix at every rate and seed, and the baseline that it is compared with.

    `mixes` is {name: mix}, a name and a mix for each rate; `series` {name without rate: {rate: name}}.

    Args:
        losses, baselines: mixes as `mixes.parse_mix` gives them. rates: texts for `mixes.parse_rate`; "" is none.
        seeds: how many.
    Raises:
        UserError: a mix names what a rate does, there is one rate alone, or one twice.
    """

    def __init__(self, losses, baselines, rates, seeds):
        self.seeds, self.rates = range(seeds), rates
        at = {rate: mixes.parse_rate(rate) if rate else {} for rate in rates}
        if rates != [""] and len(set(map(str, at.values()))) < max(2, len(rates)):
            raise UserError("--rates makes a curve of two or more different rates: add one, or leave it out")
        named = {mixes.mix_name(mix): mix for mix in [*baselines, *losses]}
        for name, mix in named.items():
            twice = set(mix) & set().union(*at.values())
            if twice:
                raise UserError(f"{', '.join(sorted(twice))} stands in the mix {name} and in --rates: give it in one")
        self.series = {name: {rate: mixes.mix_name(mix | extra) for rate, extra in at.items()}
                       for name, mix in named.items()}
        self.mixes = {self.series[name][rate]: mix | at[rate] for name, mix in named.items() for rate in rates}
        self._candidates = [mixes.mix_name(mix) for mix in baselines]
        self.best = {rate: self.series[self._candidates[0]][rate] for rate in rates}  # until `choose_baselines`

    def choose_baselines(self, figures, judged):
        """Of several baselines, take at each rate the one of the least distance, the geometric mean of judges' keys."""
        for rate in self.rates:
            names = [self.series[name][rate] for name in self._candidates]
            self.best[rate] = min(names, key=lambda name: math.prod(self.mean(figures, name, key) for key in judged))

    def baseline_of(self, name):
        """Name of the baseline at the rate of a mix."""
        return next(self.best[rate] for at in self.series.values() for rate, other in at.items() if other == name)

    def of(self, figures, name, key):
        """A figure of a mix, by seed."""
        return [figures[name, seed][key] for seed in self.seeds]

    def mean(self, figures, name, key):
        return statistics.mean(self.of(figures, name, key))

    def against_baseline(self, figures, name, key, how):
        """how(figure of the mix, figure of its baseline), by seed."""
        return list(map(how, self.of(figures, name, key), self.of(figures, self.baseline_of(name), key)))


# --- runs

def in_turn(pool, jobs, done, runs, task):
    """Call task(key) = (function, arguments...) for the keys of `runs`, with a line for each one done.

    A line says how long the rest will take, once one has taken more than seconds.
    """
    spent, started = [], time.monotonic()
    with pool:
        futures = {pool.submit(_timed, *task(key)): key for key in runs}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                key = futures[future]
                seconds = future.result()
                spent += [seconds] if seconds > 1 else []
                left = len(runs) - number
                hint = f", {_duration(statistics.mean(spent) * left / jobs)} to go" if spent and left else ""
                print(f"{done} {number}/{len(runs)}: {key[0]}, seed {key[1]} "
                      f"({_duration(time.monotonic() - started)} so far{hint})", flush=True)
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C, SIGTERM
                print("stopped: what is trained is kept, the same command goes on", file=sys.stderr)
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_training):
                process.terminate()  # it saves, and goes on when the comparison does
            raise


def _timed(function, *args):
    started = time.monotonic()
    function(*args)
    return time.monotonic() - started


def _duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def is_other(run, command):
    """Whether a run's folder holds what another command began to train: its checkpoint says which."""
    kept = _kept(run)
    began = checkpoint.load(kept, "vqvae").get("command") if kept else None
    return began is not None and _trained_by(began) != _trained_by(command)


def _kept(run):
    """The checkpoint that says what a run's folder holds: the last one, or best.pt where it was removed; or None."""
    return next((run / name for name in ("last.pt", "best.pt") if (run / name).exists()), None)


def _trained_by(command):
    """What `mixes.meaning` says of a command, whatever folder it goes to, and whether it goes on there."""
    script, flags = mixes.meaning(command)
    flags["data_folder"] = flags["data_folder"] and os.path.realpath(flags["data_folder"])
    return script, {name: value for name, value in flags.items() if name not in PLACE}


def check(run, command):
    """UserError where the folder holds a run of other flags that has been trained for a step or more.

    A command with a wrong flag ends the script.
    """
    mixes.meaning(command)
    if is_other(run, command) and checkpoint.load(_kept(run), "vqvae")["counters"]["step"]:
        raise UserError(f"{run} was trained with other flags: give another --output")
    if (run / "best.pt").exists() and not (run / "last.pt").exists() and not (run / "results.json").exists():
        raise UserError(f"{run} was not done and has lost its last.pt: remove it, and it is trained anew")


def train(run, command, threads):
    """An ordinary run in its own folder, what it prints in output.txt: done once, resumed if it was cut off.

    Raises:
        UserError: training failed.
    """
    if (run / "results.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    how = "--overwrite" if is_other(run, command) else "--resume"
    # Without the job's id, which a run would add to its name: a comparison goes on in another job where it stopped.
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    environment["OMP_NUM_THREADS"] = str(threads)
    # In a session of its own: Ctrl-C reaches this process, which stops all runs, and not each of them as well.
    with open(run / "output.txt", "a") as output, subprocess.Popen(
            [sys.executable, str(HERE / command[0]), *command[1:], how, "--output-folder",
             str(run.relative_to("models"))], stdout=output, stderr=subprocess.PIPE, text=True, env=environment,
            start_new_session=True, preexec_fn=partial(end_with, os.getpid())) as process:
        _training.add(process)
        errors = process.communicate()[1].strip().splitlines() or ["training failed"]
        _training.discard(process)
    if process.returncode:
        raise UserError(f"{run}: {next((line for line in errors if ': error: ' in line), errors[-1])}")


def end_with(parent):
    """For the child of a process to call first: on Linux, SIGTERM then comes if that parent is killed.

    So a comparison that is started again does not find its processes still at work.
    """
    if sys.platform.startswith("linux"):
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # gone before it was asked
            os._exit(1)
