"""Does a gain last? The same mixes compared after trainings of several lengths, in one plot."""
import math
from pathlib import Path

import datasets
from harness import checkpoint, cli, fields, report, run
from harness.errors import UserError
from study.tables import MEAN_OF_JUDGES

PANELS = {"mean of judges ÷ the baseline's": MEAN_OF_JUDGES,
          "PSNR − the baseline's (dB)": "psnr - baseline",
          "gradient ratio − the baseline's": "gradient_ratio - baseline"}
OF_CLASSIFIER = {"classifier's distance ÷ the baseline's": "frechet_distance/classifier / baseline"}  # where it judged
PNG = b"\x89PNG\r\n\x1a\n"  # what such a file begins with
MAY_DIFFER = run.MAY_CHANGE_ON_RESUME | datasets.MAY_CHANGE_ON_RESUME | {"seed", "output_folder", "made_with"}


def main():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("comparisons", nargs="+", type=cli.run_name, metavar="NAME",
                        help="what compare.py was given as --output, one for each length; NAME/test for its test split")
    parser.add_argument("--output", type=cli.path, default="lengths.png", help="PNG file (default %(default)s)")
    args = parser.parse_args()
    check_output(Path(args.output))
    panels, seen = {}, {}
    for folder in (Path("models") / name for name in args.comparisons):
        flags, gains, judges = read(folder)
        unit, length = ("minutes", flags["minutes"]) if flags["minutes"] else ("epochs", flags["num_epochs"])
        first, unit_of_first, known, judges_of_first = next(iter(seen.values()), (folder, unit, flags, judges))
        if unit != unit_of_first:
            raise UserError(f"{folder} was trained for {unit} and {first} was not: they share no axis")
        if length in seen:
            raise UserError(f"{folder} and {seen[length][0]} are both of {length:g} {unit}: give one of each length")
        seen[length] = folder, unit, flags, judges
        differ = [name for name in flags if name not in MAY_DIFFER and flags[name] != known.get(name)]
        if differ:
            raise UserError(f"{folder} was trained with another {differ[0]} than {first}: only lengths and learning "
                            "rates may differ")
        if judges != judges_of_first:
            raise UserError(f"{folder} was judged by {', '.join(judges)} and {first} by {', '.join(judges_of_first)}: "
                            "their means do not compare")
        for title, curve, numbers in gains:
            panels.setdefault(title, {}).setdefault(curve, []).append((length, *numbers))
    print(report.draw_curves(args.output, f"{unit} of training", panels, log_ticks=sorted(seen)))


def check_output(path):
    """UserError where a file that is no picture would be replaced."""
    if path.is_dir() or path.exists() and path.read_bytes()[:len(PNG)] != PNG:
        raise UserError(f"--output {path} is no PNG file and would be replaced: name another")


def read(folder):
    """Flags of the first run of a comparison, and what its table says of each mix against its baseline.

    Returns:
        flags, [(title of a panel, name of a curve, (mean, low, high))], not a number where there is none, and the
        distances that have a ratio to the baseline's.
    """
    path = folder / "table.json"
    with checkpoint.complete(path):
        table = checkpoint.load_json(path)
        name = "{loss}-seed{seed}".format_map(table["runs"][0])
        gains = [(title, f"{row['loss']} against {row['baseline']}", _numbers(row[column]))
                 for row in table["against"] if row["loss"] != row["baseline"]
                 for title, column in (PANELS | OF_CLASSIFIER).items() if title in PANELS or column in row]
        judges = [column for column in table["against"][0] if column.endswith(" / baseline")]
    if not gains:
        raise UserError(f"{path} compares a baseline with itself alone: leave it out")
    of_test = folder.name == "test" and not (folder / name).is_dir()  # whose runs lie in the folder above
    path = (folder.parent if of_test else folder) / name / "args.json"
    return checkpoint.load_json(path, fields.LAST["args"]), gains, judges


def _numbers(estimate):
    """(mean, low, high) of what a file keeps of an `Estimate`; TypeError where they are no numbers in this order."""
    mean, low, high = (math.nan if estimate[part] is None else 0. + estimate[part] for part in ("mean", "low", "high"))
    if low > mean or mean > high:
        raise TypeError(f"its mean {mean} lies outside {low} to {high}")
    return mean, low, high


if __name__ == "__main__":
    cli.run(main, many=False)
