"""Evaluate VQ-VAEs on a split: one table with intervals, one picture, one JSON file."""
from pathlib import Path

import torch

import datasets
import metrics
from harness import checkpoint, cli, report
from harness.errors import UserError
from harness.folder import holds_run
from metrics import measure, reported
from modules import VectorQuantizedVAE
from study.judges import FEATURES, OWN_JUDGE, Judge, no_judge, open_judged, trained_through

PICTURES = 12


def parse_args():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", type=cli.path, required=True, metavar="PT",
                        help="checkpoints of vqvae.py, or folders of its runs")
    parser.add_argument("--data-folder", type=cli.path, help="(default the first model's)")
    parser.add_argument("--split", choices=datasets.SPLITS, default="test", help="(default %(default)s)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--features", nargs="+", choices=FEATURES, default=["effnet-lite0"], metavar="NETWORK",
                       help=f"of {', '.join(FEATURES)}: networks that judge: the paired, kernel, Fréchet and sliced "
                       "Wasserstein distances in their features (default effnet-lite0)")
    group.add_argument("--no-features", action="store_true", help="leave these distances out")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="(default %(default)s)")
    parser.add_argument("--num-workers", type=cli.whole, default=1, help="(default %(default)s)")
    parser.add_argument("--device", default="auto", help="(default %(default)s)")
    parser.add_argument("--output", type=cli.path, default="evaluation", metavar="FOLDER",
                        help="(default %(default)s)")
    return parser.parse_args()


def _kind(facts):
    return f"{facts['name']} {'x'.join(map(str, facts['size']))}"


def main():
    args = parse_args()
    folder = Path(args.output)
    if holds_run(folder):
        raise UserError(f"--output {folder} is a run's folder, whose results.json would be replaced: name another")
    results_file = folder / "results.json"
    if results_file.exists() and "setting" not in checkpoint.load_json(results_file):
        raise UserError(f"{results_file} is of no evaluation and would be replaced: name another --output")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is no folder: name another")
    device = cli.pick_device(args.device)
    checkpoints = {path: checkpoint.load(path, "vqvae", datasets.FACTS)
                   for path in map(str, map(checkpoint.resolve, args.model))}
    first, facts = next((path, contents["data"]) for path, contents in checkpoints.items())
    for path, contents in checkpoints.items():
        if any(contents["data"][name] != facts[name] for name in ("name", "channels", "size")):
            raise UserError(f"{path} was trained on {_kind(contents['data'])}, {first} on {_kind(facts)}: "
                            "evaluate them apart")
    source = datasets.Source.of(checkpoints[first], args.data_folder)
    data, networks = open_judged(facts["name"], source, checkpoints, () if args.no_features else args.features, device,
                                 args.batch_size, args.num_workers)
    split = getattr(data, args.split).in_order()  # of train, every image
    judges = [Judge(name, network, split) for name, network in networks.items()]

    names = short_names(list(checkpoints))
    results, of_first, pictures = {}, {}, [metrics.as_8bit(split.examples(PICTURES))]
    for path, contents in checkpoints.items():
        model = VectorQuantizedVAE.rebuild(contents).to(device, memory_format=torch.channels_last)
        values, figures = measure(model, split, judges=judges, extra=metrics.conventions_for(data.size))
        figures["psnr_of_mean_mse"] = metrics.psnr_of_mean_mse(values["mse"])
        of_first = of_first or values
        results[names[path]] = figures | intervals(values, of_first) | training_cost(path) | {
            "checkpoint": path, "trained_through": trained_through(contents["args"])}
        with torch.no_grad():
            pictures.append(metrics.as_8bit(model(split.examples(PICTURES))[0]))

    folder.mkdir(parents=True, exist_ok=True)
    setting = {"dataset": facts["name"], "size": facts["size"], "split": args.split, "images": len(split.labels),
               "features": {judge.name: judge.network.description for judge in judges}}
    checkpoint.save_json(results_file, {"setting": setting, "models": results})
    print(f"{table(results, setting)}\n\n{conventions_table(results)}")
    for warning in filter(None, (no_judge(judge.name, list(results.values())) for judge in judges)):
        print(f"\n{warning}")
    print(f"\npicture (originals, then {', '.join(results)}): {report.save_picture(folder / 'models.png', pictures)}")


def short_names(paths):
    """{path: the shortest name that tells it from the others}: its folder's, or the path itself."""
    folders = [Path(path).parent.name for path in paths]
    return {path: path if folders.count(folder) > 1 or not folder else folder for path, folder in zip(paths, folders)}


def intervals(values, of_first):
    """95% bootstrap intervals over images: "<name>_interval" of a mean, and of its difference from the first model's
    "<name>_difference" (mean, low, high), paired by image.

    Args:
        values, of_first: {name: (N,)}, of a model and of the first.
    """
    differences = {name: value - of_first[name] for name, value in values.items()}
    return {f"{name}_interval": metrics.bootstrap_interval(value) for name, value in values.items()} | {
        f"{name}_difference": (float(value.mean()), *metrics.bootstrap_interval(value))
        for name, value in differences.items()}


def training_cost(path):
    """ms a step and peak memory that the run recorded beside its checkpoint, where it did."""
    results = Path(path).with_name("results.json")
    recorded = checkpoint.load_json(results) if results.exists() else {}
    return {name: recorded.get(name, float("nan")) for name in ("ms_per_step", "peak_memory_mb")}


def table(results, setting):
    """The Markdown table with its setting."""
    figures_of_first = next(iter(results.values()))
    keys = reported()
    for judge in setting["features"]:
        keys += [f"{name}/{judge}" for name in ("paired_distance", "kernel_distance", "frechet_distance",
                                                "sliced_wasserstein", "accuracy", "original_accuracy")
                 if f"{name}/{judge}" in figures_of_first]
    header = ["model", *keys, "ms_per_step", "peak_memory_mb"]
    rows = [[name, *(cell(figures, key) for key in header[1:])] for name, figures in results.items()]
    note = (f"{setting['dataset']}, {setting['split']} split, {setting['images']} images of "
            f"{setting['size'][0]}x{setting['size'][1]}; 95% bootstrap intervals over images")
    for judge, description in setting["features"].items():
        note += f"; {judge}: {description}"
    if setting["features"]:
        note += f"; distances at N = {setting['images']} compare within this setting only"
    if any(OWN_JUDGE in str(value) for row in rows for value in row):
        note += f"; {OWN_JUDGE} judged by the network that the model was trained through"
    text = report.markdown_table(header, rows) + f"\n\n{note}"
    (first, _), *others = results.items()
    if others:
        compared = [key for key in keys if f"{key}_difference" in figures_of_first]
        rows = [[name, *("{:+.3g} [{:+.3g}, {:+.3g}]".format(*figures[f"{key}_difference"]) for key in compared)]
                for name, figures in others]
        text += f"\n\n{report.markdown_table([f'minus {first}, by image', *compared], rows)}"
    return text


def conventions_table(results):
    """PSNR and SSIM of the same reconstructions as others define them."""
    keys = ("psnr", "psnr_of_mean_mse", "psnr_of_luma", "ssim", "ssim_uniform", "ms_ssim")
    keys = [key for key in keys if key in next(iter(results.values()))]
    rows = [[name, *(cell(figures, key) for key in keys)] for name, figures in results.items()]
    return (f"{report.markdown_table(['under other conventions', *keys], rows)}\n\n"
            "psnr, ssim: means over images of RGB, SSIM with a Gaussian window of 11 pixels; psnr_of_mean_mse: of the "
            "mean error over the split; psnr_of_luma: of BT.601 luma; ssim_uniform: a uniform window of 7 pixels; "
            "ms_ssim: as many of its five scales as fit the images")


def cell(figures, key):
    """A figure with its interval or deviation, where it has one, and a mark where the judge trained the model."""
    name, _, judge = key.partition("/")
    text = f"{figures[key]:.4g}"
    if f"{key}_interval" in figures:
        text += " [{:.4g}, {:.4g}]".format(*figures[f"{key}_interval"])
    if name == "kernel_distance":
        text = f"{figures[key]:.3g} ± {figures[f'kernel_distance_sd/{judge}']:.1g}"
    return text + (f" {OWN_JUDGE}" if judge and judge == figures["trained_through"] else "")


if __name__ == "__main__":
    cli.run(main, many=False)
