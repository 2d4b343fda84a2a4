"""One training run: its counters, curves, checkpoints, and how it ends."""
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from harness import checkpoint, cli, curves, distributed, history, progress
from harness.device import peak_memory_mb
from harness.errors import UserError
from harness.folder import WHERE, check_folder, last_checkpoint, lock, lost_best, made_with, plain, run_folder, shared
from harness.schedule import lr_scale, update_of, warmup_warning
from harness.tally import Tally

# All other flags define a run, except those that a script names.
MAY_CHANGE_ON_RESUME = {"num_epochs", "minutes", "device", "resume", "overwrite", "log_every", "compile", "no_graph",
                        "lr", "precision"}
# Flags that say nothing of what came out of a run: where it lies, and how it was computed.
NO_HPARAMS = {"output_folder", "resume", "overwrite", "log_every", "device", "no_graph", "num_workers", "no_download"}
LOG_EVERY, LEAST_POINTS = 50, 20  # steps from one point of a curve to the next; points of a run, however short
FIRST = "1_"  # before a tag: TensorBoard sorts digits before letters
SOON = 3.  # seconds until a training says how long it will take


class Run:
    """Counters, curves, checkpoints and signals of one training run, new or resumed.

    models/<output folder>/ holds args.json, last.pt, best.pt, metrics.csv and results.json; logs/<output folder>/ the
    curves. `resumed` is the checkpoint that the run goes on from, or None.

    Args:
        kind: of its checkpoints, "vqvae", "prior", ... args: the script's flags. device: torch.device.
        state: what a checkpoint holds, a dict by name of anything with a state_dict (saved, and restored here where the
            run goes on) and of plain values (saved), dicts of them included.
        may_change: flags of the script's own that may change on --resume, in addition to `MAY_CHANGE_ON_RESUME`.
        reads: paths of checkpoints that the run reads, which its folder must not hold.
        check: is called with the checkpoint to go on from, and raises UserError where the run cannot.
    Raises:
        UserError: as `check_folder`; another process is at work in the folder; a flag that defines the run differs from
            the run's.
    """

    def __init__(self, kind, args, device, state, may_change=(), reads=(), check=None):
        self.kind, self.args, self.device, self.state = kind, args, device, state
        self.models, self.logs = (run_folder(parent, args.output_folder) for parent in ("models", "logs"))
        self.see_curves = f"tensorboard --logdir {shlex.quote(str(self.logs))}"
        self.epoch = self.batch = self.step = 0
        self.seconds, self.best, self.best_step = 0., None, None  # seconds of training, without validation
        self.id = os.urandom(8).hex()  # which all checkpoints of a run have
        self.signal = self._started = self._bar = self._lock = self._pace = None
        self._tally, self._share, self._due = Tally(device), torch.ones((), device=device), True
        self._log_due = self._foretold = False
        self._length, self._points, self._value = 0, 0, ""  # batches of an epoch; see `_is_logged`; a loss, as text

        check_folder(self.models, kind, args.resume, args.overwrite, reads)
        distributed.barrier()  # all have looked before one writes
        if not distributed.rank():
            self.models.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.models)
            checkpoint.remove_temporary(self.models)
        self.resumed = last_checkpoint(self.models, kind, vars(args), MAY_CHANGE_ON_RESUME | set(may_change)) \
            if args.resume else None
        if self.resumed:
            with checkpoint.complete(self.models / "last.pt"):
                if check:
                    check(self.resumed)
                self._go_on()
            self._mend_best()
        self._logged = max(0, self.step - 1)  # step that curves are at: of the batch at hand, or of the last one
        self.curves = None if distributed.rank() else self._open_files()
        self._handlers = {number: signal.signal(number, self._catch) for number in (signal.SIGINT, signal.SIGTERM)}

    def _go_on(self):
        """Take counters, state and random numbers from the checkpoint."""
        counters, args = self.resumed["counters"], self.args
        self.epoch, self.batch, self.step = (counters[name] for name in ("epoch", "batch", "step"))
        self.seconds, self.best, self.best_step = counters["seconds"], self.resumed["best"], counters.get("best_step")
        self.id = self.resumed.get("run")
        if counters["world"] != distributed.world_size():  # batches of another size: from the first that is not done
            done = self.batch * self.resumed["args"]["batch_size"] * counters["world"]
            self.batch = done // (args.batch_size * distributed.world_size())
            self.batch -= self.batch % args.accumulate
        checkpoint.restore(self.state, self.resumed)
        if self.step >= args.accumulate and not args.minutes and not self.state["optimizer"].state:
            raise TypeError("its optimizer has no state")
        checkpoint.set_random_state(self.resumed["random"])
        print(f"resuming {self.models / 'last.pt'} at epoch {self.epoch + 1}, step {self.step}")

    def _mend_best(self):
        """Where best.pt was lost or is ahead, save it anew if the last epoch is the best, else leave it to the next."""
        what = lost_best(self.models, self.resumed)
        if not distributed.mean(what is not None):  # all have looked before one writes
            return
        lost = f"{self.models / 'best.pt'} {what}"
        if self.best_step == self.step:
            self.epoch -= 1  # which was not yet counted when it was kept
            self.save("best.pt")
            self.epoch += 1
            print(f"{lost}: it is saved anew from last.pt, whose epoch is the best")
        elif self._is_done():
            raise UserError(f"{lost}, last.pt is not of the best epoch, and none is left to train: pass a larger "
                            f"{'--minutes' if self.args.minutes else '--num-epochs'}, or --overwrite to train anew")
        else:
            self.best = self.best_step = None
            print(f"{lost}, and last.pt is not of the best epoch: the best from epoch {self.epoch + 1} on is kept")

    def _open_files(self):
        """The curves, taken back to this step; what an earlier run left is removed once nothing can fail."""
        names = ("last.pt", "best.pt", "metrics.csv", "results.json")
        old = [] if self.resumed else [*(self.models / name for name in names), *curves.files_of(self.logs)]
        opened = curves.Curves(self.logs, self.step if self.resumed else None)
        for file in old:
            file.unlink(missing_ok=True)
        if self.resumed:
            history.take_back(self.models / "metrics.csv", self.epoch)
        path, flags = self.models / "args.json", vars(self.args)
        started = checkpoint.load_json(path) if self.resumed and path.exists() else {}
        now = {name: flags[name] for name in WHERE if name in flags}
        checkpoint.save_json(path, flags | {"made_with": made_with()} | started | now)
        return opened

    # --- the loop

    def epochs(self):
        """Numbers of the epochs still to do; each one done is saved."""
        if not self.resumed:
            self.save("last.pt")
        while self.batch or not self._is_done():  # an epoch that was begun is validated, whatever the clock says
            yield self.epoch
            self.epoch, self.batch = self.epoch + 1, 0
            self.save("last.pt")
            self._stop_if_asked()
        for number, handler in self._handlers.items():  # what comes now is measured once more by --resume
            signal.signal(number, handler)
        self._logged = self.step  # of the last report: taken back, as is all from here on, where the run goes on

    def batches(self, loader):
        """Batches of the current epoch still to do, and how far they are; stops on SIGINT and SIGTERM."""
        sizes = loader.sizes()
        batches, size = len(sizes), sizes[0]
        if self.resumed and self.resumed["counters"]["world"] != distributed.world_size():
            self.batch = min(self.batch, batches)  # the last batch may have been a small one
        if self.batch > batches:
            raise UserError(f"{self.models / 'last.pt'} is damaged, it goes on at batch {self.batch} of {batches}: "
                            "--overwrite trains anew")
        if not self._pace:
            self._announce(batches)
        self._started = time.perf_counter()
        self._tally.restart()
        with progress.Progress(self._epoch_name(), sum(sizes), "images", sum(sizes[:self.batch])) as self._bar:
            for x, label in loader.epoch(self.epoch, self.batch):
                of_update, self._due = update_of(self.batch, batches, self.args.accumulate)
                # The processes' shares of a batch, whose gradients are averaged, may differ in size.
                self._share.fill_(len(x) * distributed.world_size() / size / of_update)
                self._tally.step.fill_(self.step)
                self._logged, self._log_due = self.step, self._is_logged(batches)
                yield x, label
                done, self.batch, self.step = sizes[self.batch], self.batch + 1, self.step + 1
                self._pace.step()
                self._bar.add(done, ", ".join(filter(None, (self._value, self._time_left()))))
                self._forecast()
                if self._out_of_time():
                    break
                if self._due:
                    self._stop_if_asked()
        self._bar = None
        self._stop_clock()

    def lr_scale(self, loader):
        """Factor of the learning rate at the batch of `loader` at hand."""
        # Counted by epoch and batch, so that the schedule fits where a run goes on with batches of another size.
        args, step = self.args, self.epoch * len(loader) + self.batch
        steps = None if args.minutes else args.num_epochs * len(loader)
        return lr_scale(args.lr_schedule, args.warmup_steps, self.progress(loader), step, steps)

    def progress(self, loader):
        """Share of the training that is done, in [0, 1]: of the batches of all epochs, or of the time of --minutes."""
        if self.args.minutes:
            return min(1., self._time_share())
        return min(1., (self.epoch * len(loader) + self.batch) / (self.args.num_epochs * len(loader)))

    def check_finite(self, losses):
        """Note which of the losses {name: scalar} of this step are not finite, "loss" being the one that is minimised.

        No step waits for the answer: a UserError names step and losses before anything is logged or saved.
        """
        self._tally.add(losses)

    def backward(self, loss):
        """Add the gradient of a batch's mean loss to that of the update it belongs to."""
        (loss * self._share).backward()

    def update(self, optimizer):
        """Step, once all batches of the update are in."""
        if self._due:
            optimizer.step()
            optimizer.zero_grad()

    # --- how long it takes

    def _announce(self, batches):
        """Say how many updates of so many batches an epoch the training has, and warn where they are few."""
        self._pace, self._length, accumulate = progress.Pace(time.perf_counter), batches, self.args.accumulate
        updates = -(-batches // accumulate)
        if self.args.minutes:
            print(f"{updates} updates an epoch, for {self.args.minutes:g} minutes", flush=True)
        else:
            print(progress.plan(updates, self.args.num_epochs, self._updates_done()), flush=True)
            progress.say(warmup_warning(self.args.warmup_steps, self.args.num_epochs * batches))

    def _updates_done(self):
        accumulate = self.args.accumulate
        return self.epoch * -(-self._length // accumulate) + self.batch // accumulate

    def _forecast(self):
        """Say once, as soon as it is known, how long the training will take."""
        if self._foretold or self._pace.timed() < SOON:
            return
        self._foretold, each = True, self._pace.seconds() * self.args.accumulate
        progress.say(f"{self._time_left() or 'nearly done'}, {each:.2g} s an update")
        if self.args.minutes:
            updates = self._updates_done() + round(self._seconds_left() / each)
            progress.say(progress.warning(updates, "a larger --minutes"))

    def _seconds_left(self):
        """Seconds to the end of the training, 0 until a few steps are timed."""
        if self.args.minutes:
            return max(0., 60 * self.args.minutes - self._elapsed())
        steps = (self.args.num_epochs - self.epoch) * self._length - self.batch
        return max(0, steps) * (self._pace.seconds() or 0.)

    def _time_left(self):
        """"about 5 min to go"; empty where that is unknown, and at the end."""
        seconds = self._seconds_left()
        return f"about {progress.duration(seconds)} to go" if seconds else ""

    # --- curves

    def log_now(self):
        """Whether the step at hand is one of those whose values go to the curves."""
        return self._log_due

    def _is_logged(self, batches):
        """Every --log-every steps; without it every `LOG_EVERY`, and `LEAST_POINTS` times or more in the whole run."""
        if self.args.log_every:
            return self.step % self.args.log_every == 0
        if not self.args.minutes:
            return self.step % max(1, min(LOG_EVERY, self.args.num_epochs * batches // LEAST_POINTS)) == 0
        before, self._points = self._points, int(LEAST_POINTS * self._time_share())
        return self.step % LOG_EVERY == 0 or self._points > before

    def log(self, values):
        """Add scalars {tag: value}, means over all processes, to the curves; show the first with the progress bar."""
        tag, value = next(iter(self._add(values).items()))
        self._value = f"{tag.rpartition('/')[2]} {value:.4g}"

    def _add(self, values):
        """Add scalars to the curves; their means over all processes."""
        self._raise_if_not_finite()
        values = {tag: distributed.mean(value.item() if torch.is_tensor(value) else value)
                  for tag, value in values.items()}
        if self.curves:
            self.curves.scalars(values, self._logged)
        return values

    def log_picture(self, tag, picture):
        """Add a picture (C, H, W) in [0, 1] to the curves."""
        if self.curves:
            self.curves.image(tag, picture, self._logged)

    def log_validation(self, values, shown, improved, leading):
        """Add validation values {name: number} to the curves and to metrics.csv; print those whose names are `shown`.

        TensorBoard, which sorts by name, shows the `leading` ones first. metrics.csv also has the mean training losses
        of the epoch.
        """
        self._add({f"{FIRST * (name in leading)}valid/{name}": value for name, value in values.items()})
        row = {"epoch": self.epoch + 1, "step": self.step}
        row |= {f"train/{name}": value for name, value in self._tally.means().items()}
        row |= {f"valid/{name}": value for name, value in values.items()}
        if not distributed.rank():
            history.add_row(self.models / "metrics.csv", row)
        print("  ".join([self._epoch_name(), *(f"{name} {values[name]:.4g}" for name in shown), *["best"] * improved,
                         *filter(None, [self._time_left()])]), flush=True)

    # --- checkpoints and the end

    def save(self, name):
        """Save models/<output folder>/<name>.

        last.pt is all that the run goes on from. best.pt is the model, the average of its weights where there is one,
        and what it is: neither where its data are nor what only training needs.
        """
        self._raise_if_not_finite()
        for part in self.state.values():  # a finite loss may have a gradient that is not
            if isinstance(part, nn.Module) and not all(bool(weight.isfinite().all()) for weight in part.parameters()):
                raise UserError(self._not_finite("a weight", self.step))
        counters = {"epoch": self.epoch, "step": self.step, "seconds": self.seconds, "world": distributed.world_size()}
        args, command, state = plain(vars(self.args)), [Path(sys.argv[0]).name, *sys.argv[1:]], self.state
        if name == "best.pt":
            args, command = shared(args, command)
            average = state.get("average")
            state = {part: value for part, value in state.items() if not hasattr(value, "state_dict")} | {
                "model": average.module if average else state["model"]}
        else:
            counters |= {"batch": self.batch, "best_step": self.best_step}
            state = state | {"random": checkpoint.random_state()}
        checkpoint.save(self.models / name, self.kind, {
            "run": self.id, "args": args, "counters": counters, "command": command, "best": self.best,
            **checkpoint.state_of(state)})
        distributed.barrier()
        checkpoint.saved.append(self.models / name)  # rank 0 has written it, and so came to the barrier

    def improved(self, values, monitored, larger_is_better):
        """Whether the monitored one of validation values {name: number} is the best so far; best.pt then keeps the
        model. UserError where any of them is not finite.
        """
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise UserError(self._not_finite("the validation", self.step, bad))
        value = values[monitored]
        better = self.best is None or (value > self.best if larger_is_better else value < self.best)
        if better:
            self.best, self.best_step = value, self.step
            self.save("best.pt")
        return better

    def take_best(self, model):
        """Give a model the weights of best.pt. UserError where that does not hold them."""
        path = self.models / "best.pt"
        contents = checkpoint.load(path, self.kind)
        with checkpoint.complete(path):
            model.load_state_dict(contents["model"])

    def finish(self, results, shown):
        """Write results.json, and the figures named `shown` as test/... with the flags; returns results and cost."""
        results = results | {"run": self.id, "epochs": self.epoch, "steps": self.step,
                             "train_seconds": round(self.seconds, 2),
                             "ms_per_step": round(1000 * self.seconds / max(1, self.step), 3),
                             "peak_memory_mb": round(peak_memory_mb(self.device), 1), "device": str(self.device)}
        if self.resumed and self.resumed["counters"]["step"] == self.step and (self.models / "results.json").exists():
            before = checkpoint.load_json(self.models / "results.json")  # this process trained nothing
            results["peak_memory_mb"] = before.get("peak_memory_mb", results["peak_memory_mb"])
        checkpoint.save_json(self.models / "results.json", results)
        if self.curves:
            self.curves.hparams({name: value for name, value in cli.changed.items() if name not in NO_HPARAMS},
                                {f"test/{name}": results[name] for name in shown}, self._logged)
            self.curves.close()
        return results

    def _elapsed(self):
        return self.seconds + (time.perf_counter() - self._started if self._started else 0.)

    def _stop_clock(self):
        self._raise_if_not_finite()  # which waits for the device: what it has yet to do counts
        self.seconds, self._started = self._elapsed(), None

    def _time_share(self):
        return distributed.mean(self._elapsed() / (60 * self.args.minutes))  # the same on every process

    def _out_of_time(self):
        return self.args.minutes is not None and self._time_share() >= 1

    def _is_done(self):
        return self._out_of_time() if self.args.minutes else self.epoch >= self.args.num_epochs

    def _epoch_name(self):
        return f"epoch {self.epoch + 1}" + ("" if self.args.minutes else f"/{self.args.num_epochs}")

    def _catch(self, number, frame):
        self.signal = number
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    def _stop_if_asked(self):
        if distributed.mean(self.signal is not None):  # on any process: all leave the loop at the same batch
            number = self.signal or signal.SIGTERM
            self._stop_clock()
            self.save("last.pt")
            if not distributed.rank():
                print(f"stopped by {signal.Signals(number).name} and saved {self.models / 'last.pt'}: "
                      "go on with --resume", file=sys.stderr)
            sys.exit(128 + number)

    def _raise_if_not_finite(self):
        bad = self._tally.first_bad()
        if bad:
            step, names = bad
            raise UserError(self._not_finite("the loss", step, [name for name in names if name != "loss"]
                                             or ["the sum"]))

    def _not_finite(self, what, step, names=()):
        return (f"{what} is not finite at step {step} (epoch {self.epoch + 1}){': ' if names else ''}"
                f"{', '.join(names)}; {self.models / 'last.pt'} keeps the last good state, go on from it with --resume "
                "and a lower --lr or --precision fp32")
