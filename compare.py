"""Train the same VQ-VAE under many losses and seeds: tables, pictures, and what differs from a baseline."""
import math
import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

import datasets
from experiment import RECIPES
from harness import checkpoint, cli, progress
from harness.device import pick_device
from harness.errors import UserError
from losses import TERMS
from study import measuring, mixes, tables
from study.estimates import write_tables
from study.judges import FEATURES, check_split, no_judge, open_judged
from study.runs import Sweep, check, in_turn, train

MOST_RUNS = 1000
QUICK = ("--hidden-size", "64", "--num-epochs", "1")


def parse_args():
    parser = cli.Parser(
        description=__doc__, epilog="All other flags go to vqvae.py, say --dataset cifar10 "
        f"--num-epochs 4; its defaults here: {RECIPES[mixes.BASE]}")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--losses", nargs="+", metavar="MIX",
                       help="mixes to compare: weights of loss terms, or a recipe with changes, say ssim "
                       "mse=1,ssim=0.5 mse=5,lr=1e-3 l1=1,vqgan=0.1 recommended,chroma=0; a mix names its runs and its "
                       f"rows. Besides terms and recipes it takes {', '.join(mixes.FLAGS)}")
    group.add_argument("--preset", choices=mixes.PRESETS, help="report: each term alone, and at weights 1, 0.5, 0.25 "
                       "with MSE; baselines: MSE and L1 at three weights and learning rates")
    parser.add_argument("--baseline", nargs="+", metavar="MIX", default=["mse"], help="what the others are compared "
                        "with; of several, the one of the least distance by all judges (default mse)")
    parser.add_argument("--rates", nargs="+", metavar="RATE", default=[""], help='train each mix at each of these, say '
                        'k=64 k=512 "k=512,downsample=8", and report how many bits it saves (default none)')
    parser.add_argument("--split", choices=("valid", "test"), default="valid",
                        help="where to measure: choose on valid, look at test once (default %(default)s)")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=["effnet-lite0"], metavar="NETWORK",
                        help=f"networks that judge, of {', '.join(FEATURES)}; rFID is the Fréchet distance of "
                        "inception (default effnet-lite0)")
    parser.add_argument("--quick", action="store_true", help=f"train with {' '.join(QUICK)}, a first look")
    parser.add_argument("--seeds", type=cli.at_most(MOST_RUNS), default=1, metavar="N", help="seeds that each mix is "
                        "trained with (default %(default)s)")
    parser.add_argument("--jobs", type=cli.at_most(cli.MOST_WORKERS), default=1, metavar="N", help="runs at a time, "
                        "sharing the cores (default %(default)s; 2 small models on 2 cores are faster than 1)")
    parser.add_argument("--vqgan-flags", type=shlex.split, default=[], metavar="FLAGS",
                        help='for vqgan.py alone, say "--minutes 5 --disc-start 0.8" (default none)')
    parser.add_argument("--output", type=cli.run_name, default="comparison", metavar="NAME",
                        help="runs go to models/NAME/, tables and pictures too, those of "
                        "the test split to models/NAME/test/ (default %(default)s)")
    args, flags = parser.parse_known_args()
    if args.split == "test" and len(args.baseline) > 1:
        parser.error("several --baseline with --split test would choose among them on test: name the one that valid "
                     "chose")
    for flag in (flag.split("=")[0] for flag in (*flags, *args.vqgan_flags)):
        if flag in ("--output-folder", "--seed", "--resume", "--overwrite", "--recipe"):
            parser.error(f"{flag} is set by this script for each run")
        if flag in {f"--{name}-weight" for name in (*TERMS, "disc", "perceptual")}:
            parser.error(f"{flag} would be silently the same for all runs or for none: weights stand in a mix, say "
                         "--losses mse=1,ssim=3")
    return args, [*(QUICK if args.quick else ()), *flags]


def main():
    args, flags = parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # an exception, which stops the runs

    # Every mix at every rate and seed: a run each, its folder and its command.
    losses = mixes.PRESETS[args.preset]() if args.preset else [mixes.parse_mix(text) for text in args.losses]
    sweep = Sweep(losses, [mixes.parse_mix(text) for text in args.baseline], args.rates, args.seeds)
    if args.vqgan_flags and not any(mixes.VQGAN in mix for mix in sweep.mixes.values()):
        raise UserError("--vqgan-flags are for mixes with vqgan, and none has it: add it to one, or leave them out")
    folder = Path("models") / args.output
    runs = {(name, seed): folder / f"{name}-seed{seed}" for seed in sweep.seeds for name in sweep.mixes}
    commands = {key: mixes.command_of(sweep.mixes[key[0]], key[1], flags, args.vqgan_flags) for key in runs}

    # What cannot work fails here, before the first run is trained.
    for key, run in runs.items():
        check(run, commands[key])
    tables_folder = folder if args.split == "valid" else folder / args.split
    check_tables(tables_folder / "table.json", sweep.mixes)
    data = data_flags(flags)
    device = pick_device(data.device)
    if not all((run / "results.json").exists() for run in runs.values()):
        trained = [run for run in runs.values() if (run / "best.pt").exists()]
        try_judges(data, trained, args.split, args.features, device)

    # Train. Runs of vqgan.py come first: a wrong flag of theirs is known at once, and not after hours of the others.
    threads = max(1, torch.get_num_threads() // args.jobs)  # all cores, or as many as OMP_NUM_THREADS says
    in_turn(ThreadPoolExecutor(args.jobs), args.jobs, "trained", sorted(runs, key=lambda key: commands[key][0]),
            lambda key: (train, runs[key], commands[key], threads))

    # Measure all runs on one split, and find the best of the baselines.
    split, networks, setting = measuring.open_split(list(runs.values()), args.split, args.features, device)
    figures, by_image = measuring.measure_runs(runs, split, networks, setting, args.jobs, threads)
    judged = tables.judged_keys(networks, figures.values())
    sweep.choose_baselines(figures, judged)

    # Tables, plots and a picture.
    note = note_of(args, flags, split, networks, runs.values())
    first = sweep.best[sweep.rates[0]]
    cosines = measuring.gradient_cosines(measuring.open_model(runs[first, 0], split), split)
    written = tables.tables_of(sweep, figures, by_image, judged, note, args.preset == "report") | {
        "cosines": (cosines, "Mean cosine between the terms' gradients at the reconstructions of "
                    f"{first}, seed 0: 1 is one direction, -1 the opposite.")}
    tables_folder.mkdir(exist_ok=True)
    for name in ("rates.csv", "rates.png", "ranks.csv"):  # not written each time
        (tables_folder / name).unlink(missing_ok=True)
    print("\n" + write_tables(tables_folder, written, [{"loss": name, "seed": seed} | values
                                                       for (name, seed), values in figures.items()]))
    print(f"picture: {tables.draw_picture(tables_folder / 'picture.png', sweep, runs, split)}")
    print(f"plot: {tables.draw_pareto(tables_folder / 'pareto.png', sweep, figures, judged)}")
    fewest = min(map(updates_of, runs.values()))
    for warning in filter(None, (*(no_judge(name, list(figures.values())) for name in networks),
                                 progress.warning(fewest, "more --num-epochs"))):
        print(warning)
    if len(sweep.rates) > 1:
        print(f"curves: {tables.draw_rates(tables_folder / 'rates.png', sweep, figures, judged)}")


def data_flags(flags):
    """What the flags for vqvae.py say of data and device."""
    parser = cli.Parser(add_help=False)
    datasets.add_arguments(parser)
    parser.add_argument("--device", default="auto")
    return parser.parse_known_args(flags)[0]


def try_judges(data, trained, split, features, device):
    """Open data and judges as the runs will be measured with; what they learn or download is kept."""
    data.dataset, data.data_folder = datasets.find(data.dataset, data.data_folder)
    source = replace(datasets.source_of(data), crop_scale=1., limit=None)  # as `datasets.Source.of` a run
    opened, _ = open_judged(data.dataset, source, measuring.checkpoints_of(trained), features, device)
    check_split(getattr(opened, split))
    torch.cuda.empty_cache()


def note_of(args, flags, split, networks, runs):
    """What stands below the first table: how its figures came about."""
    parts = [f"Measured on {args.split}: {len(split.labels)} images; seeds: {args.seeds}",
             f"Flags: {RECIPES[mixes.BASE]} {shlex.join(flags)}, except what a mix says itself"]
    if args.vqgan_flags:
        parts.append(f"Flags of vqgan.py: {shlex.join(args.vqgan_flags)}")
    refused = measuring.terms_for(split.examples(1))[1]
    if refused:
        parts.append(f"Loss terms not measured: {'; '.join(refused.values())}")
    programs = {str(checkpoint.load_json(run / "args.json").get("made_with")) for run in runs}
    if len(programs) > 1:
        parts.append("Runs were trained by several versions of this program, and may differ in more than their mixes: "
                     f"{'; '.join(sorted(programs))}")
    judges = "; ".join(f"{name}: {network.description}" for name, network in networks.items())
    return ". ".join([*parts, f"Judges, comparable within this setting only: {judges}"])


def updates_of(run):
    """How often a run changed its weights."""
    results, args = (checkpoint.load_json(run / name) for name in ("results.json", "args.json"))
    epochs = max(1, results["epochs"])
    return epochs * math.ceil(results["steps"] / epochs / args.get("accumulate", 1))


def check_tables(path, names):
    """UserError where tables of another comparison would be replaced: of a mix whose name is none of these."""
    if not path.exists():
        return
    with checkpoint.complete(path):
        others = sorted({run["loss"] for run in checkpoint.load_json(path)["runs"]} - set(names))
    if others:
        raise UserError(f"{path} is of a comparison that has {others[0]}: give another --output, or that mix too")


if __name__ == "__main__":
    cli.run(main, many=False)
