"""Figures over seeds and images: means with intervals, kept as numbers; and tables of them, whose text comes last."""
import csv
import io
import math
import statistics
from dataclasses import dataclass

import torch

from harness import checkpoint
from harness.report import markdown_table

RESAMPLES = 1000  # of the bootstrap
LEGEND = ("± is the standard deviation over seeds, [low, high] the 95% interval of the mean over seeds (Student's t), "
          "{low, high} that over images where there is one seed (bootstrap)")
_NUMBER = {"value": "{:.4g}", "difference": "{:+.3g}", "ratio": "{:.3g}"}


@dataclass(frozen=True)
class Estimate:
    """Mean of a figure over n seeds, its standard deviation and the 95% interval of the mean (None for one seed).

    images: (low, high), 95% interval over images, where it is known. note: text that follows the numbers.
    """
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    n: int
    kind: str = "value"  # or "difference" or "ratio"
    images: tuple | None = None
    note: str = ""

    def numbers(self):
        """{name: number or None}, what a file keeps."""
        low, high = self.images or (None, None)
        return {"mean": self.mean, "sd": self.sd, "low": self.low, "high": self.high, "n": self.n} | (
            {"images low": low, "images high": high} if self.kind != "value" else {})

    def __str__(self):
        def text(value):
            return _NUMBER[self.kind].format(value)
        if self.mean is None:
            return self.note
        around = ""
        if self.kind == "value":
            around = f" ± {self.sd:.2g}" if self.n > 1 else ""
        elif self.n > 1:
            around = f" [{text(self.low)}, {text(self.high)}]"
        elif self.images:
            around = f" {{{', '.join(map(text, self.images))}}}"
        return text(self.mean) + around + (f" {self.note}" if self.note else "")


def value(values, note=""):
    """Arithmetic mean of a figure, by seed."""
    return _estimate(values, "value", None, note)


def difference(values, images=None):
    """Arithmetic mean of paired differences, by seed."""
    return _estimate(values, "difference", images)


def ratio(values, images=None, note=""):
    """Geometric mean of paired ratios, by seed; the interval is that of their logarithms, the deviation their own."""
    logs = _estimate([math.log(value) for value in values], "ratio", images, note)
    mean, low, high = (None if bound is None else math.exp(bound) for bound in (logs.mean, logs.low, logs.high))
    return Estimate(mean, _sd(values), low, high, logs.n, "ratio", images, note)


def missing(reason):
    """No number, and why."""
    return Estimate(None, None, None, None, 0, note=f"none: {reason}")


def _estimate(values, kind, images, note=""):
    low, high = interval(values) if len(values) > 1 else (None, None)
    return Estimate(statistics.mean(values), _sd(values), low, high, len(values), kind, images, note)


def _sd(values):
    return statistics.stdev(values) if len(values) > 1 else None


def interval(values):
    """(low, high): 95% interval of the mean of two or more values (Student's t)."""
    from scipy.stats import t as student_t  # here, because it takes a second to import
    mean, half = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    half *= student_t.ppf(0.975, len(values) - 1)
    return mean - half, mean + half


def over_images(ours, theirs, how, resamples=RESAMPLES, seed=0):
    """95% bootstrap interval over images of how(mean of ours, mean of theirs), paired by image.

    Args:
        ours, theirs: (N, M), M figures of N images. how: of two (resamples, M), say torch.sub or torch.div.
    Returns:
        [(low, high)], one for each of the M figures.
    """
    ours, theirs = ours.double(), theirs.double()
    generator, means = torch.Generator().manual_seed(seed), []
    for _ in range(resamples):
        chosen = torch.randint(len(ours), (len(ours),), generator=generator)
        means.append(torch.stack([ours[chosen].mean(0), theirs[chosen].mean(0)]))
    quantiles = how(*torch.stack(means, 1)).quantile(torch.tensor([0.025, 0.975]).double(), dim=0)
    return list(map(tuple, quantiles.t().tolist()))


def rank_correlations(columns):
    """Rows of Spearman's rank correlation between columns {name: values}, each of the same things in one order."""
    from scipy.stats import spearmanr
    return [{"rank correlation": one} | {other: float(spearmanr(columns[one], columns[other]).statistic)
                                         for other in columns} for one in columns]


# --- tables

def write_tables(folder, tables, runs):
    """Write tables {name: (rows, note)}, a row a dict by column: table.md, <name>.csv and table.json.

    An `Estimate` is a column for each of its numbers in a CSV, a dict of them in table.json, which also holds `runs`,
    the figures of each run. Returns the Markdown text.
    """
    text, numbers = "", {}
    for name, (rows, note) in tables.items():
        text += markdown_table(list(rows[0]), [list(row.values()) for row in rows]) + f"\n\n{note}\n\n"
        numbers[name] = [{column: _numbers(cell) for column, cell in row.items()} for row in rows]
        flat = list(map(_flat, numbers[name]))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, list(dict.fromkeys(column for row in flat for column in row)))
        writer.writeheader()
        writer.writerows(flat)
        checkpoint.write_atomic(folder / f"{name}.csv", buffer.getvalue().encode())
    checkpoint.write_atomic(folder / "table.md", text.encode())
    checkpoint.save_json(folder / "table.json", numbers | {"runs": runs})
    return text


def _numbers(cell):
    """A cell as a file keeps it: a dict for an estimate, None for what is not finite."""
    if isinstance(cell, Estimate):
        return {name: _numbers(number) for name, number in cell.numbers().items()}
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def _flat(row):
    """A row whose dicts are a column for each of their entries."""
    flat = {}
    for column, cell in row.items():
        flat |= {f"{column} {name}": number for name, number in cell.items()} if isinstance(cell, dict) \
            else {column: cell}
    return flat
