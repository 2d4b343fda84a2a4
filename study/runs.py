"""The runs of a comparison: what is compared with what, and each trained once, resumed where it was cut off."""
import ctypes
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from threading import Event

from harness import checkpoint, fields
from harness.errors import UserError
from harness.folder import WHERE
from harness.progress import duration
from study import mixes

HERE = Path(__file__).parent.parent
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1  # opened here: a child that was just forked had better not
PLACE = {"--output-folder", "--resume", "--overwrite"}  # flags that `train` adds
_training = set()  # processes at work
_stopping = Event()  # set once they are to end


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

class Diverged(UserError):
    """The loss of one run is not finite: the other runs go on without it."""


def in_turn(pool, jobs, done, runs, task):
    """Call task(key) = (function, arguments...) for the keys of `runs`, with a line for each one done.

    A line says how long the rest will take, once one has taken more than seconds. Where some have `Diverged`, that is
    raised once all the others are done, any other error at once.
    """
    spent, started, diverged = [], time.monotonic(), []
    with pool:
        futures = {pool.submit(_timed, *task(key)): key for key in runs}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                key = futures[future]
                try:
                    seconds = future.result()
                except Diverged as error:
                    diverged.append(f"{key[0]}, seed {key[1]}")
                    print(f"{error}; the others go on", flush=True)
                    continue
                spent += [seconds] if seconds > 1 else []
                left = len(runs) - number
                hint = f", {duration(statistics.mean(spent) * left / jobs)} to go" if spent and left else ""
                print(f"{done} {number - len(diverged)}/{len(runs)}: {key[0]}, seed {key[1]} "
                      f"({duration(time.monotonic() - started)} so far{hint})", flush=True)
        except BaseException as error:
            if not isinstance(error, Exception):  # Ctrl-C, SIGTERM
                print("stopped: what is trained is kept, the same command goes on", file=sys.stderr)
            _stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(_training):
                process.terminate()  # it saves, and goes on when the comparison does
            pool.shutdown()  # waits for them
            _stopping.clear()
            raise
    if diverged:
        raise Diverged(f"no tables yet, as these runs diverged: {'; '.join(diverged)}. Give their mixes a lower lr, or "
                       "leave them out, and start again: runs that are done are kept")


def _timed(function, *args):
    started = time.monotonic()
    function(*args)
    return time.monotonic() - started


def checkpoints(run):
    """The paths of a run's checkpoints that are there, the last one first."""
    return [run / name for name in ("last.pt", "best.pt") if (run / name).exists()]


def differences(contents, command):
    """Flags in which a checkpoint's run differs from what a command trains, "--k 16, now 32".

    contents: of the checkpoint: the command that last ran it, and the values of all flags, defaults included.
    """
    (script, then), (other, now) = ((words[0], mixes.given(words)) for words in (contents["command"], command))
    differ = [] if script == other else [f"{script}, now {other}"]
    unknown = {f"--{name.replace('_', '-')}" for name in WHERE if name not in contents["args"]}  # as best.pt has it
    for flag in sorted({*then, *now} - PLACE - unknown):
        if flag not in then:  # whose default may be what is now given
            default = contents["args"].get(flag[2:].replace("-", "_"))
            then[flag] = "" if default is True else default
        if then[flag] != now.get(flag):
            differ.append(f"{flag} {_text(then[flag])}, now {_text(now.get(flag, 'not given'))}")
    return differ


def _text(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


def _load(path):
    return checkpoint.load(path, "vqvae", fields.TRAINED)


def check(run, command):
    """UserError where the folder holds a run of other flags that has been trained for a step or more."""
    found = checkpoints(run)
    for path in found:
        contents = _load(path)
        differ = differences(contents, command)
        if differ and contents["counters"]["step"]:
            raise UserError(f"{path} was trained with other flags ({'; '.join(differ)}): give another --output")
    if found == [run / "best.pt"] and not (run / "results.json").exists():
        raise UserError(f"{run} was not done and has lost its last.pt: remove it, and it is trained anew")


def train(run, command, threads):
    """An ordinary run in its own folder, what it prints in output.txt: done once, resumed if it was cut off.

    Raises:
        Diverged: its loss is not finite. UserError: training failed for another reason that a user can mend.
        RuntimeError: it has a bug, with its traceback.
    """
    if (run / "results.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    how = "--overwrite" if any(differences(_load(path), command) for path in checkpoints(run)) else "--resume"
    # Without the job's id, which a run would add to its name: a comparison goes on in another job where it stopped.
    environment = {name: value for name, value in os.environ.items() if name != "SLURM_JOB_ID"}
    environment["OMP_NUM_THREADS"] = str(threads)
    # In a session of its own: Ctrl-C reaches this process, which stops all runs, and not each of them as well.
    with open(run / "output.txt", "a") as output, subprocess.Popen(
            [sys.executable, str(HERE / command[0]), *command[1:], how,
             f"--output-folder={run.relative_to('models')}"], stdout=output, stderr=subprocess.PIPE, text=True,
            env=environment, start_new_session=True, preexec_fn=partial(end_with, os.getpid())) as process:
        _training.add(process)
        if _stopping.is_set():  # since the pool began this one
            process.terminate()
        errors = process.communicate()[1]
        _training.discard(process)
    if process.returncode and "Traceback (most recent call last)" in errors:
        raise RuntimeError(f"{run} failed:\n{errors}")
    if process.returncode:
        lines = errors.strip().splitlines() or ["training failed"]
        reason = next((line for line in lines if ": error: " in line), lines[-1])
        if "not finite" in reason:  # whose advice is for a single run
            raise Diverged(f"{run}: {re.split('[;:] go on|; ', reason)[0]}: give this mix a lower lr, or leave it out")
        raise UserError(f"{run}: {reason}")


def end_with(parent):
    """For the child of a process to call first: on Linux, SIGTERM then comes if that parent is killed.

    So a comparison that is started again does not find its processes still at work.
    """
    if sys.platform.startswith("linux"):
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # gone before it was asked
            os._exit(1)
