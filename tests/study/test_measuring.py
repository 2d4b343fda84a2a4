"""What is measured of the runs of a comparison."""
import pytest
import torch

from harness import checkpoint
from harness.batches import Batches
from harness.errors import UserError
from losses import TERMS
from study import measuring


def test_gradient_cosines_are_those_of_the_pixel_terms():
    # d mse ~ x_tilde - x, d l1 ~ its sign: at x = 0 and x_tilde = v, cos = sum |v| / sqrt(n sum v^2).
    v = torch.rand(4, 3, 24, 24) * 0.8 + 0.1
    batches = Batches(torch.zeros(4, 24, 24, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), 4)
    rows = measuring.gradient_cosines(lambda x: (x + v,), batches)
    flat = v.flatten(1)
    expected = (flat.sum(1) / (flat.shape[1] * flat.square().sum(1)).sqrt()).mean()
    assert rows[0]["l1"] == pytest.approx(float(expected), abs=0.006) and rows[1]["l1"] == 1
    assert [row["cosine"] for row in rows] == list(rows[0])[1:] == list(TERMS)


def test_terms_that_do_not_take_the_images_say_why_and_a_bug_is_none_of_them(monkeypatch):
    names, refused = measuring.terms_for(torch.zeros(1, 1, 16, 16))
    assert "ms-ssim" not in names and "more than 20 pixels" in refused["ms-ssim"] and "3 channels" in refused["chroma"]
    assert {*names, *refused} == set(TERMS) and {"mse", "ssim"} <= set(names)

    def buggy(x_tilde, x):
        raise kind("mine")
    monkeypatch.setitem(TERMS, "toy", buggy)
    for kind in (ValueError, IndexError):
        with pytest.raises(kind, match="mine"):
            measuring.terms_for(torch.zeros(1, 3, 32, 32))
    kind = UserError
    assert measuring.terms_for(torch.zeros(1, 3, 32, 32))[1]["toy"] == "mine"


@pytest.mark.parametrize("change", [
    {"figures": None}, {"figures": {}}, {"figures": {"psnr": "x"}}, {"figures": [1]}, {"key": None},
    {"by_image": {"psnr": [1.]}}, {"by_image": {}}, {"by_image": {"psnr": torch.zeros(2), "ssim": torch.zeros(3)}}])
def test_figures_that_were_kept_and_changed_are_one_line(tmp_path, change):
    whole = {"key": {"figures": ["psnr", "lpips"]}, "by_image": {"psnr": torch.zeros(2)}, "figures": dict.fromkeys(
        ("psnr", "ms_per_step", "peak_memory_mb", "train_seconds"), 1.) | {"terms": {}, "trained_through": None}}
    path = tmp_path / "kept.pt"
    checkpoint.save(path, "figures", whole)
    assert measuring._read(path, whole["key"])["figures"]["psnr"] == 1 and measuring._read(path, {"version": 0}) is None
    if change.get("figures") == {"psnr": "x"}:
        change = {"figures": whole["figures"] | change["figures"]}
    checkpoint.save(path, "figures", whole | change)
    with pytest.raises(UserError, match="kept.pt is damaged: delete it, and the run is measured again"):
        measuring._read(path, whole["key"])


@pytest.mark.parametrize("change", [
    {"figures": {"terms": {"mse": 1.}}}, {"figures": {"psnr": 1., "terms": {}}},
    {"by_image": {"psnr": torch.zeros(2)}}])
def test_runs_that_keep_other_figures_or_images_are_not_compared(change):
    kept = {"figures": {"psnr": 1., "terms": {"mse": 1.}}, "by_image": {"psnr": torch.zeros(3)}}
    measuring._check_alike({"a.pt": kept, "b.pt": kept})
    with pytest.raises(UserError, match="a.pt and c.pt keep other figures"):
        measuring._check_alike({"a.pt": kept, "b.pt": kept, "c.pt": kept | change})


def test_figures_that_lack_a_metric_of_their_key_are_no_figures():
    kept = {"key": {"figures": ["psnr", "ssim", "of a term"]}, "figures": {"psnr": 1.}}
    assert not measuring._has_all(kept) and measuring._has_all(kept | {"figures": {"psnr": 1., "ssim": 1.}})
