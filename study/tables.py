"""What a comparison says: tables of its figures against the baselines', and plots and pictures."""
import statistics

import torch

import metrics
from harness import report
from harness.errors import UserError
from study import estimates
from study.judges import OWN_JUDGE
from study.measuring import open_model
from study.rate import delta_rate

DISTANCES = ("paired_distance", "kernel_distance", "frechet_distance")  # that make the mean of the judges
JUDGES_SAY = (*DISTANCES, "sliced_wasserstein", "accuracy", "original_accuracy")
MEAN_OF_JUDGES = "mean of judges / baseline"
DIFFERENCES = ("psnr", "ssim", "gradient_ratio", "saturation_ratio")  # that tables give from the baseline's
# FID on 2,000 CIFAR-10 images over that of MSE (86.3), in the report that this project grew out of.
REPORT_RATIOS = {"mse": 1., "ssim": 0.8, "mse,ssim=0.25": 0.838, "ms-ssim": 0.908, "psnr": 0.949}
PICTURES = 10  # images a row of the picture
FAR = 1.3  # times the baseline's Fréchet distance: beyond it a mix is left out of the plot


def judged_keys(networks, runs):
    """Figures whose geometric mean is the mean of the judges: `DISTANCES` of each network, Fréchet of a classifier.

    Left out are those that a run lacks, or that are not above 0 in each, as an unbiased one may be for few images.

    Args:
        networks: names. runs: figures of each run.
    """
    keys = [f"{distance}/{network}" for network in networks for distance in DISTANCES
            if network != "classifier" or distance == "frechet_distance"]
    return [key for key in keys if all(figures.get(key, 0) > 0 for figures in runs)]


def mean_ratio(ours, theirs, judged):
    """Geometric mean over the judges of the distance of a run over that of its baseline."""
    return statistics.geometric_mean([ours[key] / theirs[key] for key in judged])


def mark(trained_through, *keys):
    """What marks figures in a table where the model was trained through one of their judges."""
    return OWN_JUDGE if trained_through and any(key.endswith(f"/{trained_through}") for key in keys) else ""


# --- tables

def tables_of(sweep, figures, by_image, judged, note, of_report):
    """{name: (rows, note)} of all that figures say.

    Args:
        figures, by_image: as of `measuring.measure_runs`. judged: `judged_keys`.
    """
    paired = (f"Differences are mix - baseline, ratios mix / baseline, paired by seed; {estimates.LEGEND}. The mean of "
              f"judges is the geometric mean of {', '.join(judged)}.")
    if any(values["trained_through"] for values in figures.values()):
        paired += f" {OWN_JUDGE}: judged by a network that it, or its baseline, was trained through."
    if of_report:
        paired += " The report's ratios of mse with ms-gmsd are at least 0.971, those of gmsd and haarpsi above 3.13."
    tables = {"table": (summarise(sweep, figures), note),
              "against": (against_baselines(sweep, figures, by_image, judged, of_report), paired)}
    if len(sweep.rates) > 1:
        tables["rates"] = (delta_rates(sweep, figures, judged), "Bjøntegaard delta rate: per cent of bits beyond the "
                           "baseline's at equal quality, less is better; bits as an ideal entropy coder of single "
                           "latents makes them.")
    if len(sweep.mixes) > 2:
        keys = (*judged, *_judges_say(figures, ["accuracy"]), "psnr", "ssim")
        tables["ranks"] = (estimates.rank_correlations({
            key: [sweep.mean(figures, name, key) for name in sweep.mixes] for key in keys}),
            "Spearman's rank correlation over all mixes.")
    return tables | {"matrix": (loss_by_metric(sweep, figures), "Loss by metric: value over that of the baseline. A "
                                "row was trained on, a column measured.")}


def summarise(sweep, figures):
    """A row a mix: each figure over seeds."""
    columns = (*metrics.reported(), "color_bias", *_judges_say(figures, JUDGES_SAY), "ms_per_step")
    return [{"loss": name} | {
        key: estimates.value(sweep.of(figures, name, key), mark(figures[name, 0]["trained_through"], key))
        for key in columns} for name in sweep.mixes]


def _judges_say(figures, names):
    """The figures of judges with these names, "<name>/<judge>"."""
    return [key for key in next(iter(figures.values())) if "/" in key and key.partition("/")[0] in names]


def against_baselines(sweep, figures, by_image, judged, of_report=False):
    """A row a mix: paired differences from the baseline of its rate, and ratios to it of what judges say."""
    rows = []
    for name in sweep.mixes:
        row = {"loss": name, "baseline": sweep.baseline_of(name)}
        through = figures[name, 0]["trained_through"] or figures[row["baseline"], 0]["trained_through"]
        spans = _over_images(sweep, by_image, name, DIFFERENCES, torch.sub)
        spans |= _over_images(sweep, by_image, name, judged, torch.div)
        for key in DIFFERENCES:
            values = sweep.against_baseline(figures, name, key, lambda ours, theirs: ours - theirs)
            row[f"{key} - baseline"] = estimates.difference(values, spans.get(key))
        for key in judged:
            values = sweep.against_baseline(figures, name, key, lambda ours, theirs: ours / theirs)
            row[f"{key} / baseline"] = estimates.ratio(values, spans.get(key), mark(through, key))
        if judged:
            means = [mean_ratio(figures[name, seed], figures[sweep.baseline_of(name), seed], judged)
                     for seed in sweep.seeds]
            row[MEAN_OF_JUDGES] = estimates.ratio(means, note=mark(through, *judged))
        if of_report:
            row["report FID / mse"] = REPORT_RATIOS.get(name, "")
        rows.append(row)
    return rows


def _over_images(sweep, by_image, name, keys, how):
    """{key: 95% interval over images}, of those keys that each image has a value of, the mean over seeds."""
    keys = [key for key in keys if key in by_image[name, 0]]
    if not keys:
        return {}
    ours, theirs = (torch.stack([torch.stack([by_image[one, seed][key] for key in keys], 1)
                                 for seed in sweep.seeds]).mean(0) for one in (name, sweep.baseline_of(name)))
    return dict(zip(keys, estimates.over_images(ours, theirs, how)))


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
                saved = estimates.difference([delta_rate(*_points(one, key, sign), *_points(other, key, sign))
                                              for one, other in zip(ours, theirs)])
            except UserError as error:  # no two curves to compare
                saved = estimates.missing(str(error))
            row[f"% bits at equal {key}"] = saved
        rows.append(row)
    return rows


def _points(figures, key, sign):
    return [values["bits_per_pixel"] for values in figures], [sign * values[key] for values in figures]


def loss_by_metric(sweep, figures):
    """A row a mix, a column a term as metric: mean over seeds, relative to the baseline's."""
    def mean(name, term):
        return statistics.mean(terms[term] for terms in sweep.of(figures, name, "terms"))
    return [{"loss": name} | {term: mean(name, term) / mean(sweep.baseline_of(name), term)
                              for term in figures[name, 0]["terms"]} for name in sweep.mixes]


# --- pictures

def draw_pareto(path, sweep, figures, judged):
    """PSNR against sharpness and a Fréchet distance, means over seeds, and the mixes that no other beats in both.

    A point's area is its step's time. Mixes too far off to be of use are named below instead of drawn. Where no judge
    has a Fréchet distance, the first of `judged` stands for it.
    """
    distance = [key for key in judged if key.startswith("frechet_distance/")][:1] or judged[:1]
    panels = [("gradient_ratio", "gradient ratio (1 is as sharp, above is noise)", 1),
              *((key, f"{key.replace('_', ' ')} (lower is better)", 0) for key in distance)]
    means = {name: {key: sweep.mean(figures, name, key) for key in ("psnr", "gradient_ratio", *distance)} | {
        "area": 60 * sweep.mean(figures, name, "ms_per_step") / sweep.mean(figures, sweep.baseline_of(name),
                                                                           "ms_per_step")} for name in sweep.mixes}
    far = [name for name, mean in means.items()
           if any(mean[key] > FAR * means[sweep.baseline_of(name)][key] for key in distance)]
    return report.draw_fronts(path, {name: mean for name, mean in means.items() if name not in far},
                              ("psnr", "PSNR (dB)"), panels, far)


def draw_rates(path, sweep, figures, judged):
    """Quality against bits per pixel, means over seeds, a curve a mix."""
    def curve(at, quality):
        return [(sweep.mean(figures, at[rate], "bits_per_pixel"), sweep.mean(figures, at[rate], quality))
                for rate in sweep.rates]
    return report.draw_curves(path, "bits per pixel", {
        quality: {name: curve(at, quality) for name, at in sweep.series.items()}
        for quality in ("psnr", "ssim", *judged)})


def draw_picture(path, sweep, runs, split):
    """Rows of originals and of each mix's reconstructions of the same images; below, the middles of them enlarged."""
    x = split.examples(PICTURES)
    rows = {"original": metrics.as_8bit(x)}
    for name in sweep.mixes:
        label = f"{name} (baseline)" if name == sweep.baseline_of(name) else name
        with torch.no_grad():
            rows[label] = metrics.as_8bit(open_model(runs[name, 0], split)(x)[0])
    return report.save_picture(path, report.with_middles(rows))
