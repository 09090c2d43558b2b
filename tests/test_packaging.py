"""The project's own files agree with each other, and say what the README says."""

from __future__ import annotations

import ast
import math
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import typer
import yaml
from samples import claims_of_runs

from asymconv import asymmetry, comparison, record, retake
from asymconv.cli import app
from asymconv.kernels import RUNGS, get_rung

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_has_the_same_pins() -> None:
    """conda installs the package itself, so its pins are pyproject's; Python's must agree too."""
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [d["pip"] for d in conda if isinstance(d, dict)]
    assert pip == ["-e .[test]"]
    python = next(d for d in conda if isinstance(d, str) and d.startswith("python"))
    assert python.startswith("python" + PROJECT["requires-python"])


def test_readme_lines_are_complete() -> None:
    """Each of the two commands makes its own environment and installs what it needs."""
    readme = (ROOT / "README.md").read_text()
    for marker, command in (("study-line", "asymconv study"), ("test-line", "pytest")):
        block = re.search(rf"<!-- {marker} -->\n```sh\n(.+)\n```", readme)
        assert block, f"the README has no {marker}"
        line = block[1]
        assert "\n" not in line and line.startswith("python3 -m venv .venv && ")
        assert "pip install" in line and command in line
    assert "test-line" in (ROOT / ".ci" / "run").read_text()


def test_readme_names_commands_notebooks_and_files_that_there_are() -> None:
    readme = (ROOT / "README.md").read_text()
    commands = typer.main.get_command(app).commands
    named = set(re.findall(r"`asymconv ([a-z]+)", readme))
    assert named and named <= set(commands)
    linked = re.findall(r"\]\(((?:notebooks|figures|tests)/[^)]+)\)", readme)
    assert {f"notebooks/{p.name}" for p in (ROOT / "notebooks").glob("*.ipynb")} <= set(linked)
    for path in (*linked, *re.findall(r"`((?:asymconv|tests)/[\w/]+\.py)`", readme)):
        assert (ROOT / path).exists(), path


def test_readme_says_where_each_file_of_data_comes_from() -> None:
    """Those that `asymconv record` makes are known by its name, all others are named."""
    files = {path.name for path in record.DATA_FOLDER.iterdir()}
    assert set(retake.FILES.values()) <= files
    listed = (ROOT / "README.md").read_text().split("taken once", 1)[1].split("\n## ", 1)[0]
    for name in files - set(retake.FILES.values()):
        assert name in listed or Path(name).stem in listed, name
    for command in retake.FILES:
        assert f"`{command}`" in (ROOT / "README.md").read_text(), command


def test_rungs_are_numbered_in_order_and_named_as_their_files() -> None:
    folder = ROOT / "asymconv" / "kernels"
    names = [rung.name for rung in RUNGS]
    assert names == sorted(names)
    assert names == sorted(path.stem for path in folder.glob("k[0-9][0-9]_*.py"))
    for rung in RUNGS:
        assert (ROOT / "notebooks" / f"{rung.notebook}.ipynb").exists()


def public_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Of a module or a class, and of the public classes in it."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node.body)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node


def raised(node: ast.AST) -> Iterator[str]:
    """Names of the exceptions that a function raises itself."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise) and isinstance(child.exc, ast.Call):
            yield ast.unparse(child.exc.func).split(".")[-1]
        elif not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            yield from raised(child)


def test_docstrings_name_exceptions_and_the_shapes_of_tensors() -> None:
    """That there is one at all is ruff's to say; cli's functions are commands, whose help it is."""
    lacking = []
    for path in sorted(set((ROOT / "asymconv").rglob("*.py")) - {ROOT / "asymconv" / "cli.py"}):
        for function in public_functions(ast.parse(path.read_text()).body):
            said = ast.get_docstring(function) or ""
            types = [a.annotation for a in (*function.args.args, *function.args.kwonlyargs)]
            annotated = " ".join(ast.unparse(a) for a in (*types, function.returns) if a)
            wanted = [name for name in raised(function) if name not in said]
            if re.search(r"\bTensor\b", annotated) and not re.search(r"\([NK\d]+,|shape", said):
                wanted.append("a shape")
            if wanted:
                lacking.append(f"{path.relative_to(ROOT)}, {function.name}: {', '.join(wanted)}")
    assert not lacking, "\n".join(lacking)


def test_ruff() -> None:
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_stands_at_the_top_level_but_what_should() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    allowed = {
        *("notebooks", "asymconv", "figures", "tests", "environment.yml", "README.md"),
        *("pyproject.toml", ".ci", ".gitignore"),
    }
    assert {path.split("/")[0] for path in listed} <= allowed


WITHOUT_JUPYTER = """
import sys
for name in ("IPython", "nbconvert", "nbformat", "papermill"):
    sys.modules[name] = None
import pytest
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:nbval", "-o", "addopts=", sys.argv[1]]))
"""


def test_tests_are_collected_without_jupyter() -> None:
    """A GPU machine may have torch and pytest alone; the tests that need it must run there."""
    command = [sys.executable, "-c", WITHOUT_JUPYTER, str(ROOT / "tests")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "test_timing_on_this_gpu" in done.stdout


def test_the_readmes_claims_are_what_the_records_give() -> None:
    readme = (ROOT / "README.md").read_text()
    ladder, network = record.load(record.LADDER), comparison.load_network()
    theirs, strict = ladder["nn.Conv2d"].median, ladder["nn.Conv2d, strict fp32"].median
    ours = ladder["k07"].median
    before, after = (network.forward[name] for name in (comparison.THEIRS, comparison.OURS))
    layers = comparison.load_layers()
    calls = [c for c in layers.overheads if not c.what.startswith(tuple(comparison.DETOURS))]
    detours = [c.ours - c.theirs for c in layers.overheads if c not in calls]
    by_k06 = [  # where k07 does not run
        row.median("k06") / row.median(comparison.THEIRS)
        for row in layers.rows
        if not row.training and "k06" in row.milliseconds and get_rung("k07").refuses(row.shape)
    ]
    pitch = asymmetry.get_series("pitch")
    relative = asymmetry.load()["pitch"].relative(pitch)
    at = [i for i, shape in enumerate(pitch.shapes) if shape.out_width % 2]

    def odd(*numbers: str) -> str:
        return f"{100 * (max(relative[n][i] for n in numbers for i in at) - 1):.0f}"

    forced = [c.ours - c.theirs for c in calls if "forced" in c.what]
    left = [c.ours - c.theirs for c in calls if "forced" not in c.what]
    for claim in (
        f"{theirs / ours:.2f} times as fast as PyTorch's default",
        f"{strict / ladder['k08'].median:.1f} times as fast as PyTorch's strict fp32",
        f"k07 takes {ours / ladder['memory floor'].median:.2f} times what moving the bytes alone",
        *claims_of_runs(),
        f"{min(detours):.0f} to {max(detours):.0f} µs more (notebook 09)",
        f"{min(by_k06):.1f} to {max(by_k06):.1f} times as long as nn.Conv2d",
        f"takes {statistics.median(after):.0f} ms converted and {statistics.median(before):.0f}",
        f"odd length cost k07 and k08 up to {odd('k07', 'k08')} %, k06 up to {odd('k06')} %",
        f"costs its host {math.ceil(max(forced))} µs more than nn.Conv2d's, at most",
        f"one that PyTorch runs {math.ceil(max(left))}",
    ):
        assert claim in readme, claim
