"""Does a gain last? The same mixes compared after trainings of several lengths, in one plot."""
import math
import re
from pathlib import Path

from harness import checkpoint, cli, report

PANELS = {"mean of judges ÷ the baseline's": "mean of judges / baseline",
          "PSNR − the baseline's (dB)": "psnr - baseline",
          "gradient ratio − the baseline's": "gradient_ratio - baseline"}


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("comparisons", nargs="+", type=cli.run_name, metavar="NAME",
                        help="what compare.py was given as --output, one for each length; NAME/test for its test split")
    parser.add_argument("--output", type=cli.path, default="lengths.png", help="PNG file (default %(default)s)")
    args = parser.parse_args()
    panels = {title: {} for title in PANELS}
    for folder in (Path("models") / name for name in args.comparisons):
        with checkpoint.complete(folder / "table.json"):
            table = checkpoint.load_json(folder / "table.json")
            name = "{loss}-seed{seed}".format_map(table["runs"][0])
            run = folder / name if (folder / name).is_dir() else folder.parent / name  # of the table of the test split
            flags = checkpoint.load_json(run / "args.json")
            if flags["minutes"]:
                raise ValueError(f"{run} was trained for minutes: the plot is over epochs, leave {folder} out")
            for row in table["against"]:
                if row["loss"] != row["baseline"]:
                    for title, column in PANELS.items():
                        curve = panels[title].setdefault(f"{row['loss']} beside {row['baseline']}", [])
                        curve.append((flags["num_epochs"], *numbers(row[column])))
    lengths = sorted({point[0] for curves in panels.values() for curve in curves.values() for point in curve})
    if not lengths:
        raise ValueError("these compare nothing but a baseline with itself: give comparisons of two mixes")
    print(report.draw_curves(args.output, "epochs of training", panels, ticks=lengths))


def numbers(text):
    """"0.7 [0.6, 0.8]" -> value, low, high; the bounds of "0.7 (one seed)" are nan."""
    return (list(map(float, re.findall(r"[-+]?\d[\d.e+-]*", text))) + [math.nan] * 2)[:3]


if __name__ == "__main__":
    cli.run(main, many=False)
