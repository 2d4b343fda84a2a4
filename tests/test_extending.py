"""A new loss term, metric, data set, judge or quantizer is one function or class and one row, in one file."""
import json
import shutil

import pytest
from conftest import HERE
from processes import Forked

ROWS = {
    "terms/pixel.py": """
def toy(x_tilde, x):
    \"\"\"Toy error: in [0, 16].\"\"\"
    return (x_tilde - x).pow(4).mean()


ROWS["toy"] = Row(toy)
""",
    "metrics.py": """
def toy(x_tilde, x):
    return (x_tilde - x).abs().amax((1, 2, 3))


IMAGE_METRICS["toy"] = toy
""",
    "datasets.py": """
def _toy(source):
    images = torch.randint(256, (40, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"train": (images, torch.arange(40) % 2)}, ["even", "odd"]


DATASETS["toy"] = _toy
""",
    "quantizers.py": """
class Toy(VQEmbedding):
    pass


QUANTIZERS["toy"] = Toy
""",
    "study/judges.py": """


class Toy(nn.Module):
    description = "mean colours"

    def forward(self, x):
        return x.mean((2, 3))


FEATURES["toy"] = lambda data, source: Toy()
""",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with a toy row at the end of each of these files."""
    folder = tmp_path_factory.mktemp("project")
    for path in HERE.glob("*.py"):
        if not path.stem.startswith("test_"):
            shutil.copy(path, folder)
    for wing in ("harness", "readers", "priors", "study", "terms", "kernels"):
        if (HERE / wing).exists():
            shutil.copytree(HERE / wing, folder / wing)
    for name, row in ROWS.items():
        (folder / name).write_text((folder / name).read_text() + row)
    return folder


def run(folder, *command):
    process = Forked(folder, folder / command[0], *command[1:])
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


def test_toy_rows_are_trained_measured_and_compared_with(copy):
    small = ["--dataset", "toy", "--hidden-size", "4", "--k", "8", "--batch-size", "8", "--num-epochs", "1"]
    run(copy, "vqvae.py", *small, "--toy-weight", "1", "--mse-weight", "0", "--quantizer", "toy")
    results = json.loads((copy / "models" / "vqvae" / "results.json").read_text())
    assert 0 < results["toy"] <= 1
    run(copy, "evaluate.py", "--model", "models/vqvae/best.pt", "--features", "toy")
    evaluated = json.loads((copy / "evaluation" / "results.json").read_text())
    assert 0 < evaluated["models"]["vqvae"]["toy"] <= 1
    assert evaluated["models"]["vqvae"]["frechet_distance/toy"] > 0
    run(copy, "compare.py", "--losses", "toy", *small, "--quantizer", "toy")
    table = json.loads((copy / "models" / "comparison" / "table.json").read_text())
    assert any(row["loss"] == "toy" for row in table["table"])
    assert all(0 < row["toy"] <= 1 and row["terms"]["toy"] > 0 for row in table["runs"])
