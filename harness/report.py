"""What a person looks at: tables of figures over seeds, plots, and pictures of images side by side."""
import csv
import io
import math
import re
import statistics

import torch

from harness import checkpoint

LEAST_SIDE = 96  # pixels; smaller images are enlarged by a whole factor, each pixel a square


def markdown_table(header, rows):
    """Aligned Markdown table; numbers with four significant digits."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row]
             for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def image_rows(rows, least_side=LEAST_SIDE):
    """One picture (3, H', W') in [0, 1] of rows of images, each row (N, C, H, W) in [0, 1]; the last may be shorter."""
    from torchvision.utils import make_grid  # here, because it takes more than a second to import
    images = torch.cat([row.float().cpu() for row in rows])
    factor = -(-least_side // min(images.shape[2:]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return make_grid(images, nrow=len(rows[0]), padding=4, pad_value=1.)


def save_picture(path, rows, least_side=LEAST_SIDE):
    """Save rows of images (N, C, H, W) in [0, 1] as a PNG; images smaller than `least_side` are enlarged."""
    from torchvision.utils import save_image
    checkpoint.write_with(path, lambda file: save_image(image_rows(rows, least_side), file, "png"))
    return path


# --- figures of several runs

def spread(values):
    """"mean ± sd", or the value where there is one alone."""
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2g}"


def interval(values):
    """(low, high): 95% interval of the mean of two or more values (Student's t)."""
    from scipy.stats import t as student_t  # here, because it takes a second to import
    mean, half = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    half *= student_t.ppf(0.975, len(values) - 1)
    return mean - half, mean + half


def difference(values):
    """Mean of paired differences with its 95% `interval`; one alone says so."""
    mean = f"{statistics.mean(values):+.3g}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    low, high = interval(values)
    return f"{mean} [{low:+.3g}, {high:+.3g}]"


def ratio(values):
    """Geometric mean of paired ratios with its 95% `interval`, of their logarithms; one alone says so."""
    if len(values) == 1:
        return f"{values[0]:.3g} (one seed)"
    logs = [math.log(value) for value in values]
    mean, low, high = (math.exp(value) for value in (statistics.mean(logs), *interval(logs)))
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def numbers(cell):
    """[value, low, high] of a cell that `difference` or `ratio` wrote; nan for the bounds of one seed."""
    found = re.findall(r"[-+]?(?:nan|inf|\d[\d.]*(?:e[-+]\d+)?)", cell.partition("(")[0])
    return (list(map(float, found)) + 3 * [math.nan])[:3]


def rank_correlations(columns):
    """Rows of Spearman's rank correlation between columns {name: values}, each of the same things in one order."""
    from scipy.stats import spearmanr
    return [{"rank correlation": one} | {other: f"{spearmanr(columns[one], columns[other]).statistic:.2f}"
                                         for other in columns} for one in columns]


def write_tables(folder, tables, runs):
    """Write tables {name: (rows, note)}, a row a dict by column: table.md, <name>.csv and table.json.

    table.json holds `runs` beside them, the figures of each run. Returns the Markdown text.
    """
    text = ""
    for name, (rows, note) in tables.items():
        text += markdown_table(list(rows[0]), [list(row.values()) for row in rows]) + f"\n\n{note}\n\n"
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        checkpoint.write_atomic(folder / f"{name}.csv", buffer.getvalue().encode())
    checkpoint.write_atomic(folder / "table.md", text.encode())
    checkpoint.save_json(folder / "table.json", {name: rows for name, (rows, _) in tables.items()} | {"runs": runs})
    return text


def draw_fronts(path, points, horizontal, panels, left_out=()):
    """A panel for each of `panels`: points by two figures, and a line through those that no other beats in both.

    Args:
        points: {name: {figure: value}}, numbered in the legend; "area" of one is that of its dot.
        horizontal: (figure, label), larger is better. panels: [(figure, label, value that nothing is better than)].
        left_out: names that are mentioned instead of drawn.
    """
    from matplotlib.figure import Figure  # here, because no run needs it
    figure, key = Figure(figsize=(7 * len(panels), 6), layout="constrained"), horizontal[0]
    for axes, (other, label, ideal) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for number, (name, point) in enumerate(points.items(), 1):
            axes.scatter(point[key], point[other], point.get("area", 60), alpha=0.6, label=f"{number}  {name}")
            axes.annotate(number, (point[key], point[other]), xytext=(5, 3), textcoords="offset points", fontsize=9)
        axes.plot(*zip(*front([(point[key], point[other]) for point in points.values()], ideal)), color="grey",
                  linewidth=1, zorder=0)
        axes.set(xlabel=horizontal[1] + (f"\nnot shown: {', '.join(left_out)}" if left_out else ""), ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return _save_figure(path, figure)


def draw_curves(path, label, panels, log_ticks=()):
    """A panel for each of `panels`, {title: {name: [(x, y) or (x, y, low, high)...]}}, with intervals where there are.

    log_ticks: of x, which is then on a logarithmic scale.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(4.5 * len(panels), 4.5), layout="constrained")
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, points in curves.items():
            x, y, *bounds = zip(*sorted(points))
            bars = [[a - b for a, b in zip(y, bounds[0])], [b - a for a, b in zip(y, bounds[1])]] if bounds else None
            axes.errorbar(x, y, bars, marker="o", capsize=4, label=name)
        axes.set(xlabel=label, title=title)
        axes.grid(alpha=0.3)
        if log_ticks:
            axes.set_xscale("log")
            axes.set_xticks(log_ticks, log_ticks)
            axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    return _save_figure(path, figure)


def _save_figure(path, figure):
    checkpoint.write_with(path, lambda file: figure.savefig(file, format="png", dpi=100))
    return path


def front(points, ideal):
    """Those of points (a, b), sorted, that no other beats in both: larger a is better, and b closer to `ideal`."""
    return sorted((a, b) for a, b in set(points) if not any(
        c >= a and abs(d - ideal) <= abs(b - ideal) and (c, d) != (a, b) for c, d in points))
