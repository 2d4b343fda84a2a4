"""The runs of a comparison measured on one split, by the same judges, and kept for the next time."""
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context

import torch
import torch.nn.functional as F

import datasets
import metrics
from harness import checkpoint, fields
from harness.errors import UserError
from losses import TERMS
from modules import load
from study.judges import Judge, open_judged, trained_through
from study.runs import end_with, in_turn

VERSION = 4  # of the figures kept in a run's folder: raise it whenever one changes its meaning
COSINE_BATCHES = 8


def checkpoints_of(runs):
    """{run: contents of its best.pt}."""
    return {run: checkpoint.load(run / "best.pt", "vqvae", fields.VQVAE) for run in runs}


def open_split(runs, split, features, device):
    """A split of the data set of runs, networks by name that judge it, and what their figures depend on.

    Raises:
        UserError: the runs were trained on different images.
    """
    checkpoints = checkpoints_of(runs)
    ckpt = checkpoints[runs[0]]
    source = datasets.Source.of(ckpt)
    data, networks = open_judged(ckpt["data"]["name"], source, checkpoints, features, device)
    for run, contents in checkpoints.items():
        if contents["data"]["images"] != ckpt["data"]["images"]:
            raise UserError(f"{run} and {runs[0]} were trained on different images: give another --output")
    setting = {"version": VERSION, "split": split, "images": datasets.fingerprint(data.name, source),
               "figures": [*metrics.IMAGE_METRICS, *TERMS],
               "networks": {name: network.description for name, network in networks.items()}}
    return getattr(data, split), networks, setting


def measure_runs(runs, split, networks, setting, jobs, threads):
    """Each run measured now, or before under the same `setting`.

    Args:
        runs: {(name, seed): folder}. jobs: processes. threads: of each.
    Returns:
        {(name, seed): figures} as of `measure_run`, and {(name, seed): {figure: (N,)}}, those that each image has.
    """
    kept = {key: run / f"compared-{setting['split']}-{'-'.join(networks)}.pt" for key, run in runs.items()}
    keys = {key: {"checkpoint": checkpoint.digest(run / "best.pt")} | setting for key, run in runs.items()}
    missing = {key: run for key, run in runs.items() if not kept[key].exists() or not _read(kept[key], keys[key])}
    if missing:
        judges = [Judge(name, network, split) for name, network in networks.items()]
        if jobs > 1 and split.device.type == "cpu":  # processes: two networks in threads of one slow each other down
            pool = ProcessPoolExecutor(jobs, get_context("spawn"), _prepare_process,
                                       (os.getpid(), split, judges, threads))
        else:
            jobs, pool = 1, ThreadPoolExecutor(1, initializer=_prepare, initargs=(split, judges, threads))
        in_turn(pool, jobs, "measured", missing, lambda key: (_measure_and_keep, missing[key], kept[key], keys[key]))
    measured = {key: _read(path, keys[key]) for key, path in kept.items()}
    _check_alike({kept[key]: contents for key, contents in measured.items()})
    return ({key: contents["figures"] for key, contents in measured.items()},
            {key: contents["by_image"] for key, contents in measured.items()})


def _read(path, key):
    """What a file keeps under this key; None where it is of another, say an older version's."""
    try:
        contents = checkpoint.load(path, "figures", {"key": dict})
        if contents["key"] != key:
            return None
        with checkpoint.complete(path):
            checkpoint.check(contents, [fields.FIGURES, _has_all])
        return contents
    except UserError as error:
        raise UserError(f"{path} is damaged: delete it, and the run is measured again") from error


def _has_all(contents):
    """Whether figures that were kept have the metrics that their key names."""
    return set(contents["key"]["figures"]) & metrics.IMAGE_METRICS.keys() <= contents["figures"].keys()


def _check_alike(measured):
    """UserError where a file, of {path: contents}, keeps other figures than the first, or of fewer images."""
    first, *others = [(path, set(kept["figures"]), set(kept["figures"]["terms"]),
                       {name: len(values) for name, values in kept["by_image"].items()})
                      for path, kept in measured.items()]
    for other in others:
        if other[1:] != first[1:]:
            raise UserError(f"{first[0]} and {other[0]} keep other figures, or of other images: delete both, and the "
                            "runs are measured again")


_measuring = {}  # of a process that measures: the split and its judges


def _prepare_process(parent, *what):
    end_with(parent)
    _prepare(*what)
    for judge in _measuring["judges"]:
        judge.network.to(memory_format=torch.channels_last)  # as the one that came here


def _prepare(split, judges, threads):
    torch.set_num_threads(threads)
    _measuring.update(split=split, judges=judges)


def _measure_and_keep(run, path, key):
    figures, by_image = measure_run(run, **_measuring)
    checkpoint.save(path, "figures", {"key": key, "figures": figures, "by_image": by_image})


def measure_run(run, split, judges):
    """Figures of a finished run, the values of the loss terms under "terms", and its cost; and those by image, (N,)."""
    terms, _ = terms_for(split.examples(1))
    values, figures = metrics.measure(open_model(run, split), split, judges=judges, extra={
        f"term/{name}": partial(_term_of_images, TERMS[name]) for name in terms})
    figures["terms"] = {name: figures.pop(f"term/{name}") for name in terms}
    cost = checkpoint.load_json(run / "results.json", fields.COST)
    figures |= {name: cost[name] for name in fields.COST}
    figures["trained_through"] = trained_through(checkpoint.load(run / "best.pt", "vqvae")["args"])
    return figures, {name: value.float() for name, value in values.items() if name in figures}


def _term_of_images(term, x_tilde, x):
    """A loss term as a metric of images in [0, 1]: its value for the batch, for each of them."""
    return term(2 * x_tilde - 1, 2 * x - 1).expand(len(x))


def terms_for(x):
    """Names of the terms that take images such as x (B, C, H, W), and {name: why not} of the others."""
    names, refused = [], {}
    for name, term in TERMS.items():
        try:
            term(x, x)
            names.append(name)
        except UserError as error:  # too small, or without colour
            refused[name] = str(error)
    return names, refused


def open_model(run, split):
    """The trained model of a run, on the device of a split."""
    return load(run).to(split.device, memory_format=torch.channels_last)


def gradient_cosines(model, split):
    """Rows of the mean cosine between the gradients of two terms at a model's reconstructions of a split's images."""
    (names, _), total, count = terms_for(split.examples(1)), 0., 0
    for x, _ in islice(split, COSINE_BATCHES):
        with torch.no_grad():
            x_tilde = model(x)[0].float()
        x_tilde.requires_grad_()
        gradients = torch.stack([torch.autograd.grad(TERMS[name](x_tilde, x), x_tilde)[0].flatten(1)
                                 for name in names])  # (terms, B, C H W)
        gradients = F.normalize(gradients, dim=2)
        total, count = total + torch.einsum("ibd,jbd->ij", gradients, gradients), count + len(x)
    return [{"cosine": name} | {other: round(value, 3) for other, value in zip(names, row)}
            for name, row in zip(names, (total / count).tolist())]
