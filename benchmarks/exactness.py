"""Is the search exact on this device? Its answers against float64.

    python -m benchmarks.exactness            counts for both precisions of Triton's kernel, on a GPU
"""
import sys
from functools import partial

import torch

from harness import cli
from kernels.nearest import nearest, triton_nearest

MARGIN = 1e-6  # of the least squared distance: a code that is farther by more is wrong
AT_ONCE = 2 ** 25  # distances in float64


def wrong_codes(x, codebook, indices):
    """How many of the vectors x (N, D) have a code that is farther than their nearest by more than `MARGIN` of it."""
    wrong, codes = 0, codebook.double()
    rows = max(1, AT_ONCE // len(codes))
    for vectors, chosen in zip(x.double().split(rows), indices.split(rows)):
        # The expanded square is good to 1e-12 here: inputs and codes of a proof lie around the origin, of size one.
        distances = vectors.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * vectors @ codes.t()
        least = distances.amin(1)
        wrong += int((distances.gather(1, chosen.unsqueeze(1)).squeeze(1) > least * (1 + MARGIN)).sum())
    return wrong


def wrong_ties(codebook, indices):
    """How many indices name a code that also stands at a lower index."""
    _, place = torch.unique(codebook, dim=0, return_inverse=True)
    order = torch.arange(len(codebook), device=codebook.device)
    lowest = torch.full_like(order, len(codebook)).scatter_reduce(0, place, order, "amin")[place]
    return int((lowest[indices] != indices).sum())


def search_errors(search, count, codes, width, device, dtype=torch.float32):
    """Counts of `wrong_codes` and `wrong_ties`, the latter where every code stands about four times in the codebook."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(count, width, device=device, generator=generator).to(dtype)
    codebook = torch.randn(codes, width, device=device, generator=generator)
    repeated = codebook[torch.randint(-(-codes // 4), (codes,), device=device, generator=generator)]
    ties = search(x, repeated)
    return {"wrong": wrong_codes(x, codebook, search(x, codebook)),
            "wrong among ties": wrong_codes(x, repeated, ties), "ties not lowest": wrong_ties(repeated, ties)}


def main():
    cli.Parser(description=__doc__.splitlines()[0]).parse_args()
    if not torch.cuda.is_available():
        sys.exit("a GPU is needed: the search on a CPU is tested against brute force by the tests")
    device = torch.device("cuda")
    searches = {"vq": nearest} | {
        precision: partial(triton_nearest, precision=precision) for precision in ("ieee", "tf32x3")}
    for shape in ((131072, 512, 64), (8192, 512, 256), (16384, 16384, 64), (5000, 777, 300), (5000, 100, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            for name, search in searches.items():
                print(shape, dtype, name, search_errors(search, *shape, device, dtype), flush=True)


if __name__ == "__main__":
    main()
