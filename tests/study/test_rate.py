"""Bits saved at equal quality, against closed forms."""
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.interpolate import PchipInterpolator

from study.rate import delta_rate


def test_a_curve_with_a_share_of_the_bits_saves_the_rest_at_any_quality():
    rates, qualities = np.array([0.3, 0.5, 0.9, 1.4]), np.array([22., 24., 27., 28.])
    assert delta_rate(0.8 * rates, qualities, rates, qualities) == pytest.approx(-20)
    assert delta_rate(rates, qualities, rates, qualities) == pytest.approx(0)
    shuffled = [2, 0, 3, 1]
    assert delta_rate(1.1 * rates[shuffled], qualities[shuffled], rates, qualities) == pytest.approx(10)


def test_of_straight_lines_it_is_the_distance_between_them():
    # quality = a + b ln rate, both of slope b: apart by da, at equal quality rates are apart by exp(da / b).
    rates = np.array([0.25, 0.5, 1., 2.])
    assert delta_rate(rates, 30 + 4 * np.log(rates), rates, 28 + 4 * np.log(rates)) == pytest.approx(
        100 * (np.exp(-2 / 4) - 1))


def test_only_what_both_reach_counts():
    rates, qualities = np.array([1., 2., 4.]), np.array([10., 12., 15.])
    other_rates, other = np.array([1.5, 2.5, 3.5, 5.]), np.array([11., 13., 14., 18.])
    a, b = PchipInterpolator(qualities, np.log(rates)), PchipInterpolator(other, np.log(other_rates))
    mean = quad(lambda quality: a(quality) - b(quality), 11., 15., limit=200)[0] / 4
    assert delta_rate(rates, qualities, other_rates, other) == pytest.approx(100 * (np.exp(mean) - 1), rel=1e-6)


def test_published_example():
    # Rates (kbit/s) and PSNR (dB) of the readme of the bjontegaard package, and what its 1.3 makes of them (pchip).
    ours = [9787.80, 4469.00, 2451.52, 1356.24], [40.121, 38.651, 36.970, 34.987]
    reference = [9487.76, 4593.60, 2486.44, 1358.24], [40.037, 38.615, 36.845, 34.851]
    assert delta_rate(*ours, *reference) == pytest.approx(-4.417485, abs=1e-6)


@pytest.mark.parametrize("curve, says", [
    (([1, 2], [20, 21]), "do not overlap"), (([1, 2, 3], [10, 12, 11]), "does not rise"), (([1], [10]), "two or more"),
    (([0, 1], [10, 11]), "positive")])
def test_curves_that_say_nothing_are_refused(curve, says):
    with pytest.raises(ValueError, match=says):
        delta_rate(*curve, [1, 2], [10, 12])
