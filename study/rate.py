"""Rate at equal quality: how many of the bits one curve of (rate, quality) saves over another."""
import numpy as np
from scipy.interpolate import PchipInterpolator

from harness.errors import UserError


def delta_rate(rates, qualities, reference_rates, reference_qualities):
    """Bjøntegaard delta rate in per cent: bits that a curve needs beyond a reference at equal quality; -20 saves 20%.

    The mean over the qualities that both reach of the difference of log rates, each log rate a piecewise cubic Hermite
    polynomial of the quality (Bjøntegaard 2001, VCEG-M33; PCHIP as in JVET's reference sheets).

    Args:
        rates, reference_rates: positive, two or more each, in one unit, in any order. qualities, reference_qualities:
            of each; larger is better, and rises with the rate.
    Raises:
        UserError: fewer than two rates, a quality that does not rise with the rate, or no quality that both reach.
    """
    curves = [_curve(*curve) for curve in ((rates, qualities), (reference_rates, reference_qualities))]
    low, high = max(curve.x[0] for curve in curves), min(curve.x[-1] for curve in curves)
    if low >= high:
        raise UserError("the curves do not overlap: no quality is reached by both")
    ours, reference = (curve.integrate(low, high) / (high - low) for curve in curves)
    return 100 * float(np.expm1(ours - reference))


def _curve(rates, qualities):
    """Log rate as a function of quality."""
    rates, qualities = (np.asarray(values, dtype=float) for values in (rates, qualities))
    order = np.argsort(rates)
    rates, qualities = rates[order], qualities[order]
    if len(rates) < 2 or not (rates > 0).all():
        raise UserError("a curve needs two or more positive rates")
    if not (np.diff(qualities) > 0).all():
        raise UserError("the quality does not rise with the rate")
    return PchipInterpolator(qualities, np.log(rates))
