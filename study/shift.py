"""What each loss term says of detail that is misplaced by one pixel, over what it says of detail that is gone.

An image is its blur and its detail, x = blur + detail. Of each term this prints

    term(blur + detail shifted by one pixel right and down, x) / term(blur, x).

Above 1, a model that does not know where detail lies does better to leave it out: the term asks for a blur. Below 1,
it does better to draw it. The blur is a 3x3 binomial filter. Values depend on the images and their size.
"""
import math

import torch

import datasets
from harness import cli, report
from harness.errors import UserError
from losses import TERMS, sharpened
from study.measuring import terms_for

IMAGES, BATCH = 256, 64


def main():
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=cli.path, metavar="FOLDER", help="folder of images (default the photographs "
                        "that ship with scikit-image)")
    parser.add_argument("--image-size", type=cli.image_size, default=(64, 64), metavar="N|HxW",
                        help="resize and center-crop the images (default 64)")
    args = parser.parse_args()
    if min(args.image_size) < 2:
        raise UserError("an image of one pixel has no detail to shift: pass a larger --image-size")
    name = "folder" if args.images else datasets.BUILT_IN
    data = datasets.load(name, datasets.Source(args.images or "data", args.image_size), BATCH)
    x = data.valid.examples(IMAGES)
    print(f"{len(x)} images of {name} at {x.shape[2]}x{x.shape[3]}\n")
    print(report.markdown_table(["term", "of a blur", "of shifted detail", "ratio"], rows(x)))


def rows(x):
    """[term, its value of the blurred images x (B, C, H, W), of those of shifted detail, the ratio] of each term."""
    blurred = sharpened(x, -1.)  # an unsharp mask of amount -1 leaves the blur
    shifted = blurred + (x - blurred).roll((1, 1), (2, 3))
    result = []
    for name in terms_for(x[:1])[0]:
        blur, shift = (mean(TERMS[name], image, x) for image in (blurred, shifted))
        result.append([name, blur, shift, shift / blur if blur else math.nan])
    return result


@torch.no_grad()
def mean(term, x_tilde, x):
    """Mean of a term over batches: what is a statistic of a batch is one of as many images as in a training."""
    return sum(float(term(*pair)) for pair in zip(x_tilde.split(BATCH), x.split(BATCH))) / -(-len(x) // BATCH)


if __name__ == "__main__":
    cli.run(main)
