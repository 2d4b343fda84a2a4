"""Train the same VQ-VAE under many losses and seeds: tables, pictures, and what differs from a baseline."""
import os
import shlex
import signal
import sys
from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F

import datasets
import metrics
from experiment import RECIPES
from harness import checkpoint, cli, report
from harness.errors import UserError
from losses import TERMS
from metrics import measure, reported
from modules import VectorQuantizedVAE
from study import mixes
from study.judges import FEATURES, OWN_JUDGE, Judge, no_judge, open_judged, trained_through
from study.rate import delta_rate
from study.runs import Sweep, check, end_with, in_turn, train

QUICK = ("--hidden-size", "64", "--num-epochs", "1")
VERSION = 2  # of the figures kept beside a run: raise it whenever one changes its meaning
# FID on 2,000 CIFAR-10 images over that of MSE (86.3), in the report that this project grew out of.
REPORT_RATIOS = {"mse": "1.000", "ssim": "0.800", "mse+0.25ssim": "0.838", "ms-ssim": "0.908", "psnr": "0.949",
                 "gmsd": "> 3.13", "haarpsi": "> 3.13"} | {f"mse{w}ms-gmsd": ">= 0.971" for w in ("+", "+0.5", "+0.25")}
PICTURES = 10  # images a row of the picture
COSINE_BATCHES = 8
DIFFERENCES = ("psnr", "ssim", "gradient_ratio", "saturation_ratio")  # that tables give from the baseline's
FAR = 1.3  # times the baseline's Fréchet distance: beyond it a mix is left out of the plot


def parse_args():
    parser = cli.Parser(
        description=__doc__, allow_abbrev=False, epilog="All other flags go to vqvae.py, say --dataset cifar10 "
        f"--num-epochs 4; its defaults here: {RECIPES[mixes.BASE]}")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--losses", nargs="+", metavar="MIX",
                       help='say ssim "mse=1,ssim=0.5" "mse=5,lr=1e-3" "l1=1,vqgan=0.1" recommended; beside loss terms '
                       f"and recipes: {', '.join(mixes.FLAGS)}")
    group.add_argument("--preset", choices=mixes.PRESETS, help="report: each term alone, and at weights 1, 0.5, 0.25 "
                       "beside MSE; baselines: MSE and L1 at three weights and learning rates")
    parser.add_argument("--baseline", nargs="+", metavar="MIX", default=["mse"], help="what the others are compared "
                        "with; of several, the one of the least Fréchet distance (default mse)")
    parser.add_argument("--rates", nargs="+", metavar="RATE", default=[""], help='train each mix at each of these, say '
                        'k=64 k=512 "k=512,downsample=8", and say how many bits it saves (default none)')
    parser.add_argument("--split", choices=("valid", "test"), default="valid",
                        help="where to measure: choose on valid, look at test once (default %(default)s)")
    parser.add_argument("--features", nargs="+", choices=FEATURES, default=["effnet-lite0"], metavar="NETWORK",
                        help=f"of {', '.join(FEATURES)}: networks that judge, the first is also that of the sliced "
                        "Wasserstein distance (default effnet-lite0)")
    parser.add_argument("--quick", action="store_true", help=f"train with {' '.join(QUICK)}")
    parser.add_argument("--seeds", type=cli.positive_int, default=1, metavar="N", help="(default %(default)s)")
    parser.add_argument("--jobs", type=cli.positive_int, default=1, metavar="N", help="runs at a time, "
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
    losses = mixes.PRESETS[args.preset]() if args.preset else [mixes.parse_mix(text) for text in args.losses]
    sweep = Sweep(losses, [mixes.parse_mix(text) for text in args.baseline], args.rates, args.seeds)
    if args.vqgan_flags and not any(mixes.VQGAN in mix for mix in sweep.mixes.values()):
        raise UserError("--vqgan-flags are for mixes with vqgan, and none has it: add it to one, or leave them out")
    folder = Path("models") / args.output
    runs = {(name, seed): folder / f"{name}-seed{seed}" for seed in sweep.seeds for name in sweep.mixes}
    threads = max(1, torch.get_num_threads() // args.jobs)  # all cores, or as many as OMP_NUM_THREADS says
    commands = {key: mixes.command_of(sweep.mixes[key[0]], key[1], flags, args.vqgan_flags) for key in runs}
    for key, run in runs.items():  # all of them, before the first is trained
        check(run, commands[key])
    tables_folder = folder if args.split == "valid" else folder / args.split
    check_tables(tables_folder / "table.json", sweep.mixes)
    flags_of_first = Namespace(**mixes.meaning(next(iter(commands.values())))[1])
    device = cli.pick_device(flags_of_first.device)
    if not all((run / "results.json").exists() for run in runs.values()):
        # What is no use as data or to the judges fails here; what they learn or download is kept.
        flags_of_first.dataset, flags_of_first.data_folder = datasets.find(flags_of_first.dataset,
                                                                            flags_of_first.data_folder)
        source = replace(datasets.source_of(flags_of_first), crop_scale=1.)  # as `datasets.Source.of` a run
        open_judged(flags_of_first.dataset, source,
                    checkpoints_of(run for run in runs.values() if (run / "best.pt").exists()), args.features, device)
        torch.cuda.empty_cache()
    in_turn(ThreadPoolExecutor(args.jobs), args.jobs, "trained", runs,
            lambda key: (train, runs[key], commands[key], threads))

    split, networks, setting = open_split(list(runs.values()), args.split, args.features, device)
    figures = measure_runs(runs, split, networks, setting, args.jobs, threads)
    judged = [f"frechet_distance/{name}" for name in networks] + [f"sliced_wasserstein/{args.features[0]}"]
    sweep.choose_baselines(figures, judged)
    note = (f"Measured on {args.split}: {len(split.labels)} images; seeds: {args.seeds}. Flags: "
            f"{' '.join([RECIPES[mixes.BASE], *flags])}, but for what a mix says itself"
            f"{'; of vqgan.py: ' * bool(args.vqgan_flags)}{' '.join(args.vqgan_flags)}. Judges, comparable within "
            f"this setting only: " + "; ".join(f"{name}: {network.description}" for name, network in networks.items()))
    first = sweep.best[sweep.rates[0]]
    tables = tables_of(sweep, figures, judged, note, args.preset == "report") | {
        "cosines": (gradient_cosines(open_model(runs[first, 0], split), split), "Mean cosine between the terms' "
                    f"gradients at the reconstructions of {first}, seed 0: 1 is one direction, -1 the opposite.")}
    tables_folder.mkdir(exist_ok=True)
    for name in ("rates.csv", "rates.png", "ranks.csv"):  # not written each time
        (tables_folder / name).unlink(missing_ok=True)
    text = report.write_tables(tables_folder, tables, [{"loss": name, "seed": seed} | values
                                                for (name, seed), values in figures.items()])
    picture = draw_picture(tables_folder / "picture.png", [runs[name, 0] for name in sweep.mixes], split)
    plot = draw_pareto(tables_folder / "pareto.png", sweep, figures)
    print(f"\n{text}picture (originals, then {', '.join(sweep.mixes)}; below, their middles enlarged): {picture}\n"
          f"plot: {plot}")
    for warning in filter(None, (no_judge(name, list(figures.values())) for name in networks)):
        print(warning)
    if len(sweep.rates) > 1:
        print(f"curves: {draw_rates(tables_folder / 'rates.png', sweep, figures, judged)}")


def check_tables(path, names):
    """UserError where tables of another comparison would be replaced: of a mix whose name is none of these."""
    others = {run["loss"] for run in checkpoint.load_json(path).get("runs", [])} - set(names) if path.exists() else ()
    if others:
        raise UserError(f"{path} is of a comparison that has {min(others)}: give another --output, or that mix too")


# --- measuring

def checkpoints_of(runs):
    """{run: contents of its best.pt}."""
    return {run: checkpoint.load(run / "best.pt", "vqvae", datasets.FACTS) for run in runs}


def open_split(runs, split, features, device):
    """A split of the data set of runs, networks by name that judge it, and what their figures depend on."""
    checkpoints = checkpoints_of(runs)
    ckpt = checkpoints[runs[0]]
    source = datasets.Source.of(ckpt)
    data, networks = open_judged(ckpt["data"]["name"], source, checkpoints, features, device)
    setting = {"version": VERSION, "split": split, "images": datasets.fingerprint(data.name, source),
               "figures": [*metrics.IMAGE_METRICS, *TERMS],
               "networks": {name: network.description for name, network in networks.items()}}
    return getattr(data, split), networks, setting


def measure_runs(runs, split, networks, setting, jobs, threads):
    """Figures of each run, {(name, seed): figures}: measured now, or before under the same `setting`."""
    kept = {key: run / f"compared-{setting['split']}-{'-'.join(networks)}.json" for key, run in runs.items()}
    keys = {key: {"checkpoint": checkpoint.digest(run / "best.pt")} | setting for key, run in runs.items()}
    missing = {key: run for key, run in runs.items()
               if not kept[key].exists() or checkpoint.load_json(kept[key]).get("key") != keys[key]}
    if missing:
        judges = [Judge(name, network, split) for name, network in networks.items()]
        # Processes, because two networks in threads of one slow each other down.
        pool = ProcessPoolExecutor(jobs, get_context("spawn"), prepare_process, (os.getpid(), split, judges, threads)) \
            if jobs > 1 else ThreadPoolExecutor(1, initializer=prepare_measuring, initargs=(split, judges, threads))
        in_turn(pool, jobs, "measured", missing, lambda key: (measure_and_keep, missing[key], kept[key], keys[key]))
    return {key: checkpoint.load_json(path)["figures"] for key, path in kept.items()}


_measuring = {}  # of a process that measures: the split and its judges


def prepare_process(parent, *what):
    end_with(parent)
    prepare_measuring(*what)


def prepare_measuring(split, judges, threads):
    torch.set_num_threads(threads)
    _measuring.update(split=split, judges=judges)


def measure_and_keep(run, path, key):
    checkpoint.save_json(path, {"key": key, "figures": measure_run(run)})


def measure_run(run):
    """Figures of a finished run, the values of the loss terms under "terms", and its cost."""
    split = _measuring["split"]
    terms = terms_for(split)
    _, figures = measure(open_model(run, split), split, judges=_measuring["judges"],
                         extra={f"term/{name}": partial(term_of_images, TERMS[name]) for name in terms})
    figures["terms"] = {name: figures.pop(f"term/{name}") for name in terms}
    with checkpoint.complete(run / "results.json"):
        cost = checkpoint.load_json(run / "results.json")
        figures |= {name: cost[name] for name in ("ms_per_step", "peak_memory_mb", "train_seconds")}
    return figures | {
        "trained_through": trained_through(checkpoint.load(run / "best.pt", "vqvae")["args"])}


def term_of_images(term, x_tilde, x):
    """A loss term as a metric of images in [0, 1]: its value for the batch, for each of them."""
    return term(2 * x_tilde - 1, 2 * x - 1).expand(len(x))


def terms_for(split):
    """Names of the terms that the images of a split are large enough for."""
    x, names = split.examples(1), []
    for name, term in TERMS.items():
        try:
            term(x, x)
            names.append(name)
        except UserError:
            pass
    return names


def open_model(run, split):
    model = VectorQuantizedVAE.rebuild(checkpoint.load(run / "best.pt", "vqvae"))
    return model.to(split.device, memory_format=torch.channels_last)


# --- tables

def tables_of(sweep, figures, judged, note, of_report):
    """{name: (rows, note)} of all that figures say, but for the cosines."""
    paired = "Differences and ratios are paired by seed, with 95% intervals (Student's t); one seed has none."
    tables = {"table": (summarise(sweep, figures, judged), note),
              "against": (against_baselines(sweep, figures, judged, of_report), paired)}
    if any(values["trained_through"] for values in figures.values()):
        tables["against"] = (tables["against"][0], f"{paired} {OWN_JUDGE}: judged by a network it was trained through.")
    if len(sweep.rates) > 1:
        tables["rates"] = (delta_rates(sweep, figures, judged), "Bjøntegaard delta rate: per cent of bits beyond the "
                           "baseline's at equal quality, less is better; bits as an ideal entropy coder of single "
                           f"latents makes them. {paired}")
    if len(sweep.mixes) > 2:
        keys = (*judged, *accuracies(figures, ("accuracy/",)), "psnr", "ssim")
        tables["ranks"] = (report.rank_correlations({key: [sweep.mean(figures, name, key) for name in sweep.mixes]
                                                     for key in keys}), "Spearman's rank correlation over all mixes.")
    return tables | {"matrix": (loss_by_metric(sweep, figures), "Loss by metric: value over that of the baseline. A "
                                "row was trained on, a column measured.")}


def summarise(sweep, figures, judged):
    """A row a mix: mean ± sd over seeds."""
    columns = (*reported(), "color_bias", *judged, *accuracies(figures), "ms_per_step")
    return [{"loss": name} | {key: report.spread(sweep.of(figures, name, key)) + mark(figures, name, key)
                              for key in columns} for name in sweep.mixes]


def accuracies(figures, of=("accuracy/", "original_accuracy/")):
    return [key for key in next(iter(figures.values())) if key.startswith(of)]


def mark(figures, name, key):
    through = figures[name, 0]["trained_through"]
    return f" {OWN_JUDGE}" if through and key.endswith(f"/{through}") else ""


def against_baselines(sweep, figures, judged, of_report):
    """A row a mix: paired differences from the baseline of its rate, and ratios to it of what judges say."""
    rows = []
    for name in sweep.mixes:
        row = {"loss": name, "baseline": sweep.baseline_of(name)}
        for key in DIFFERENCES:
            row[f"{key} - baseline"] = report.difference(
                sweep.against_baseline(figures, name, key, lambda ours, theirs: ours - theirs))
        ratios = {key: sweep.against_baseline(figures, name, key, lambda ours, theirs: ours / theirs)
                  for key in judged}
        row |= {f"{key} / baseline": report.ratio(values) + mark(figures, name, key) for key, values in ratios.items()}
        row["mean of judges / baseline"] = report.ratio(
            [sum(values) / len(judged) for values in zip(*ratios.values())]) + max(
            mark(figures, name, key) for key in judged)
        if of_report:
            row["report FID / mse"] = REPORT_RATIOS.get(name, "")
        rows.append(row)
    return rows


def delta_rates(sweep, figures, judged):
    """A row a mix: bits saved over the best baselines at equal quality, by seed."""
    qualities = {"psnr": 1, "ssim": 1, "saturation_ratio": 1} | dict.fromkeys(judged, -1)  # 1 where larger is better
    rows = []
    for name, at in sweep.series.items():
        row = {"loss": name}
        for key, sign in qualities.items():
            ours, theirs = ([[figures[rates[rate], seed] for rate in sweep.rates] for seed in sweep.seeds]
                            for rates in (at, sweep.best))
            try:
                row[f"% bits at equal {key}"] = report.difference([
                    delta_rate(*points(one, key, sign), *points(other, key, sign)) for one, other in zip(ours, theirs)])
            except UserError as error:
                row[f"% bits at equal {key}"] = f"none: {error}"
        rows.append(row)
    return rows


def points(figures, key, sign):
    return [values["bits_per_pixel"] for values in figures], [sign * values[key] for values in figures]


def loss_by_metric(sweep, figures):
    """A row a mix, a column a term as metric: mean over seeds, relative to the baseline's."""
    def mean(name, term):
        return sum(terms[term] for terms in sweep.of(figures, name, "terms")) / len(sweep.seeds)
    return [{"loss": name} | {term: f"{mean(name, term) / mean(sweep.baseline_of(name), term):.3f}"
                              for term in figures[name, 0]["terms"]} for name in sweep.mixes]


def gradient_cosines(model, split):
    """Rows of the mean cosine between the gradients of two terms at a model's reconstructions of a split's images."""
    names, total, count = terms_for(split), 0., 0
    for x, _ in islice(split, COSINE_BATCHES):
        with torch.no_grad():
            x_tilde = model(x)[0].float()
        x_tilde.requires_grad_()
        gradients = torch.stack([torch.autograd.grad(TERMS[name](x_tilde, x), x_tilde)[0].flatten(1)
                                 for name in names])  # (terms, B, C H W)
        gradients = F.normalize(gradients, dim=2)
        total, count = total + torch.einsum("ibd,jbd->ij", gradients, gradients), count + len(x)
    return [{"cosine": name} | {other: f"{value:.2f}" for other, value in zip(names, row)}
            for name, row in zip(names, (total / count).tolist())]


# --- pictures

def draw_pareto(path, sweep, figures):
    """PSNR against sharpness and against Fréchet distance, means over seeds, and the mixes that no other beats in both.

    A point's area is its step's time. Mixes too far off to be of use are named below instead of drawn.
    """
    means = {name: {key: sweep.mean(figures, name, key) for key in ("psnr", "gradient_ratio", "frechet_distance")} | {
        "area": 60 * sweep.mean(figures, name, "ms_per_step") / sweep.mean(figures, sweep.baseline_of(name),
                                                                           "ms_per_step")} for name in sweep.mixes}
    far = [name for name, mean in means.items()
           if mean["frechet_distance"] > FAR * means[sweep.baseline_of(name)]["frechet_distance"]]
    return report.draw_fronts(path, {name: mean for name, mean in means.items() if name not in far},
                              ("psnr", "PSNR (dB)"),
                              [("gradient_ratio", "gradient ratio (1 is as sharp)", 1),
                               ("frechet_distance", "Fréchet distance (lower is better)", 0)], far)


def draw_rates(path, sweep, figures, judged):
    """Quality against bits per pixel, means over seeds, a curve a mix."""
    def curve(at, quality):
        return [(sweep.mean(figures, at[rate], "bits_per_pixel"), sweep.mean(figures, at[rate], quality))
                for rate in sweep.rates]
    return report.draw_curves(path, "bits per pixel", {
        quality: {name: curve(at, quality) for name, at in sweep.series.items()}
        for quality in ("psnr", "ssim", *judged)})


def draw_picture(path, runs, split):
    """Rows of originals and of each run's reconstructions of the same images; below, the middles of them enlarged."""
    x = split.examples(PICTURES)
    with torch.no_grad():
        rows = [metrics.as_8bit(x)] + [metrics.as_8bit(open_model(run, split)(x)[0]) for run in runs]
    top, left = (side // 4 for side in x.shape[2:])  # sides divide by 4: the middle, enlarged, is as large as the whole
    details = [row[:, :, top:3 * top, left:3 * left].repeat_interleave(2, 2).repeat_interleave(2, 3) for row in rows]
    return report.save_picture(path, rows + details)


if __name__ == "__main__":
    cli.run(main, many=False)
