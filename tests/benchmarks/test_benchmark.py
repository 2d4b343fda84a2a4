"""benchmark.py: how it measures, and that what it compares computes the same."""
import json

import pytest
import torch
from conftest import call
from PIL import Image

import experiment
from benchmarks import benchmark, gpu_day, steps, streams
from harness.device import keep_freed_memory
from modules import GatedPixelCNN, VectorQuantizedVAE


def test_medians_of_calls_in_turn(monkeypatch):
    calls, clock = [], [0.]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def take(label, *seconds):
        durations = iter(seconds)

        def call():
            calls.append(label)
            clock[0] += next(durations)
        return call
    seconds = benchmark.alternate({"slow": take("slow", 9, 4, 1, 2), "share": (take("share", 9, 2, 3, 4), 10)}, 3)
    assert calls == ["slow", "share"] * 4  # once to warm up
    assert seconds == {"slow": 2, "share": 30}


@pytest.mark.skipif(benchmark.extra_memory_mb(lambda: None, torch.device("cpu")) is None, reason="needs Linux")
def test_memory_is_what_a_call_holds_at_once():
    keep_freed_memory()  # as in every script

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
    monkeypatch.setattr(streams, "IMAGES", 8)
    code, out, err = call(tmp_path, "benchmarks/benchmark.py", "folder", "stream-128", "ssim-32", "--repeats", "1")
    assert code == 0 and "times as fast" in out and "first epoch" in out, err
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    row = results["stream-128"]["a worker of datasets.py"]
    assert row["images_per_s"] == pytest.approx(8000 / row["ms"])
    assert (row["workers"] - 1) * row["images_per_s"] < 10_000 <= row["workers"] * row["images_per_s"]
    assert set(results) == {"folder", "stream-128", "ssim-32"}
    assert results["folder"]["datasets.py, later epochs"]["speed_ratio"] > 0
    code, _, err = call(tmp_path, "benchmarks/benchmark.py", "speed")
    assert code == 2 and "no such subject: speed" in err


def test_later_epochs_of_a_folder_open_no_file(monkeypatch):
    monkeypatch.setattr(benchmark, "FILES", 64)
    first, later = list(benchmark.folder(torch.device("cpu")).values())[1:]
    opened, real = [], Image.open
    monkeypatch.setattr(Image, "open", lambda *args: opened.append(args) or real(*args))
    first()
    decoded = len(opened)
    later()
    assert decoded >= 64 and len(opened) == decoded


# --- the day of a GPU

@pytest.mark.parametrize("seconds", [1e9, -1.])
def test_a_part_that_fails_or_comes_too_late_is_reported_and_the_rest_goes_on(tmp_path, monkeypatch, seconds):
    def bad(device, small):
        yield {"found": "so far"}
        assert "so far" in (tmp_path / "gpu_day.json").read_text()
        raise RuntimeError("no kernel")
    monkeypatch.setattr(gpu_day, "ALL_SECONDS", seconds)
    monkeypatch.setattr(steps, "PRODUCT", steps.PRODUCT)  # which a dry run sets
    monkeypatch.setattr(gpu_day, "PARTS", {"bad": bad, "exactness": gpu_day.exactness})
    code, out, err = call(tmp_path, "benchmarks/gpu_day.py", "--device", "cpu", "--dry-run")
    assert code == 0, err
    found = json.loads((tmp_path / "gpu_day.json").read_text())
    assert ("no kernel" in found["failed"]["bad"]) == ("exactness" in found) == ("bad" in found) == (seconds > 0)
    assert ("run --parts exactness" in (tmp_path / "gpu_day.md").read_text()) == (seconds < 0)
    timed = gpu_day.timed({"good": lambda: None, "bad": lambda: next(iter(()))}, torch.device("cpu"))
    assert (timed["good"] is not None) == (seconds > 0) and timed["bad"] is None


# --- steps of training

def test_our_step_is_that_of_the_flags():
    args = steps.flags_of("--recipe", "recommended", "--hidden-size", 8)
    assert args.lr == 2e-3 and args.quantizer == "ema" and args.hidden_size == 8
    model = VectorQuantizedVAE(**experiment.model_args_of(args, 3))
    assert experiment.build_optimizer(args, model).defaults["betas"] == experiment.ADAM_BETAS
    step = steps.Training(steps.noise(4, 16, "cpu"), "--hidden-size", 8, "--k", 16)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    step()
    changed = {name for name, value in step.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"codebook.embedding.weight", "encoder.0.weight", "decoder.3.weight", "codebook.initialised"} <= changed


def test_throughput_counts_images_and_operations(monkeypatch):
    monkeypatch.setattr(steps, "STEPS_A_CALL", 2)
    monkeypatch.setattr(steps, "PRODUCT", 64)
    flags = ("--hidden-size", "8", "--k", "16", "--downsample", "8")
    callables = steps.throughput(16, 4, *flags)(torch.device("cpu"))
    assert len(callables) == 4 and sum("--compile" in label for label in callables) == 1
    rows = benchmark.measure({label: call for label, call in callables.items() if "--compile" not in label}, 1,
                             torch.device("cpu"))
    for row in rows.values():
        assert row["images_per_s"] == pytest.approx(4 / (row["ms"] / 1000)) and row["peak_share"] > 0
    # Multiplications and additions of one convolution forward, and as many again for the gradient of its weights.
    first = 2 * 3 * 8 * 16 * (4 * 8 * 8)
    last = next(iter(callables.values()))[0].flops
    assert 2 * first < last < 200 * first


def test_a_single_step_has_a_time_and_no_throughput():
    cpu = torch.device("cpu")
    step = steps.Training(steps.noise(4, 8, cpu), "--hidden-size", 4, "--k", 8)
    (row,) = benchmark.measure({"step": step}, 1, cpu).values()
    assert row["ms"] > 0 and "images_per_s" not in row


def test_a_call_that_finds_no_memory_is_left_out(capsys):
    def greedy():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert not benchmark.fits("large", (greedy, 0.1)) and "left out: large" in capsys.readouterr().out
    assert benchmark.fits("small", lambda: None)
