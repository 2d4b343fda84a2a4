"""Train the same VQ-VAE under many losses and seeds: one table, one picture, and what differs from MSE."""
import argparse
import csv
import io
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from scipy.stats import t as student_t

import checkpoint
import datasets
import metrics
import report
import training
from features import FEATURES, measure, original_features
from losses import TERMS
from modules import VectorQuantizedVAE

HERE = Path(__file__).parent
BASELINE = "mse"
RECIPE = ("--lr", "2e-3", "--lr-schedule", "cosine", "--beta", "0.1", "--flip")
QUICK = ("--hidden-size", "64", "--num-epochs", "1", "--warmup-steps", "35")
REPORT_WEIGHTS = (1., 0.5, 0.25)
# FID on 2,000 CIFAR-10 images of the report that this project grew out of.
REPORT_FID = {"mse": 86.3, "ssim": 69.0, "mse+0.25ssim": 72.3, "ms-ssim": 78.4, "psnr": 81.9}
MEASURED = ("psnr", "ssim", "gradient_ratio", "high_frequency_ratio", "color_bias", "perplexity", "frechet_distance")
PICTURES = 10  # images a row of the picture


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, epilog="All other flags go to vqvae.py, say --dataset cifar10 "
        f"--num-epochs 4; its defaults here: {' '.join(RECIPE)}")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--losses", nargs="+", metavar="MIX", help='say mse ssim "mse=1,ssim=0.5"')
    group.add_argument("--preset", choices=("report",), help="each term alone, and at weights 1, 0.5, 0.25 beside MSE")
    parser.add_argument("--quick", action="store_true", help=f"train with {' '.join(QUICK)}")
    parser.add_argument("--seeds", type=training.positive_int, default=1, metavar="N", help="(default %(default)s)")
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
    for number, ((name, seed), run) in enumerate(runs.items(), 1):
        print(f"[{number}/{len(runs)}] {name}, seed {seed}", flush=True)
        train(run, mixes[name], seed, flags)

    device = training.pick_device("auto")
    test = open_test(next(iter(runs.values())))
    network = FEATURES[args.features]().to(device, memory_format=torch.channels_last)
    real = None
    figures = {}
    for (name, seed), run in runs.items():
        kept = run / f"compared-{args.features}.json"
        if not kept.exists():
            if real is None:
                real = original_features(network, test)
            checkpoint.save_json(kept, measure_run(run, test, network, real))
        figures[name, seed] = checkpoint.load_json(kept)

    rows = summarise(mixes, args.seeds, figures)
    note = (f"Seeds: {args.seeds}. Test images: {len(test.labels)}. Fréchet distance through {network.description}: "
            f"comparable within this setting only. Flags: {' '.join(flags)}")
    text = report.markdown_table(list(rows[0]), [list(row.values()) for row in rows]) + f"\n\n{note}\n"
    (folder / "table.md").write_text(text)
    checkpoint.save_json(folder / "table.json", {"note": note, "rows": rows,
                                                 "runs": [{"loss": n, "seed": s} | v for (n, s), v in figures.items()]})
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.write_atomic(folder / "table.csv", buffer.getvalue().encode())
    picture = draw_picture(folder / "picture.png", [runs[name, 0] for name in mixes], test)
    print(f"\n{text}\npicture (originals, then {', '.join(mixes)}; below, their middles enlarged): {picture}")


# --- mixes

def parse_mix(text):
    """"ssim" or "mse=1,ssim=0.5" -> {term: weight}; ValueError where it is neither."""
    mix = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        if name not in TERMS:
            raise ValueError(f"no loss term {name!r} in {text!r}: the terms are {', '.join(TERMS)}")
        try:
            mix[name] = training.positive(weight or "1")
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"the weight of {name} in {text!r} {error}") from None
    return mix


def mix_name(mix):
    """{"mse": 1, "ssim": 0.5} -> "mse+0.5ssim"."""
    return "+".join(("" if weight == 1 else f"{weight:g}") + name for name, weight in mix.items())


def report_mixes():
    terms = [name for name in TERMS if name not in ("mse", "l1")]
    return [{term: 1.} for term in terms] + [{"mse": 1., term: w} for term in terms for w in REPORT_WEIGHTS]


# --- runs

def train(run, mix, seed, flags):
    """An ordinary run of vqvae.py in its own folder: done once, resumed if it was cut off.

    Raises:
        ValueError: the folder holds a run of other flags, or training failed.
    """
    weights = [part for name in TERMS for part in (f"--{name}-weight", f"{mix.get(name, 0.):g}")]
    command = ["vqvae.py", *flags, *weights, "--seed", str(seed)]
    known = run / "command.json"
    if known.exists() and checkpoint.load_json(known) != command:
        raise ValueError(f"{run} was trained with other flags: give another --output, or remove it")
    if (run / "results.json").exists():
        return
    run.mkdir(parents=True, exist_ok=True)
    checkpoint.save_json(known, command)
    done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:], "--resume",
                           "--output-folder", str(run.relative_to("models"))], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise ValueError(f"{run}: {(done.stderr.strip().splitlines() or ['training failed'])[-1]}")


def open_test(run):
    found = checkpoint.load(run / "best.pt", "vqvae")
    return datasets.load(found["data"]["name"], datasets.Source.of(found), 128, training.pick_device("auto")).test


def open_model(run, test):
    model = VectorQuantizedVAE.rebuild(checkpoint.load(run / "best.pt", "vqvae"))
    return model.to(test.device, memory_format=torch.channels_last)


def measure_run(run, test, network, real):
    """Figures of a finished run on the test split, the largest colour bias of a channel by size, and its cost."""
    _, figures = measure(open_model(run, test), test, network, real)
    figures["color_bias"] = max((v for name, v in figures.items() if name.startswith("color_bias_")), key=abs)
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
        row["report FID / mse"] = f"{REPORT_FID[name] / REPORT_FID['mse']:.3f}" if name in REPORT_FID else ""
        rows.append(row)
    return rows


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


def draw_picture(path, runs, test):
    """Rows of originals and of each run's reconstructions of the same images; below, the middles of them enlarged."""
    x = test.examples(PICTURES)
    with torch.no_grad():
        rows = [metrics.as_8bit(x)] + [metrics.as_8bit(open_model(run, test)(x)[0]) for run in runs]
    top, left = (side // 4 for side in x.shape[2:])  # sides divide by 4: the middle, enlarged, is as large as the whole
    details = [row[:, :, top:3 * top, left:3 * left].repeat_interleave(2, 2).repeat_interleave(2, 3) for row in rows]
    return report.save_picture(path, rows + details)


if __name__ == "__main__":
    training.cli(main)
