"""Train a prior over the next frame's latents, given those before it and the action, and generate video with it."""
import math
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image

import datasets
from datasets import SPLITS
from harness import checkpoint, cli, distributed, fields, report
from harness.batches import send
from harness.device import adam, allow_tf32, autocast_of, compiled, one_step, pick_device, set_lr
from harness.errors import UserError
from harness.folder import trained_folder
from priors import first_stage
from priors.latents import count_images, load_latents, mean_nats, read_or_encode, split_latents
from priors.networks import VideoPrior

MAY_CHANGE_ON_RESUME = {"rollout", "action", "starts", "temperature", "top_k", "fps"}
RECORDED = "recorded"
STRIP = 8  # frames of a film strip
MOST_FPS, GIF_SIDE = 50, 65535  # of GIF files


def parse_args():
    parser = cli.Parser(description=__doc__)
    first_stage.add_arguments(parser)
    group = parser.add_argument_group("prior")
    group.add_argument("--context", type=cli.at_most(fields.MOST_CONTEXT), default=2, metavar="K",
                       help=f"frames that the next one depends on, at most {fields.MOST_CONTEXT}")
    group.add_argument("--hidden-size-prior", type=cli.positive_int, default=64, help="width of every layer")
    group.add_argument("--num-layers", type=cli.at_most(fields.MOST_LAYERS), default=4, help="layers of the PixelCNN")
    group.add_argument("--noise", type=cli.share, default=0.1, metavar="SHARE", help="largest share of the codes of "
                       "earlier frames that training replaces by others of their frame, so that errors of a rollout do "
                       "not grow")
    cli.add_arguments(parser, output_folder="video", lr=1e-3)
    group = parser.add_argument_group("generation")
    group.add_argument("--rollout", type=cli.at_most(fields.MOST_FRAMES), metavar="T",
                       help="generate T frames with the prior in the output folder, as it was trained, and train "
                       "nothing")
    group.add_argument("--action", default=RECORDED, help="action of every frame: a name, several in a row such as "
                       "right,right,left, or recorded, those of the test split")
    group.add_argument("--starts", type=cli.at_most(fields.MOST_SAMPLES), default=4, metavar="N",
                       help="places in the test split to start from")
    group.add_argument("--fps", type=cli.at_most(MOST_FPS), default=30,
                       help=f"frames per second of the GIF, at most {MOST_FPS}; rounded, as a frame lasts whole "
                       "hundredths of a second")
    first_stage.add_drawing_arguments(group)
    args = parser.parse_args()
    for flag in ("action", "starts", "fps", "temperature", "top_k"):
        if not args.rollout and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)} is for a rollout, training takes what was "
                         "recorded: add --rollout, or leave it out")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    first = first_stage.FirstStage(args.model, device)
    args, source = first_stage.settle(args, first, in_order=True)
    actions = getattr(datasets.DATASETS[args.dataset], "actions", [])
    if args.rollout:
        return roll_out(args, first, source, actions)

    frames = load_latents(args, first, source, "video")
    autocast = autocast_of(device, args.precision)  # after the codes, which are those of float32
    windows = {split: cut(*frames[split], args.context, split) for split in SPLITS}
    train, valid, test = split_latents(windows, args, device)
    torch.manual_seed(args.seed)
    model_args = {"K": first.K, "context": args.context, "n_actions": len(actions), "dim": args.hidden_size_prior,
                  "n_layers": args.num_layers}
    model = VideoPrior(**model_args)
    one = torch.zeros(1, dtype=torch.int64)
    print(report.size_of(model, one.expand(1, args.context + 1, *first.shape), one))
    model.to(device, memory_format=torch.channels_last)
    optimizer = adam(model.parameters(), args.lr)

    run = first_stage.open_run("video", args, first, {
        "model": model, "optimizer": optimizer, "model_args": model_args, "images": count_images(frames)},
        MAY_CHANGE_ON_RESUME)
    network = distributed.wrap(model, device)

    def forward(window, action):
        """Nats it takes to code a latent, each given those above and to its left, the frames before and the action."""
        with autocast():
            logits = network(window, action)
        return F.cross_entropy(logits.float(), window[:, -1])

    forward = compiled(forward) if args.compile else forward

    def step(window, action):
        loss = forward(window, action)
        run.check_finite({"loss": loss})
        run.backward(loss)
        run.update(optimizer)
        return {"loss/train/nats_per_latent": loss.detach()}

    step = one_step(step, device, optimizer, graph=not args.no_graph, accumulate=args.accumulate)
    for _ in run.epochs():
        model.train()
        for window, action in run.batches(train):
            lr = args.lr * run.lr_scale(train)
            set_lr(optimizer, lr)
            values = step(disturb(window, args.noise), action)  # frames before as a rollout has them
            if run.log_now():
                run.log(values | {"lr": lr})

        values = measure(model, valid, first, autocast)
        improved = run.improved(values, "nats_per_latent", larger_is_better=False)
        run.log_validation(values, values, improved, ("nats_per_latent",))

    # The best epoch, once, on the test split.
    run.take_best(model)
    allow_tf32(False)
    values = measure(model, test, first) | as_the_last_frame(train, test, first.K)
    results = run.finish(values, tuple(values))
    print("\n" + report.markdown_table(["test split", "value"], [[name, results[name]] for name in values]))
    print(f"\n{results['ms_per_step']:.4g} ms a step, {results['train_seconds']:.4g} s of training on {device}\n"
          f"curves: {run.see_curves}")


def starts_of_windows(rows, length, split, flag):
    """Positions (M,) at which `length` frames of one clip follow one another, of rows (N, 4) in order.

    Raises:
        UserError: there are none; a smaller `flag` may help.
    """
    clip, number = rows[:, 1], rows[:, 2]
    follows = (clip[1:] == clip[:-1]) & (number[1:] == number[:-1] + 1)
    row = F.pad((~follows).cumsum(0), (1, 0))  # (N,): the same for all that follow one another
    first = torch.arange(max(0, len(rows) - length + 1))
    whole = row[first] == row[first + length - 1]
    if not whole.any():
        raise UserError(f"no clip of the {split} split has {length} frames in a row, the longest row has "
                        f"{row.bincount().max()}: pass a smaller {flag}, or number the frames of a clip without gaps")
    return first[whole]


def cut(frames, rows, context, split):
    """Windows (M, context + 1, h, w) of frames (N, h, w) of one clip, and the action (M,) that led to their last."""
    first = starts_of_windows(rows, context + 1, split, "--context")
    return frames[first[:, None] + torch.arange(context + 1)], rows[first + context, 3]


def disturb(window, most):
    """A window (B, context + 1, h, w), a share of the codes of all frames but its last replaced by others of theirs.

    The share is drawn for each window, up to `most`; what is drawn is the same whatever the processes.
    """
    frames = window[:, :-1]
    draws = distributed.rand(window, 1 + frames[0].numel())
    hit = (draws[:, 1:] < most * draws[:, :1]).view(frames.shape)
    places = distributed.of_rank_0(torch.randperm(frames[0, 0].numel()))
    elsewhere = frames.flatten(2)[:, :, send(places, window.device)].view(frames.shape)
    return torch.cat([torch.where(send(hit, window.device), elsewhere, frames), window[:, -1:]], 1)


def measure(model, batches, first, autocast=nullcontext):
    """Code length of a frame's latents, and the share of them whose most probable code is right."""
    values = mean_nats(model, batches, autocast,
                       lambda window, action: ({"nats": model(window, action)}, window[:, -1]))
    return first.code_length(values["nats"]) | {"right": values["nats_right"]}


def as_the_last_frame(train, test, K):
    """Nats a latent where each is that of the last frame with the probability that it is in train, else any other."""
    kept = distributed.total(_kept(train))
    same = float(kept[0] / kept[1])
    kept = distributed.total(_kept(test))
    right = float(kept[0] / kept[1])
    nats = -right * math.log(max(same, 1e-9)) - (1 - right) * math.log(max(1 - same, 1e-9) / max(1, K - 1))
    return {"last_frame_nats_per_latent": nats, "last_frame_right": right}


def _kept(batches):
    pairs = [(float((window[:, -1] == window[:, -2]).sum()), window[:, -1].numel()) for window, _ in batches]
    return torch.tensor(pairs, dtype=torch.float64).sum(0)


# --- generation

def chosen_actions(text, names, recorded):
    """Actions (N, T) int64: those recorded (N, T), or those named, the last one kept up.

    Raises:
        UserError: a name is not known.
    """
    if text == RECORDED:
        return recorded
    asked = [name.strip() for name in text.split(",")]
    for name in asked:
        if name not in names:
            raise UserError(f"--action {name!r} is not known: " + (
                f"{', '.join(names)} are, and, alone, {RECORDED}" if names else
                "this data set has no actions, leave it out"))
    chosen = [names.index(name) for name in asked][:recorded.shape[1]]
    chosen += [chosen[-1]] * (recorded.shape[1] - len(chosen))
    return torch.tensor(chosen).expand(len(recorded), -1)


def roll_out(args, first, source, actions):
    """Go on from frames of the test split for --rollout frames: a GIF and a film strip, real above generated."""
    chosen_actions(args.action, actions, torch.zeros(1, args.rollout, dtype=torch.int64))  # a wrong name fails early
    model, _ = first_stage.open_trained("video", args, first, VideoPrior.rebuild)
    folder, context = trained_folder(args.output_folder), model.context
    frames, rows = read_or_encode(folder / "latents.pt", args, first, source)["test"]
    starts = starts_of_windows(rows, context + args.rollout, "test", "--rollout")
    if len(starts) < args.starts:
        print(f"the test split has {len(starts)} places to start from, not --starts {args.starts}: all are taken")
    starts = starts[torch.linspace(0, len(starts) - 1, min(args.starts, len(starts))).long()]
    widths = [report.image_rows([torch.zeros(n, first.data["channels"], *first.data["size"])]).shape[2] for n in (2, 3)]
    column = widths[1] - widths[0]
    most = (GIF_SIDE - widths[0]) // column + 2
    if len(starts) > most:
        raise UserError(f"--starts {args.starts} is too many for a GIF, which has a column for each: pass at most "
                        f"{most}")
    window = (starts[:, None] + torch.arange(context + args.rollout))
    real = frames[window].long().to(first.device)
    chosen = chosen_actions(args.action, actions, rows[window[:, context:], 3]).to(first.device)
    generator = torch.Generator().manual_seed(args.seed)
    drawn = model.rollout(real[:, :context], chosen, args.temperature, args.top_k, generator)
    videos = [first.decode(part.flatten(0, 1)).unflatten(0, part.shape[:2]).cpu()
              for part in (real[:, context:], drawn)]
    name = folder / first_stage.name_of_sample(args, "rollout", args.action.replace(",", "-")[:60])
    contents = {"real": _bytes(videos[0]), "generated": _bytes(videos[1]), "actions": chosen.cpu()}
    checkpoint.write_with(f"{name}.pt", partial(torch.save, contents))
    print(f"above real frames as the VQ-VAE has them, below generated: {save_gif(f'{name}.gif', videos, args.fps)}, "
          f"{save_strip(f'{name}.png', videos)}\n"
          f"real and generated frames, uint8 (N, T, C, H, W), and actions: {name}.pt")


def _bytes(images):
    return (images * 255).round().byte()


def save_gif(path, videos, fps):
    """Save videos (N, T, C, H, W) in [0, 1], the first in a row above the second."""
    frames = [report.image_rows([video[:, t] for video in videos]) for t in range(videos[0].shape[1])]
    frames = [Image.fromarray(_bytes(frame).permute(1, 2, 0).numpy()) for frame in frames]
    checkpoint.write_with(path, partial(frames[0].save, format="gif", save_all=True, append_images=frames[1:],
                                        duration=10 * round(100 / fps), loop=0))
    return path


def save_strip(path, videos):
    """Save `STRIP` frames spread over each of the first two videos, real above generated."""
    chosen = torch.linspace(0, videos[0].shape[1] - 1, min(STRIP, videos[0].shape[1])).long()
    rows = [video[i, chosen] for i in range(min(2, len(videos[0]))) for video in videos]
    return report.save_picture(path, rows)


if __name__ == "__main__":
    cli.run(main)
