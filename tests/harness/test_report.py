"""Figures over seeds against their formulas, and files that hold what the text says."""
import csv
import json
import math
import statistics

import pytest
import torch
from PIL import Image

from harness import distributed, report


def test_spread():
    assert report.spread([2.]) == "2" and report.spread([1., 2., 3.]) == "2 ± 1"


def test_differences_always_have_their_interval():
    assert report.difference([0.5]) == "+0.5 (one seed)"
    # t(0.975, 2) = 4.303, sd = 0.1: 1 ± 4.303 * 0.1 / sqrt(3)
    assert report.difference([0.9, 1., 1.1]) == "+1 [+0.752, +1.25]"
    assert report.difference([0.5, -0.5, 0.]) == "+0 [-1.24, +1.24]"


def test_ratios_are_geometric():
    assert report.ratio([0.7]) == "0.7 (one seed)"
    values = [0.5 * math.exp(x) for x in (-0.1, 0., 0.1)]
    half = 4.3027 * 0.1 / math.sqrt(3)
    assert report.ratio(values) == f"0.5 [{0.5 * math.exp(-half):.3g}, {0.5 * math.exp(half):.3g}]"


def test_interval_covers_the_mean_as_often_as_it_says():
    import random
    draw = random.Random(0)
    held = sum(low <= 3 <= high for low, high in (
        report.interval([draw.gauss(3, 2) for _ in range(3)]) for _ in range(2000)))
    assert held / 2000 == pytest.approx(0.95, abs=0.02)


def test_rank_correlations():
    rows = report.rank_correlations({"a": [1, 2, 3, 10], "b": [2, 4, 6, 7], "c": [9, 3, 2, 1]})
    assert rows[0] == {"rank correlation": "a", "a": "1.00", "b": "1.00", "c": "-1.00"} and rows[2]["b"] == "-1.00"


def test_front_is_what_no_other_beats_in_both():
    assert report.front([(1, 5), (2, 4), (3, 6), (2, 2)], ideal=0) == [(2, 2), (3, 6)]
    # 1.4 is as far from 1 as 0.6, and further than 0.9.
    assert report.front([(1, 0.9), (2, 0.7), (3, 0.2), (2, 1.4), (0, 1.2)], ideal=1) == [(1, 0.9), (2, 0.7), (3, 0.2)]


def test_a_picture_is_written_by_one_process_as_a_whole(tmp_path, monkeypatch):
    report.save_picture(tmp_path / "a.png", [torch.zeros(2, 3, 8, 8)])
    before = (tmp_path / "a.png").read_bytes()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    report.save_picture(tmp_path / "a.png", [torch.ones(2, 3, 8, 8)])
    assert (tmp_path / "a.png").read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_tables_and_plots_are_written(tmp_path):
    text = report.write_tables(tmp_path, {"one": ([{"x": "é, b", "y": 1.23456}], "a note")}, [{"seed": 0}])
    assert "| é, b | 1.235 |" in text and "a note" in text and (tmp_path / "table.md").read_text() == text
    assert next(csv.DictReader((tmp_path / "one.csv").read_text().splitlines())) == {"x": "é, b", "y": "1.23456"}
    assert json.loads((tmp_path / "table.json").read_text())["runs"] == [{"seed": 0}]
    points = {"a": {"x": 1., "y": 2.}, "b": {"x": 2., "y": 1., "area": 10}}
    plot = report.draw_fronts(tmp_path / "plot.png", points, ("x", "X"), [("y", "Y", 1), ("y", "Z", 0)], ["c"])
    assert Image.open(plot).size == (1400, 600)
    plot = report.draw_curves(tmp_path / "curves.png", "X", {"Y": {"a": [(2, 4), (1, 3)]}})
    assert Image.open(plot).size == (450, 450)
    curves = {"a": [(1, 3, 2, 4), (10, 5, *2 * [math.nan])]}
    plot = report.draw_curves(tmp_path / "lengths.png", "X", {"Y": curves, "Z": curves}, log_ticks=[1, 10])
    assert Image.open(plot).size == (900, 450)


@pytest.mark.parametrize("values", [[0.5, 0.6, 0.65], [1e-6, 3e-6], [-2., 12.]])
def test_numbers_are_read_back_from_cells(values):
    assert report.numbers(report.difference(values)) == pytest.approx(
        [statistics.mean(values), *report.interval(values)], rel=5e-3)
    if min(values) > 0:
        assert report.numbers(report.ratio(values))[0] == pytest.approx(statistics.geometric_mean(values), rel=5e-3)
    value, *bounds = report.numbers(report.difference(values[:1]) + " †")
    assert value == values[0] and all(map(math.isnan, bounds))
    assert all(map(math.isnan, report.numbers(report.difference([math.nan]))))
