"""What tables say of made-up figures."""
import math

import pytest
import torch

from study import tables
from study.runs import Sweep

NETWORKS = ("effnet-lite0", "classifier")
JUDGED = ["paired_distance/effnet-lite0", "kernel_distance/effnet-lite0", "frechet_distance/effnet-lite0",
          "frechet_distance/classifier"]


def figures_of(value, trained_through=None, **more):
    """Every figure is value, those of judges that are no part of their mean 1."""
    named = dict.fromkeys([*tables.DIFFERENCES, *JUDGED], value)
    return named | {"kernel_distance/classifier": 1., "sliced_wasserstein/effnet-lite0": 1.} | more | {
        "trained_through": trained_through}


def test_the_mean_of_judges_is_the_geometric_mean_of_the_distances_that_were_measured():
    ours = figures_of(1.) | dict(zip(JUDGED, (0.5, 0.25, 2., 1.)))
    theirs = figures_of(2.)
    assert tables.judged_keys(NETWORKS, [ours, theirs]) == JUDGED
    assert tables.mean_ratio(ours, theirs, JUDGED) == pytest.approx((0.25 * 0.125 * 1 * 0.5) ** 0.25)
    assert tables.judged_keys(["classifier"], [ours]) == JUDGED[3:]
    # A kernel distance below 0 has no ratio, and a network without pairs no paired distance.
    unbiased = figures_of(1., **{JUDGED[1]: -0.1})
    assert tables.judged_keys(NETWORKS, [ours, unbiased]) == [JUDGED[0], *JUDGED[2:]]
    assert tables.judged_keys(["inception"], [{"frechet_distance/inception": 3.}]) == ["frechet_distance/inception"]


def test_a_mix_is_compared_with_the_baseline_by_seed_and_by_image():
    sweep = Sweep([{"l1": 1.}], [{"mse": 1.}], [""], 2)
    figures = {("mse", 0): figures_of(1.), ("mse", 1): figures_of(2.), ("l1", 0): figures_of(0.5, "effnet-lite0"),
               ("l1", 1): figures_of(0.5, "effnet-lite0")}
    by_image = {key: {name: torch.full((9,), figures[key][name]) for name in ("psnr", JUDGED[0])} for key in figures}
    baseline, mix = tables.against_baselines(sweep, figures, by_image, JUDGED)
    assert mix["loss"] == "l1" and mix["baseline"] == baseline["baseline"] == "mse"
    assert mix["psnr - baseline"].mean == -1 and mix["psnr - baseline"].images == (-1, -1)  # of 0.5 and of 1.5
    assert mix["ssim - baseline"].mean == -1 and mix["ssim - baseline"].images is None
    for key in JUDGED:
        assert mix[f"{key} / baseline"].mean == pytest.approx(math.sqrt(0.5 * 0.25))
        assert ("†" in str(mix[f"{key} / baseline"])) == (key != JUDGED[3])
    assert mix[f"{JUDGED[0]} / baseline"].images == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert mix[tables.MEAN_OF_JUDGES].mean == pytest.approx(math.sqrt(0.5 * 0.25)) and "†" in str(
        mix[tables.MEAN_OF_JUDGES])
    assert baseline[tables.MEAN_OF_JUDGES].mean == 1 and "†" not in str(baseline[tables.MEAN_OF_JUDGES])
    assert tables.MEAN_OF_JUDGES not in tables.against_baselines(sweep, figures, by_image, [])[0]
    of_report = tables.against_baselines(sweep, figures, by_image, JUDGED, of_report=True)
    assert [row["report FID / mse"] for row in of_report] == [1, ""]


def test_delta_rates_are_those_of_the_curves():
    sweep = Sweep([{"l1": 1.}], [{"mse": 1.}], ["k=4", "k=16", "k=64"], 2)
    figures = {}
    for seed in sweep.seeds:
        for bits, rate in enumerate(sweep.rates, 1):  # quality b at rate b: 90% of the bits, and one unit of distance
            figures[f"mse,{rate}", seed] = {"bits_per_pixel": bits, "psnr": 20 + bits, "ssim": bits / 9,
                                            "saturation_ratio": bits / 3, "d": 1 / bits}
            figures[f"l1,{rate}", seed] = figures[f"mse,{rate}", seed] | {"bits_per_pixel": (0.9 - seed / 10) * bits,
                                                                          "ssim": 2 + bits}
    row = tables.delta_rates(sweep, figures, ["d"])[1]
    half = 12.706 * 5  # Student's t at one degree of freedom, of -10 and -20
    for key in ("psnr", "saturation_ratio", "d"):
        saved = row[f"% bits at equal {key}"].numbers()
        assert row["loss"] == "l1" and saved["n"] == 2
        assert [saved["mean"], saved["low"], saved["high"]] == pytest.approx([-15, -15 - half, -15 + half], rel=1e-3)
    assert "do not overlap" in str(row["% bits at equal ssim"])


def test_a_ratio_to_a_baseline_that_was_trained_through_a_judge_is_marked():
    sweep = Sweep([{"l1": 1.}], [{"mse": 1.}], [""], 1)
    figures = {("mse", 0): figures_of(1., "effnet-lite0"), ("l1", 0): figures_of(0.5)}
    mix = tables.against_baselines(sweep, figures, dict.fromkeys(figures, {}), JUDGED)[1]
    assert [key for key in JUDGED if "†" in str(mix[f"{key} / baseline"])] == JUDGED[:3]
    assert "†" in str(mix[tables.MEAN_OF_JUDGES]) and "†" not in str(mix["psnr - baseline"])
