"""A trained VQ-VAE whose latents others are models of, and what their scripts share: flags, runs, checks."""
import argparse
import math
from dataclasses import replace

import torch

import datasets
import metrics
from datasets import Source, check_same
from harness import checkpoint, cli, fields
from harness.device import pick_precision
from harness.errors import UserError
from harness.folder import trained_folder
from harness.run import Run
from modules import VectorQuantizedVAE

ENCODE_BATCH = 256


def add_arguments(parser):
    """Flags of the VQ-VAE and of where its data set is."""
    group = parser.add_argument_group("VQ-VAE: what is given must agree with its checkpoint")
    group.add_argument("--model", type=cli.path, required=True, metavar="PT",
                       help="checkpoint of vqvae.py or its run's folder, say models/vqvae/best.pt")
    group.add_argument("--dataset", choices=datasets.DATASETS, help="data set that it was trained on")
    group.add_argument("--hidden-size-vae", type=cli.positive_int, help="width of its layers")
    group.add_argument("--k", type=cli.positive_int, help="its number of codes")
    datasets.add_folder_arguments(parser.add_argument_group("data"))


def add_drawing_arguments(group):
    """Flags of how codes are drawn."""
    group.add_argument("--temperature", type=cli.positive, default=1., help="temperature of the draw: "
                       "below 1 prefers probable codes")
    group.add_argument("--top-k", type=cli.positive_int, help="draw from the most probable codes only")


def name_of_sample(args, *what):
    """Stem of the name of a file that is drawn with these flags, those that are not as usual in it."""
    unusual = ((args.temperature != 1, f"temperature{args.temperature:g}"), (args.top_k, f"top{args.top_k}"),
               (args.seed, f"seed{args.seed}"))
    return "-".join([*what, *(text for given, text in unusual if given)])


def some(names):
    """The first of many names, in one line."""
    return ", ".join(names[:10]) + ", ..." * (len(names) > 10)


def class_of(text, classes):
    """The number of the class that is named so, or has that number where none is. UserError where there is no such."""
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and len(text) < 10 and int(text) < len(classes):
        return int(text)
    raise UserError(f"--label {text} is no class: " + (
        f"give a name, such as {some(classes)}, or a number from 0 to {len(classes) - 1}" if classes
        else "this data set has no classes"))


def check_vqvae(ckpt, path, K):
    """UserError where a model, of which these are the contents, was not trained on the K codes of a VQ-VAE."""
    known, digest, args = ckpt["vqvae"]["path"], ckpt["vqvae"]["digest"], ckpt["model_args"]
    if digest != checkpoint.digest(path) or args.get("input_dim", args.get("K")) != K:
        raise UserError(f"this {ckpt['kind']} was trained on the codes of {known} as it was then, and {path} is "
                        f"another VQ-VAE: pass that one, or train a {ckpt['kind']} for this one")


def check_classes(data, classes, folder):
    """UserError where the data set of a folder has other classes than those that the VQ-VAE was trained with."""
    if data.classes != classes:
        raise UserError(f"--data-folder {folder} has the classes {data.classes}, but the VQ-VAE was trained with "
                        f"{classes}")


class FirstStage:
    """A trained VQ-VAE, frozen, whose latents another model is trained on.

    Attributes: `ckpt`, the contents of its checkpoint, and their `digest`; `data`, facts of its data set; `classes`; K,
    the number of codes; the `shape` (h, w) of its latents.

    Raises:
        FileNotFoundError, UserError: there is no such checkpoint.
    """

    def __init__(self, path, device):
        self.ckpt = checkpoint.load(path, "vqvae", fields.VQVAE)
        self.path, self.digest, self.device = path, checkpoint.digest(path), device
        self.vqvae = VectorQuantizedVAE.rebuild(self.ckpt).to(device, memory_format=torch.channels_last)
        self.data, self.K, self.classes = self.ckpt["data"], self.vqvae.K, self.ckpt["data"]["classes"]
        self.shape = tuple(side // self.vqvae.downsample for side in self.data["size"])

    @torch.no_grad()
    def embedded_codes(self):
        """The VQ-VAE's codes (K, D), as its decoder sees them."""
        return self.vqvae.codebook.embed(torch.arange(self.K, device=self.device).view(-1, 1, 1)).flatten(1)

    @torch.no_grad()
    def encode(self, x):
        """Latents (N, h, w) of images (N, C, H, W) in [-1, 1]."""
        return self.vqvae.encode(x)

    @torch.no_grad()
    def decode(self, latents):
        """Images (N, C, H, W) in [0, 1], as an image file would hold them, of latents (N, h, w)."""
        return metrics.as_8bit(torch.cat([self.vqvae.decode(part) for part in latents.split(ENCODE_BATCH)]))

    def code_length(self, nats):
        """A code length in nats a latent, in bits, and spread over it, in bits a dimension of an image."""
        bits = nats / math.log(2)
        dimensions = self.data["channels"] * math.prod(self.data["size"])
        return {"nats_per_latent": nats, "perplexity": math.exp(min(nats, 700.)), "bits_per_latent": bits,
                "bits_per_dim": bits * math.prod(self.shape) / dimensions}


def settle(args, first, in_order=False):
    """The flags with what they leave open, which the VQ-VAE was trained with, and the `Source` of its images.

    in_order: the frames of clips one after another, as `datasets.load` has them.

    Raises:
        UserError: a flag contradicts the VQ-VAE.
    """
    known = {"dataset": first.data["name"], "k": first.K, "hidden_size_vae": first.vqvae.dim}
    for name, value in known.items():
        given = getattr(args, name)
        if given is not None and given != value:
            raise UserError(f"--{name.replace('_', '-')} {given} contradicts {args.model}, which has {value}: "
                            "leave the flag out")
    source = Source.of(first.ckpt, args.data_folder, not args.no_download)
    source = replace(source, skip_broken=source.skip_broken or args.skip_broken, in_order=in_order,
                     limit=args.limit if datasets.is_rendered(known["dataset"]) else None)
    settled = {"data_folder": source.folder, "skip_broken": source.skip_broken,
               "precision": pick_precision(first.device, args.precision)}
    return argparse.Namespace(**vars(args) | known | settled), source


def open_run(kind, args, first, state, may_change):
    """The run of a model of latents, new or resumed; `state` is what its checkpoints hold besides facts of the VQ-VAE.

    Raises:
        UserError: as `Run`; another VQ-VAE or other images.
    """
    state = {"data": first.data, "vqvae": {"path": first.path, "digest": first.digest}} | state

    def check(contents):
        checkpoint.check(contents, fields.OF_LATENTS)
        check_vqvae(contents, args.model, first.K)
        check_same(contents["path"], {"images": contents["images"]}, {"images": state["images"]})

    return Run(kind, args, first.device, state, may_change | datasets.MAY_CHANGE_ON_RESUME | {"model"}, [args.model],
               check)


def open_trained(kind, args, first, rebuild):
    """The model in the output folder, rebuilt from its best.pt, and that file's contents."""
    ckpt = checkpoint.load(trained_folder(args.output_folder) / "best.pt", kind,
                           fields.PRIOR if kind == "prior" else fields.OF_LATENTS)
    check_vqvae(ckpt, args.model, first.K)
    return rebuild(ckpt).to(first.device), ckpt
