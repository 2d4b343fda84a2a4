"""stacked_vqvae.py, video_prior.py and evaluate.py --prior: runs, resumption, two processes, bad input."""
import argparse
import json
import math
import signal
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from conftest import at_work, call, start, stop_after
from PIL import Image
from processes import finish, start_two

import stacked_vqvae
import video_prior
from harness import checkpoint, distributed
from harness.device import allow_tf32
from priors import latents
from priors.latents import split_latents

SMALL = ("--hidden-size-prior", "8", "--num-layers", "2", "--batch-size", "8", "--device", "cpu", "--precision", "fp32")
SCRIPTS = {"stacked_vqvae.py": ("stacked", ("--codes", "2", "--draws", "2")), "video_prior.py": ("video", ())}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with clips of a square that moves, two VQ-VAEs of their frames, and one of two classes."""
    path = tmp_path_factory.mktemp("latents")
    for clip in range(6):
        split = ("train", "train", "train", "train", "valid", "test")[clip]
        (path / "clips" / split / str(clip)).mkdir(parents=True)
        for number in range(10):
            pixels = np.full((16, 16, 3), 40 + clip, np.uint8)
            pixels[2 * (clip % 4):2 * (clip % 4) + 8, number:number + 6] = 220
            Image.fromarray(pixels).save(path / "clips" / split / str(clip) / f"{number:06}.png")
    for i in range(40):
        (path / "classes" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.full((16, 16, 3), 30 + 150 * (i % 2) + i, np.uint8))
        image.save(path / "classes" / "ab"[i % 2] / f"x{i}.png")
    for name, data, seed in (("vqvae", "clips", 0), ("other", "clips", 1), ("classes", "classes", 0)):
        code, _, err = call(path, "vqvae.py", "--dataset", "folder", "--data-folder", data, "--hidden-size", "8", "--k",
                            "16", "--batch-size", "8", "--num-epochs", "2", "--lr", "1e-3", "--device", "cpu",
                            "--output-folder", name, "--seed", seed)
        assert code == 0, err
    return path


def train(folder, script, *flags, model="models/vqvae"):
    return call(folder, script, "--model", model, *SMALL, *SCRIPTS[script][1], *flags)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_is_killed_and_goes_on_is_one_that_was_not(folder, script):
    kind, extra = SCRIPTS[script]
    assert train(folder, script, "--num-epochs", "4", "--output-folder", f"{kind}-whole")[0] == 0
    process = start(folder, script, "--model", "models/vqvae", *SMALL, *extra, "--num-epochs", "4", "--output-folder",
                    f"{kind}-cut")
    stop_after(process, "epoch 2/", signal.SIGKILL)
    code, _, err = train(folder, script, "--num-epochs", "4", "--output-folder", f"{kind}-cut", "--resume")
    assert code == 0, err
    one, two = (checkpoint.load(folder / "models" / f"{kind}-{run}" / "last.pt", kind)["model"]
                for run in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_are_one(folder, script):
    kind, extra = SCRIPTS[script]
    flags = ("--model", "models/vqvae", *SMALL, *extra, "--num-epochs", "2")
    finish(start_two(folder, script, *flags, "--batch-size", "4", "--output-folder", f"{kind}-two"))
    assert call(folder, script, *flags, "--output-folder", f"{kind}-one")[0] == 0
    one, two = (json.loads((folder / "models" / f"{kind}-{name}" / "results.json").read_text())
                for name in ("one", "two"))
    for name in ("nats_per_latent", "nats_swapped_codes") if kind == "stacked" else ("nats_per_latent",):
        assert two[name] == pytest.approx(one[name], rel=2e-3)


def test_images_go_without_codes_whatever_the_shares_of_the_processes(monkeypatch):
    def left_out(share, offset):
        monkeypatch.setattr(distributed, "count_of", lambda rows: (5, offset))
        torch.manual_seed(0)
        return stacked_vqvae.left_out(torch.zeros(share, 4, 4), 0.5).tolist(), torch.rand(1)
    (whole, after), (first, after_first), (second, _) = left_out(5, 0), left_out(3, 0), left_out(2, 3)
    assert whole == first + second and set(whole) == {True, False} and after == after_first


def test_frames_before_are_disturbed_whatever_the_shares_of_the_processes(monkeypatch):
    window = torch.randint(50, (5, 3, 4, 6))

    def disturb(part, offset, most=1.):
        monkeypatch.setattr(distributed, "count_of", lambda rows: (5, offset))
        torch.manual_seed(0)
        return video_prior.disturb(part, most)
    whole = disturb(window, 0)
    assert torch.equal(whole, torch.cat([disturb(window[:3], 0), disturb(window[3:], 3)]))
    assert torch.equal(whole[:, -1], window[:, -1]) and torch.equal(disturb(window, 0, 0.), window)
    changed = (whole != window)[:, :-1].flatten(1).float().mean(1)
    assert 0.1 < changed.mean() < 0.9 and changed.std() > 0
    assert all(set(new.unique().tolist()) <= set(old.unique().tolist())
               for new, old in zip(whole.flatten(0, 1), window.flatten(0, 1)))


def test_the_stacked_model_draws(folder):
    code, out, err = train(folder, "stacked_vqvae.py", "--num-epochs", "1", "--output-folder", "draws")
    assert code == 0, err
    results = json.loads((folder / "models" / "draws" / "results.json").read_text())
    assert {"nats_swapped_codes", "nats_no_codes", "codebook_perplexity_2", "psnr_one_draw"} <= set(results)
    code, out, err = train(folder, "stacked_vqvae.py", "--sample", "4", "--output-folder", "draws")
    assert code == 0 and "sample.png" in out, err
    assert (folder / "models" / "draws" / "sample.png").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_codes_and_the_test_split_are_of_whole_float32(folder, monkeypatch, script):
    seen, module = [], sys.modules[script[:-3]]

    def look(function, what):
        def looked(*args):
            seen.append((what, torch.get_float32_matmul_precision()))
            return function(*args)
        return looked
    monkeypatch.setattr(latents, "encode", look(latents.encode, "codes"))
    monkeypatch.setattr(module, "measure", look(module.measure, "split"))
    monkeypatch.setattr(module, "autocast_of", lambda *_: allow_tf32(True) or nullcontext)  # as on a GPU in fp32
    torch.set_float32_matmul_precision("highest")
    assert train(folder, script, "--num-epochs", "1", "--output-folder", f"whole-{script[:-3]}")[0] == 0
    assert seen == [("codes", "highest")] * 3 + [("split", "high"), ("split", "highest")]


def test_the_video_prior_rolls_out(folder, monkeypatch):
    assert train(folder, "video_prior.py", "--num-epochs", "1", "--output-folder", "rolls")[0] == 0
    code, out, err = train(folder, "video_prior.py", "--rollout", "5", "--starts", "2", "--output-folder", "rolls")
    assert code == 0, err
    assert Image.open(folder / "models" / "rolls" / "rollout-recorded.gif").n_frames > 1
    videos = torch.load(folder / "models" / "rolls" / "rollout-recorded.pt", weights_only=True)
    assert videos["real"].shape == videos["generated"].shape == (2, 5, 3, 16, 16)
    assert videos["real"].dtype == torch.uint8
    for flags, message in ((("--rollout", "5", "--action", "jump"), "no actions"), (("--rollout", "50"), "in a row")):
        code, _, err = train(folder, "video_prior.py", *flags, "--output-folder", "rolls")
        assert code == 2 and message in err and err.count("\n") == 1
    code, out, err = train(folder, "video_prior.py", "--rollout", "2", "--starts", "99", "--output-folder", "rolls")
    assert code == 0 and "places to start from, not --starts 99" in out, err
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # what was trained outside of a job is used in one
    code, out, err = train(folder, "video_prior.py", "--rollout", "2", "--starts", "1", "--output-folder", "rolls",
                           "--temperature", "0.5", "--seed", "3")
    assert code == 0 and "models/rolls/rollout-recorded-temperature0.5-seed3.gif" in out, err
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setattr(video_prior, "GIF_SIDE", 150)
    code, _, err = train(folder, "video_prior.py", "--rollout", "2", "--starts", "2", "--output-folder", "rolls")
    assert code == 2 and "--starts 2 is too many for a GIF" in err and "at most 1" in err


def test_a_first_stage_of_other_classes_in_test_keeps_its_splits():
    grids = torch.zeros(20, 4, 4, dtype=torch.long)
    splits = {"train": (grids, torch.zeros(20).long()), "valid": (grids[:4], torch.ones(4).long()),
              "test": (grids[:3], torch.ones(3).long())}
    args = argparse.Namespace(batch_size=8, seed=0, limit=None)
    assert [len(part.images) for part in split_latents(splits, args, "cpu")] == [20, 4, 3]


def test_windows_hold_frames_that_follow_one_another_and_the_action_that_led_to_the_last():
    clip = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    number = torch.tensor([0, 1, 2, 3, 4, 5, 5, 6, 8, 9])  # the second clip goes on counting, stutters and skips
    rows = torch.stack([torch.zeros(10).long(), clip, number, torch.arange(10) + 100], 1)
    frames = torch.arange(10).view(10, 1, 1)
    windows, actions = video_prior.cut(frames, rows, 1, "train")
    assert windows.flatten(1).tolist() == [[0, 1], [1, 2], [2, 3], [4, 5], [6, 7], [8, 9]]
    assert actions.tolist() == [101, 102, 103, 105, 107, 109]
    with pytest.raises(ValueError, match="longest row has 4: pass a smaller --rollout"):
        video_prior.starts_of_windows(rows, 5, "test", "--rollout")


def test_actions_are_recorded_or_named_and_the_last_is_kept_up():
    names, recorded = ["noop", "right", "left"], torch.tensor([[2, 0, 1, 0]])
    assert video_prior.chosen_actions("recorded", names, recorded) is recorded
    assert video_prior.chosen_actions("right, left", names, recorded.expand(2, 4)).tolist() == [[1, 2, 2, 2]] * 2
    assert video_prior.chosen_actions("left,left,left,left,right", names, recorded).tolist() == [[2, 2, 2, 2]]
    for text in ("jump", "right,", "recorded,right"):
        with pytest.raises(ValueError, match="not known: noop, right, left are, and, alone, recorded"):
            video_prior.chosen_actions(text, names, recorded)


def test_the_last_frame_is_compared_with_even_where_no_latent_stays():
    still, moving = torch.zeros(1, 2, 2, 2).long(), torch.arange(2).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    figures = video_prior.as_the_last_frame([(moving, None)], [(moving, None)], 4)
    assert figures == {"last_frame_nats_per_latent": pytest.approx(math.log(3)), "last_frame_right": 0}
    figures = video_prior.as_the_last_frame([(moving, None)], [(still, None)], 4)
    assert figures == {"last_frame_nats_per_latent": pytest.approx(-math.log(1e-9)), "last_frame_right": 1}


@pytest.mark.parametrize("script, flags, message", [
    ("video_prior.py", ("--context", "30"), "no clip of the train split has 31 frames"),
    ("stacked_vqvae.py", ("--codes", "17"), "17 codes are more than the 4x4 latents"),
    ("stacked_vqvae.py", ("--without-codes", "0"), "pass a share above 0"),
    ("stacked_vqvae.py", ("--model", "models/nowhere"), "no checkpoint at"),
])
def test_what_is_wrong_is_one_line(folder, script, flags, message):
    code, _, err = train(folder, script, *flags, "--output-folder", "wrong")
    assert code == 2 and message in err and err.count("\n") == 1
    assert not (folder / "models" / "wrong" / "args.json").exists()


def test_a_vqvae_without_sequences_and_the_codes_of_another_are_refused(folder):
    code, _, err = train(folder, "video_prior.py", "--output-folder", "wrong", model="models/classes")
    assert code == 2 and "has no sequences" in err and err.count("\n") == 1
    for script, (kind, _) in SCRIPTS.items():
        assert train(folder, script, "--num-epochs", "1", "--output-folder", f"{kind}-own")[0] == 0
        more = ("--sample", "2") if kind == "stacked" else ("--rollout", "2")
        for flags in (more, ("--resume",)):
            code, _, err = train(folder, script, *flags, "--output-folder", f"{kind}-own", model="models/other")
            assert code == 2 and "another VQ-VAE" in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--limit", "--batch-size"])
def test_a_batch_of_one_is_refused_before_a_run_is_replaced(folder, flag):
    if not (folder / "models" / "kept").exists():
        assert train(folder, "stacked_vqvae.py", "--num-epochs", "1", "--output-folder", "kept")[0] == 0
    before = {path: path.read_bytes() for path in (folder / "models" / "kept").glob("[!.]*")}
    code, _, err = train(folder, "stacked_vqvae.py", "--output-folder", "kept", "--overwrite", flag, "1")
    assert code == 2 and err.count("\n") == 1 and "--limit" in err and "--batch-size" in err, err
    assert before == {path: path.read_bytes() for path in (folder / "models" / "kept").glob("[!.]*")}


def test_latents_of_a_run_that_is_at_work_are_not_replaced(folder):
    live = folder / "models" / "live"
    assert train(folder, "stacked_vqvae.py", "--num-epochs", "1", "--output-folder", "live")[0] == 0
    before = (live / "latents.pt").read_bytes()
    again = ("stacked_vqvae.py", "--num-epochs", "1", "--output-folder", "live", "--overwrite")
    with at_work(live):
        code, _, err = train(folder, *again, model="models/other")
    assert code == 2 and "models/live is in use" in err and (live / "latents.pt").read_bytes() == before
    assert train(folder, *again, model="models/other")[0] == 0 and (live / "latents.pt").read_bytes() != before


def test_class_agreement_judges_a_prior(folder):
    code, _, err = call(folder, "pixelcnn_prior.py", "--model", "models/classes", *SMALL, "--num-epochs", "1",
                        "--output-folder", "class-prior")
    assert code == 0, err
    flags = ("--prior", "models/class-prior", "--samples", "3", "--device", "cpu")
    code, out, err = call(folder, "evaluate.py", "--model", "models/classes", *flags)
    assert code == 0, err
    rows = [line.split("|") for line in out.splitlines() if line.startswith("|")][2:]
    shares = [float(row[2]) for row in rows]
    assert len(shares) == 5 and all(0 <= share <= 1 for share in shares)
    assert all(float(row[3]) >= 0 for row in rows[1:3]), out
    assert ("is no judge here" in out) == (shares[0] < 0.75 or shares[1] < shares[0] / 2)  # of two classes
    assert shares[2] == pytest.approx((shares[3] + shares[4]) / 2, abs=1e-3)
    for flag, message in ((("--model", "models/vqvae"), "another VQ-VAE"), (("--seed", "-1"), "whole number")):
        code, _, err = call(folder, "evaluate.py", "--model", "models/classes", *flags, *flag)
        assert code == 2 and message in err and err.count("\n") == 1
