"""Train a PixelCNN prior on the latents of a VQ-VAE, and sample images from it."""
from contextlib import nullcontext

import torch
import torch.nn.functional as F

import metrics
from harness import cli, distributed, fields, report
from harness.device import adam, allow_tf32, autocast_of, compiled, one_step, pick_device, set_lr
from harness.errors import UserError
from harness.folder import trained_folder
from modules import GatedPixelCNN
from priors import first_stage
from priors.latents import count_images, load_latents, mean_nats, split_latents

COLUMNS, MOST_ROWS = 10, 10  # of a picture of samples: a row is a class
MAY_CHANGE_ON_RESUME = {"sample", "label", "temperature", "top_k", "sample_every"}


def parse_args():
    parser = cli.Parser(description=__doc__)
    first_stage.add_arguments(parser)
    group = parser.add_argument_group("prior")
    group.add_argument("--hidden-size-prior", type=cli.positive_int, default=64, help="width of every layer")
    group.add_argument("--num-layers", type=cli.at_most(fields.MOST_LAYERS), default=15, help="number of layers")
    cli.add_arguments(parser, output_folder="prior", lr=3e-4)
    group = parser.add_argument_group("sampling")
    group.add_argument("--sample", type=cli.at_most(fields.MOST_SAMPLES), metavar="N",
                       help="draw N images from the prior in the output folder, as it was trained, and train nothing")
    group.add_argument("--label", metavar="CLASS", help="name of the images' class, or its number where no class has "
                       "that name (default all in turn)")
    first_stage.add_drawing_arguments(group)
    group.add_argument("--sample-every", type=cli.positive_int, default=5, metavar="EPOCHS",
                       help="epochs from one grid of samples in the curves to the next")
    return parser.parse_args()


def main():
    args = parse_args()
    device = pick_device(args.device)
    first = first_stage.FirstStage(args.model, device)
    args, source = first_stage.settle(args, first)
    classes = first.classes
    if args.label is not None:
        args.label = first_stage.class_of(args.label, classes)
    if args.sample:
        return sample(args, first)
    if args.label is not None:
        raise UserError(f"--label {classes[args.label]} is for samples, training takes all classes: add --sample, or "
                        "leave it out")

    splits = load_latents(args, first, source, "prior")
    autocast = autocast_of(device, args.precision)  # after the codes, which are those of float32
    train, valid, test = split_latents(splits, args, device, of_classes=bool(classes))
    labels = train.labels.unique().to(device) if classes else None  # Mini-ImageNet's training images lack some
    torch.manual_seed(args.seed)
    model_args = {"input_dim": first.K, "dim": args.hidden_size_prior, "n_layers": args.num_layers,
                  "n_classes": len(classes)}
    model = GatedPixelCNN(**model_args)
    one = torch.zeros(1, dtype=torch.int64)
    print(report.size_of(model, one.expand(1, *first.shape), one if classes else None))
    model.to(device, memory_format=torch.channels_last)
    optimizer = adam(model.parameters(), args.lr)

    run = first_stage.open_run("prior", args, first, {
        "model": model, "optimizer": optimizer, "model_args": model_args, "images": count_images(splits),
        "data": first.data | {"labels": labels.tolist() if classes else []}}, MAY_CHANGE_ON_RESUME)
    network = distributed.wrap(model, device)

    def forward(codes, label):
        """Nats it takes to code a latent, each given those above and to its left, and the class."""
        with autocast():
            logits = network(codes, label if classes else None)
        return F.cross_entropy(logits.float(), codes)

    forward = compiled(forward) if args.compile else forward

    def step(codes, label):
        loss = forward(codes, label)
        run.check_finite({"loss": loss})
        run.backward(loss)
        run.update(optimizer)
        return {"loss/train/nats_per_latent": loss.detach()}

    step = one_step(step, device, optimizer, graph=not args.no_graph, accumulate=args.accumulate)
    for epoch in run.epochs():
        model.train()
        for codes, label in run.batches(train):
            lr = args.lr * run.lr_scale(train)
            set_lr(optimizer, lr)
            values = step(codes, label)
            if run.log_now():
                run.log(values | {"lr": lr})

        values = measure(model, valid, first, autocast)
        improved = run.improved(values, "nats_per_latent", larger_is_better=False)
        run.log_validation(values, values, improved, ("nats_per_latent",))
        if (epoch + 1) % args.sample_every == 0:
            images = draw_images(model, first, grid_labels(labels), args)
            run.log_picture("samples", report.image_rows(images.split(COLUMNS)))

    # The best epoch, once, on the test split, and what it draws and what uniform codes give.
    run.take_best(model)
    allow_tf32(False)
    values = measure(model, test, first)
    usage = metrics.codebook_usage(torch.bincount(test.images.flatten().long(), minlength=first.K))
    usage["codebook_perplexity"] = usage.pop("perplexity")  # the first stage's; the prior has one of its own
    images = draw_images(model, first, grid_labels(labels), args)
    run.log_picture("samples", report.image_rows(images.split(COLUMNS)))
    picture = save_samples(run.models / "samples.png", images)
    uniform = torch.randint(first.K, (MOST_ROWS * COLUMNS, *first.shape), device=device)
    chance = save_samples(run.models / "samples_uniform.png", first.decode(uniform))
    names = (*values, "codebook_perplexity")
    results = run.finish(values | usage, names)
    print("\n" + report.markdown_table(["test split", "value"], [[name, results[name]] for name in names]))
    print(f"\n{results['ms_per_step']:.4g} ms a step, {results['train_seconds']:.4g} s of training on {device}\n"
          f"samples{', a row a class' if classes else ''}: {picture}\nfrom uniform codes: {chance}\n"
          f"curves: {run.see_curves}")


def measure(model, batches, first, autocast=nullcontext):
    """What the prior needs to code a latent."""
    nats = mean_nats(model, batches, autocast, lambda codes, label: (
        {"nats": model(codes, label if first.classes else None)}, codes))["nats"]
    return first.code_length(nats)


# --- samples

def grid_labels(labels):
    """Labels of a picture of samples, `COLUMNS` of each of the first; a number of images where there are none."""
    return MOST_ROWS * COLUMNS if labels is None else labels[:MOST_ROWS].repeat_interleave(COLUMNS)


def draw_images(model, first, labels, args):
    """Images (N, C, H, W) in [0, 1] from the prior, of `labels` (N,) or as many as the number `labels` says."""
    unconditional = isinstance(labels, int)
    generator = torch.Generator().manual_seed(args.seed)
    return first.decode(model.generate(None if unconditional else labels, first.shape,
                                       labels if unconditional else len(labels), args.temperature, args.top_k,
                                       generator))


def save_samples(path, images):
    return report.save_picture(path, images.split(COLUMNS))


def sample(args, first):
    """Draw images from the prior in the output folder and save them as one picture."""
    model, ckpt = first_stage.open_trained("prior", args, first, GatedPixelCNN.rebuild)
    labels = args.sample
    if first.classes:
        seen = ckpt["data"]["labels"]
        if args.label is not None and args.label not in seen:
            raise UserError(f"--label {first.classes[args.label]} is a class without training images: this prior knows "
                            + first_stage.some([first.classes[number] for number in seen]))
        seen = torch.tensor(seen if args.label is None else [args.label], device=first.device)
        labels = seen[torch.arange(args.sample, device=first.device) % len(seen)].sort().values
    what = [] if args.label is None else [str(args.label)]
    path = trained_folder(args.output_folder) / f"{first_stage.name_of_sample(args, 'sample', *what)}.png"
    of_class = "" if args.label is None else f" of the class {first.classes[args.label]}"
    print(f"samples{of_class}: {save_samples(path, draw_images(model, first, labels, args))}")


if __name__ == "__main__":
    cli.run(main)
