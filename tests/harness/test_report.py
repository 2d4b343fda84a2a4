"""Tables that fit a line, pictures with labels, plots."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

from harness import distributed, report


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


def test_a_table_fits_a_line_and_its_rows_keep_their_names():
    text = report.markdown_table(["model", *(f"figure {i}" for i in range(9))],
                                 [["a|b\nc", *9 * [0.123456]], ["d", *9 * ["25.31 [25.12, 25.55]"]]])
    parts = [part.splitlines() for part in text.split("\n\n")]
    assert len(parts) == 3 and max(map(len, text.splitlines())) <= 120
    for header, _, *rows in parts:
        assert header.startswith("| model ") and [row.split(" | ")[0] for row in rows] == ["| a\\|b c", "| d     "]
    shown = [cell.strip() for header, *_ in parts for cell in header.strip("| ").split("|")[1:]]
    assert shown == [f"figure {i}" for i in range(9)] and text.count("0.1235") == 9
    wide = report.markdown_table(["x", "y"], [["r" * 200, "s" * 200]])
    assert len(wide.splitlines()) == 3  # a table has two columns, however wide they are


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"])
def test_a_name_of_several_lines_is_a_row_all_the_same(end):
    table = report.markdown_table(["model", "psnr"], [[f"a{end}b|c", 1.]])
    lines = table.splitlines()
    assert len(lines) == 3 and "a b\\|c" in lines[2]


def test_labels_stand_above_their_rows_and_small_images_are_enlarged(tmp_path):
    rows = report.with_middles({"original": torch.rand(3, 3, 32, 32), "a name: \udcff é": torch.rand(3, 3, 32, 32)})
    assert [label.partition(", ")[2] for label in rows] == ["", "", *2 * ["middle enlarged"]]
    middle = rows["original, middle enlarged"]
    assert middle.shape == (3, 3, 32, 32) and torch.equal(middle[:, :, ::2, 1::2], rows["original"][:, :, 8:24, 8:24])
    picture = np.array(Image.open(report.save_picture(tmp_path / "a.png", rows)))
    plain = np.array(Image.open(report.save_picture(tmp_path / "b.png", [rows["original"]])))
    height, width, _ = plain.shape
    assert height >= 96 and picture.shape[1] == width and picture.shape[0] == 4 * (height + report.LABEL_SIZE + 6)
    strip = picture[:report.LABEL_SIZE + 6]
    assert strip.min() < 100 and strip.max() == 255  # black on white
    np.testing.assert_array_equal(picture[len(strip):len(strip) + height], plain)


def test_plots_are_written(tmp_path):
    points = {"a": {"x": 1., "y": 2.}, "b": {"x": 2., "y": 1., "area": 10}}
    plot = report.draw_fronts(tmp_path / "plot.png", points, ("x", "X"), [("y", "Y", 1), ("y", "Z", 0)], ["c"])
    assert Image.open(plot).size == (1400, 600)
    plot = report.draw_curves(tmp_path / "curves.png", "X", {"Y": {"a": [(2, 4), (1, 3)]}})
    assert Image.open(plot).size == (450, 450)
    curves = {"a": [(1, 3, 2, 4), (10, 5, *2 * [math.nan])]}
    plot = report.draw_curves(tmp_path / "lengths.png", "X", {"Y": curves, "Z": curves}, log_ticks=[1, 10])
    assert Image.open(plot).size == (900, 450)
