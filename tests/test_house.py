"""The house: who may import whom, and how large a file may be."""
import ast
from graphlib import TopologicalSorter

import pytest
from conftest import HERE

WINGS = ("terms", "kernels", "readers", "priors", "study", "harness", "benchmarks")
SCRIPTS = {path.stem for path in HERE.glob("*.py") if '\nif __name__ == "__main__":' in path.read_text()}
MOST_LINES = 400


def modules():
    """{dotted name: path} of every module that is no test."""
    paths = [path for folder in (HERE, *(HERE / wing for wing in WINGS)) for path in folder.glob("*.py")
             if not path.stem.startswith(("test_", "__init__"))]
    return {".".join(path.relative_to(HERE).with_suffix("").parts): path for path in paths}


def imports(path, known):
    """Names in `known` that a file imports anywhere, within functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name} has a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known


@pytest.fixture(scope="module")
def arrows():
    paths = modules()
    return {name: imports(path, set(paths)) for name, path in paths.items()}


def test_the_reading_of_imports_sees_every_kind(tmp_path):
    source = tmp_path / "x.py"
    source.write_text("import losses\nfrom harness import cli\ndef f():\n    from harness.run import Run\n")
    assert imports(source, set(modules())) == {"losses", "harness.cli", "harness.run"}


def test_harness_imports_nothing_from_the_top_level(arrows):
    assert {name: [other for other in others if not other.startswith("harness.")]
            for name, others in arrows.items() if name.startswith("harness.")} == {
                name: [] for name in arrows if name.startswith("harness.")}


def test_benchmarks_alone_import_a_script(arrows):
    assert {"vqvae", "vqgan", "compare"} <= SCRIPTS
    assert {name: others & SCRIPTS for name, others in arrows.items()
            if others & SCRIPTS and not name.startswith("benchmarks.")} == {}


MAY_IMPORT = {"harness": set(), "kernels": {"harness"}, "terms": {"kernels", "harness"}, "readers": {"harness"},
              "priors": {"root", "harness"}, "study": {"root", "harness", "priors"}}


def wing(name):
    """The wing of a module, or "root"."""
    return name.split(".")[0] if "." in name else "root"


def test_wings_import_downwards_only(arrows):
    wrong = [f"{name} -> {other}" for name, others in arrows.items() for other in others
             if wing(name) in MAY_IMPORT and wing(other) not in MAY_IMPORT[wing(name)] | {wing(name)}]
    assert wrong == []


def test_the_house_is_small_enough_to_know(arrows):
    """Files at the root, and arrows between those and the wings, each wing taken as one."""
    def room(name):
        return name if wing(name) == "root" else wing(name)
    drawn = {(room(name), room(other)) for name, others in arrows.items() for other in others
             if room(name) != room(other)}
    assert len(list(HERE.glob("*.py"))) <= 20 and len(drawn) <= 80, (len(drawn), sorted(drawn))


def test_there_is_no_circle(arrows):
    tuple(TopologicalSorter(arrows).static_order())  # raises CycleError


def test_files_are_small_enough_to_read():
    lines = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    assert lines["functions"] <= 150
    pages = {"README.md": 160, "RESULTS.md": 300} | {f"docs/{path.name}": 120 for path in (HERE / "docs").glob("*.md")}
    assert {page: most for page, most in pages.items() if len((HERE / page).read_text().splitlines()) > most} == {}
