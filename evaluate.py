"""Evaluate VQ-VAEs on a split: tables with intervals, a picture and a JSON file; or a prior by the classes it draws."""
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

import datasets
import metrics
from harness import checkpoint, cli, fields, report
from harness.device import pick_device
from harness.errors import UserError
from harness.folder import holds_run
from harness.images import MADE_FOLDERS
from modules import GatedPixelCNN, VectorQuantizedVAE
from priors.first_stage import FirstStage, add_drawing_arguments, check_classes, check_vqvae
from study.distances import frechet_distance
from study.estimates import over_images
from study.judges import FEATURES, OWN_JUDGE, Judge, no_judge, open_judged, open_network, trained_through
from study.tables import JUDGES_SAY, judged_keys, mark, mean_ratio

PICTURES, ORIGINAL, PICTURE = 10, "original", "models.png"


def parse_args():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", type=cli.path, metavar="RUN", help="runs of vqvae.py or vqgan.py: their "
                        "folders, or checkpoints in them (with --prior, default the one whose codes it draws)")
    parser.add_argument("--baseline", type=cli.path, metavar="RUN", help="the run that the others are compared with: "
                        "differences are run - baseline, ratios run / baseline (default the first of --model)")
    parser.add_argument("--data-folder", type=cli.path, help="where the images are (default the first model's)")
    parser.add_argument("--split", choices=datasets.SPLITS, default="valid",
                        help="where to measure: choose on valid, look at test once (default %(default)s)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--features", nargs="+", choices=FEATURES, default=["effnet-lite0"], metavar="NETWORK",
                       help=f"networks that judge, of {', '.join(FEATURES)}: by the paired, kernel, Fréchet and "
                       "sliced Wasserstein distances in their features; rFID is the Fréchet distance of inception "
                       "(default effnet-lite0)")
    group.add_argument("--no-features", action="store_true", help="leave these distances out")
    parser.add_argument("--batch-size", type=cli.positive_int, default=128, help="images at a time (default "
                        "%(default)s)")
    parser.add_argument("--num-workers", type=cli.at_most(cli.MOST_WORKERS, 0), default=1, help="processes that "
                        "decode images where a data set streams from disk (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default %(default)s)")
    parser.add_argument("--output", type=cli.path, default="evaluation", metavar="FOLDER",
                        help="where results.json and models.png go (default %(default)s)")
    group = parser.add_argument_group("a prior instead", "does it draw the class it is asked for, and how far are its "
                                      "samples from real images of --split? A classifier of their classes judges")
    group.add_argument("--prior", type=cli.path, metavar="RUN", help="run of pixelcnn_prior.py")
    group.add_argument("--samples", type=cli.at_most(fields.MOST_SAMPLES), default=100,
                       help="images drawn of each class (default %(default)s)")
    add_drawing_arguments(group)
    group.add_argument("--seed", type=cli.whole, default=0, help="seed of the draws (default %(default)s)")
    args = parser.parse_args()
    if not args.model and not args.prior:
        parser.error("--model or --prior is needed: name a run")
    of_prior = [name for name in ("samples", "temperature", "top_k", "seed")
                if getattr(args, name) != parser.get_default(name)]
    if of_prior and not args.prior:
        parser.error(f"--{of_prior[0].replace('_', '-')} is for --prior: add it, or leave this out")
    of_models = [parser.get_default(name) for name in ("baseline", "features", "no_features", "output")]
    if args.prior and ([args.baseline, args.features, args.no_features, args.output] != of_models
                       or len(args.model or []) > 1):
        parser.error("--prior is judged alone, by a classifier, and writes no files: leave out --baseline, --features, "
                     "--no-features, --output and further models")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    if args.prior:
        evaluate_prior(args, device)
    else:
        evaluate_models(args, device)


# --- models

def evaluate_models(args, device):
    """Measure the models on one split, each against the baseline, which is the first of them."""
    paths = [args.baseline, *args.model] if args.baseline else args.model
    checkpoints = {path: checkpoint.load(path, "vqvae", fields.VQVAE)
                   for path in map(str, map(checkpoint.resolve, paths))}
    check_one_kind(checkpoints)
    names, (first, *others) = short_names(list(checkpoints)), checkpoints
    facts, baseline = checkpoints[first]["data"], names[first]
    source = datasets.Source.of(checkpoints[first], args.data_folder)
    folder = checked_output(Path(args.output), source.folder)
    data, networks = open_judged(facts["name"], source, checkpoints, () if args.no_features else args.features, device,
                                 args.batch_size, args.num_workers)
    for path, contents in checkpoints.items():
        warn_of_learned(data, path, contents)
    split = getattr(data, args.split).in_order()  # of train, every image
    judges = [Judge(name, network, split) for name, network in networks.items()]

    results, by_image, pictures = {}, {}, {ORIGINAL: metrics.as_8bit(split.examples(PICTURES))}
    for path, contents in checkpoints.items():
        model, name = VectorQuantizedVAE.rebuild(contents).to(device, memory_format=torch.channels_last), names[path]
        by_image[name], figures = metrics.measure(model, split, judges=judges,
                                                  extra=metrics.conventions_for(data.size))
        figures["psnr_of_mean_mse"] = metrics.psnr_of_mean_mse(by_image[name]["mse"])
        results[name] = training_of(path, contents) | figures | intervals(by_image[name]) | {
            "checkpoint": path, "trained_through": trained_through(contents["args"])}
        with torch.no_grad():
            pictures[f"{name} (baseline)" if path == first and others else name] = metrics.as_8bit(
                model(split.examples(PICTURES))[0])
    judged = judged_keys(networks, results.values())
    for name in (names[path] for path in others):
        results[name] |= against(results[name], results[baseline], by_image[name], by_image[baseline], judged)

    setting = {"dataset": facts["name"], "size": facts["size"], "split": args.split, "images": len(split.labels),
               "baseline": baseline, "judged": judged,
               "features": {name: network.description for name, network in networks.items()}}
    print(f"{table(results, setting)}\n\n{conventions_table(results)}")  # whatever becomes of the files
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.save_json(folder / "results.json", {"setting": setting, "models": results})
    judges_fail = filter(None, (no_judge(name, list(results.values())) for name in networks))
    for line in (*warnings_of(results), *judges_fail):
        print(f"\nwarning: {line}")
    print(f"\npicture: {report.save_picture(folder / PICTURE, report.with_middles(pictures))}")


def warn_of_learned(data, path, contents):
    """Say where the images that a model, by its checkpoint, held out may not be those held out here."""
    known, now = contents["data"], data.facts()
    if known["carved"] != now["carved"] or (known["images"] != now["images"] and not contents["args"].get("limit")):
        print(f"warning: {path} held out other images than those of this folder: if it learned some of these, its "
              "figures are too good")


def checked_output(folder, data):
    """The folder that results go to. UserError where they would replace something else, or lie among the data."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is no folder: name another")
    if holds_run(folder):
        raise UserError(f"--output {folder} is a run's folder, whose results.json would be replaced: name another")
    file = folder / "results.json"
    if file.exists() and "setting" not in checkpoint.load_json(file):
        raise UserError(f"{file} is of no evaluation and would be replaced: name another --output")
    if (folder / PICTURE).exists() and not file.exists():
        raise UserError(f"{folder / PICTURE} is of no evaluation and would be replaced: name another --output")
    if folder.resolve().is_relative_to(Path(data).resolve()) and folder.parts[:1] not in [(n,) for n in MADE_FOLDERS]:
        raise UserError(f"--output {folder} lies in the data folder {data}, where its picture would become data: name "
                        "another")
    return folder


def check_one_kind(checkpoints):
    """UserError where models were trained on different data sets, or on images of different sizes."""
    kinds = {path: f"{contents['data']['name']} {'x'.join(map(str, contents['data']['size']))}, "
             f"{contents['data']['channels']} channels" for path, contents in checkpoints.items()}
    (first, kind), *others = kinds.items()
    for path, other in others:
        if other != kind:
            raise UserError(f"{path} was trained on {other}, {first} on {kind}: evaluate them apart")


def short_names(paths):
    """{path: the shortest name that tells it from the others and the originals}: its folder's, or the path itself."""
    folders = [Path(path).parent.name for path in paths]
    return {path: path if folders.count(folder) > 1 or folder in ("", ORIGINAL) else folder
            for path, folder in zip(paths, folders)}


def training_of(path, contents):
    """How far a run was trained, and at what cost: from its results.json, and its last.pt where that is further.

    "finished" is None where there is neither: a best.pt alone says how far it is itself.
    """
    results, last = (Path(path).with_name(name) for name in ("results.json", "last.pt"))
    recorded = checkpoint.load_json(results, fields.RESULTS) if results.exists() else {}
    run, counters, kept = contents.get("run"), contents["counters"], {}  # older files lack the first
    recorded_steps = recorded.get("steps", -1)
    with suppress(UserError) if recorded_steps >= counters["step"] else nullcontext():  # then it can be done without
        kept = checkpoint.load(last, "vqvae", fields.LAST, "remove it, or put it back") if last.exists() else {}
    for file, found in ((results, recorded), (last, kept)):
        if found.get("run", run) != run:
            raise UserError(f"{path} is of another run than {file}: put its own back, or move it elsewhere")
    of_epoch = "best_step" not in counters  # a best.pt, kept in its epoch
    training = {"epochs": counters["epoch"] + of_epoch, "steps": counters["step"], "finished": None,
                **{name: recorded.get(name) for name in ("ms_per_step", "peak_memory_mb")}}
    if recorded_steps >= counters["step"]:
        training |= {"epochs": recorded["epochs"], "steps": recorded_steps, "finished": True}
    if kept and kept["counters"]["step"] > recorded_steps:  # not finished, or trained on since
        counters, args = kept["counters"], kept["args"]
        done, asked, unit = (counters["seconds"] / 60, args["minutes"], "minutes") if args["minutes"] else (
            counters["epoch"], args["num_epochs"], "epochs")
        training |= {"epochs": max(counters["epoch"], training["epochs"]), "finished": done >= asked,
                     "steps": max(counters["step"], training["steps"]),
                     "done": f"{round(done, 2):g} of {asked:g} {unit}"}
    return training


def warnings_of(results):
    """A line for each model that is unfinished, or trained for less than another."""
    longest = max(results, key=lambda name: results[name]["steps"])
    for name, figures in results.items():
        if figures["finished"] is False:
            yield f"{name} is unfinished: {figures['done']} are done"
        elif figures["finished"] and all(figures[unit] < results[longest][unit] for unit in ("steps", "epochs")):
            yield f"{name} was trained for {figures['steps']} steps, {longest} for {results[longest]['steps']}"


def intervals(by_image):
    """95% bootstrap intervals over images of the mean of each figure, "<name>_interval"."""
    return {f"{name}_interval": metrics.bootstrap_interval(values) for name, values in by_image.items()}


def against(ours, theirs, ours_by_image, theirs_by_image, judged):
    """What a model's figures are against the baseline's: (value, low, high), with the 95% interval over paired images.

    Returns:
        "<name>_difference", model - baseline, of each figure that an image has; "<name>_ratio", model / baseline, of
        the `judged`, without an interval where only a whole split has the figure; and of their geometric mean,
        "mean_of_judges_ratio".
    """
    def spans(names, how):
        pair = (torch.stack([by_image[name] for name in names], 1) for by_image in (ours_by_image, theirs_by_image))
        return dict(zip(names, over_images(*pair, how))) if names else {}
    differences = spans(list(ours_by_image), torch.sub)
    ratios = spans([name for name in judged if name in ours_by_image], torch.div)
    found = {f"{name}_difference": (ours[name] - theirs[name], *span) for name, span in differences.items()}
    found |= {f"{name}_ratio": (ours[name] / theirs[name], *ratios.get(name, (None, None))) for name in judged}
    return found | ({"mean_of_judges_ratio": (mean_ratio(ours, theirs, judged), None, None)} if judged else {})


def table(results, setting):
    """The Markdown tables: figures, differences from the baseline and ratios to it, with their setting."""
    baseline = setting["baseline"]
    figures = results[baseline]
    keys = metrics.reported() + [f"{name}/{judge}" for judge in setting["features"] for name in JUDGES_SAY
                                 if f"{name}/{judge}" in figures]
    header = ["epochs", "steps", *keys, "ms_per_step", "peak_memory_mb"]
    text = report.markdown_table(["model", *header], [
        [name, *(cell(figures, key) for key in header)] for name, figures in results.items()])
    text += (f"\n\n{setting['dataset']}, {setting['split']} split, {setting['images']} images of "
             f"{setting['size'][0]}x{setting['size'][1]}; [low, high]: 95% bootstrap interval over images; "
             f"{metrics.SHARPNESS}")
    text += "".join(f"; {judge}: {description}" for judge, description in setting["features"].items())
    if setting["features"]:
        text += (f"; distances at N = {setting['images']} compare within this setting only; ± is the standard "
                 "deviation over draws of N images")
    if any(figures["trained_through"] for figures in results.values()):
        text += f"; {OWN_JUDGE} judged by the network that the model, or its baseline, was trained through"
    if setting["judged"] and len(results) > 1:
        text += f"; mean_of_judges: the geometric mean of the ratios of {', '.join(setting['judged'])}"
    differences = [key for key in keys if f"{key}_interval" in figures]
    ratios = [*setting["judged"], "mean_of_judges"] if setting["judged"] else []
    for sign, kind, columns in (("-", "difference", differences), ("/", "ratio", ratios)):
        rows = [[name, *(against_cell(figures, results[baseline], key, kind, setting["judged"]) for key in columns)]
                for name, figures in results.items() if name != baseline]
        if rows and columns:
            text += "\n\n" + report.markdown_table([f"run {sign} {baseline}", *columns], rows)
    return text


def conventions_table(results):
    """PSNR and SSIM of the same reconstructions as others define them."""
    keys = ("psnr", "psnr_of_mean_mse", "psnr_of_luma", "ssim", "ssim_uniform", "ms_ssim")
    keys = [key for key in keys if key in next(iter(results.values()))]
    rows = [[name, *(cell(figures, key) for key in keys)] for name, figures in results.items()]
    return (f"{report.markdown_table(['other conventions', *keys], rows)}\n\n"
            "psnr, ssim: means over images of RGB, SSIM with a Gaussian window of 11 pixels; psnr_of_mean_mse: of the "
            "mean error over the split; psnr_of_luma: of BT.601 luma; ssim_uniform: a uniform window of 7 pixels; "
            "ms_ssim: as many of its five scales as fit the images")


def cell(figures, key):
    """A figure with its interval or deviation, where it has one, and a mark where the judge trained the model."""
    name, _, judge = key.partition("/")
    value = "–" if figures[key] is None else figures[key]  # a cost that no file keeps
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    if f"{key}_interval" in figures:
        text += " [{:.4g}, {:.4g}]".format(*figures[f"{key}_interval"])
    if name == "kernel_distance":
        text = f"{figures[key]:.3g} ± {figures[f'kernel_distance_sd/{judge}']:.1g}"
    return f"{text} {mark(figures['trained_through'], key)}".rstrip()


def against_cell(figures, baseline, key, kind, judged):
    """A difference or a ratio with its interval, where it has one, and a mark as in `cell`, also for the baseline's
    training; the mean is of `judged`."""
    numbers, form = figures[f"{key}_{kind}"], "{:+.3g}" if kind == "difference" else "{:.3g}"
    text = form.format(numbers[0]) if None in numbers else f"{form} [{form}, {form}]".format(*numbers)
    through = figures["trained_through"] or baseline["trained_through"]
    return f"{text} {mark(through, *(judged if key == 'mean_of_judges' else [key]))}".rstrip()


# --- a prior

def evaluate_prior(args, device):
    """Agreement of a classifier of real images with the class asked for, and Fréchet distance: of reconstructions of
    the split in `args`, and of samples."""
    path = args.model[0] if args.model else checkpoint.load(args.prior, "prior", fields.PRIOR)["vqvae"]["path"]
    if not (args.model or Path(path).exists()):
        raise UserError(f"{args.prior} draws the codes of {path}, which is not there: pass --model, where it is now")
    first, prior_ckpt = FirstStage(path, device), checkpoint.load(args.prior, "prior", fields.PRIOR)
    classes, name = first.classes, first.data["name"]
    if not classes:
        raise UserError(f"{path} was trained on a data set without classes: there is nothing to agree on")
    check_vqvae(prior_ckpt, path, first.K)
    source = datasets.Source.of(first.ckpt, args.data_folder)
    data, _ = open_judged(name, source, {path: first.ckpt}, (), device, args.batch_size, args.num_workers)
    check_classes(data, classes, source.folder)  # before a classifier learns others
    warn_of_learned(data, path, first.ckpt)
    split = getattr(data, args.split).in_order()  # of train, every image
    judge = Judge("classifier", open_network("classifier", data, source), split)

    prior, generator = GatedPixelCNN.rebuild(prior_ckpt).to(device), torch.Generator().manual_seed(args.seed)
    labels = torch.arange(len(classes), device=device).repeat_interleave(args.samples)
    with torch.no_grad():
        drawn = [prior.generate(label, first.shape, len(label), args.temperature, args.top_k, generator)
                 for label in labels.split(args.samples)]
        samples = torch.cat([judge.network(first.decode(codes)) for codes in torch.cat(drawn).split(args.batch_size)])
        rebuilt = torch.cat([judge.network(first.decode(first.encode(x))) for x, _ in split])
    figures = judge.figures(rebuilt)
    rows = [[f"real {args.split} images", figures["original_accuracy"], ""],
            ["their reconstructions", figures["accuracy"], figures["frechet_distance"]],
            [f"samples, {args.samples} a class", judge.agreement(samples, labels),
             frechet_distance(samples, judge.real)]]
    rows += [[f"  {name}", judge.agreement(*part), ""]
             for name, *part in zip(classes, samples.split(args.samples), labels.split(args.samples))]
    print(report.markdown_table(["judged by the classifier", "agreement", "Fréchet distance"], rows))
    warning = no_judge("classifier", [{f"{name}/classifier": value for name, value in figures.items()}])
    if warning:
        print(warning)


if __name__ == "__main__":
    cli.run(main, many=False)
