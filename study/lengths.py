"""Does a gain last? The same mixes compared after trainings of several lengths, in one plot."""
from pathlib import Path

import datasets
from harness import checkpoint, cli, report, run
from harness.errors import UserError

PANELS = {"mean of judges ÷ the baseline's": "mean of judges / baseline",
          "PSNR − the baseline's (dB)": "psnr - baseline",
          "gradient ratio − the baseline's": "gradient_ratio - baseline"}
MAY_DIFFER = run.MAY_CHANGE_ON_RESUME | datasets.MAY_CHANGE_ON_RESUME | {"seed", "output_folder"}  # flags


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("comparisons", nargs="+", type=cli.run_name, metavar="NAME",
                        help="what compare.py was given as --output, one for each length; NAME/test for its test split")
    parser.add_argument("--output", type=cli.path, default="lengths.png", help="PNG file (default %(default)s)")
    args = parser.parse_args()
    panels, seen = {title: {} for title in PANELS}, {}
    for folder in (Path("models") / name for name in args.comparisons):
        flags, rows = read(folder)
        epochs = flags["num_epochs"]
        if epochs in seen:
            raise UserError(f"{folder} and {seen[epochs][0]} are both of {epochs} epochs: give one of each length")
        seen[epochs] = folder, flags
        first, known = next(iter(seen.values()))
        differ = [name for name in flags if name not in MAY_DIFFER and flags[name] != known.get(name)]
        if differ:
            raise UserError(f"{folder} was trained with another {differ[0]} than {first}: only lengths and learning "
                            "rates may differ")
        for row in rows:
            for title, column in PANELS.items():
                curve = panels[title].setdefault(f"{row['loss']} beside {row['baseline']}", [])
                curve.append((epochs, *report.numbers(row[column])))
    print(report.draw_curves(args.output, "epochs of training", panels, log_ticks=sorted(seen)))


def read(folder):
    """Flags of the first run of a comparison, and the rows of its table that set a mix against another."""
    path = folder / "table.json"
    with checkpoint.complete(path):
        table = checkpoint.load_json(path)
        name = "{loss}-seed{seed}".format_map(table["runs"][0])
        rows = [row for row in table["against"] if row["loss"] != row["baseline"]]
    if not rows:
        raise UserError(f"{path} compares a baseline with itself alone: leave it out")
    of_test = folder.name == "test" and not (folder / name).is_dir()  # whose runs lie beside it
    path = (folder.parent if of_test else folder) / name / "args.json"
    flags = checkpoint.load_json(path)
    with checkpoint.complete(path):
        if flags["minutes"]:
            raise UserError(f"{folder} was trained for minutes, the plot is over epochs: leave it out")
    return flags, rows


if __name__ == "__main__":
    cli.run(main, many=False)
