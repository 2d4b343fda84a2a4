"""What the scripts that model the latents of a trained VQ-VAE share: the VQ-VAE, its latents, their code length."""
import math
from dataclasses import replace

import torch
import torch.nn.functional as F

import datasets
import metrics
from datasets import SPLITS, Source, check_counts
from harness import checkpoint, cli, distributed
from harness.batches import Batches
from harness.errors import UserError
from harness.folder import check_data, check_folder, lock, run_folder
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
    """File name of a picture that is drawn with these flags, those that are not as usual in it."""
    unusual = ((args.temperature != 1, f"temperature{args.temperature:g}"), (args.top_k, f"top{args.top_k}"),
               (args.seed, f"seed{args.seed}"))
    return "-".join(["sample", *what, *(text for given, text in unusual if given)]) + ".png"


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


def check_vqvae(ckpt, path):
    """UserError where a model, of which these are the contents, was trained on the codes of another VQ-VAE."""
    with checkpoint.complete(ckpt["path"]):
        known, digest = ckpt["vqvae"]["path"], ckpt["vqvae"]["digest"]
    if digest != checkpoint.digest(path):
        raise UserError(f"this {ckpt['kind']} was trained on the codes of {known} as it was then, and {path} is "
                        f"another VQ-VAE: pass that one, or train a {ckpt['kind']} for this one")


def check_classes(data, classes, folder):
    """UserError where the data set of a folder has other classes than those that the VQ-VAE was trained with."""
    if data.classes != classes:
        raise UserError(f"--data-folder {folder} has the classes {data.classes}, but the VQ-VAE was trained with "
                        f"{classes}")


class FirstStage:
    """A trained VQ-VAE, frozen, and the latents of the data set that it was trained on.

    Args:
        args: flags; those of the data set that are left open are set to what the VQ-VAE was trained with.
        in_order: the frames of clips one after another, as `datasets.load` has them.
    Raises:
        FileNotFoundError, UserError: no such checkpoint, or the flags contradict it.
    """

    def __init__(self, args, device, in_order=False):
        ckpt = checkpoint.load(args.model, "vqvae", datasets.FACTS | {"model_args": {"K": int, "dim": int}})
        self.args, self.device, self.data = args, device, ckpt["data"]
        self.vqvae = VectorQuantizedVAE.rebuild(ckpt).to(device, memory_format=torch.channels_last)
        self.K, self.classes = self.vqvae.K, self.data["classes"]
        self.shape = tuple(side // self.vqvae.downsample for side in self.data["size"])
        self.source = replace(_inherit(args, ckpt), in_order=in_order)

    def batches(self, kind, of_classes):
        """Train, valid and test batches of latents for a run of `kind`, which fails here before an old one is replaced.

        of_classes: whether the model is told them, and so must have seen those of each split.
        """
        return split_latents(self.cached(kind), self.args, self.device, of_classes)

    def cached(self, kind):
        """{split: (latents (N, h, w), labels (N,) or (N, 4))} for a run of `kind`, encoded once."""
        args, folder = self.args, run_folder("models", self.args.output_folder)
        check_folder(folder, kind, args.resume, args.overwrite, [args.model])
        check_data(args.data_folder, args.output_folder)
        with distributed.rank_0_first():
            splits = self.read_or_encode(folder / "latents.pt")
        self.counts = [len(splits[split][0]) for split in SPLITS]
        return splits

    def read_or_encode(self, path):
        """{split: (latents, labels)} from `path`, or encoded and kept there.

        Raises:
            UserError: the file is damaged, or is to be replaced while another process is at work in its folder.
        """
        def key():
            digest, images = checkpoint.digest(self.args.model), datasets.fingerprint(self.args.dataset, self.source)
            return f"{digest} {images}" + " in order" * self.source.in_order
        if path.exists():
            try:
                kept = checkpoint.load(path, "latents", {"key": str, "splits": dict.fromkeys(SPLITS, tuple)})
            except UserError as error:
                raise UserError(f"{path} is damaged: delete it, and the images are encoded anew") from error
            if kept["key"] == key():
                return kept["splits"]
        splits, images = {}, self.images()
        if not distributed.rank():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock(path.parent)  # the folder's as long as this object lives: its run takes it once more
        for split in SPLITS:
            encoded = [(self.encode(x).to(torch.int32).cpu(), label.cpu())
                       for x, label in getattr(images, split).in_order()]
            splits[split] = tuple(map(torch.cat, zip(*encoded)))
        checkpoint.save(path, "latents", {"key": key(), "splits": splits})  # opened, a data set may have been made anew
        return splits

    def images(self):
        """The data set. UserError where it has classes and they are not those of the VQ-VAE."""
        args = self.args
        data = datasets.load(args.dataset, self.source, ENCODE_BATCH, self.device, workers=args.num_workers)
        if not self.source.in_order:  # whose classes are clips
            check_classes(data, self.classes, args.data_folder)
        return data

    @torch.no_grad()
    def embedded_codes(self):
        """The VQ-VAE's codes (K, D), as its decoder sees them."""
        return self.vqvae.codebook.embed(torch.arange(self.K, device=self.device).view(-1, 1, 1)).flatten(1)

    @torch.no_grad()
    def encode(self, x):
        """Latents (N, h, w) of images (N, C, H, W) in [-1, 1]."""
        return self.vqvae.eval().encode(x)

    @torch.no_grad()
    def decode(self, latents):
        """Images (N, C, H, W) in [0, 1], as an image file would hold them, of latents (N, h, w)."""
        return metrics.as_8bit(torch.cat([self.vqvae.eval().decode(part) for part in latents.split(ENCODE_BATCH)]))

    def start(self, kind, model, optimizer, model_args, may_change):
        """Open the run of a model of these latents, or go on with it; returns it and the network to train."""
        args, vqvae = self.args, {"path": self.args.model, "digest": checkpoint.digest(self.args.model)}
        state = {"model": model, "optimizer": optimizer, "model_args": model_args, "data": self.data, "vqvae": vqvae,
                 "images": self.counts}
        run = Run(kind, args, self.device, state, may_change | datasets.MAY_CHANGE_ON_RESUME | {"model"}, [args.model])
        if run.resumed:
            check_vqvae(run.resumed, args.model)
            check_counts(run.resumed["path"], run.resumed["images"], self.counts)
        return run, distributed.wrap(model, self.device)

    def trained(self, kind, rebuild):
        """The model in the output folder, rebuilt from its best.pt, and that file's contents."""
        ckpt = checkpoint.load(run_folder("models", self.args.output_folder) / "best.pt", kind)
        check_vqvae(ckpt, self.args.model)
        return rebuild(ckpt).to(self.device), ckpt

    def code_length(self, nats):
        """A code length in nats a latent, in bits, and spread over it, in bits a dimension of an image."""
        bits = nats / math.log(2)
        dimensions = self.data["channels"] * math.prod(self.data["size"])
        return {"nats_per_latent": nats, "perplexity": math.exp(min(nats, 700.)), "bits_per_latent": bits,
                "bits_per_dim": bits * math.prod(self.shape) / dimensions}


def _inherit(args, ckpt):
    """Take from the VQ-VAE's checkpoint what the flags leave open; UserError where they contradict it."""
    known = {"dataset": ckpt["data"]["name"], "k": ckpt["model_args"]["K"],
             "hidden_size_vae": ckpt["model_args"]["dim"]}
    for name, value in known.items():
        given = getattr(args, name)
        if given is not None and given != value:
            raise UserError(f"--{name.replace('_', '-')} {given} contradicts {args.model}, which has {value}: "
                            "leave the flag out")
        setattr(args, name, value)
    source = Source.of(ckpt, args.data_folder, not args.no_download)
    source = replace(source, skip_broken=source.skip_broken or args.skip_broken)
    args.data_folder, args.skip_broken = source.folder, source.skip_broken
    return source


def split_latents(splits, args, device, of_classes=False):
    """Train, valid and test batches of latents; of classes, splits with some that train lacks are carved from train."""
    known = set(splits["train"][1].flatten().tolist())
    if of_classes and any(not set(splits[split][1].tolist()) <= known for split in ("valid", "test")):
        print(f"valid and test have classes that train lacks: both are carved from train, {datasets.CARVED:.0%} each")
        splits = datasets.complete({"train": splits["train"]}, ["valid", "test"])
    latents, labels = splits["train"]
    splits = splits | {"train": (latents[:args.limit], labels[:args.limit])}
    batches = [LatentBatches(*splits[split], args.batch_size, device, shuffle=split == "train", seed=args.seed)
               for split in SPLITS]
    for split, part in zip(batches, SPLITS):
        split.shard(distributed.rank(), distributed.world_size(), part)
    return batches


class LatentBatches(Batches):
    """Batches of latents (B, h, w) int64 and labels, from integers (N, h, w) of any kind."""

    @staticmethod
    def _check(latents):
        return tuple(latents.shape[1:])

    def _to_input(self, latents):
        return latents.long()


@torch.no_grad()
def mean_nats(models, batches, autocast, nats_of):
    """Nats a latent over a split, all processes together.

    Args:
        models: put in eval mode meanwhile. nats_of: (latents, labels of a batch) -> {name: logits (B, K, h, w)} and the
            latents (B, h, w) that they are of.
    Returns:
        {name: mean nats, name + "_right": share of latents whose most probable code is right}
    """
    models.eval()
    sums, count = {}, 0
    for batch in batches:
        with autocast():
            logits, latents = nats_of(*batch)
        for name, values in logits.items():
            nats = float(F.cross_entropy(values.float(), latents)) * latents.numel()
            found = nats, float((values.argmax(1) == latents).sum())
            sums[name] = [old + new for old, new in zip(sums.get(name, (0., 0.)), found)]
        count += latents.numel()
    models.train()
    names = sorted(sums)
    totals = torch.tensor([count, *(value for name in names for value in sums[name])], dtype=torch.float64)
    count, *totals = distributed.total(totals).tolist()
    means = {name: totals[2 * i] / count for i, name in enumerate(names)}
    return means | {f"{name}_right": totals[2 * i + 1] / count for i, name in enumerate(names)}
