"""Evaluate VQ-VAEs on the test split: one table with intervals, one picture, one JSON file."""
from functools import partial
from pathlib import Path

import torch

import datasets
import metrics
from evaluation import measure, original_features
from features import FEATURES
from harness import checkpoint, cli, report
from modules import VectorQuantizedVAE

PICTURES = 12
SHOWN = ("psnr", "ssim", "gradient_ratio", "high_frequency_ratio", "saturation_ratio")


def parse_args():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, metavar="PT", help="checkpoints of vqvae.py")
    parser.add_argument("--data-folder", help="(default the first model's)")
    parser.add_argument("--features", choices=FEATURES, default="effnet-lite0",
                        help="network of the Fréchet and kernel distances (default %(default)s)")
    parser.add_argument("--no-features", action="store_true", help="leave these distances out")
    parser.add_argument("--lpips", action="store_true", help="add LPIPS (torchmetrics; downloads its weights)")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="(default %(default)s)")
    parser.add_argument("--num-workers", type=cli.whole, default=1, help="(default %(default)s)")
    parser.add_argument("--device", default="auto", help="(default %(default)s)")
    parser.add_argument("--output", default="evaluation", metavar="FOLDER", help="(default %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    device = cli.pick_device(args.device)
    found = {path: checkpoint.load(path, "vqvae") for path in args.model}
    facts = next(iter(found.values()))["data"]
    for path, contents in found.items():
        if any(contents["data"][name] != facts[name] for name in ("name", "channels", "size")):
            raise ValueError(f"{path} was trained on {contents['data']['name']} {contents['data']['size']}, "
                             f"{args.model[0]} on {facts['name']} {facts['size']}: evaluate them apart")
    source = datasets.Source.of(found[args.model[0]], args.data_folder)
    test = datasets.load(facts["name"], source, args.batch_size, device, workers=args.num_workers).test
    network = None if args.no_features else FEATURES[args.features]().to(device, memory_format=torch.channels_last)
    lpips = open_lpips() if args.lpips else None
    real = original_features(network, test) if network else None

    names = short_names(args.model)
    results, pictures = {}, [metrics.as_8bit(test.examples(PICTURES))]
    for path, contents in found.items():
        model = VectorQuantizedVAE.rebuild(contents).to(device, memory_format=torch.channels_last)
        results[names[path]] = evaluate(model, test, network, real, lpips) | training_cost(path) | {"checkpoint": path}
        with torch.no_grad():
            pictures.append(metrics.as_8bit(model(test.examples(PICTURES))[0]))

    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    setting = {"dataset": facts["name"], "size": facts["size"], "images": len(test.labels),
               "features": network.description if network else None}
    checkpoint.save_json(folder / "results.json", {"setting": setting, "models": results})
    print(table(results, setting))
    print(f"\npicture (originals, then {', '.join(results)}): {report.save_picture(folder / 'models.png', pictures)}")


def short_names(paths):
    """{path: the shortest name that tells it from the others}: its folder's, or the path itself."""
    folders = [Path(path).parent.name for path in paths]
    return {path: path if folders.count(folder) > 1 or not folder else folder for path, folder in zip(paths, folders)}


def evaluate(model, test, network, real, lpips):
    """Every figure of a model: means, "<name>_interval" 95% bootstrap intervals, distances of features."""
    distances = []
    values, figures = measure(model, test, network=network, real=real,
                              on_batch=lpips and (lambda *pair: distances.append(lpips(*pair))))
    if lpips:
        values["lpips"] = torch.cat(distances)
        figures["lpips"] = float(values["lpips"].mean())
    return figures | {f"{name}_interval": metrics.bootstrap_interval(value) for name, value in values.items()}


def open_lpips():
    """A function of images (B, C, H, W) in [0, 1] -> LPIPS (B,) (Zhang et al. 2018). ValueError without weights."""
    try:
        from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as lpips
        compare = partial(lpips, net_type="alex", reduction="none", normalize=True)
        compare(*torch.zeros(2, 1, 3, 64, 64))
    except Exception as error:
        raise ValueError(f"--lpips needs the AlexNet weights of torchvision, which cannot be had ({error}): leave it "
                         "out") from error
    return torch.no_grad()(lambda x_tilde, x: compare(x_tilde.expand(-1, 3, -1, -1), x.expand(-1, 3, -1, -1)).flatten())


def training_cost(path):
    """ms a step and peak memory that the run recorded beside its checkpoint, where it did."""
    results = Path(path).with_name("results.json")
    recorded = checkpoint.load_json(results) if results.exists() else {}
    return {name: recorded.get(name, float("nan")) for name in ("ms_per_step", "peak_memory_mb")}


def table(results, setting):
    """The Markdown table with its setting."""
    extra = [name for name in ("lpips", "frechet_distance", "kernel_distance") if name in next(iter(results.values()))]
    header = ["model", *SHOWN, *extra, "perplexity", "ms_per_step", "peak_memory_mb"]
    rows = []
    for name, figures in results.items():
        cells = {key: figures[key] for key in header[1:]}
        for key in SHOWN:
            low, high = figures[f"{key}_interval"]
            cells[key] = f"{figures[key]:.4g} [{low:.4g}, {high:.4g}]"
        if "kernel_distance" in extra:
            cells["kernel_distance"] = f"{figures['kernel_distance']:.3g} ± {figures['kernel_distance_sd']:.1g}"
        rows.append([name, *cells.values()])
    note = (f"{setting['dataset']}, {setting['images']} test images of {setting['size'][0]}x{setting['size'][1]}; "
            "95% bootstrap intervals over images")
    if setting["features"]:
        note += (f"; Fréchet and kernel distance through {setting['features']}, N = {setting['images']}: comparable "
                 "within this setting only")
    return report.markdown_table(header, rows) + f"\n\n{note}"


if __name__ == "__main__":
    cli.run(main)
