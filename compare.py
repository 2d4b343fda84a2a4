"""Train the same VQ-VAE under many losses and seeds: one table, one picture, and what differs from MSE."""
import argparse
import csv
import io
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import t as student_t

import datasets
import metrics
from evaluation import measure, original_features
from experiment import DISC_WEIGHT
from features import FEATURES
from harness import checkpoint, cli, report
from losses import TERMS, ReconstructionLoss
from modules import VectorQuantizedVAE

HERE = Path(__file__).parent
BASELINE = "mse"
VQGAN = "vqgan"  # in a mix, it stands for the discriminator, and its weight for --disc-weight
SHARPEN = "sharpen"  # in a mix, it stands for --sharpen, and its weight for the amount
RECIPE = ("--lr", "2e-3", "--lr-schedule", "cosine", "--beta", "0.1", "--flip")
QUICK = ("--hidden-size", "64", "--num-epochs", "1", "--warmup-steps", "35")
REPORT_TERMS = ("psnr", "ssim", "ms-ssim", "gradient", "gmsd", "ms-gmsd", "haarpsi")
REPORT_WEIGHTS = (1., 0.5, 0.25)
# FID on 2,000 CIFAR-10 images over that of MSE (86.3), in the report that this project grew out of.
REPORT_RATIOS = {"mse": "1.000", "ssim": "0.800", "mse+0.25ssim": "0.838", "ms-ssim": "0.908", "psnr": "0.949",
                 "gmsd": "> 3.13", "haarpsi": "> 3.13"} | {f"mse{w}ms-gmsd": ">= 0.971" for w in ("+", "+0.5", "+0.25")}
MEASURED = ("psnr", "ssim", "gradient_ratio", "high_frequency_ratio", "saturation_ratio", "color_bias", "perplexity",
            "frechet_distance")
PICTURES = 10  # images a row of the picture
COSINE_BATCHES = 8
FAR = 1.3  # times the Fréchet distance of MSE: beyond it a mix is left out of the plot


def parse_args():
    parser = cli.Parser(
        description=__doc__, allow_abbrev=False, epilog="All other flags go to vqvae.py, say --dataset cifar10 "
        f"--num-epochs 4; its defaults here: {' '.join(RECIPE)}")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--losses", nargs="+", metavar="MIX",
                       help='say ssim "mse=1,ssim=0.5" "ssim=1,sharpen=0.3" vqgan (vqgan.py on MSE) '
                       '"l1=1,ssim=0.5,vqgan=0.1"')
    group.add_argument("--preset", choices=("report",), help="each term alone, and at weights 1, 0.5, 0.25 beside MSE")
    parser.add_argument("--quick", action="store_true", help=f"train with {' '.join(QUICK)}")
    parser.add_argument("--seeds", type=cli.positive_int, default=1, metavar="N", help="(default %(default)s)")
    parser.add_argument("--jobs", type=cli.positive_int, default=1, metavar="N", help="runs at a time, "
                        "sharing the cores (default %(default)s; 2 small models on 2 cores are faster than 1)")
    parser.add_argument("--vqgan-flags", type=shlex.split, default=[], metavar="FLAGS",
                        help='for vqgan.py alone, say "--disc-start 500"')
    parser.add_argument("--features", choices=FEATURES, default="effnet-lite0", help="(default %(default)s)")
    parser.add_argument("--output", default="comparison", metavar="NAME",
                        help="runs go to models/NAME/, tables and picture too (default %(default)s)")
    args, flags = parser.parse_known_args()
    for taken in ("--output-folder", "--seed", "--resume", "--overwrite"):
        if any(flag.split("=")[0] == taken for flag in flags):
            parser.error(f"{taken} is set by this script for each run")
    return args, [*RECIPE, *(QUICK if args.quick else ()), *flags]


def main():
    args, flags = parse_args()
    mixes = report_mixes() if args.preset else [parse_mix(text) for text in args.losses]
    mixes = {mix_name(mix): mix for mix in [{BASELINE: 1.}, *mixes]}
    folder = Path("models") / args.output
    runs = {(name, seed): folder / f"{name}-seed{seed}" for name in mixes for seed in range(args.seeds)}
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    commands = {key: command_of(mixes[key[0]], key[1], flags, args.vqgan_flags) for key in runs}
    in_turn(ThreadPoolExecutor(args.jobs), "trained", runs, lambda key: (train, runs[key], commands[key], threads))

    # Processes, because two networks in threads of one slow each other down.
    test, network = open_test(next(iter(runs.values()))), FEATURES[args.features]
    pool = ProcessPoolExecutor(args.jobs, get_context("spawn"), prepare_measuring, (test, network, threads))
    figures = in_turn(pool, "measured", runs, lambda key: (measure_once, runs[key], args.features))

    note = (f"Seeds: {args.seeds}. Test images: {len(test.labels)}. Fréchet distance through {network.description}: "
            f"comparable within this setting only. Flags: {' '.join(flags)}")
    text = write_tables(folder, {
        "table": (summarise(mixes, args.seeds, figures), note),
        "matrix": (loss_by_metric(mixes, args.seeds, figures), "Loss by metric: value on the test split over that of "
                   f"{BASELINE}. A row was trained on, a column measured."),
        "cosines": (gradient_cosines(open_model(runs[BASELINE, 0], test), test), "Mean cosine between the terms' "
                    f"gradients at the reconstructions of {BASELINE}, seed 0: 1 is one direction, -1 the opposite.")},
        [{"loss": name, "seed": seed} | values for (name, seed), values in figures.items()])
    picture = draw_picture(folder / "picture.png", [runs[name, 0] for name in mixes], test)
    plot = draw_pareto(folder / "pareto.png", mixes, args.seeds, figures)
    print(f"\n{text}picture (originals, then {', '.join(mixes)}; below, their middles enlarged): {picture}\n"
          f"plot: {plot}")


# --- mixes

def parse_mix(text):
    """"ssim" or "mse=1,ssim=0.5" or "vqgan" -> {term: weight}; ValueError where it is none of them."""
    mix = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        if name not in (*TERMS, VQGAN, SHARPEN):
            raise ValueError(f"no loss term {name!r} in {text!r}: the terms are {', '.join((*TERMS, VQGAN))}, and "
                             f"{SHARPEN}")
        try:
            mix[name] = cli.positive(weight or str(DISC_WEIGHT if name == VQGAN else 1))
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"the weight of {name} in {text!r} {error}") from None
    ReconstructionLoss(terms_of(mix), sharpen=mix.get(SHARPEN, 0.))  # what it refuses fails before anything is trained
    return mix


def terms_of(mix):
    """The loss terms of a mix and their weights; MSE where it names none."""
    return {name: weight for name, weight in mix.items() if name in TERMS} or {BASELINE: 1.}


def mix_name(mix):
    """{"mse": 1, "ssim": 0.5} -> "mse+0.5ssim"."""
    usual = {VQGAN: DISC_WEIGHT}
    return "+".join(("" if weight == usual.get(name, 1) else f"{weight:g}") + name for name, weight in mix.items())


def report_mixes():
    return [{term: 1.} for term in REPORT_TERMS] + [
        {"mse": 1., term: weight} for term in REPORT_TERMS for weight in REPORT_WEIGHTS]


# --- runs

def in_turn(pool, done, runs, task):
    """{key: result} of task(key) = (function, arguments...) for the keys of `runs`, with a line for each one done."""
    results = {}
    with pool:
        futures = {key: pool.submit(*task(key)) for key in runs}
        try:
            for number, (key, future) in enumerate(futures.items(), 1):
                results[key] = future.result()
                print(f"{done} {number}/{len(runs)}: {key[0]}, seed {key[1]}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return results


def command_of(mix, seed, flags, vqgan_flags):
    """Command line of the run of a mix and a seed."""
    terms = terms_of(mix)
    weights = [part for name in TERMS for part in (f"--{name}-weight", f"{terms.get(name, 0.):g}")]
    script = ["vqgan.py", "--disc-weight", f"{mix[VQGAN]:g}", *vqgan_flags] if VQGAN in mix else ["vqvae.py"]
    sharpen = ["--sharpen", f"{mix[SHARPEN]:g}"] if SHARPEN in mix else []
    return [*script, *flags, *weights, *sharpen, "--seed", str(seed)]


def train(run, command, threads):
    """An ordinary run in its own folder, what it prints in output.txt: done once, resumed if it was cut off.

    Raises:
        ValueError: the folder holds a run of other flags, or training failed.
    """
    known = run / "command.json"
    if known.exists() and checkpoint.load_json(known) != command:
        raise ValueError(f"{run} was trained with other flags: give another --output, or remove it")
    if (run / "results.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.save_json(known, command)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with open(run / "output.txt", "a") as output:
        done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:], "--resume", "--output-folder",
                               str(run.relative_to("models"))], stdout=output, stderr=subprocess.PIPE, text=True,
                              env=environment)
    if done.returncode:
        raise ValueError(f"{run}: {(done.stderr.strip().splitlines() or ['training failed'])[-1]}")


def open_test(run):
    found = checkpoint.load(run / "best.pt", "vqvae")
    return datasets.load(found["data"]["name"], datasets.Source.of(found), 128, cli.pick_device("auto")).test


def terms_for(test):
    """Names of the terms that the images of a split are large enough for."""
    x, names = test.examples(1), []
    for name, term in TERMS.items():
        try:
            term(x, x)
            names.append(name)
        except ValueError:
            pass
    return names


def open_model(run, test):
    model = VectorQuantizedVAE.rebuild(checkpoint.load(run / "best.pt", "vqvae"))
    return model.to(test.device, memory_format=torch.channels_last)


_measuring = {}  # of a process that measures: the test split, the feature network, features of the originals


def prepare_measuring(test, network, threads):
    torch.set_num_threads(threads)
    network = network().to(test.device, memory_format=torch.channels_last)
    _measuring.update(test=test, network=network)


def measure_once(run, features):
    """Figures of a run, measured now or before."""
    kept = run / f"compared-{features}.json"
    if not kept.exists():
        if "real" not in _measuring:  # not before a run needs it: a sweep that is drawn again measures nothing
            _measuring["real"] = original_features(_measuring["network"], _measuring["test"])
        checkpoint.save_json(kept, measure_run(run, **_measuring))
    return checkpoint.load_json(kept)


def measure_run(run, test, network, real):
    """Figures of a finished run on the test split, the largest colour bias of a channel by size, terms and cost."""
    terms = dict.fromkeys(terms_for(test), 0.)

    def on_batch(x_tilde, x):
        for name in terms:
            terms[name] += float(TERMS[name](2 * x_tilde - 1, 2 * x - 1)) * len(x) / len(test.labels)
    _, figures = measure(open_model(run, test), test, network=network, real=real, on_batch=on_batch)
    figures["color_bias"] = max((v for name, v in figures.items() if name.startswith("color_bias_")), key=abs)
    figures["terms"] = terms
    cost = checkpoint.load_json(run / "results.json")
    return figures | {name: cost[name] for name in ("ms_per_step", "peak_memory_mb", "train_seconds")}


# --- tables

def summarise(mixes, seeds, figures):
    """A row a mix: mean ± sd over seeds, what differs from MSE, and the Fréchet distance relative to MSE's."""
    rows = []
    for name in mixes:
        row = {"loss": name}
        for key in (*MEASURED, "ms_per_step"):
            values = [figures[name, seed][key] for seed in range(seeds)]
            row[key] = spread(values)
            if key in ("psnr", "ssim", "gradient_ratio"):
                row[f"{key} - {BASELINE}"] = difference(
                    [value - figures[BASELINE, seed][key] for seed, value in enumerate(values)])
        ratios = [figures[name, seed]["frechet_distance"] / figures[BASELINE, seed]["frechet_distance"]
                  for seed in range(seeds)]
        row[f"frechet / {BASELINE}"] = spread(ratios)
        row["report FID / mse"] = REPORT_RATIOS.get(name, "")
        rows.append(row)
    return rows


def loss_by_metric(mixes, seeds, figures):
    """A row a mix, a column a term as metric: mean over seeds, relative to MSE's."""
    def mean(name, term):
        return statistics.mean(figures[name, seed]["terms"][term] for seed in range(seeds))
    return [{"loss": name} | {term: f"{mean(name, term) / mean(BASELINE, term):.3f}"
                              for term in figures[BASELINE, 0]["terms"]} for name in mixes]


def gradient_cosines(model, test):
    """Rows of the mean cosine between the gradients of two terms at a model's reconstructions of test images."""
    names, total, count = terms_for(test), 0., 0
    for x, _ in islice(test, COSINE_BATCHES):
        with torch.no_grad():
            x_tilde = model(x)[0].float()
        x_tilde.requires_grad_()
        gradients = torch.stack([torch.autograd.grad(TERMS[name](x_tilde, x), x_tilde)[0].flatten(1)
                                 for name in names])  # (terms, B, C H W)
        gradients = F.normalize(gradients, dim=2)
        total, count = total + torch.einsum("ibd,jbd->ij", gradients, gradients), count + len(x)
    return [{"cosine": name} | {other: f"{value:.2f}" for other, value in zip(names, row)}
            for name, row in zip(names, (total / count).tolist())]


def write_tables(folder, tables, runs):
    """Tables {name: (rows, note)} as one Markdown text, a CSV file each, and a JSON file with the figures of each run.

    Returns:
        the text.
    """
    text = ""
    for name, (rows, note) in tables.items():
        text += report.markdown_table(list(rows[0]), [list(row.values()) for row in rows]) + f"\n\n{note}\n\n"
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        checkpoint.write_atomic(folder / f"{name}.csv", buffer.getvalue().encode())
    checkpoint.write_atomic(folder / "table.md", text.encode())
    checkpoint.save_json(folder / "table.json", {name: rows for name, (rows, _) in tables.items()} | {"runs": runs})
    return text


def spread(values):
    """"mean ± sd", or the value where there is one alone."""
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2g}"


def difference(values):
    """Mean and 95% interval of paired differences over seeds (Student's t); "no difference" where it holds zero."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:+.3g}"
    half = student_t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    if mean - half <= 0 <= mean + half:
        return "no difference"
    return f"{mean:+.3g} [{mean - half:+.3g}, {mean + half:+.3g}]"


# --- pictures

def draw_pareto(path, mixes, seeds, figures):
    """PSNR against sharpness and against Fréchet distance, means over seeds, and the mixes that no other beats in both.

    A point's area is its step's time. Mixes too far off to be of use are named below instead of drawn.
    """
    from matplotlib.figure import Figure  # here, because no run needs it
    means = {name: {key: statistics.mean(figures[name, seed][key] for seed in range(seeds))
                    for key in ("psnr", "gradient_ratio", "frechet_distance", "ms_per_step")} for name in mixes}
    far = [name for name, mean in means.items()
           if mean["frechet_distance"] > FAR * means[BASELINE]["frechet_distance"]]
    shown = {name: mean for name, mean in means.items() if name not in far}
    figure = Figure(figsize=(14, 6), layout="constrained")
    for axes, key, sign, label in zip(figure.subplots(1, 2), ("gradient_ratio", "frechet_distance"), (1, -1),
                                      ("gradient ratio (1 is as sharp)", "Fréchet distance (lower is better)")):
        for number, (name, mean) in enumerate(shown.items(), 1):
            area = 60 * mean["ms_per_step"] / means[BASELINE]["ms_per_step"]
            axes.scatter(mean["psnr"], mean[key], area, alpha=0.6, label=f"{number}  {name}")
            axes.annotate(number, (mean["psnr"], mean[key]), xytext=(5, 3), textcoords="offset points", fontsize=9)
        front = sorted((mean["psnr"], mean[key]) for mean in shown.values() if not any(
            other["psnr"] >= mean["psnr"] and sign * other[key] >= sign * mean[key] and other is not mean
            for other in shown.values()))
        axes.plot(*zip(*front), color="grey", linewidth=1, zorder=0)
        axes.set(xlabel="PSNR (dB)" + (f"\nnot shown: {', '.join(far)}" if far else ""), ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    checkpoint.write_atomic(path, buffer.getvalue())
    return path


def draw_picture(path, runs, test):
    """Rows of originals and of each run's reconstructions of the same images; below, the middles of them enlarged."""
    x = test.examples(PICTURES)
    with torch.no_grad():
        rows = [metrics.as_8bit(x)] + [metrics.as_8bit(open_model(run, test)(x)[0]) for run in runs]
    top, left = (side // 4 for side in x.shape[2:])  # sides divide by 4: the middle, enlarged, is as large as the whole
    details = [row[:, :, top:3 * top, left:3 * left].repeat_interleave(2, 2).repeat_interleave(2, 3) for row in rows]
    return report.save_picture(path, rows + details)


if __name__ == "__main__":
    cli.run(main)
