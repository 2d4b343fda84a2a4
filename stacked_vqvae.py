"""Train a second VQ-VAE on the latents of a first: a few codes for an image, decoded by a PixelCNN."""
import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F

import metrics
from harness import cli, distributed, fields, report
from harness.batches import send
from harness.device import adam, allow_tf32, autocast_of, compiled, one_step, pick_device, set_lr
from harness.errors import UserError
from harness.folder import trained_folder
from priors import first_stage
from priors.latents import count_images, load_latents, mean_nats, open_images, split_latents
from priors.networks import CODES, StackedVQVAE
from quantizers import filled

MAY_CHANGE_ON_RESUME = {"sample", "temperature", "top_k", "draws"}
SHOWN = 10  # images of a picture


def parse_args():
    parser = cli.Parser(description=__doc__)
    first_stage.add_arguments(parser)
    group = parser.add_argument_group("second stage")
    group.add_argument("--codes", type=cli.at_most(fields.MOST_CODES), default=3, metavar="N",
                       help=f"codes that stand for an image, each with a codebook of its own of {CODES}")
    group.add_argument("--hidden-size-prior", type=cli.positive_int, default=64, help="width of every layer")
    group.add_argument("--num-layers", type=cli.at_most(fields.MOST_LAYERS), default=4, help="layers of the PixelCNN")
    group.add_argument("--beta", type=cli.not_negative, default=0.25, help="weight of the commitment loss")
    group.add_argument("--alone-weight", type=cli.not_negative, default=1., metavar="W", help="weight of the latents' "
                       "cross-entropy given the codes alone, which keeps the codes in use")
    group.add_argument("--without-codes", type=cli.share, default=0.1, metavar="SHARE", help="share of the training "
                       "images that the PixelCNN sees without codes, which shows what the codes carry")
    cli.add_arguments(parser, output_folder="stacked", lr=1e-3)
    group = parser.add_argument_group("sampling")
    group.add_argument("--sample", type=cli.at_most(fields.MOST_SAMPLES), metavar="N",
                       help="draw N images with the model in the output folder, as it was trained, and train nothing")
    group.add_argument("--draws", type=cli.at_most(fields.MOST_DRAWS), default=3, metavar="N",
                       help="draws of each image from its codes")
    first_stage.add_drawing_arguments(group)
    return parser.parse_args()


def main():
    args = parse_args()
    if not args.without_codes:
        raise UserError("--without-codes 0 would leave open what the codes carry: pass a share above 0")
    device = pick_device(args.device)
    first = first_stage.FirstStage(args.model, device)
    args, source = first_stage.settle(args, first)
    if args.sample:
        return sample(args, first, source)

    embedded = first.embedded_codes()  # (K, D)
    model_args = {"K": first.K, "D": embedded.shape[1], "shape": first.shape, "n_codes": args.codes,
                  "dim": args.hidden_size_prior, "n_layers": args.num_layers}
    torch.manual_seed(args.seed)
    model = StackedVQVAE(**model_args)
    model.first.weight.data.copy_(embedded)
    print(report.size_of(model, torch.zeros(1, *first.shape, dtype=torch.int64), torch.zeros(1, dtype=torch.bool)))
    model.to(device, memory_format=torch.channels_last)
    splits = load_latents(args, first, source, "stacked")
    autocast = autocast_of(device, args.precision)  # after the codes, which are those of float32
    counts = count_images(splits)
    splits |= {split: with_another(*splits[split], split) for split in ("valid", "test")}
    train, valid, test = split_latents(splits, args, device)
    if min(train.sizes()) == 1:
        raise UserError("a batch of one image is too little for batch norm: pass a --batch-size and a --limit of 2 or "
                        "more, or add images")
    optimizer = adam(model.parameters(), args.lr)

    run = first_stage.open_run("stacked", args, first, {
        "model": model, "optimizer": optimizer, "model_args": model_args, "images": counts}, MAY_CHANGE_ON_RESUME)
    network, ready = distributed.wrap(model, device), partial(filled, model)

    def forward(grid, absent):
        with autocast():
            logits, alone, z_e, z_q, logits_codes, codes = network(grid, absent)

        # The latents given the codes, and those above and to the left or not; outputs towards their codes; the prior
        # over codes, whose gradient reaches nothing else.
        losses = {"cross-entropy": F.cross_entropy(logits.float(), grid),
                  "alone": F.cross_entropy(alone.float(), grid),
                  "commitment": F.mse_loss(z_e, z_q.detach()),
                  "prior": F.cross_entropy(logits_codes.float(), codes)}
        loss = losses["cross-entropy"] + args.alone_weight * losses["alone"] + args.beta * losses["commitment"] \
            + losses["prior"]
        return loss, {name: value.detach() for name, value in losses.items()}

    forward = compiled(forward, ready) if args.compile else forward

    def step(grid, absent):
        loss, losses = forward(grid, absent)
        run.check_finite({"loss": loss, **losses})
        run.backward(loss)
        run.update(optimizer)
        return {f"loss/train/{name}": value for name, value in losses.items()}

    step = one_step(step, device, optimizer, graph=not args.no_graph, accumulate=args.accumulate, ready=ready)
    for _ in run.epochs():
        model.train()
        for grid, _ in run.batches(train):
            lr = args.lr * run.lr_scale(train)
            set_lr(optimizer, lr)
            values = step(grid, left_out(grid, args.without_codes))
            if run.log_now():
                run.log(values | {"lr": lr})

        values = measure(model, valid, first, autocast)
        improved = run.improved(values, "nats_per_latent", larger_is_better=False)
        run.log_validation(values, values, improved, ("nats_per_latent",))

    # The best epoch, once, on the test split.
    run.take_best(model)
    allow_tf32(False)
    values = measure(model, test, first)
    psnr, picture = reconstruct(args, first, source, model, run.models / "reconstructions.png")
    results = run.finish(values | psnr, tuple(values | psnr))
    print("\n" + report.markdown_table(["test split", "value"], [[name, results[name]] for name in values | psnr]))
    print(f"\n{results['ms_per_step']:.4g} ms a step, {results['train_seconds']:.4g} s of training on {device}\n"
          f"originals, reconstructions of the first stage and from {args.codes} codes, free samples: {picture} "
          f"(PSNR is of these {SHOWN})\n"
          f"curves: {run.see_curves}")


def with_another(grids, labels, split):
    """Each of the grids (N, h, w) of a split with the one half the split further on, (N, 2, h, w), and the labels."""
    if len(grids) == 1:
        raise UserError(f"the {split} split has one image, and none whose codes to swap with its own: add images")
    return torch.stack([grids, grids.roll(len(grids) // 2, 0)], 1), labels


def left_out(grid, share):
    """Which (B,) of this process's grids go without codes."""
    return send(distributed.rand(grid) < share, grid.device)


@torch.no_grad()
def measure(model, batches, first, autocast=nullcontext):
    """Code length with the right codes, those of another image and none; what a code of the prior takes; usage."""
    used = [torch.zeros(CODES, dtype=torch.float64) for _ in range(model.n_codes)]

    def logits_of(pair, _):
        grid, other = pair.unbind(1)
        codes = model.codes(grid)
        for count, column in zip(used, codes.unbind(1)):
            count += torch.bincount(column.cpu(), minlength=CODES)
        z_q, without = model.embed(codes), torch.ones(len(grid), dtype=torch.bool, device=grid.device)
        conditions = {"right": model.condition(z_q), "swapped": model.condition(model.embed(model.codes(other))),
                      "none": model.condition(z_q, without)}
        return {name: model.pixelcnn(grid, spatial=part) for name, part in conditions.items()}, grid

    nats = mean_nats(model, batches, autocast, logits_of)
    values = first.code_length(nats["right"]) | {"nats_swapped_codes": nats["swapped"], "nats_no_codes": nats["none"],
                                                 "bits_carried": (nats["none"] - nats["right"]) / math.log(2)
                                                 * math.prod(first.shape)}
    for i, count in enumerate(used):
        values[f"codebook_perplexity_{i + 1}"] = metrics.codebook_usage(distributed.total(count))["perplexity"]
    return values


def reconstruct(args, first, source, model, path):
    """PSNR of images of the test split from their codes, and a picture of them, saved at a path."""
    x = open_images(args, first, source).test.examples(SHOWN)
    grid, original = first.encode(x), metrics.as_8bit(x)
    generator = torch.Generator().manual_seed(args.seed)
    model.eval()
    with torch.no_grad():
        codes = model.codes(grid)
    draws = [first.decode(model.draw(codes, args.temperature, args.top_k, generator)) for _ in range(args.draws)]
    free = first.decode(model.draw(model.draw_codes(len(x), args.temperature, args.top_k, generator), args.temperature,
                                   args.top_k, generator))
    rows = [original, first.decode(grid), *draws, free]
    psnr = {"psnr_first_stage": rows[1], "psnr_one_draw": draws[0], f"psnr_mean_of_{args.draws}_draws": sum(draws)
            / len(draws)}
    return ({name: float(metrics.psnr(image, original).mean()) for name, image in psnr.items()},
            report.save_picture(path, rows))


def sample(args, first, source):
    """Draw codes from their prior, latents from the codes, and decode them: one picture."""
    model, _ = first_stage.open_trained("stacked", args, first, StackedVQVAE.rebuild)
    generator = torch.Generator().manual_seed(args.seed)
    codes = model.draw_codes(args.sample, args.temperature, args.top_k, generator)
    images = first.decode(model.draw(codes, args.temperature, args.top_k, generator))
    path = trained_folder(args.output_folder) / first_stage.name_of_sample(args, "sample")
    print(f"samples: {report.save_picture(f'{path}.png', images.split(SHOWN))}")
    _, picture = reconstruct(args, first, source, model, f"{path}-reconstructions.png")
    print(f"from their codes: {picture}")


if __name__ == "__main__":
    cli.run(main)
