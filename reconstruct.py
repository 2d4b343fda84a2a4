"""Reconstruct image files of any size with a trained VQ-VAE: originals next to their reconstructions."""
import math
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import metrics
from harness import checkpoint, cli, report
from harness.decoding import BrokenImage, decode
from harness.device import pick_device
from harness.errors import UserError
from harness.images import find_images
from modules import load
from terms.images import LUMA


def parse_args():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--model", type=cli.path, required=True, metavar="RUN", help="run of vqvae.py or vqgan.py: its "
                        "folder, say pretrained/photos, or a checkpoint in it")
    parser.add_argument("images", nargs="*", type=cli.path, metavar="PATH", help="image files, and folders of them")
    parser.add_argument("--save-latents", type=cli.path, metavar="NPZ", help="also keep the latents of the images in "
                        "this file")
    parser.add_argument("--from-latents", type=cli.path, metavar="NPZ", help="decode the latents in this file, which "
                        "--save-latents wrote, instead of images")
    parser.add_argument("--output", type=cli.path, default="reconstructions", metavar="FOLDER",
                        help="folder that the pictures go to (default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    parser.add_argument("--tile", type=cli.positive_int, default=1024, metavar="PIXELS",
                        help="reconstruct larger images in tiles of this side (default %(default)s)")
    parser.add_argument("--skip-broken", action="store_true", help="go on without files that do not decode")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default %(default)s)")
    args = parser.parse_args()
    if bool(args.images) == bool(args.from_latents):
        parser.error("give images, or --from-latents and no images")
    if args.save_latents and args.from_latents:
        parser.error("--save-latents is for images: leave it out")
    if args.save_latents and Path(args.save_latents).suffix != ".npz":  # a photograph, or a model
        parser.error(f"--save-latents {args.save_latents} must end in .npz")
    if args.save_latents and Path(args.save_latents).is_dir():
        parser.error(f"--save-latents {args.save_latents} is a folder: name a file")
    return args


def main():
    args = parse_args()
    device = pick_device(args.device)
    model = load(args.model).to(device, memory_format=torch.channels_last)
    if args.from_latents:
        decode_file(args, model, device)
    else:
        reconstruct_images(args, model, device)


def reconstruct_images(args, model, device):
    """Save each image next to its reconstruction, and print a table; keep their latents where that is asked for."""
    sources = name_targets(list_sources(args.images), Path(args.output), args.overwrite)
    if args.save_latents and Path(args.save_latents).exists() and not args.overwrite:
        raise UserError(f"{args.save_latents} exists: pass --overwrite to replace it, or another --save-latents")
    whole = [pair for pair in sources if decodes(pair[0], args.skip_broken)]  # before one is written
    if args.save_latents:
        Path(args.save_latents).parent.mkdir(parents=True, exist_ok=True)
    rows, kept = [], {}
    for path, target in whole:
        image = open_image(path, model.input_dim)
        latents = encode(model, image.to(device), args.tile)
        height, width = image.shape[2:]
        x_tilde = metrics.as_8bit(decode_latents(model, latents, args.tile)[:, :, :height, :width]).cpu()
        x = metrics.as_8bit(image)
        target.parent.mkdir(parents=True, exist_ok=True)
        report.save_picture(target, [torch.cat([x, x_tilde])], least_side=1)
        rows.append([str(target), f"{height}x{width}", *figures(x_tilde, x)])
        kept[str(target.relative_to(args.output))] = latents[0].cpu(), (height, width)
    print(report.markdown_table(["original, reconstruction", "size", "psnr", "ssim", "gradient_ratio"], rows))
    print(metrics.SHARPNESS)
    if len(whole) < len(sources):
        print(f"skipped {len(sources) - len(whole)} broken images of {len(sources)}")
    if args.save_latents:
        save_latents(args.save_latents, kept, checkpoint.digest(args.model))
        print(f"latents of {len(kept)} images: {args.save_latents}")


def decode_file(args, model, device):
    """Save the images that the latents of a file stand for."""
    kept = read_latents(args.from_latents, model, checkpoint.digest(args.model))
    targets = {Path(args.output) / name: part for name, part in kept.items()}
    taken = [target for target in targets if target.exists()]
    if taken and not args.overwrite:
        raise UserError(f"{taken[0]} exists: pass --overwrite to replace it, or another --output than {args.output}")
    for target, (latents, (height, width)) in targets.items():
        image = metrics.as_8bit(decode_latents(model, latents[None].to(device), args.tile)[0, :, :height, :width])
        pixels = (image * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        pixels = pixels[:, :, 0] if pixels.shape[2] == 1 else pixels
        target.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_with(target, partial(Image.fromarray(pixels).save, format="png"))
    print(f"{len(targets)} images of {args.from_latents}: {args.output}")


def figures(x_tilde, x):
    """PSNR, SSIM and gradient ratio of one image; the latter two are nan where a side of one pixel has no structure."""
    structural = [float(metric(x_tilde, x)) if min(x.shape[2:]) > 1 else math.nan
                  for metric in (metrics.ssim, metrics.gradient_ratio)]
    return [float(metrics.psnr(x_tilde, x)), *structural]


def list_sources(paths):
    """[(image file, name under the output folder)]; FileNotFoundError or UserError where there is none."""
    sources = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = [(file, Path(path.resolve().name) / file.relative_to(path)) for file in find_images(path)[0]]
            if not inside:
                raise UserError(f"no images under {path}")
            sources += inside
        elif path.is_file():
            sources.append((path, Path(path.name)))
        else:
            raise FileNotFoundError(f"{path} does not exist or is no regular file")
    return sources


def name_targets(sources, output, overwrite):
    """[(image file, the file of its reconstruction)]: a PNG of its name, that keeps the ending where two share a name.

    Raises:
        UserError: two would be one file still, or one would replace an image that is read, or any file without
            `overwrite`.
    """
    names = [name.with_suffix(".png") for _, name in sources]
    count = Counter(names)
    inputs, taken = {path.resolve() for path, _ in sources}, {}
    for (path, name), target in zip(sources, names):
        target = output / (name.with_name(f"{name.name}.png") if count[target] > 1 else target)
        if target in taken:
            raise UserError(f"{taken[target]} and {path} would both be reconstructed as {target}: do them apart")
        if target.resolve() in inputs:
            raise UserError(f"{target} is read and would be replaced: pass another --output than {output}")
        if target.exists() and not overwrite:
            raise UserError(f"{target} exists: pass --overwrite to replace it, or another --output than {output}")
        taken[target] = path
    return [(path, target) for target, path in taken.items()]


def decodes(path, skip_broken):
    """Whether an image file does; BrokenImage where it does not and may not be skipped."""
    try:
        decode(path)
    except BrokenImage:
        if not skip_broken:
            raise
        return False
    return True


def open_image(path, channels):
    """An image file as (1, C, H, W) in [-1, 1]; colour files become grey for a model of one channel."""
    pixels = torch.from_numpy(decode(path)).permute(2, 0, 1).unsqueeze(0).float()
    if channels == 1:
        pixels = torch.einsum("bchw,c->bhw", pixels, pixels.new_tensor(LUMA)).unsqueeze(1)
    return pixels / 127.5 - 1


def reach(model):
    """Pixels around a tile that it depends on, through encoder and decoder, in whole codes; at most a code too many."""
    pixels, step = 0, 1  # what a value sees to each side; pixels from one value to the next
    for layer in (*model.encoder.modules(), *model.decoder.modules()):
        if isinstance(layer, nn.ConvTranspose2d):
            pixels += -(-(layer.kernel_size[0] - 1 - layer.padding[0]) // layer.stride[0]) * step
            step //= layer.stride[0]
        elif isinstance(layer, nn.Conv2d):
            pixels += max(layer.padding[0], layer.kernel_size[0] - layer.padding[0] - layer.stride[0]) * step
            step *= layer.stride[0]
    return -(-pixels // model.downsample) * model.downsample


def spans(length, side, margin):
    """[(start, stop of a tile, start, stop of what it depends on)] along an axis of so many codes."""
    return [(start, min(start + side, length), max(0, start - margin), min(start + side + margin, length))
            for start in range(0, length, side)]


@torch.no_grad()
def encode(model, x, tile):
    """Latents (1, h, w) of an image (1, C, H, W) in [-1, 1] of any size, padded by its border to whole codes.

    A large one is encoded in tiles, which overlap by what the model sees on each side: the result is that of the whole.
    """
    unit = model.downsample
    padded = F.pad(x, (0, -x.shape[3] % unit, 0, -x.shape[2] % unit), mode="replicate")
    height, width = (side // unit for side in padded.shape[2:])
    latents = torch.empty(1, height, width, dtype=torch.int64, device=x.device)
    side, margin = max(1, tile // unit), reach(model) // unit
    for top, bottom, above, below in spans(height, side, margin):
        for left, right, before, after in spans(width, side, margin):
            part = model.encode(padded[:, :, above * unit:below * unit, before * unit:after * unit])
            latents[:, top:bottom, left:right] = part[:, top - above:bottom - above, left - before:right - before]
    return latents


@torch.no_grad()
def decode_latents(model, latents, tile):
    """Image (1, C, f h, f w) in [-1, 1] of latents (1, h, w), f the downsampling; in tiles as in `encode`."""
    unit, (height, width) = model.downsample, latents.shape[1:]
    result = torch.empty(1, model.input_dim, height * unit, width * unit, device=latents.device)
    side, margin = max(1, tile // unit), reach(model) // unit
    for top, bottom, above, below in spans(height, side, margin):
        for left, right, before, after in spans(width, side, margin):
            part = model.decode(latents[:, above:below, before:after])
            result[:, :, top * unit:bottom * unit, left * unit:right * unit] = part[
                :, :, (top - above) * unit:(bottom - above) * unit, (left - before) * unit:(right - before) * unit]
    return result


# --- files of latents

def save_latents(path, kept, digest):
    """Save {name: (latents (h, w), (H, W) of the image)} of the model of a digest as an npz file.

    Its arrays: "model", the digest; "names" (N,); "sizes" (N, 2); "latents_0", "latents_1", ... (h, w) int64.
    """
    grids = {f"latents_{i}": latents.numpy() for i, (latents, _) in enumerate(kept.values())}
    sizes = np.array([size for _, size in kept.values()], dtype=np.int64).reshape(-1, 2)  # where there are none, too
    checkpoint.write_with(path, lambda file: np.savez_compressed(file, model=digest, names=list(kept), sizes=sizes,
                                                                 **grids))


def read_latents(path, model, digest):
    """What `save_latents` was given. UserError where the file is none of its, or of another model."""
    try:
        with np.load(path) as file:
            known, names, sizes = str(file["model"]), file["names"].tolist(), file["sizes"]
            grids = [file[f"latents_{i}"] for i in range(len(names))]
        if not all(np.issubdtype(part.dtype, np.integer) and part.ndim == 2 for part in (sizes, *grids)):
            raise ValueError("latents and sizes must be whole numbers in two dimensions")
        if sizes.shape != (len(names), 2) or (sizes < 1).any():
            raise ValueError("sizes must be a height and a width for each name")
        if len(set(map(Path, names))) < len(names):
            raise ValueError("two names are the same")
        if not all(Path(name).suffix == ".png" and ".." not in Path(name).parts and not Path(name).is_absolute()
                   and "\0" not in name for name in names):
            raise ValueError("a name is no PNG file in the output folder")
        kept = {name: (torch.from_numpy(grid.astype(np.int64)), tuple(size))
                for name, grid, size in zip(names, grids, sizes.tolist())}
    except (KeyError, ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is damaged or holds no latents of --save-latents ({error}): make it anew") from error
    if known != digest:
        raise UserError(f"{path} holds latents of another model: pass the --model that it was made with")
    for name, (grid, size) in kept.items():
        fits = [-(-side // model.downsample) for side in size] == list(grid.shape)
        if not (fits and ((grid >= 0) & (grid < model.K)).all()):
            raise UserError(f"{path} holds latents of {name} that do not fit the model: make it anew")
    return kept


if __name__ == "__main__":
    cli.run(main, many=False)
