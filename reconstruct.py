"""Reconstruct image files of any size with a trained VQ-VAE: originals next to their reconstructions."""
import math
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import metrics
from harness import cli, report
from harness.decoding import BrokenImage, decode
from harness.device import pick_device
from harness.errors import UserError
from harness.images import find_images
from modules import load
from terms.images import LUMA


def parse_args():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--model", type=cli.path, required=True, metavar="PT", help="checkpoint of vqvae.py")
    parser.add_argument("images", nargs="+", type=cli.path, metavar="PATH", help="image files, and folders of them")
    parser.add_argument("--output", type=cli.path, default="reconstructions", metavar="FOLDER",
                        help="(default %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that are in it")
    parser.add_argument("--tile", type=cli.positive_int, default=1024, metavar="PIXELS",
                        help="reconstruct larger images in tiles of this side (default %(default)s)")
    parser.add_argument("--skip-broken", action="store_true", help="go on without files that do not decode")
    parser.add_argument("--device", default="auto", help="(default %(default)s)")
    return parser.parse_args()


def main():
    args = parse_args()
    device = pick_device(args.device)
    model = load(args.model).to(device, memory_format=torch.channels_last)
    sources = name_targets(list_sources(args.images), Path(args.output), args.overwrite)
    whole = [pair for pair in sources if decodes(pair[0], args.skip_broken)]  # before one is written
    rows = []
    for path, target in whole:
        image = open_image(path, model.input_dim)
        x_tilde = metrics.as_8bit(reconstruct(model, image.to(device), args.tile)).cpu()
        x = metrics.as_8bit(image)
        target.parent.mkdir(parents=True, exist_ok=True)
        report.save_picture(target, [torch.cat([x, x_tilde])], least_side=1)
        rows.append([str(target), f"{x.shape[2]}x{x.shape[3]}", *figures(x_tilde, x)])
    print(report.markdown_table(["original, reconstruction", "size", "psnr", "ssim", "gradient_ratio"], rows))
    if len(whole) < len(sources):
        print(f"skipped {len(sources) - len(whole)} broken images of {len(sources)}")


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


@torch.no_grad()
def reconstruct(model, x, tile):
    """Reconstruction (1, C, H, W) of an image of any size: padded by its border to whole codes, tiled if large.

    Tiles overlap by what the model sees on each side, so that the result is that of the image as a whole.
    """
    unit, margin, (height, width) = model.downsample, reach(model), x.shape[2:]
    tile = max(unit, tile // unit * unit)
    padded = F.pad(x, (0, -width % unit, 0, -height % unit), mode="replicate")
    result = torch.empty_like(padded)
    for top in range(0, padded.shape[2], tile):
        for left in range(0, padded.shape[3], tile):
            above, before = max(0, top - margin), max(0, left - margin)
            part = padded[:, :, above:top + tile + margin, before:left + tile + margin]
            made = model(part)[0][:, :, top - above:, left - before:]
            target = result[:, :, top:top + tile, left:left + tile]
            target.copy_(made[:, :, :target.shape[2], :target.shape[3]])
    return result[:, :, :height, :width]


if __name__ == "__main__":
    cli.run(main, many=False)
