"""Train a PixelCNN prior on the latents of a VQ-VAE, and sample images from it."""
import math
from pathlib import Path

import torch

import datasets
import metrics
from datasets import SPLITS, Source
from functions import cross_entropy
from harness import checkpoint, cli, distributed, report
from harness.batches import LatentBatches
from harness.compiled import compile_forward, graphs_fit
from harness.run import Run, check_folder, run_folder
from modules import GatedPixelCNN, VectorQuantizedVAE

COLUMNS, MOST_ROWS = 10, 10  # of a picture of samples: a row is a class
ENCODE_BATCH = 256
MAY_CHANGE_ON_RESUME = {"model", "sample", "label", "temperature", "top_k", "sample_every"}


def parse_args():
    parser = cli.Parser(description=__doc__)
    group = parser.add_argument_group("VQ-VAE: known from its checkpoint, an error where it says otherwise")
    group.add_argument("--model", required=True, metavar="PT", help="checkpoint of vqvae.py, say models/vqvae/best.pt")
    group.add_argument("--dataset", choices=datasets.DATASETS, help="that it was trained on")
    group.add_argument("--hidden-size-vae", type=cli.positive_int, help="width of its layers")
    group.add_argument("--k", type=cli.positive_int, help="its number of codes")
    group = parser.add_argument_group("prior")
    group.add_argument("--hidden-size-prior", type=cli.positive_int, default=64, help="(default %(default)s)")
    group.add_argument("--num-layers", type=cli.positive_int, default=15, help="(default %(default)s)")
    datasets.add_folder_arguments(parser.add_argument_group("data"))
    cli.add_arguments(parser, output_folder="prior", lr=3e-4)
    group = parser.add_argument_group("sampling")
    group.add_argument("--sample", type=cli.positive_int, metavar="N",
                       help="draw N images from the trained prior in the output folder, and train nothing")
    group.add_argument("--label", type=int, help="class of the images (default all in turn)")
    group.add_argument("--temperature", type=cli.positive, default=1., help="of the draw (default %(default)s)")
    group.add_argument("--top-k", type=cli.positive_int, help="draw from the most probable codes only")
    group.add_argument("--sample-every", type=cli.positive_int, default=5, metavar="EPOCHS",
                       help="a grid of samples for the curves (default %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    device = cli.pick_device(args.device)
    ckpt = checkpoint.load(args.model, "vqvae")
    vqvae = VectorQuantizedVAE.rebuild(ckpt).to(device, memory_format=torch.channels_last)
    source = inherit(args, ckpt)
    classes, size = ckpt["data"]["classes"], ckpt["data"]["size"]
    shape = tuple(side // vqvae.downsample for side in size)
    if args.label is not None and not 0 <= args.label < len(classes):
        raise ValueError(f"--label {args.label} is out of range: " + (
            f"the classes are 0...{len(classes) - 1}" if classes else "this data set has no classes"))
    if args.sample:
        return sample(args, vqvae, classes, shape, device)

    # Data fail here, before an old run is replaced.
    check_folder(args, "prior", [args.model])
    autocast = cli.autocast(device, args.precision)
    with distributed.rank_0_first():
        latents = cached_latents(run_folder("models", args) / "latents.pt", args, ckpt, source, vqvae, device)
    train, valid, test = split_latents(latents, args, device)
    torch.manual_seed(args.seed)
    model_args = {"input_dim": ckpt["model_args"]["K"], "dim": args.hidden_size_prior, "n_layers": args.num_layers,
                  "n_classes": len(classes)}
    model = GatedPixelCNN(**model_args).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=device.type != "mps")
    run = Run("prior", args, device, {
        "model": model, "optimizer": optimizer, "model_args": model_args, "data": ckpt["data"],
        "vqvae": {"path": args.model, "digest": checkpoint.digest(args.model)}}, MAY_CHANGE_ON_RESUME, [args.model])
    if run.resumed:
        checkpoint.check_vqvae(run.resumed, args.model)
    if args.compile:
        compile_forward(model, graphs_fit(device, args.accumulate))
    network = distributed.wrap(model, device)

    for epoch in run.epochs():
        model.train()
        for codes, label in run.batches(train):
            run.schedule_lr(optimizer, train)
            with autocast():
                logits = network(codes, label if classes else None)  # (B, K, h, w)

            # Each code given those above and to its left, and the class.
            loss = cross_entropy(logits, codes)
            run.check_finite(loss, {"cross-entropy": loss})

            run.backward(loss)
            run.update(optimizer)

            if run.log_now():
                run.log({"loss/train/nats_per_latent": loss, "lr": optimizer.param_groups[0]["lr"]})
                run.show(nats=loss)

        values = code_length(model, valid, classes, ckpt["data"], autocast)
        improved = run.improved(values["nats_per_latent"], larger_is_better=False)
        run.log({f"valid/{name}": value for name, value in values.items()})
        if (epoch + 1) % args.sample_every == 0:
            images = draw_images(model, vqvae, grid_labels(classes, device), shape, args)
            run.log_picture("samples", report.image_rows(images.split(COLUMNS)))
        run.print_epoch(values, improved)

    # The best epoch, once, on the test split, and what it draws beside what uniform codes give.
    model.load_state_dict(checkpoint.load(run.models / "best.pt", "prior")["model"])
    values = code_length(model, test, classes, ckpt["data"], autocast)
    usage = metrics.codebook_usage(torch.bincount(test.images.flatten().long(), minlength=model_args["input_dim"]))
    labels = grid_labels(classes, device)
    images = draw_images(model, vqvae, labels, shape, args)
    run.log_picture("samples", report.image_rows(images.split(COLUMNS)))
    picture = save_samples(run.models / "samples.png", images)
    uniform = torch.randint(model_args["input_dim"], (MOST_ROWS * COLUMNS, *shape), device=device)
    chance = save_samples(run.models / "samples_uniform.png", decode(vqvae, uniform))
    names = ("nats_per_latent", "bits_per_latent", "bits_per_dim", "perplexity")
    results = run.finish(values | usage, names)
    print("\n" + report.markdown_table(["test split", "value"], [[name, results[name]] for name in names]))
    print(f"\n{results['ms_per_step']:.4g} ms a step, {results['train_seconds']:.4g} s of training on {device}\n"
          f"samples{', a row a class' if classes else ''}: {picture}\nfrom uniform codes: {chance}\n"
          f"curves: tensorboard --logdir {run.logs}")


def inherit(args, ckpt):
    """Take from the VQ-VAE's checkpoint what the flags leave open; ValueError where they contradict it."""
    known = {"dataset": ckpt["data"]["name"], "k": ckpt["model_args"]["K"],
             "hidden_size_vae": ckpt["model_args"]["dim"]}
    for name, value in known.items():
        given = getattr(args, name)
        if given is not None and given != value:
            raise ValueError(f"--{name.replace('_', '-')} {given} contradicts {args.model}, which has {value}: "
                             "leave the flag out")
        setattr(args, name, value)
    source = Source.of(ckpt, args.data_folder, not args.no_download)
    source.skip_broken |= args.skip_broken
    args.data_folder, args.skip_broken = source.folder, source.skip_broken
    return source


# --- latents

def cached_latents(path, args, ckpt, source, vqvae, device):
    """{split: (latents (N, h, w), labels (N,))}, read from `path`, or encoded once and kept there.

    Raises:
        ValueError: the file is damaged.
    """
    key = f"{checkpoint.digest(args.model)} {datasets.fingerprint(args.dataset, source)}"
    if path.exists():
        try:
            kept = checkpoint.load(path, "latents")
        except ValueError as error:
            raise ValueError(f"{path} is damaged: delete it, and the images are encoded anew") from error
        if kept["key"] == key:
            return kept["splits"]
    data = datasets.load(args.dataset, source, ENCODE_BATCH, device, workers=args.num_workers)
    if data.classes != ckpt["data"]["classes"]:
        raise ValueError(f"--data-folder {args.data_folder} has the classes {data.classes}, but the VQ-VAE was trained "
                         f"with {ckpt['data']['classes']}")
    vqvae.eval()
    splits = {}
    with torch.no_grad():
        for split in SPLITS:
            batches = getattr(data, split)
            batches.shuffle = False
            encoded = [(vqvae.encode(x).to(torch.int32).cpu(), label.cpu()) for x, label in batches]
            splits[split] = tuple(map(torch.cat, zip(*encoded)))
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.save(path, "latents", {"key": key, "splits": splits})
    return splits


def split_latents(splits, args, device):
    """Train, valid and test batches of latents; splits with classes that train lacks are carved from train."""
    latents, labels = splits["train"]
    known = set(labels.tolist())
    if any(not set(splits[split][1].tolist()) <= known for split in ("valid", "test")):
        print("valid and test have classes that train lacks: both are carved from train, a tenth each")
        tenth = max(1, len(labels) // 10)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(datasets.SPLIT_SEED))
        parts = dict(zip(("valid", "test", "train"), order.split([tenth, tenth, len(labels) - 2 * tenth])))
        splits = {split: (latents[part], labels[part]) for split, part in parts.items()}
    latents, labels = splits["train"]
    splits = splits | {"train": (latents[:args.limit], labels[:args.limit])}
    batches = [LatentBatches(*splits[split], args.batch_size, device, shuffle=split == "train", seed=args.seed)
               for split in SPLITS]
    for split in batches:
        split.shard(distributed.rank(), distributed.world_size())
    return batches


@torch.no_grad()
def code_length(model, batches, classes, data, autocast):
    """What the prior needs to code a latent (nats, bits) and, spread over it, a dimension of an image (bits)."""
    model.eval()
    nats = latents = 0.
    for codes, label in batches:
        with autocast():
            logits = model(codes, label if classes else None)
        nats += float(cross_entropy(logits, codes)) * codes.numel()
        latents += codes.numel()
    model.train()
    nats, latents = distributed.total(torch.tensor([nats, latents], dtype=torch.float64)).tolist()
    bits = nats / latents / math.log(2)
    dimensions = data["channels"] * math.prod(data["size"])
    return {"nats_per_latent": nats / latents, "bits_per_latent": bits,
            "bits_per_dim": bits * codes[0].numel() / dimensions}


# --- samples

def grid_labels(classes, device):
    """Labels of a picture of samples, `COLUMNS` of each of the first classes; a number of images without classes."""
    if not classes:
        return MOST_ROWS * COLUMNS
    return torch.arange(min(len(classes), MOST_ROWS), device=device).repeat_interleave(COLUMNS)


def draw_images(model, vqvae, labels, shape, args):
    """Images (N, C, H, W) in [0, 1] from the prior, of `labels` (N,) or as many as the number `labels` says."""
    unconditional = isinstance(labels, int)
    generator = torch.Generator().manual_seed(args.seed)
    latents = model.generate(None if unconditional else labels, shape, labels if unconditional else len(labels),
                             args.temperature, args.top_k, generator)
    return decode(vqvae, latents)


@torch.no_grad()
def decode(vqvae, latents):
    return metrics.as_8bit(torch.cat([vqvae.eval().decode(part) for part in latents.split(ENCODE_BATCH)]))


def save_samples(path, images):
    return report.save_picture(path, images.split(COLUMNS))


def sample(args, vqvae, classes, shape, device):
    """Draw images from the prior in the output folder and save them as one picture."""
    folder = Path("models") / args.output_folder
    ckpt = checkpoint.load(folder / "best.pt", "prior")
    checkpoint.check_vqvae(ckpt, args.model)
    model = GatedPixelCNN.rebuild(ckpt).to(device)
    labels = args.sample
    if classes:
        labels = torch.arange(args.sample, device=device) % len(classes)
        labels = torch.full_like(labels, args.label) if args.label is not None else labels.sort().values
    path = folder / ("sample.png" if args.label is None else f"sample-{args.label}.png")
    print(f"samples: {save_samples(path, draw_images(model, vqvae, labels, shape, args))}")


if __name__ == "__main__":
    cli.run(main)
