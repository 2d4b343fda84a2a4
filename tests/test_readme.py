"""Every command of the README and of docs/ runs, on small data and for a moment; what they say is so."""
import json
import re
import shlex
import subprocess
from concurrent.futures import Executor, Future

import pytest
import torch
from conftest import HERE, call, write_images
from PIL import Image

import compare
import experiment
from losses import STRUCTURAL_TERMS, TERMS
from quantizers import QUANTIZERS
from study import mixes

README, RESULTS = ((HERE / name).read_text() for name in ("README.md", "RESULTS.md"))
PAGES = {path.name: path.read_text() for path in [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
         if path.name not in ("lab-notes.md", "adding-a-term.md")}  # of the past, and of a term that is not there
TRAIN = ["--batch-size", "8", "--num-epochs", "1", "--device", "cpu", "--limit", "16"]
VQVAE = [*TRAIN, "--hidden-size", "4", "--k", "8"]
SHORTER = {
    "vqvae.py": VQVAE, "compare.py": [*VQVAE, "--seeds", "1"], "vqgan.py": [*VQVAE, "--disc-layers", "1"],
    "pixelcnn_prior.py": [*TRAIN, "--hidden-size-prior", "4", "--num-layers", "2"],
    "stacked_vqvae.py": [*TRAIN, "--hidden-size-prior", "4", "--num-layers", "1", "--codes", "2"],
    "video_prior.py": [*TRAIN, "--hidden-size-prior", "4", "--num-layers", "1"],
    "benchmarks/gpu_day.py": ["--device", "cpu", "--dry-run", "--parts", "search"],
    "benchmarks/benchmark.py": ["--repeats", "1", "--device", "cpu"]}
ELSEWHERE = ("make", "tensorboard", "python3", "pip", "study/study.sh", "#SBATCH", "#!/bin/bash")
DRAWN = {"--sample": ["--sample", "2"], "--rollout": ["--rollout", "2"]}  # with a trained model


def fenced(page, language=""):
    """The code blocks of a page in a language."""
    return [block for name, block in re.findall(r"^```(\w*)\n(.*?)^```$", page, re.M | re.S) if name == language]


def blocks(page):
    """Lines of commands of each code block of a page, comments off and continued lines joined."""
    for block in fenced(page):
        lines = block.replace("\\\n", " ").splitlines()
        commands = [line for line in lines
                    if re.match(r"python|torchrun|make|tensorboard|study/|srun|#SBATCH|pip", line)]
        if commands:
            yield [shlex.split(line, comments=not line.startswith("#")) for line in commands]


def shortened(words):
    """The command on images/ in place of its data, at a size that takes a moment."""
    script, *flags = words[1:] if words[0] == "python" else words[words.index("vqvae.py"):]
    if script == "-m":
        script, *flags = flags[0].replace(".", "/") + ".py", *flags[1:]
    kept, skip = [], False
    for flag in flags:
        if skip:
            skip = False
        elif flag in ("--dataset", "--data-folder", "--minutes", "--action"):
            skip = True
        else:
            kept += ["photo"] if flag == "holiday/" else ["photo/a.jpg"] if flag == "photo.jpg" else [flag]
    data = ["--data-folder", "images"] if script in ("vqvae.py", "vqgan.py", "compare.py") else []
    more = SHORTER.get(script, [])
    drawn = next((small for flag, small in DRAWN.items() if flag in kept), None)
    return script, [*kept, *data, *([*drawn, "--device", "cpu"] if drawn else more)]


class Immediate(Executor):
    """Runs in this thread, where signals may be caught."""

    def __init__(self, *_, initializer=lambda: None, initargs=()):
        initializer(*initargs)

    def submit(self, function, *args, **kwargs):
        future = Future()
        future.set_result(function(*args, **kwargs))
        return future


def train_here(run, command, threads):
    code, _, err = call(".", *command, "--resume", "--output-folder", str(run.relative_to("models")))
    assert code == 0, err


@pytest.fixture
def folder(tmp_path):
    """Where the reader of a page is: ten classes, or clips, of images."""
    folder = tmp_path
    write_images(folder, 100, side=32)
    for path in sorted((folder / "images").iterdir()):
        clip = folder / "images" / str(int(path.stem) // 10)  # or class
        clip.mkdir(exist_ok=True)
        path.rename(clip / path.name)
    (folder / "pretrained").symlink_to(HERE / "pretrained")
    (folder / "photo").mkdir()
    Image.new("RGB", (40, 50), "red").save(folder / "photo" / "a.jpg")
    return folder


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if any(blocks(page))])
def test_every_command_runs(folder, monkeypatch, name):
    monkeypatch.setattr(compare, "ThreadPoolExecutor", Immediate)
    monkeypatch.setattr(compare, "train", train_here)
    monkeypatch.setattr(mixes, "PRESETS", {name: lambda preset=preset: preset()[:1]
                                           for name, preset in mixes.PRESETS.items()})
    ran = set()
    for number, commands in enumerate(blocks(PAGES[name])):
        for words in commands:
            if words[0] in ELSEWHERE:
                continue
            script, flags = shortened(words)
            if script in ("compare.py", "vqvae.py", "vqgan.py") and "--output-folder" not in flags:
                flags += ["--output" if script == "compare.py" else "--output-folder", f"block{number}-{len(ran)}"]
            code, out, err = call(folder, script, *flags)
            assert code == 0 and out, f"{' '.join(words)}\n{script} {' '.join(flags)}\n{err}"
            ran.add(" ".join(words))
    monkeypatch.chdir(folder)
    Image.new("RGB", (30, 21)).save("photo.jpg")
    for block in fenced(PAGES[name], "python"):
        exec(block, {"images": torch.zeros(2, 3, 32, 32)})


def make_train(folder):
    """Words of the command that `make train` runs in a folder, where the set-up is done."""
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@" > words')
    (folder / "python").chmod(0o755)
    subprocess.run(["make", "-s", "-f", str(HERE / "Makefile"), "-o", "ready", "BIN=.", "READY=ready", "train"],
                   cwd=folder, check=True)
    return (folder / "words").read_text().split()


def test_make_train_runs_and_starts_anew_once_it_is_finished(folder):
    words = make_train(folder)
    assert words[-1] == "--resume"  # and a run that was stopped goes on
    code, out, err = call(folder, *words, *VQVAE)
    assert code == 0 and "test split" in out, err
    assert make_train(folder) == [*words[:-1], "--overwrite"]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    notebook = json.loads((HERE / "docs" / "quickstart.ipynb").read_text())
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5
    for name in ("modules.py", "vqvae.py", "pretrained"):
        (tmp_path / name).symlink_to(HERE / name)
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names, ids = {}, set()
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("code", "markdown") and cell["id"] not in ids and cell["metadata"] == {}
        ids.add(cell["id"])
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["latents"].shape == (8, 16, 16) and names["images"].shape == names["decoded"].shape
    assert (tmp_path / "models" / "quickstart" / "best.pt").exists()


def test_make_knows_every_target_that_is_named():
    targets = set(re.findall(r"^([a-z-]+):", (HERE / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)", README)) <= targets


def test_tables_name_every_recipe_term_and_quantizer():
    for name, flags in experiment.RECIPES.items():
        assert re.search(rf"^\| `{name}` \| .* \| `{re.escape(flags)}` \|$", README, re.M), name
    rows = {name for row in re.findall(r"^\| (`.*?) \|", "".join(PAGES.values()), re.M)
            for name in re.findall(r"`([a-z0-9-]+)`", row)}
    assert set(TERMS) <= rows and set(QUANTIZERS) <= rows
    others = ", ".join(f"`{name}`" for name in TERMS if name not in STRUCTURAL_TERMS)
    assert f"all but {others}" in README.replace("\n", " ")


def test_pictures_and_links_are_there():
    for path in re.findall(r"\]\(([^)#:]+)\)", README + RESULTS):
        assert (HERE / path).exists(), path
    for page in (HERE / "docs").glob("*.md"):
        for path in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / path).exists(), f"{page.name}: {path}"


def test_nothing_is_left_to_fill_in():
    for text in (README, RESULTS):
        assert "@@" not in text and "XX" not in text
