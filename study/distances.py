"""Distances in the features of a network: of two sets of images, and of pairs of an image and its reconstruction."""
import torch
import torch.nn.functional as F

PROJECTIONS, PROJECTIONS_AT_ONCE = 1024, 128  # of the sliced Wasserstein distance
ROWS_AT_ONCE = 1024  # of the matrices of the kernel distance


# --- of sets

@torch.no_grad()
def frechet_distance(fake, real):
    """Fréchet distance of the Gaussians fitted to features (N, D) and (M, D) (Heusel et al. 2017, arXiv 1706.08500).

    |m - m'|^2 + tr(S + S' - 2 (S S')^1/2), in [0, inf): 0 at equality. It is biased upward by about 1/N: compare only
    figures of equally many images.
    """
    means, roots = [], []
    for features in map(_float64, (fake, real)):
        means.append(features.mean(0))
        centred = (features - means[-1]) / max(1, len(features) - 1) ** 0.5
        roots.append(torch.linalg.qr(centred, mode="r").R)  # R^T R is the covariance S
    # The trace of (S S')^1/2 is the sum of the singular values of R R'^T.
    traces = sum(root.square().sum() for root in roots) - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return float((means[0] - means[1]).square().sum() + traces)


def cubic_kernel(a, b):
    """(a b^T / D + 1)^3 of features (N, D) and (M, D): (N, M), the kernel of KID."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian_kernel(a, b):
    """1000 exp(-|a - b|^2 / (2 10^2)) of features (N, D) and (M, D): (N, M), the kernel of CMMD."""
    return 1000 * torch.exp(-torch.cdist(a, b).square() / 200)


@torch.no_grad()
def kernel_distance(fake, real, kernel=cubic_kernel):
    """Squared maximum mean discrepancy of features (N, D) of reconstructions and of their originals, in the same order.

    The mean over i != j of k(x_i, x_j) + k(y_i, y_j) - 2 k(x_i, y_j), as KID (Binkowski et al. 2018, arXiv 1801.01401)
    is with its cubic kernel. It is unbiased at any N and so may fall below 0. A reconstruction never meets its own
    original, which is like it and would lower the figure.

    Returns:
        the distance, and its standard deviation over draws of N images.
    Raises:
        ValueError: shapes differ or are not (N, D).
    """
    _check_pairs("the kernel distance", fake, real)
    x, y = _float64(fake), _float64(real)
    count, sums = len(x), []
    for rows in torch.arange(count, device=x.device).split(ROWS_AT_ONCE):
        pairs = kernel(x[rows], x) + kernel(y[rows], y) - kernel(x[rows], y) - kernel(y[rows], x)
        sums.append(pairs.sum(1) - pairs.gather(1, rows.unsqueeze(1)).squeeze(1))
    by_image = torch.cat(sums) / (count - 1)
    return float(by_image.mean()), float(2 * by_image.std() / count ** 0.5)


@torch.no_grad()
def sliced_wasserstein(fake, real, projections=PROJECTIONS, seed=0):
    """Squared sliced Wasserstein distance of features (N, D) of reconstructions and of originals: 0 at equality.

    D times the mean over random directions u of the squared 2-Wasserstein distance of the projections,
    mean_i (sort(fake u)_i - sort(real u)_i)^2 (Bonneel et al. 2015; with deep features arXiv 2605.06797). Squared as
    the Fréchet distance is, and D times so that, as there, a shift by m counts |m|^2. It assumes no Gaussian and holds
    up with few images. The directions depend on the seed and D alone.

    Raises:
        ValueError: shapes differ or are not (N, D).
    """
    _check_pairs("sliced Wasserstein", fake, real)
    fake, real, width = fake.float(), real.float(), fake.shape[1]
    directions = torch.randn(width, projections, generator=torch.Generator().manual_seed(seed)).to(fake.device)
    total = 0.
    for part in F.normalize(directions, dim=0).split(PROJECTIONS_AT_ONCE, dim=1):
        sorted_fake, sorted_real = ((features @ part).t().sort(dim=1).values for features in (fake, real))
        total += float((sorted_fake - sorted_real).square().mean(1).sum())
    return width * total / projections


def _check_pairs(name, fake, real):
    if fake.shape != real.shape or fake.ndim != 2:
        raise ValueError(f"{name} needs two sets of features of one shape (N, D), got {tuple(fake.shape)} and "
                         f"{tuple(real.shape)}")


def _float64(features):
    return features.double() if features.is_cuda else features.cpu().double()  # other devices may lack float64


# --- of pairs

def paired_distance(fake_maps, real_maps):
    """Squared distance of the features of two images at several depths, each position's scaled to unit length.

    The mean over depths and positions of |f / |f| - f' / |f'||^2, in [0, 4]: the form of LPIPS (Zhang et al. 2018,
    arXiv 1801.03924) without its weights learned from human judgements. 0 at equality.

    Args:
        fake_maps, real_maps: a (B, D, h, w) for each depth; D, h and w may differ from depth to depth.
    Returns:
        (B,), differentiable.
    """
    by_depth = [(F.normalize(a.float(), dim=1) - F.normalize(b.float(), dim=1)).square().sum(1).mean((1, 2))
                for a, b in zip(fake_maps, real_maps, strict=True)]
    return sum(by_depth) / len(by_depth)
