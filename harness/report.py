"""What a person looks at: tables, plots, and pictures of images side by side."""
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from harness import checkpoint

LEAST_SIDE = 96  # pixels; smaller images are enlarged by a whole factor, each pixel a square
MOST_COLUMNS = 120  # characters a line of a table
LABEL_SIZE = 14  # pixels


def markdown_table(header, rows):
    """Aligned Markdown table; numbers with four significant digits.

    Where a line would have more than `MOST_COLUMNS` characters, further columns follow in a table below, of which the
    first column is the same.
    """
    cells = [[_cell(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) + 3 for i in range(len(header))]
    parts, room = [[0]], MOST_COLUMNS - widths[0] - 1
    for column, width in enumerate(widths[1:], 1):
        if width > room and len(parts[-1]) > 1:
            parts.append([0])
            room = MOST_COLUMNS - widths[0] - 1
        parts[-1].append(column)
        room -= width
    return "\n\n".join(_table([[row[i] for i in part] for row in cells], [widths[i] for i in part]) for part in parts)


def _table(cells, widths):
    lines = ["".join(f"| {cell}".ljust(width) for cell, width in zip(row, widths)) + "|" for row in cells]
    return "\n".join([lines[0], "".join("|" + "-" * (width - 1) for width in widths) + "|", *lines[1:]])


def _cell(cell):
    return f"{cell:.4g}" if isinstance(cell, float) else _one_line(str(cell)).replace("|", "\\|")


def _one_line(text):
    return " ".join(text.splitlines())


def size_of(model, *inputs):
    """One line: the parameters of a model, and the multiply-adds of its forward pass on the inputs of one image.

    Products of matrices, convolutions and the search of the nearest codes are counted, in eval mode; nothing of the
    model changes.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because it takes long to import
    search = {torch.ops.kernels.nearest: lambda x, codebook, **_: 2 * math.prod(x) * codebook[0]} if hasattr(
        torch.ops.kernels, "nearest") else {}  # of shapes; where the model searches, its kernel is there
    was_training = model.training
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=search) as counter:
        model.eval()(*inputs)
    model.train(was_training)
    count, products = sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / 2e6
    return (f"model: {count:,} parameters, {products:,.1f} million multiply-adds an image" if products >= 1 else
            f"model: {count:,} parameters, {products:.2g} million multiply-adds an image")


# --- pictures


def image_rows(rows, least_side=LEAST_SIDE):
    """One picture (3, H', W') in [0, 1] of rows of images, each row (N, C, H, W) in [0, 1]; the last may be shorter."""
    from torchvision.utils import make_grid  # here, because it takes more than a second to import
    images = torch.cat([row.float().cpu() for row in rows])
    factor = -(-least_side // min(images.shape[2:]))
    images = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return make_grid(images, nrow=len(rows[0]), padding=4, pad_value=1.)


def save_picture(path, rows, least_side=LEAST_SIDE):
    """Save rows of images (N, C, H, W) in [0, 1] as a PNG; images smaller than `least_side` are enlarged.

    rows: a list, or a dict of them by the label that stands above each.
    """
    from torchvision.utils import save_image
    if isinstance(rows, dict):
        picture = _labelled({label: image_rows([row], least_side) for label, row in rows.items()})
    else:
        picture = image_rows(rows, least_side)
    checkpoint.write_with(path, lambda file: save_image(picture, file, "png"))
    return path


def _labelled(pictures):
    """One picture (3, H, W) of several by their label, which stands above each."""
    width, font = max(picture.shape[2] for picture in pictures.values()), ImageFont.load_default(LABEL_SIZE)
    lines = []
    for label, picture in pictures.items():
        strip = Image.new("RGB", (width, LABEL_SIZE + 6), "white")
        ImageDraw.Draw(strip).text((4, 2), _one_line(label).encode(errors="replace").decode(), "black", font)
        lines += [torch.from_numpy(np.array(strip)).permute(2, 0, 1) / 255,
                  F.pad(picture, (0, width - picture.shape[2]), value=1.)]
    return torch.cat(lines, 1)


def with_middles(rows, note="middle enlarged"):
    """Rows of images {label: (N, C, H, W)}, then of their middles, enlarged to about the size of a whole image."""
    middles = {}
    for label, images in rows.items():
        height, width = (side // 2 for side in images.shape[2:])
        top, left = ((side - part) // 2 for side, part in zip(images.shape[2:], (height, width)))
        middle = images[:, :, top:top + height, left:left + width]
        middles[f"{label}, {note}"] = middle.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return rows | middles


# --- plots

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
            axes.set_xticks(log_ticks, [f"{tick:g}" for tick in log_ticks])
            axes.minorticks_off()
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    return _save_figure(path, figure)


def _save_figure(path, figure):
    checkpoint.write_with(path, lambda file: figure.savefig(file, format="png", dpi=100))
    return path


def front(points, ideal):
    """Those of points (a, b), sorted, that no other beats in both: larger a is better, and b closer to `ideal`."""
    return sorted((a, b) for a, b in set(points) if not any(
        c >= a and abs(d - ideal) <= abs(b - ideal) and (c, d) != (a, b) for c, d in points))
