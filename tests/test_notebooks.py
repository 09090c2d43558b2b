"""The notebooks were run, are in canonical form, and run headless through papermill.

Whether their outputs still come out is nbval's test: pytest collects notebooks/ with it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from asymconv import study
from asymconv.kernels import RUNGS

nbformat = pytest.importorskip("nbformat", reason="no Jupyter on this machine")

PATHS = study.notebooks()
IDS = [p.stem for p in PATHS]


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_was_run_from_top_to_bottom_without_errors(path: Path) -> None:
    """nbval passes a notebook that was never run: it has no outputs to compare."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert code
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    for cell in code:
        assert not [o for o in cell.outputs if o.output_type == "error"]
        assert not [o for o in cell.outputs if o.get("name") == "stderr"], cell.source


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_is_in_canonical_form(path: Path) -> None:
    """As nbstripout leaves it when outputs and counts are kept: no times, no machine's names."""
    keys = "metadata.papermill cell.metadata.papermill cell.metadata.execution"
    command = [sys.executable, "-m", "nbstripout", "--keep-output", "--keep-count"]
    command += ["--extra-keys", keys, "--textconv", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == path.read_text()
    metadata = json.loads(path.read_text())["metadata"]
    assert metadata["kernelspec"]["name"] == "python3"
    assert metadata["language_info"] == {"name": "python"}


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_pastes_nothing(path: Path) -> None:
    """Kernels and helpers come from the package; a notebook defines neither.

    A cell with the tag "network" may define what its reader would bring along: a torch.nn network.
    """
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            network = "network" in cell.metadata.get("tags", ())
            for word in ("__global__", "load_inline", *(() if network else ("def ", "class "))):
                assert word not in cell.source, f"{path.name}: {cell.source}"
            assert len(cell.source.splitlines()) <= 16, f"{path.name}: a long cell"


def test_every_rung_has_its_notebook_that_shows_and_checks_it() -> None:
    for rung in RUNGS:
        text = (study.NOTEBOOKS / f"{rung.notebook}.ipynb").read_text()
        assert rung.number in text


def test_the_study_runs_a_notebook_and_draws_the_figures(tmp_path: Path) -> None:
    console = Console(width=100, record=True)
    study.run(tmp_path / "out", ["01"], console)
    printed = console.export_text()
    assert (tmp_path / "out" / "01_seed.ipynb").exists()
    assert (tmp_path / "out" / "figures" / "ladder.svg").exists()
    assert "k02_block_per_pixel" in printed
    assert "H100" in printed
    assert not list((tmp_path / "out").glob(".*")), "a temporary file is left"


def test_a_failing_cell_is_named_and_what_ran_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("print('so far')"), nbformat.v4.new_code_cell("1 / 0")]
    )
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(broken, folder / "00_broken.ipynb")
    monkeypatch.setattr(study, "NOTEBOOKS", folder)
    with pytest.raises(study.StudyError, match=r"00_broken\.ipynb, cell 2: ZeroDivisionError"):
        study.run(tmp_path / "out", None, Console())
    assert "so far" in (tmp_path / "out" / "00_broken.ipynb").read_text()


def test_unknown_notebooks_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(study.StudyError, match="no notebook '77'"):
        study.notebooks(["77"])
    monkeypatch.setattr(study, "NOTEBOOKS", tmp_path / "nowhere")
    with pytest.raises(study.StudyError, match="from a clone"):
        study.notebooks()
