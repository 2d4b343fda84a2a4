"""lengths.py: what the tables of several comparisons become in one plot."""
import json

from PIL import Image

import lengths
from conftest import call
from harness import report


def compared(folder, name, epochs, value, losses=("mse", "l1"), **flags):
    """What compare.py leaves of a comparison that lengths.py reads."""
    path = folder / "models" / name
    run = (path.parent if path.name == "test" else path) / "mse-seed0"
    for made in (path, run):
        made.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text(json.dumps({"num_epochs": epochs, "minutes": None} | flags))
    rows = [{"loss": loss, "baseline": "mse"} | dict.fromkeys(lengths.PANELS.values(), value) for loss in losses]
    (path / "table.json").write_text(json.dumps({"runs": [{"loss": "mse", "seed": 0}], "against": rows}))


def test_a_plot_has_a_point_for_each_length(tmp_path, monkeypatch):
    compared(tmp_path, "four/test", 4, "0.7 [0.6, 0.85]")
    compared(tmp_path, "twelve", 12, "-0.001 [-0.002, +1e-05]")
    drawn = []
    real = report.draw_curves
    monkeypatch.setattr(report, "draw_curves",
                        lambda *args, ticks: drawn.append((args[2], ticks)) or real(*args, ticks=ticks))
    code, out, err = call(tmp_path, "lengths.py", "twelve", "models/four/test", "--output", "plot.png")
    assert code == 0 and out == "plot.png\n", err
    assert drawn == [({title: {"l1 beside mse": [(12, -0.001, -0.002, 1e-5), (4, 0.7, 0.6, 0.85)]}
                       for title in lengths.PANELS}, [4, 12])]
    assert Image.open(tmp_path / "plot.png").size[0] > 1000


def test_one_seed_has_no_interval(tmp_path):
    compared(tmp_path, "four", 4, "+0.5 (one seed)")
    code, _, err = call(tmp_path, "lengths.py", "four")
    assert code == 0 and not err and (tmp_path / "lengths.png").exists()
    value, low, high = lengths.numbers("+0.5 (one seed)")
    assert value == 0.5 and low != low and high != high
    assert lengths.numbers("0.5 [0.4, 0.6] †") == [0.5, 0.4, 0.6]


def test_bad_input_is_one_line(tmp_path):
    compared(tmp_path, "minutes", 100, "1 [1, 1]", minutes=5.)
    compared(tmp_path, "alone", 4, "1 [1, 1]", losses=["mse"])
    compared(tmp_path, "other", 4, "1 [1, 1]")
    (tmp_path / "models" / "other" / "table.json").write_text("{}")
    for name, words in (("minutes", "for minutes"), ("alone", "nothing but a baseline"), ("other", "does not hold all"),
                        ("none", "none/table.json")):
        code, _, err = call(tmp_path, "lengths.py", name)
        assert code == 2 and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "lengths.png").exists()
