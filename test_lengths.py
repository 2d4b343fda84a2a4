"""lengths.py: what the tables of several comparisons become in one plot."""
import json

import pytest
from PIL import Image

import lengths
from conftest import call
from harness import report


def compared(folder, name, epochs, value, **flags):
    """What compare.py leaves of a comparison that lengths.py reads."""
    run = folder / "models" / name / "mse-seed0"
    run.mkdir(parents=True)
    (run / "args.json").write_text(json.dumps({"num_epochs": epochs, "minutes": None} | flags))
    rows = [{"loss": loss, "baseline": "mse"} | dict.fromkeys(lengths.PANELS, value) for loss in ("mse", "l1")]
    (run.parent / "table.json").write_text(json.dumps({"runs": [{"loss": "mse", "seed": 0}], "against": rows}))


def test_a_plot_has_a_point_for_each_length(tmp_path, monkeypatch):
    compared(tmp_path, "deep/four", 4, "0.7 [0.6, 0.85]")
    compared(tmp_path, "twelve", 12, "-0.001 (one seed)")
    drawn = []
    real = report.draw_intervals
    monkeypatch.setattr(report, "draw_intervals", lambda *args: drawn.append(args[1]) or real(*args))
    code, out, err = call(tmp_path, "lengths.py", "twelve", "models/deep/four", "--output", "plot.png")
    assert code == 0 and out == "plot.png\n", err
    assert drawn == [{panel: {"l1 beside mse": [(12, -0.001, -0.001, -0.001), (4, 0.7, 0.6, 0.85)]}
                      for panel in lengths.PANELS}]
    assert Image.open(tmp_path / "plot.png").size[0] > 1000


@pytest.mark.parametrize("text, expected", [("+1e-05 [-2.5e-05, +4.5e-05]", [1e-5, -2.5e-5, 4.5e-5]),
                                            ("0.5 [0.4, 0.6] †", [0.5, 0.4, 0.6]), ("+0 (one seed)", [0, 0, 0])])
def test_numbers_of_a_cell(text, expected):
    assert lengths.numbers(text) == expected


def test_bad_input_is_one_line(tmp_path):
    compared(tmp_path, "minutes", 100, "1 [1, 1]", minutes=5.)
    compared(tmp_path, "other", 4, "1 [1, 1]")
    (tmp_path / "models" / "other" / "table.json").write_text("{}")
    for name, words in (("minutes", "for minutes"), ("other", "does not hold all"), ("none", "none/table.json")):
        code, _, err = call(tmp_path, "lengths.py", name)
        assert code == 2 and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "lengths.png").exists()
