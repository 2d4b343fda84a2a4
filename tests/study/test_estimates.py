"""Figures over seeds and images against their formulas, and files that hold what the text says."""
import csv
import json
import math
import statistics

import pytest
import torch

from study import estimates


def test_a_value_has_its_deviation():
    one = estimates.value([2.])
    assert str(one) == "2" and one.numbers() == {"mean": 2., "sd": None, "low": None, "high": None, "n": 1}
    three = estimates.value([1., 2., 3.], "†")
    assert str(three) == "2 ± 1 †" and three.numbers()["sd"] == 1 and three.numbers()["n"] == 3


def test_differences_have_an_interval_over_seeds_or_else_over_images():
    assert str(estimates.difference([0.5])) == "+0.5"
    assert str(estimates.difference([0.5], (0.25, 0.75))) == "+0.5 {+0.25, +0.75}"
    # t(0.975, 2) = 4.303, sd = 0.1: 1 ± 4.303 * 0.1 / sqrt(3)
    found = estimates.difference([0.9, 1., 1.1], (0.25, 0.75))
    assert str(found) == "+1 [+0.752, +1.25]"
    assert found.numbers() == pytest.approx({"mean": 1, "sd": 0.1, "low": 1 - 0.24841, "high": 1 + 0.24841, "n": 3,
                                             "images low": 0.25, "images high": 0.75}, abs=1e-4)
    assert str(estimates.difference([0.5, -0.5, 0.])) == "+0 [-1.24, +1.24]"


def test_ratios_are_geometric():
    assert str(estimates.ratio([0.7])) == "0.7"
    values = [0.5 * math.exp(x) for x in (-0.1, 0., 0.1)]
    half = 4.3027 * 0.1 / math.sqrt(3)
    found = estimates.ratio(values, note="†")
    assert str(found) == f"0.5 [{0.5 * math.exp(-half):.3g}, {0.5 * math.exp(half):.3g}] †"
    assert found.sd == pytest.approx(statistics.stdev(values))


def test_interval_covers_the_mean_as_often_as_it_says():
    import random
    draw = random.Random(0)
    held = sum(low <= 3 <= high for low, high in (
        estimates.interval([draw.gauss(3, 2) for _ in range(3)]) for _ in range(2000)))
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("how, sd", [(torch.sub, 0.1), (torch.div, 0.05)])
def test_intervals_over_images_are_those_of_the_mean_of_pairs(how, sd):
    # Ours is theirs and noise of sd 0.1, theirs is about 2: paired, what both share does not widen the interval.
    generator = torch.Generator().manual_seed(0)
    theirs = 2 + 0.3 * torch.randn(900, 2, generator=generator)
    ours = theirs + 0.1 * torch.randn(900, 2, generator=generator)
    for i, (low, high) in enumerate(estimates.over_images(ours, theirs, how)):
        assert low < how(ours.mean(0), theirs.mean(0))[i] < high
        assert high - low == pytest.approx(2 * 1.96 * sd / 30, rel=0.15)
    one, = estimates.over_images(ours[:, :1], theirs[:, :1], how)
    assert one == pytest.approx(estimates.over_images(ours, theirs, how)[0], rel=1e-12)  # whatever stands next to it


def test_rank_correlations():
    rows = estimates.rank_correlations({"a": [1, 2, 3, 10], "b": [2, 4, 6, 7], "c": [9, 3, 2, 1]})
    assert rows[0] == {"rank correlation": "a", "a": 1, "b": 1, "c": -1} and rows[2]["b"] == -1


def test_a_table_is_numbers_in_its_files_and_text_last(tmp_path):
    rows = [{"loss": "é, b", "x": estimates.value([1.2344, 1.2348]), "y": estimates.ratio([0.5], (0.4, 0.6)),
             "z": 1.23456},
            {"loss": "c", "x": estimates.value([3., 3.]), "y": estimates.missing("no curve"), "z": math.nan}]
    text = estimates.write_tables(tmp_path, {"one": (rows, "a note")}, [{"seed": 0}])
    assert "| é, b | 1.235 ± 0.00028 | 0.5 {0.4, 0.6} | 1.235 |" in text and "| none: no curve |" in text
    assert "a note" in text and (tmp_path / "table.md").read_text() == text

    first, second = csv.DictReader((tmp_path / "one.csv").read_text().splitlines())
    assert list(first)[:6] == ["loss", "x mean", "x sd", "x low", "x high", "x n"] and first["loss"] == "é, b"
    assert float(first["x mean"]) == pytest.approx(1.2346) and first["x n"] == "2" and float(first["z"]) == 1.23456
    assert first["y sd"] == first["y low"] == second["y mean"] == "" and float(first["y images low"]) == 0.4
    for row in (first, second):  # as pandas reads them: numbers, or nothing
        assert all(not value or math.isfinite(float(value)) for name, value in row.items()
                   if name != "loss")
    kept = json.loads((tmp_path / "table.json").read_text(), parse_constant=pytest.fail)
    assert kept["runs"] == [{"seed": 0}] and kept["one"][0]["x"]["n"] == 2 and kept["one"][1]["z"] is None
    assert kept["one"][0]["y"]["sd"] is None and kept["one"][0]["y"]["images high"] == 0.6
