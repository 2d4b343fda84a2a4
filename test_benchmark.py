"""benchmark.py: how it measures, and that what it compares computes the same."""
import json
import time

import pytest
import torch

import benchmark
from conftest import call
from modules import GatedPixelCNN


def test_medians_of_calls_in_turn():
    calls = []

    def wait(label, seconds):
        return lambda: (calls.append(label), time.sleep(seconds))
    seconds = benchmark.alternate({"slow": wait("slow", 0.02), "share": (wait("share", 0.005), 10)}, repeats=3)
    assert calls == ["slow", "share"] * 4  # once to warm up
    assert 0.02 <= seconds["slow"] < 0.04 and 0.05 <= seconds["share"] < 0.1


@pytest.mark.skipif(benchmark.extra_memory_mb(lambda: None, torch.device("cpu")) is None, reason="needs Linux")
def test_memory_is_what_a_call_holds_at_once():
    def hold(megabytes):
        return lambda: torch.ones(megabytes, 2 ** 18).sum()  # float32
    assert benchmark.extra_memory_mb(hold(300), torch.device("cpu")) == pytest.approx(300, rel=0.1)
    assert benchmark.extra_memory_mb(lambda: [hold(50)() for _ in range(4)], torch.device("cpu")) < 100


def test_references_compute_what_we_compute(monkeypatch):
    torch.manual_seed(0)
    for name, count, codes in (("vq-512x64", 300, 16), ("vq-16384x64", 100, 64)):
        callables = list(benchmark._search(count, codes, 8)(torch.device("cpu")).values())
        assert torch.equal(callables[0](), callables[1]()), name
    for side, name in ((32, "ssim"), (176, "ms-ssim")):
        theirs, *others = (call()[0] for call in benchmark._similarity(name, 2, side)(torch.device("cpu")).values())
        for gradient in others:
            torch.testing.assert_close(gradient, theirs, atol=1e-7, rtol=1e-3)
    model = GatedPixelCNN(16, 8, 3).eval()
    latents, label = torch.randint(16, (2, 5, 6)), torch.tensor([3, 7])
    torch.testing.assert_close(benchmark._plain_logits(model, latents, label), model(latents, label))


def test_the_command_line_prints_and_keeps_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "FILES", 64)
    code, out, err = call(tmp_path, "benchmark.py", "folder", "ssim-32", "--repeats", "1")
    assert code == 0 and "times as fast" in out and "first epoch" in out, err
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert set(results) == {"folder", "ssim-32"} and results["folder"]["datasets.py, later epochs"]["speed_ratio"] > 1
    code, _, err = call(tmp_path, "benchmark.py", "speed")
    assert code == 2 and "no such subject: speed" in err
