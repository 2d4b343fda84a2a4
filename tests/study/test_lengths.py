"""lengths.py: what the tables of several comparisons become in one plot."""
import json

import pytest
from conftest import call
from PIL import Image

from harness import report
from study import estimates, lengths, tables
from study.runs import Sweep


def compared(folder, name, epochs, values, losses=({"mse": 1.}, {"l1": 1.}), judge="x", **flags):
    """What compare.py leaves of a comparison that lengths.py reads: every figure of l1 is values, by seed, of mse 1."""
    path = folder / "models" / name
    run = (path.parent if path.name == "test" else path) / "mse-seed0"
    for made in (path, run):
        made.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text(json.dumps({"num_epochs": epochs, "minutes": None, "k": 8} | flags))
    sweep, judged = Sweep(list(losses), [{"mse": 1.}], [""], len(values)), [f"frechet_distance/{judge}"]
    figures = {(loss, seed): dict.fromkeys([*tables.DIFFERENCES, *judged], value if loss == "l1" else 1.) | {
        "trained_through": None} for loss in sweep.mixes for seed, value in enumerate(values)}
    rows = tables.against_baselines(sweep, figures, dict.fromkeys(figures, {}), judged)
    estimates.write_tables(path, {"against": (rows, "")}, [{"loss": loss, "seed": seed} for loss, seed in figures])


def test_a_plot_has_a_point_for_each_length(tmp_path, monkeypatch):
    compared(tmp_path, "four/test", 4, [0.5, 0.6], lr=4e-3, made_with={"torch": "2.6"})
    compared(tmp_path, "deep/twelve", 12, [0.75], lr=2e-3, made_with={"torch": "2.11"})
    drawn, real = [], report.draw_curves
    monkeypatch.setattr(report, "draw_curves", lambda *args, **how: drawn.append((args[2], how)) or real(*args, **how))
    code, out, err = call(tmp_path, "study/lengths.py", "deep/twelve", "models/four/test", "--output", "plot.png")
    assert code == 0 and out == "plot.png\n" and not err, err
    (panels, how), = drawn
    assert how == {"log_ticks": [4, 12]} and set(panels) == set(lengths.PANELS)
    for title, values in zip(lengths.PANELS, ((0.3 ** 0.5, 0.75), (-0.45, -0.25), (-0.45, -0.25))):
        (name, ((_, one, low, high), (_, mean, *interval))), = panels[title].items()
        assert name == "l1 against mse" and one == values[1] and low != low and high != high
        assert mean == pytest.approx(values[0], rel=1e-9) and interval[0] < mean < interval[1]
    assert Image.open(tmp_path / "plot.png").size[0] > 1000


def test_lengths_may_be_minutes(tmp_path, monkeypatch):
    for minutes in (20., 60.):
        compared(tmp_path, f"minutes-{minutes:g}", 100, [0.5], judge="classifier", minutes=minutes)
    drawn = []
    monkeypatch.setattr(report, "draw_curves", lambda path, label, panels, **how: drawn.append((label, panels, how)))
    assert call(tmp_path, "study/lengths.py", "minutes-20", "minutes-60")[0] == 0
    (label, panels, how), = drawn
    assert label == "minutes of training" and how == {"log_ticks": [20., 60.]}
    assert set(panels) == set(lengths.PANELS | lengths.OF_CLASSIFIER)
    assert all([x for x, *_ in points] == [20., 60.] for curves in panels.values() for points in curves.values())


def test_bad_input_is_one_line(tmp_path):
    compared(tmp_path, "minutes", 100, [1., 1.], minutes=5.)
    compared(tmp_path, "alone", 4, [1.], losses=[{"mse": 1.}])
    for name, flags in (("four", {}), ("again", {}), ("other", {"k": 16}), ("cut", {})):
        compared(tmp_path, name, 12 if name == "other" else 4, [1., 1.], **flags)
    (tmp_path / "models" / "cut" / "table.json").write_text("{}")
    compared(tmp_path, "none", 0, [1., 1.])
    compared(tmp_path, "judged", 8, [1., 1.], judge="y")
    for name, values in (("damaged", {"mean": "x"}), ("old", "+0 [+0, +0]"),
                         ("turned", {"mean": 1, "low": 2, "high": 0})):
        compared(tmp_path, name, 4, [1., 1.])
        table = json.loads((tmp_path / "models" / name / "table.json").read_text())
        table["against"][1]["psnr - baseline"] = values
        (tmp_path / "models" / name / "table.json").write_text(json.dumps(table))
    for names, words in (("four minutes", "share no axis"), ("minutes minutes", "both of 5 minutes"),
                         ("alone", "with itself"), ("cut", "does not hold all"),
                         ("damaged", "does not hold all"), ("old", "does not hold all"),
                         ("turned", "lies outside 2.0 to 0.0"), ("none", "its num_epochs is 0"),
                         ("missing", "missing/table.json"), ("four again", "both of 4 epochs"),
                         ("four other", "another k"), ("four judged", "their means do not compare")):
        code, _, err = call(tmp_path, "study/lengths.py", *names.split())
        assert code == 2 and words in err and err.count("\n") == 1, err
    assert not (tmp_path / "lengths.png").exists()


@pytest.mark.parametrize("content", [b"", b"weights", b"PK\x03\x04", None])
def test_a_file_that_is_no_picture_is_never_replaced(tmp_path, content):
    compared(tmp_path, "four", 4, [1., 1.])
    path = tmp_path / "best.pt"
    path.mkdir() if content is None else path.write_bytes(content)
    code, _, err = call(tmp_path, "study/lengths.py", "four", "--output", "best.pt")
    assert code == 2 and "best.pt is no PNG file and would be replaced" in err and err.count("\n") == 1
    assert path.is_dir() if content is None else path.read_bytes() == content
    for _ in range(2):  # a picture is
        assert call(tmp_path, "study/lengths.py", "four", "--output", "plot.png")[0] == 0
