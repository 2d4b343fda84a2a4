"""How far a long job is and how long the rest will take: a bar on a terminal, elsewhere a line a minute."""
import time

from tqdm import tqdm

from harness import distributed

LINE_EVERY = 60.  # seconds
SLOW_STEPS = 3  # at the start of a training: libraries pick their kernels, and a step is captured or compiled
FEW_UPDATES = 1000


def duration(seconds):
    """A time as text: "45 s", "12 min" or "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Progress:
    """Shows that `done` of `total` items are done, in rank 0 alone; a context.

    Args:
        what: the job, say "encoding train". unit: of its items. note: without one, the time that is left is shown.
    """

    def __init__(self, what, total, unit="images", done=0):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self._before, self._start = done, time.monotonic()
        self._said, self._rank = self._start, distributed.rank()
        self._bar = tqdm(total=total, initial=done, unit=f" {unit}", leave=False, desc=what,
                         disable=True if self._rank else None)  # None: where stderr is no terminal

    def add(self, count, note=None):
        """So many items more are done; `note` stands next to them."""
        self.done += count
        self._bar.update(count)
        if not self._bar.disable:
            if note is not None:
                self._bar.set_postfix_str(note, refresh=False)
            return
        now = time.monotonic()
        if not self._rank and now - self._said >= LINE_EVERY:
            self._said = now
            left = (now - self._start) / (self.done - self._before) * (self.total - self.done)
            note = f"about {duration(left)} to go" if note is None else note
            print(f"{self.what}: {self.done} of {self.total} {self.unit}{', ' * bool(note)}{note}", flush=True)

    def __enter__(self):
        return self

    def close(self):
        self._bar.close()

    def __exit__(self, *_):
        self.close()


def say(text):
    """Print a line above the bar of a job; nothing where there is no text."""
    if text:
        tqdm.write(text)


def counted(items, what, unit):
    """The items of a sequence, shown as `Progress` while they are done."""
    with Progress(what, len(items), unit) as progress:
        for item in items:
            yield item
            progress.add(1)


class Pace:
    """How long a step of a training takes, by the clock: validation counts, the first `SLOW_STEPS` do not."""

    def __init__(self, clock):
        self._clock, self._steps, self._start = clock, 0, None

    def step(self):
        self._steps += 1
        if self._steps == SLOW_STEPS:
            self._start = self._clock()

    def timed(self):
        """Seconds since the slow steps; 0 until a few others are done."""
        return self._clock() - self._start if self._steps >= 2 * SLOW_STEPS else 0.

    def seconds(self):
        """Seconds a step takes; None until a few are timed."""
        timed = self._steps - SLOW_STEPS
        return (self._clock() - self._start) / timed if timed >= SLOW_STEPS else None


def plan(updates, epochs, done=0):
    """How many updates a training has, `updates` in each epoch and `done` already; a second line warns of few."""
    total = updates * epochs
    text = f"{updates} updates an epoch x {epochs} epochs = {total} updates" + f", {done} of them done" * bool(done)
    return "\n".join(filter(None, [text, warning(total, f"--num-epochs {-(-FEW_UPDATES // updates)} or more")]))


def warning(updates, remedy):
    """One line where a training has so few updates that it learns little, else nothing; `remedy` is what to pass."""
    return "" if updates >= FEW_UPDATES else (
        f"warning: {updates} updates are few: a model learns little in less than about {FEW_UPDATES:,}. Pass a smaller "
        f"--batch-size, or {remedy}")
