"""Does a gain last? The same mixes compared after trainings of several lengths, in one plot."""
import re
from pathlib import Path

from harness import checkpoint, cli, report

PANELS = {"mean of judges / baseline": "mean of judges ÷ the baseline's",
          "psnr - baseline": "PSNR − the baseline's (dB)",
          "gradient_ratio - baseline": "gradient ratio − the baseline's"}


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("comparisons", nargs="+", type=cli.run_name, metavar="NAME",
                        help="what compare.py was given as --output, one for each length")
    parser.add_argument("--output", type=cli.path, default="lengths.png", help="PNG file (default %(default)s)")
    args = parser.parse_args()
    curves = {panel: {} for panel in PANELS}
    for folder in (Path("models") / name for name in args.comparisons):
        with checkpoint.complete(folder / "table.json"):
            table = checkpoint.load_json(folder / "table.json")
            run = folder / "{loss}-seed{seed}".format_map(table["runs"][0])
            flags = checkpoint.load_json(run / "args.json")
            if flags["minutes"]:
                raise ValueError(f"{run} was trained for minutes: the plot is over epochs, leave {folder} out")
            for row in table["against"]:
                if row["loss"] != row["baseline"]:
                    name = f"{row['loss']} beside {row['baseline']}"
                    for panel, of_panel in curves.items():
                        of_panel.setdefault(name, []).append((flags["num_epochs"], *numbers(row[panel])))
    print(report.draw_intervals(args.output, curves, "epochs of training", PANELS))


def numbers(text):
    """"0.7 [0.6, 0.8]" -> value, low, high; of "0.7 (one seed)" the value is both bounds."""
    return (list(map(float, re.findall(r"[-+]?\d[\d.e+-]*", text))) * 3)[:3]


if __name__ == "__main__":
    cli.run(main, many=False)
