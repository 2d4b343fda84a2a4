"""study.sh: every command of it is understood, without a run of any."""
import subprocess
import sys

import pytest
from conftest import HERE
from test_mixes import seen

import compare
from study import mixes
from study.runs import Sweep


def commands(folder, *arguments, **environment):
    """What study.sh would run, were Python not an echo."""
    done = subprocess.run(["sh", str(HERE / "study" / "study.sh"), *arguments], cwd=folder, text=True,
                          capture_output=True, env={"PATH": "/usr/bin:/bin", "PYTHON": "echo", **environment})
    lines = [line.split() for line in done.stdout.splitlines() if not line.startswith("==")]
    return done.returncode, lines, done.stderr


@pytest.mark.parametrize("mix", ["recommended", "recommended,fine-blocks=1"])
@pytest.mark.parametrize("arguments, questions", [(("--quick",), 16), (("CIFAR", "PHOTOS"), 27)])
def test_every_command_is_understood(tmp_path, monkeypatch, arguments, questions, mix):
    for folder in ("CIFAR", "PHOTOS"):
        (tmp_path / folder).mkdir()
    code, found, err = commands(tmp_path, *arguments, MIX=mix)
    assert code == 0, err
    compared = [command for command in found if command[0] == "compare.py"]
    assert len(compared) == questions and any("pixelcnn_prior.py" in command for command in found)
    splits = []
    for command in compared:
        monkeypatch.setattr(sys, "argv", command)
        args, flags = compare.parse_args()
        losses = mixes.PRESETS[args.preset]() if args.preset else map(mixes.parse_mix, args.losses)
        sweep = Sweep(list(losses), list(map(mixes.parse_mix, args.baseline)), args.rates, args.seeds)
        for mix in sweep.mixes.values():
            seen(mixes.command_of(mix, 0, flags, args.vqgan_flags))
        splits.append(args.split)
    assert splits.count("test") == (2 if "--quick" in arguments else 3)  # the claim: two lengths, and photographs
    plots = [command[2:] for command in found if command[:2] == ["-m", "study.lengths"]]
    quick = arguments == ("--quick",)
    lengths = ["1", "2"] if quick else ["4", "12", "30", "60"]
    assert plots[0] == [*(f"study/epochs-{length}" for length in lengths), "--output", "models/study/lasts.png"]
    minutes = [f"study/photo-minutes-{length}" for length in (7, 20, 60, 180)]
    assert plots[1:] == ([] if quick else [[*minutes, "--output", "models/study/minutes.png"]])


@pytest.mark.parametrize("name", ["my images", "a\ttab", "cifar[1]", "wild*", "$HOME", "-dash", 'quo"te'])
def test_the_folder_that_was_named_is_used_whatever_its_name(tmp_path, name):
    for folder in (name, "cifar1", "wildcat"):
        (tmp_path / folder).mkdir()
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\nprintf '<%s>' \"$@\"\necho\n")
    python.chmod(0o755)
    done = subprocess.run([HERE / "study" / "study.sh", f"./{name}", f"../{tmp_path.name}/{name}"], cwd=tmp_path,
                          capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "ONLY": "width photo-losses",
                                                               "PYTHON": "bin/python"})
    assert done.returncode == 0, done.stderr
    for line in (line for line in done.stdout.splitlines() if line.startswith("<compare.py>")):
        assert f"<--data-folder><{tmp_path / name}>" in line
    assert done.stdout.count("<compare.py>") == 2


def test_runs_have_the_same_names_in_a_job_of_slurm(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "job ${SLURM_JOB_ID-none}"\n')
    python.chmod(0o755)
    code, found, _ = commands(tmp_path, "--quick", ONLY="width", PYTHON=str(python), SLURM_JOB_ID="42")
    assert code == 0 and found == [["job", "none"]]


def test_questions_are_asked_by_name_and_usage_is_told(tmp_path):
    code, found, _ = commands(tmp_path, "--quick", ONLY="rates", MIX="l1,ssim=0.5")
    assert code == 0 and len(found) == 2 and "l1,ssim=0.5" in found[0]
    assert found[0][-4:] == ["--num-epochs", "1", "--lr", "4e-3"] and "--hidden-size 32" in " ".join(found[0])
    for named in ("date", "photo-claim", "rates date", "*"):  # no questions of --quick
        code, found, err = commands(tmp_path, "--quick", ONLY=named)
        assert code == 2 and not found and f"'{named.split()[-1]}', the questions are: baselines lasts" in err
    code, found, err = commands(tmp_path, "nowhere")
    assert code == 2 and not found and "no folder nowhere" in err
    code, found, err = commands(tmp_path, "--quick", PYTHON="false")
    assert code == 2 and not found and "false has no torch" in err
    code, found, err = commands(tmp_path)
    assert code == 2 and not found and "study/study.sh --quick" in err and "ONLY" in err
