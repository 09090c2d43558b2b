"""Run the notebooks headless, and redraw what is made from records."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = ROOT / "notebooks"


class StudyError(RuntimeError):
    """The study could not run to its end; the message says which cell of which notebook and why."""


def notebooks(only: Sequence[str] | None = None) -> list[Path]:
    """The notebooks in order, or those whose names begin with one of `only`.

    Raises:
        StudyError: none there, or an `only` that names none.
    """
    if not NOTEBOOKS.is_dir():
        raise StudyError(f"no notebooks at {NOTEBOOKS}: run the study from a clone of the project")
    paths = sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    for wanted in only or ():
        if not any(p.name.startswith(wanted) for p in paths):
            raise StudyError(f"no notebook {wanted!r}; there are {[p.stem for p in paths]}")
    return [p for p in paths if only is None or p.name.startswith(tuple(only))]


def redraw(folder: Path, readme: Path | None = None) -> list[Path]:
    """Draw every figure from the records into a folder; update a README's table if one is given."""
    from asymconv import plots, record, tables

    paths = plots.draw_all(folder)
    if readme is not None:
        tables.update_readme(readme, record.load())
        paths.append(readme)
    return paths


def measure_live(output: Path, console: Console) -> None:
    """Take the ladder's record on this machine's GPU, and let everything after show it."""
    from asymconv import record

    path = (output / "data" / "ladder.json").resolve()
    with console.status("measuring the ladder on this GPU"):
        record.measure_ladder().save(path)
    os.environ[record.LADDER_VARIABLE] = str(path)  # the notebooks' processes inherit it
    console.print(f"measured on this GPU: {path}", soft_wrap=True)


def _execute(notebook: Path, target: Path) -> None:
    """Run one notebook through papermill; the target is whole or, after an error, what ran."""
    import papermill
    from papermill.exceptions import PapermillExecutionError

    temporary = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        papermill.execute_notebook(
            notebook,
            temporary,
            cwd=NOTEBOOKS,
            kernel_name="python3",
            progress_bar=False,
            log_output=False,
            extra_arguments=["--IPKernelApp.log_level=40"],  # errors; it warns of local TCP
        )
    except PapermillExecutionError as error:
        raise StudyError(
            f"{notebook.name}, cell {error.exec_count}: {error.ename}: {error.evalue}\n"
            f"what ran until then: {target}"
        ) from error
    finally:
        if temporary.exists():
            os.replace(temporary, target)


def run(output: Path, only: Sequence[str] | None, console: Console, *, html: bool = False) -> None:
    """The main job: execute the notebooks, draw the figures, print the ladder.

    With a GPU and a compiler the ladder is measured anew first; without, the committed record is
    shown.

    Args:
        output: a folder for executed notebooks, figures and, with a GPU, the new record.
        only: beginnings of notebook names; None runs all.
        console: where to print.
        html: write the notebooks as linked HTML pages too, to output/html.

    Raises:
        StudyError: a cell failed, papermill is not installed, or there is no such notebook.
    """
    import torch

    from asymconv import build, record, tables

    try:
        import papermill  # noqa: F401

        if html:
            from asymconv import pages
    except ImportError as error:
        install = "pip install 'asymconv[study]' (in a clone: -e '.[study]')"
        raise StudyError(f"{error.name} is not installed: {install}") from error
    paths = notebooks(only)
    output.mkdir(parents=True, exist_ok=True)
    if torch.cuda.is_available():
        try:
            build.cuda_home()
            measure_live(output, console)
        except build.MissingToolError as error:
            console.print(f"the record is shown, nothing is measured: {error}", soft_wrap=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("notebooks", total=len(paths))
        for path in paths:
            progress.update(task, description=path.stem)
            _execute(path, output / path.name)
            progress.advance(task)
        progress.update(task, description="notebooks")
    redraw(output / "figures")
    ladder = record.load()
    console.print(tables.ladder_rich(ladder))
    console.print(f"measured on {ladder.gpu}, {ladder.made['date']}", soft_wrap=True)
    console.print(f"notebooks: {output}/*.ipynb", soft_wrap=True)
    console.print(f"figures:   {output / 'figures'}/*.svg", soft_wrap=True)
    if html:
        executed = [output / path.name for path in paths]
        figure = output / "figures" / "ladder.svg"
        front, *_ = pages.write(executed, output / "html", ladder, figure, ROOT / "README.md")
        console.print(f"pages:     {front}", soft_wrap=True)
