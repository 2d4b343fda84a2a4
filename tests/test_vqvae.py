"""The training script through its real command line: what it writes, how it goes on, and what it says of bad input."""
import json
import signal

import pytest
import torch
from conftest import call, start, stop_after, write_images
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import datasets
from harness import checkpoint, cli
from losses import TERMS

SMALL = ["--dataset", "folder", "--data-folder", "images", "--hidden-size", "8", "--k", "16", "--batch-size", "8",
         "--lr", "1e-3", "--log-every", "2", "--device", "cpu", "--flip"]


@pytest.fixture
def folder(tmp_path):
    """A working directory with a folder of 60 images 16x16, of two colours each."""
    write_images(tmp_path, 60)
    return tmp_path


def run(folder, *flags, **environment):
    return call(folder, "vqvae.py", *SMALL, *flags, **environment)


def weights(folder, name="last.pt", run="vqvae"):
    return checkpoint.load(folder / "models" / run / name, "vqvae")


def equal(one, two):
    """Whether two checkpoints hold the same, time aside."""
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one if key != "seconds")
    if isinstance(one, list):
        return len(one) == len(two) and all(map(equal, one, two))
    return torch.equal(one, two) if torch.is_tensor(one) else one == two


def test_a_bug_in_a_loss_term_keeps_its_traceback(folder, monkeypatch):
    def term_with_a_bug(x_tilde, x):
        return x_tilde.view(3, -1).mean()[int("one")]
    monkeypatch.setitem(TERMS, "mse", term_with_a_bug)
    with pytest.raises((ValueError, RuntimeError)) as error:
        run(folder)
    assert error.traceback[-1].name == "term_with_a_bug"


@pytest.mark.parametrize("error", [ValueError, KeyError, TypeError, AssertionError, RuntimeError])
def test_only_what_a_user_can_mend_loses_its_traceback(error, capsys):
    def main():
        raise error("a bug")
    with pytest.raises(error):
        cli.run(main)
    assert capsys.readouterr().err == ""


def test_a_negative_weight_is_one_line(folder):
    code, _, err = run(folder, "--ssim-weight", "-1")
    assert code == 2 and len(err.splitlines()) == 1 and "--ssim-weight" in err


def test_a_run_leaves_its_table_picture_curves_and_checkpoints(folder):
    code, out, err = run(folder, "--num-epochs", "2", "--mse-weight", "1", "--ssim-weight", "0.5")
    assert code == 0, err
    models = folder / "models" / "vqvae"
    results, args = (json.loads((models / name).read_text()) for name in ("results.json", "args.json"))
    assert all(name in out for name in ("psnr", "ssim", "gradient_ratio", "perplexity", "tensorboard --logdir"))
    assert results["steps"] == 12 and results["epochs"] == 2 and 5 < results["psnr"] < 40
    assert results["ms_per_step"] > 0 and results["peak_memory_mb"] > 0 and args["ssim_weight"] == 0.5
    assert Image.open(models / "reconstructions.png").size[1] > 2 * 96

    events = EventAccumulator(str(folder / "logs" / "vqvae"), size_guidance={"images": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss/train/reconstruction", "loss/train/quantization", "loss/test/reconstruction",
            "loss/test/quantization", "loss/valid/reconstruction", "valid/mse"} <= tags
    assert {f"term/{term}/{kind}" for term in ("mse", "ssim") for kind in ("raw", "weighted", "gradient_norm")} <= tags
    assert sorted(tags)[:3] == ["1_valid/gradient_ratio", "1_valid/psnr", "1_valid/ssim"]  # TensorBoard sorts so, too
    assert set(events.Tags()["images"]) == {"original_above_reconstruction"}
    picture = events.Images("original_above_reconstruction")[-1]
    assert (picture.height, picture.width) == (2 * 100 + 4, 6 * 100 + 4)  # 6 of 16x16, each enlarged sixfold
    raw, weighted = (events.Scalars(f"term/ssim/{kind}")[-1].value for kind in ("raw", "weighted"))
    assert weighted == pytest.approx(0.5 * raw, rel=1e-5)
    best = weights(folder, "best.pt")
    assert best["data"]["size"] == [16, 16] and best["loss"]["weights"] == {"mse": 1., "ssim": 0.5}


def test_training_learns(folder):
    code, out, err = run(folder, "--num-epochs", "40", "--precision", "fp32", "--beta", "0.25")
    assert code == 0, err
    psnr = [float(line.split("psnr ")[1].split()[0]) for line in out.splitlines() if line.startswith("epoch")]
    assert len(psnr) == 40 and max(psnr) > psnr[0] + 1


@pytest.mark.parametrize("term", TERMS)
def test_every_term_trains_alone(folder, term):
    size = "24" if term in ("ms-ssim", "nlpd") else "16"
    flags = ("--mse-weight", "0", f"--{term}-weight", "1", "--image-size", size, "--num-epochs", "1")
    code, out, err = run(folder, *flags)
    assert code == 0, err
    assert weights(folder)["loss"]["weights"] == {term: 1.}
    assert ("2 scales" in out) == (term == "ms-ssim")


def test_sharpen_changes_the_loss_and_no_metric(folder):
    results = {}
    for amount in ("0", "2"):
        code, _, err = run(folder, "--lr", "1e-12", "--num-epochs", "1", "--output-folder", amount, "--sharpen", amount,
                           "--ssim-weight", "1")
        assert code == 0, err
        assert weights(folder, run=amount)["loss"]["sharpen"] == float(amount)
        results[amount] = json.loads((folder / "models" / amount / "results.json").read_text())
    assert results["2"]["psnr"] == pytest.approx(results["0"]["psnr"], abs=1e-3)
    assert results["2"]["loss"] > results["0"]["loss"] + 0.001


@pytest.mark.parametrize("flags", [
    ("--quantizer", "gradient", "--precision", "fp32"), ("--ssim-weight", "1", "--balance", "gradient")])
def test_killed_and_resumed_is_bit_for_bit_uninterrupted(folder, flags):
    flags = (*flags, "--num-epochs", "6", "--seed", "3")
    assert run(folder, *flags, "--output-folder", "whole")[0] == 0

    stop_after(start(folder, "vqvae.py", *SMALL, *flags, "--output-folder", "cut"), "epoch 2/", signal.SIGKILL)
    assert 1 <= weights(folder, run="cut")["counters"]["epoch"] < 6
    code, out, err = run(folder, *flags, "--output-folder", "cut", "--resume")
    assert code == 0 and "resuming" in out, err
    for name in ("last.pt", "best.pt"):
        one, two = (weights(folder, name, run) for run in ("whole", "cut"))
        assert equal(*({name: value for name, value in contents.items()
                        if name not in ("args", "command", "path", "run")} for contents in (one, two)))
    one, two = (json.loads((folder / "models" / run / "results.json").read_text()) for run in ("whole", "cut"))
    assert one["psnr"] == two["psnr"] and one["perplexity"] == two["perplexity"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_epoch_saves_there_and_resumes_to_the_same(folder, number):
    flags = ("--num-epochs", "60", "--precision", "fp32")
    process = start(folder, "vqvae.py", *SMALL, *flags, "--output-folder", "cut")
    _, err = stop_after(process, "epoch 3/", number)
    assert process.returncode == 128 + number and "go on with --resume" in err and "Traceback" not in err
    counters = weights(folder, run="cut")["counters"]
    assert counters["step"] == counters["epoch"] * 6 + counters["batch"] < 360
    assert run(folder, *flags, "--output-folder", "cut", "--resume")[0] == 0
    assert run(folder, *flags, "--output-folder", "whole")[0] == 0
    assert equal(weights(folder, run="cut")["model"], weights(folder, run="whole")["model"])


def test_a_finished_run_is_refused_resumed_or_overwritten(folder):
    assert run(folder, "--num-epochs", "1")[0] == 0
    before = weights(folder)
    code, _, err = run(folder, "--num-epochs", "1")
    assert code != 0 and "--resume" in err and "--overwrite" in err and equal(before, weights(folder))
    code, _, err = run(folder, "--num-epochs", "1", "--resume", "--k", "32")
    assert code != 0 and "--k 16 (now 32)" in err
    assert run(folder, "--num-epochs", "2", "--resume")[0] == 0 and weights(folder)["counters"]["epoch"] == 2
    assert run(folder, "--num-epochs", "1", "--overwrite")[0] == 0 and weights(folder)["counters"]["epoch"] == 1


def test_slurm_job_id_names_the_run_and_another_job_goes_on_with_it(folder):
    assert run(folder, "--num-epochs", "1", SLURM_JOB_ID="42")[0] == 0
    assert (folder / "models/vqvae-42/best.pt").exists() and (folder / "logs/vqvae-42").is_dir()
    code, out, err = run(folder, "--num-epochs", "2", "--output-folder", "vqvae-42", "--resume", SLURM_JOB_ID="43")
    assert code == 0 and "resuming" in out and " before: " not in out, err
    assert [path.name for parent in ("models", "logs") for path in (folder / parent).iterdir()] == ["vqvae-42"] * 2
    assert run(folder, "--num-epochs", "1")[0] == 0
    assert run(folder, "--num-epochs", "1", SLURM_JOB_ID="44")[0] == 0  # which leaves the run without an id alone
    assert {path.name for path in (folder / "models").iterdir()} == {"vqvae", "vqvae-42", "vqvae-44"}


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(folder):
    code, _, err = run(folder, "--num-epochs", "3", "--lr", "1e30", "--precision", "fp32")
    assert code != 0 and "not finite at step" in err and len(err.strip().splitlines()) == 1
    assert all(torch.isfinite(value).all() for value in weights(folder)["model"].values())


@pytest.mark.parametrize("flags, message", [
    (("--mse-weight", "-1"), "--mse-weight"), (("--ssim-weight", "nan"), "--ssim-weight"),
    (("--l1-weight", "inf"), "--l1-weight"), (("--mse-weight", "0"), "all loss weights are zero"),
    (("--data-folder", "nowhere"), "nowhere does not exist"), (("--data-folder", "empty"), "no images under"),
    (("--image-size", "18"), "--image-size 16x16"), (("--image-size", "8", "--ssim-weight", "1"), "at least 11"),
    (("--image-size", "20", "--ms-ssim-weight", "1"), "two scales"), (("--batch-size", "0"), "--batch-size"),
    (("--lr", "0"), "--lr"), (("--warmup-steps", "-1"), "--warmup-steps"), (("--num-workers", "x"), "--num-workers"),
    (("--device", "warp"), "--device warp"),
    (("--dataset", "cifar10", "--no-download"), "--no-download forbids"),
    (("--restart-below", "2"), "--restart-below: must be a share below 1")])
def test_bad_input_is_one_clear_line_and_leaves_nothing(folder, flags, message):
    (folder / "empty").mkdir()
    code, _, err = run(folder, "--num-epochs", "1", *flags)
    assert code != 0 and message in err.strip().splitlines()[-1] and "Traceback" not in err
    assert not (folder / "models").exists() and not (folder / "logs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a cuda device")
def test_cuda_where_there_is_none_is_an_error(folder):
    code, _, err = run(folder, "--device", "cuda")
    assert code != 0 and "--device cuda is not available here" in err


def test_a_broken_image_and_a_damaged_checkpoint(folder):
    (folder / "images" / "7.png").write_bytes(b"not an image")
    code, _, err = run(folder, "--num-epochs", "1")
    assert code != 0 and "7.png does not decode" in err and len(err.strip().splitlines()) == 1
    code, out, _ = run(folder, "--num-epochs", "1", "--skip-broken")
    assert code == 0 and "skipped 1 broken" in out
    (folder / "models/vqvae/last.pt").write_bytes(b"damaged")
    code, _, err = run(folder, "--num-epochs", "2", "--skip-broken", "--resume")
    assert code != 0 and "last.pt is damaged" in err


def test_streaming_from_disk_trains_as_from_memory(folder, monkeypatch):
    flags = ("--num-epochs", "2", "--num-workers", "1", "--precision", "fp32", "--output-folder")
    assert run(folder, *flags, "memory")[0] == 0
    monkeypatch.setattr(datasets, "IN_MEMORY_BYTES", 0)
    assert run(folder, *flags, "streamed")[0] == 0
    assert equal(weights(folder, run="streamed")["model"], weights(folder, run="memory")["model"])


def test_an_error_of_the_process_itself_is_one_line_and_a_status(folder):
    process = start(folder, "vqvae.py", *SMALL, "--data-folder", "nowhere")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2 and out == ""
    assert err == "vqvae.py: error: --data-folder nowhere does not exist or is no folder\n"


def test_accumulated_batches_make_one_update(folder):
    code, _, err = run(folder, "--num-epochs", "2", "--accumulate", "4")  # 6 batches an epoch: 4 and 2
    assert code == 0, err
    found = weights(folder)
    assert found["counters"]["step"] == 12
    assert {int(state["step"]) for state in found["optimizer"]["state"].values()} == {4}


def test_a_frozen_codebook_is_that_of_its_run(folder):
    assert run(folder, "--num-epochs", "1")[0] == 0
    flags = ("--num-epochs", "2", "--output-folder", "frozen", "--seed", "1", "--ssim-weight", "1")
    code, _, err = run(folder, *flags, "--frozen-codebook", "models/vqvae/best.pt")
    assert code == 0, err
    source, found = weights(folder, "best.pt")["model"], weights(folder, run="frozen")["model"]
    assert all(torch.equal(found[name], value) == (not name.startswith("decoder")) for name, value in source.items()
               if not name.endswith("num_batches_tracked"))
    code, _, err = run(folder, *flags[2:], "--k", "32", "--overwrite", "--frozen-codebook", "models/vqvae/best.pt")
    assert code == 2 and "K 16" in err and (folder / "models" / "frozen" / "best.pt").exists()
