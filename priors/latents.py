"""Latents of a trained VQ-VAE as data: encoded once, kept with the run, in batches; and what it takes to code them."""
import hashlib
from contextlib import nullcontext

import torch
import torch.nn.functional as F

import datasets
from datasets import SPLITS
from harness import checkpoint, distributed, fields
from harness.batches import Batches
from harness.errors import UserError
from harness.folder import check_data, check_folder, lock, run_folder
from harness.progress import Progress
from priors.first_stage import ENCODE_BATCH, check_classes


def load_latents(args, first, source, kind):
    """{split: (latents (N, h, w), labels (N,) or (N, 4))} of a source for a run of `kind`, encoded once.

    Raises:
        UserError: the output folder or the data cannot be used; an old run has not been replaced.
    """
    folder = run_folder("models", args.output_folder)
    check_folder(folder, kind, args.resume, args.overwrite, [args.model])
    check_data(args.data_folder, args.output_folder)
    with distributed.rank_0_first():
        return read_or_encode(folder / "latents.pt", args, first, source)


def count_images(splits):
    """Number of images of each split, which a run that is resumed compares."""
    return [len(splits[split][0]) for split in SPLITS]


def read_or_encode(path, args, first, source):
    """{split: (latents, labels)} from `path`, or encoded and kept there.

    Raises:
        UserError: the file is damaged, or is to be replaced while another process is at work in its folder.
    """
    def key():
        return f"{first.digest} {datasets.fingerprint(args.dataset, source)}" + " in order" * source.in_order
    if path.exists():
        try:
            kept = checkpoint.load(path, "latents", fields.LATENTS)
        except UserError as error:
            raise UserError(f"{path} is damaged: delete it, and the images are encoded anew") from error
        if kept["key"] == key() and "digest" in kept:  # which older files lack
            if kept["digest"] != digest(kept["splits"]):
                raise UserError(f"{path} was changed since it was written: delete it, and the images are encoded anew")
            return kept["splits"]
    images = open_images(args, first, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if distributed.rank() else lock(path.parent):
        splits = {split: encode(getattr(images, split), first, f"encoding {split}") for split in SPLITS}
        # Opened, a data set may have been made anew: its key is what it is now.
        checkpoint.save(path, "latents", {"key": key(), "digest": digest(splits), "splits": splits})
    return splits


def digest(splits):
    """SHA-256 of {split: tensors}."""
    found = hashlib.sha256()
    for split, tensors in sorted(splits.items()):
        found.update(f"{split} {[list(tensor.shape) for tensor in tensors]}".encode())
        for tensor in tensors:
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def encode(batches, first, what):
    """(latents (N, h, w) int32, labels) of the images of a split, in their order, on the CPU; progress says `what`."""
    encoded = []
    with Progress(what, len(batches.labels)) as progress:
        for x, label in batches.in_order():
            encoded.append((first.encode(x).to(torch.int32).cpu(), label.cpu()))
            progress.add(len(x))
    return tuple(map(torch.cat, zip(*encoded)))


def open_images(args, first, source):
    """The VQ-VAE's data set. UserError where it has classes and they are not those of the VQ-VAE."""
    data = datasets.load(args.dataset, source, ENCODE_BATCH, first.device, workers=args.num_workers)
    if not source.in_order:  # where classes are clips
        check_classes(data, first.classes, source.folder)
    return data


def split_latents(splits, args, device, of_classes=False):
    """Train, valid and test batches of latents; of classes, splits with some that train lacks are carved from train."""
    known = set(splits["train"][1].flatten().tolist())
    if of_classes and any(not set(splits[split][1].tolist()) <= known for split in ("valid", "test")):
        print(f"valid and test have classes that train lacks: both are carved from train, {datasets.CARVED:.0%} each")
        splits = datasets.complete({"train": splits["train"]}, ["valid", "test"])
    splits = datasets.limited(splits, args.limit) if args.limit else splits
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
