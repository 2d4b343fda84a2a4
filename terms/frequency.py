"""Terms of frequencies: pyramids, spectra and the wavelets of phase congruency and saliency."""
import math

import torch
import torch.nn.functional as F

from harness.errors import UserError
from terms.images import EPS, Row, check_sides, chroma_of, edges, luma_of, power, similarity, unit, weighted_channels

# --- Laplacian pyramids


def _blurred(x, axis):
    """Half of x along an axis: filtered by Burt and Adelson's five taps, mirrored at the border, every second kept."""
    x = x.movedim(axis, -1)
    x = torch.cat([x[..., :2].flip(-1), x, x[..., -2:].flip(-1)], -1)
    outer, inner = x[..., :-4] + x[..., 4:], x[..., 1:-3] + x[..., 3:-1]
    return (0.05 * outer + 0.25 * inner + 0.4 * x[..., 2:-2])[..., ::2].movedim(-1, axis)


def _expanded(x, axis, length):
    """x between and at its pixels along an axis, by the same taps; the last pixels are repeated beyond the border."""
    x = x.movedim(axis, -1)
    x = torch.cat([x[..., :1], x, x[..., -1:]], -1)
    at, after = 0.1 * (x[..., :-2] + x[..., 2:]) + 0.8 * x[..., 1:-1], 0.5 * (x[..., 1:-1] + x[..., 2:])
    return torch.stack([at, after], -1).flatten(-2)[..., :length].movedim(-1, axis)


def pyramid(x, levels):
    """Laplacian pyramid of x (B, C, H, W), the finest band first and what is left, a low pass, last (Burt, Adelson)."""
    bands = []
    for _ in range(levels - 1):
        low = _blurred(_blurred(x, 2), 3)
        bands.append(x - _expanded(_expanded(low, 3, x.shape[3]), 2, x.shape[2]))
        x = low
    return [*bands, x]


def _least_side(levels):
    """Pixels of a side that has 2 or more left to filter for the last band but one."""
    return 2 ** (levels - 2) + 1


LAPLACIAN_LEVELS = 4


def laplacian(x_tilde, x):
    """Mean absolute error of each of 4 bands of the Laplacian pyramid, added: in [0, 5] (Bojanowski et al. 2018).

    sum_j 4^j |L_j(x_tilde) - L_j(x)|_1 per pixel, on [0, 1] (arXiv 1707.05776; bands of Burt and Adelson 1983).

    Raises:
        UserError: a side is too small for the bands, under 5 pixels.
    """
    check_sides("laplacian", x, _least_side(LAPLACIAN_LEVELS))
    return sum(band.abs().mean() for band in pyramid(unit(x_tilde) - unit(x), LAPLACIAN_LEVELS))


# Published for each band: the constant of the divisor, and the weights of the four neighbours in it.
NLPD_BANDS = ((0.0248, (0.1011, 0.1015, 0.1493, 0.1460)), (0.0185, (0.0757, 0.0837, 0.1986, 0.1846)),
              (0.0179, (0.0477, 0.0467, 0.2138, 0.2243)), (0.0191, (0., 0., 0.2503, 0.2616)),
              (0.0220, (0., 0., 0.2598, 0.2552)), (0.2782, (0., 0., 0.2215, 0.0717)))


def nlpd(x_tilde, x):
    """Normalised Laplacian pyramid distance: 0 or more, about 1 for unlike photographs (Laparra et al. 2016).

    Mean over 6 bands of the luma of the root mean square difference, per image, where a band is divided by a constant
    and its neighbours' magnitudes, as contrast masks contrast ("Perceptual image quality assessment using a normalized
    Laplacian pyramid", HVEI). The published weights but for the one of a fifth neighbour, 0.0072.

    Raises:
        UserError: a side is too small for the bands, under 17 pixels.
    """
    check_sides("nlpd", x, _least_side(len(NLPD_BANDS)))
    pair = luma_of(unit(torch.cat([x_tilde, x])))
    pairs = (band.chunk(2) for band in _normalised_bands(pair))
    squares = [(a - b).square().mean((1, 2, 3)) for a, b in pairs]
    return ((torch.stack(squares) + EPS).sqrt() - math.sqrt(EPS)).mean()


def _normalised_bands(luma):
    for band, (constant, (below, above, right, left)) in zip(pyramid(luma, len(NLPD_BANDS)), NLPD_BANDS):
        size = F.pad(band.abs(), (1, 1, 1, 1))
        divisor = constant + right * size[..., 1:-1, 2:] + left * size[..., 1:-1, :-2]
        if below:
            divisor = divisor + below * size[..., 2:, 1:-1] + above * size[..., :-2, 1:-1]
        yield band / divisor


# --- spectra

def focal_frequency(x_tilde, x):
    """Focal frequency loss, squared errors of frequencies weighted by how wrong each is: 0 or more (Jiang et al. 2021).

    mean_f w_f |FFT(x_tilde)_f - FFT(x)_f|^2, w_f the distance of f over the largest of its channel and image, taken as
    a constant; orthonormal, on [0, 1]; alpha = 1, the whole image as one patch (arXiv 2012.12821).
    """
    difference = torch.view_as_real(torch.fft.fft2(unit(x_tilde) - unit(x), norm="ortho"))
    squares = difference.square().sum(-1)  # (B, C, H, W)
    distance = squares.detach().sqrt()
    return (distance / distance.amax((2, 3), keepdim=True).clamp(min=EPS) * squares).mean()


# --- wavelets

def _frequencies(height, width, like, half=False):
    """Frequencies down (height, 1) and across (1, width or width // 2 + 1), in cycles per pixel."""
    across = (torch.fft.rfftfreq if half else torch.fft.fftfreq)(width, dtype=like.dtype, device=like.device)
    return torch.fft.fftfreq(height, dtype=like.dtype, device=like.device).unsqueeze(1), across.unsqueeze(0)


def _log_gabor(radius, centre, bandwidth):
    """exp(-ln(radius / centre)^2 / (2 bandwidth^2)), 0 at radius 0."""
    return torch.exp(-(radius.clamp(min=EPS) / centre).log().square() / (2 * bandwidth ** 2)) * (radius > 0)


FSIM_C, FSIM_GRADIENT_C, FSIM_CHROMA_C, FSIM_CHROMA_POWER = 0.85, 160 / 255 ** 2, 200 / 255 ** 2, 0.03


def fsim(x_tilde, x):
    """1 - FSIM, the feature similarity index: in [0, 1]; with chroma (FSIMc) for colour images (Zhang et al. 2011).

    Similarity of phase congruency (Kovesi 1999) times that of Scharr gradients times, to the power 0.03, that of I and
    Q, averaged with the larger phase congruency as weight, per image. Images are taken at their own size: the paper
    shrinks those above 256 pixels. The threshold of noise is a constant to the gradient.
    """
    x_tilde, x = unit(x_tilde), unit(x)
    luma_tilde, luma = luma_of(x_tilde), luma_of(x)
    phase_tilde, phase = _phase_congruency(luma_tilde), _phase_congruency(luma)
    score = similarity(phase_tilde, phase, FSIM_C) * similarity(
        edges(luma_tilde, 3 / 16, 10 / 16), edges(luma, 3 / 16, 10 / 16), FSIM_GRADIENT_C)
    if x.shape[1] == 3:
        chroma = similarity(chroma_of(x_tilde), chroma_of(x), FSIM_CHROMA_C)  # (B, 2, H, W)
        score = score * power(chroma[:, :1] * chroma[:, 1:], FSIM_CHROMA_POWER)
    weight = torch.maximum(phase_tilde, phase)
    return 1 - (((score * weight).sum((1, 2, 3)) + EPS) / (weight.sum((1, 2, 3)) + EPS)).mean()


ORIENTATIONS, SCALES, SHORTEST_WAVE, CUTOFF = 4, 4, 6, 0.45
NOISE = (math.sqrt(math.pi / 2) + 2 * math.sqrt(2 - math.pi / 2)) / 1.7  # thresholds two deviations above the mean


def _phase_congruency(luma):
    """(B, 1, H, W) phase congruency of the luma (B, 1, H, W): in [0, 1], large where waves of all lengths agree."""
    filters = _phase_filters(*luma.shape[2:], luma)  # (orientations, scales, H, W)
    response = torch.fft.ifft2(torch.fft.fft2(luma).unsqueeze(2) * filters)  # (B, orientations, scales, H, W)
    even, odd = response.real, response.imag
    sum_even, sum_odd = even.sum(2, keepdim=True), odd.sum(2, keepdim=True)
    length = (sum_even.square() + sum_odd.square() + EPS).sqrt()
    deviation = (even * sum_odd - odd * sum_even).abs().sum(2) / length.squeeze(2)
    amplitude = (even.square() + odd.square() + EPS).sqrt()
    with torch.no_grad():
        median = amplitude[:, :, 0].flatten(2).median(2).values.square()  # of the shortest waves: mostly noise
        noise = median / math.log(2) / filters[:, 0].square().sum((1, 2))
        whole = torch.fft.ifft2(filters.sum(1), norm="ortho").real.square().sum((1, 2))
        threshold = (NOISE * (noise * whole).sqrt())[..., None, None]
    energy = (length.squeeze(2) - deviation - threshold).relu().sum(1, keepdim=True)
    return energy / amplitude.sum((1, 2)).unsqueeze(1)


def _phase_filters(height, width, like):
    """(orientations, scales, height, width) log-Gabor filters, each of one half of the plane of frequencies."""
    down, across = _frequencies(height, width, like)
    radius, angle = (down.square() + across.square()).sqrt(), torch.atan2(down, across.expand(height, -1))
    low = 1 / (1 + (radius / CUTOFF) ** 30)
    waves = torch.stack([_log_gabor(radius, 1 / (SHORTEST_WAVE * 2 ** scale), math.log(0.55)) * low
                         for scale in range(SCALES)])
    turned = [angle - math.pi * turn / ORIENTATIONS for turn in range(ORIENTATIONS)]
    spread = torch.stack([torch.atan2(turn.sin(), turn.cos()) for turn in turned]) / (math.pi / ORIENTATIONS / 1.2)
    return (-spread.square() / 2).exp().unsqueeze(1) * waves


VSI_C, VSI_GRADIENT_C, VSI_CHROMA_C = 1.27, 386 / 255 ** 2, 130 / 255 ** 2
VSI_GRADIENT_POWER, VSI_CHROMA_POWER = 0.4, 0.02
LMN = ((0.06, 0.63, 0.27), (0.30, 0.04, -0.35), (0.34, -0.6, 0.17))


def vsi(x_tilde, x):
    """1 - VSI, the visual saliency index: in [0, 1], colour images (Zhang et al. 2014, doi 10.1109/TIP.2014.2346028).

    Similarity of saliency times that of Scharr gradients of L, to the power 0.4, times that of the opponent colours M
    and N, to the power 0.02, averaged with the larger saliency as weight, per image. Saliency is that of images at
    their own size, the published one where that is 256x256.

    Raises:
        UserError: the images have no colour.
    """
    if x.shape[1] != 3:
        raise UserError(f"vsi needs 3 channels, not {x.shape[1]}: --vsi-weight 0")
    x_tilde, x = unit(x_tilde), unit(x)
    saliency_tilde, saliency = _saliency(x_tilde), _saliency(x)
    lmn_tilde, lmn = weighted_channels(x_tilde, LMN), weighted_channels(x, LMN)
    contrast = similarity(edges(lmn_tilde[:, :1], 3 / 16, 10 / 16), edges(lmn[:, :1], 3 / 16, 10 / 16), VSI_GRADIENT_C)
    chroma = similarity(lmn_tilde[:, 1:], lmn[:, 1:], VSI_CHROMA_C)
    score = similarity(saliency_tilde, saliency, VSI_C) * contrast ** VSI_GRADIENT_POWER * power(
        chroma[:, :1] * chroma[:, 1:], VSI_CHROMA_POWER)
    weight = torch.maximum(saliency_tilde, saliency)
    return 1 - (((score * weight).sum((1, 2, 3)) + EPS) / (weight.sum((1, 2, 3)) + EPS)).mean()


SALIENT_WAVES, SALIENT_BANDWIDTH = 0.021 * 256, 1.34  # waves per side of the image
CENTRE_SIGMA = 145 / 256  # of a side: the centre of an image is looked at first


def _saliency(x):
    """(B, 1, H, W) saliency of colour images in [0, 1] by simple priors (Zhang et al. 2013, SDSP): in [0, 1].

    The prior of warm colours is left out: with VSI's constant it is 1 but at a pixel that is least in both a* and b*.
    """
    height, width = x.shape[2:]
    down, across = _frequencies(height, width, x, half=True)
    band = _log_gabor(((down * height).square() + (across * width).square()).sqrt(), SALIENT_WAVES, SALIENT_BANDWIDTH)
    detail = torch.fft.irfft2(torch.fft.rfft2(_lab(x)) * band, s=(height, width))
    detail = (detail.square().sum(1, keepdim=True) + EPS).sqrt()
    rows, columns = ((torch.arange(side, dtype=x.dtype, device=x.device) + 0.5) / side - 0.5 for side in x.shape[2:])
    saliency = detail * torch.exp(-(rows.square().unsqueeze(1) + columns.square()) / CENTRE_SIGMA ** 2)
    low, high = saliency.amin((2, 3), keepdim=True), saliency.amax((2, 3), keepdim=True)
    return (saliency - low) / (high - low + EPS)


RGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
WHITE = (0.9642119944211994, 1., 0.8251882845188288)  # D50


def _lab(x):
    """CIE L*a*b* of sRGB images (B, 3, H, W) in [0, 1]."""
    linear = torch.where(x > 0.04045, ((x.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4, x / 12.92)
    xyz = weighted_channels(linear, [[weight / white for weight in row] for row, white in zip(RGB_TO_XYZ, WHITE)])
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), (903.3 * xyz + 16) / 116).split(1, 1)
    return torch.cat([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


ROWS = {
    "laplacian": Row(laplacian, structural=True),
    "nlpd": Row(nlpd, structural=True),
    "focal-frequency": Row(focal_frequency, structural=True),
    "fsim": Row(fsim, structural=True),
    "vsi": Row(vsi, structural=True, colour=True),
}
