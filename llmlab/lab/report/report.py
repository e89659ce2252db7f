"""Notebooks to a report: papermill runs them, nbconvert renders them, one index page ties them together."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import papermill

from llmlab.base.errors import InputError, Interrupted
from llmlab.lab.execute import execute
from llmlab.lab.report.pages import render, write_challenge_page, write_index
from llmlab.lab.report.pdf import find_chromium, write_pdf
from llmlab.measure.record import read_records
from llmlab.base.paths import atomic, check_writable, home

__all__ = ["Run", "check_parameters", "command", "find_notebooks", "report", "run_notebook", "write_challenge_page"]


@dataclass(frozen=True)
class Run:
    """One executed notebook.

    Attributes:
        name, title: its file name without suffix and its first heading.
        seconds: that it ran.
        command: runs it again, alone, with the same parameters.
        page: its HTML beside the index, if it came so far; error: one line if it failed.
        figures, records: names of the figures, and the records, that were written while it ran.
    """

    name: str
    title: str
    seconds: float
    command: str
    parameters: dict[str, Any] = field(default_factory=dict)
    page: str | None = None
    error: str | None = None
    figures: list[str] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether a cell raised or the kernel died."""
        return self.error is not None


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """The lab's notebooks in order, or those named (by path, or by name or number: "01_where_time_goes", "01").

    Raises InputError for a name that is no notebook.
    """
    folder = home() / "notebooks"
    everything = sorted(folder.glob("[0-9]*.ipynb"))
    if not names:
        if not everything:
            raise InputError(f"there are no notebooks in {folder}: run from a checkout, or name a notebook.")
        return everything
    found = []
    for name in names:
        path = Path(name)
        matches = [p for p in everything if p.stem == name or p.stem.split("_")[0] == name]
        if path.suffix == ".ipynb" and path.is_file():
            found.append(path)
        elif matches:
            found.append(matches[0])
        else:
            known = ", ".join(p.stem for p in everything) or "none"
            raise InputError(f"no notebook {name!r}: give the path of an .ipynb file or one of {known}.")
    return found


def check_parameters(notebook: Path, parameters: dict[str, Any]) -> None:
    """Hold parameter names against the notebook's cell tagged `parameters`.

    Papermill only warns about a name that the cell lacks, and the run silently uses defaults; here it is an InputError.
    """
    try:
        known = papermill.inspect_notebook(str(notebook))
    except Exception as error:  # papermill and nbformat raise many kinds; all mean "no usable notebook"
        raise InputError(f"cannot read the notebook {notebook}: {' '.join(str(error).split())[:200]}.") from None
    unknown = sorted(set(parameters) - set(known))
    if unknown:
        names = ", ".join(known) if known else "none: it has no cell tagged parameters"
        raise InputError(f"{notebook.name} has no parameter {', '.join(unknown)}: its parameters are {names}.")


def report(
    notebooks: Sequence[Path],
    *,
    output: Path,
    parameters: dict[str, Any] | None = None,
    pdf: bool = False,
    on_start: Callable[[str], None] = lambda name: None,
    on_end: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Run notebooks one after another and write their pages and `index.html` into `output`.

    A notebook that fails leaves its executed copy, traceback included, and the others still run. They draw their
    figures into `output`/figures.

    Args:
        notebooks: from `find_notebooks`; they run in their own folder.
        output: the report's folder; executed copies go to `output`/notebooks.
        parameters: values for every one of the notebooks; each must have a parameter of each name.
        pdf: print every page to a PDF beside it as well.
        on_start, on_end: called around each notebook.

    Returns:
        One Run per notebook, failed ones included.

    Raises:
        InputError: before the first notebook runs: an unknown parameter, an unreadable notebook, an unwritable folder,
            a PDF without Chromium.
        Interrupted: by Ctrl-C or SIGTERM; the kernel has ended, and the index shows the notebooks that finished.
    """
    parameters = parameters or {}
    chromium = find_chromium() if pdf else None
    for notebook in notebooks:
        check_parameters(notebook, parameters)
    check_writable(output / "notebooks")
    check_writable(output / "figures")
    begin = time.perf_counter()
    runs: list[Run] = []
    again = command([_named(notebook) for notebook in notebooks], parameters)
    for notebook in notebooks:
        on_start(notebook.stem)
        started = time.perf_counter()
        try:
            run = run_notebook(notebook, output, parameters)
        except KeyboardInterrupt:
            write_index(runs, output, seconds=time.perf_counter() - begin, command=again)
            raise Interrupted(
                f"interrupted in {notebook.stem} after {time.perf_counter() - started:.0f} s; "
                f"{len(runs)} of {len(notebooks)} notebooks are in {output / 'index.html'}."
            ) from None
        runs.append(run)
        on_end(run)
    index = write_index(runs, output, seconds=time.perf_counter() - begin, command=again)
    if chromium:
        for page in [index, *(output / run.page for run in runs if run.page)]:
            write_pdf(chromium, page)
    return runs


def run_notebook(notebook: Path, output: Path, parameters: dict[str, Any]) -> Run:
    """Execute one notebook into `output`/notebooks and render `output`/NAME.html. Its failure is in the Run."""
    executed = output / "notebooks" / notebook.name
    folder = (output / "figures").absolute()
    drawn, recorded = _drawn(folder), len(read_records())
    begin = time.perf_counter()
    error, _ = execute(notebook, executed, parameters, cwd=notebook.parent, environment={"LLMLAB_FIGURES": str(folder)})
    seconds = time.perf_counter() - begin
    page = None
    content = nbformat.read(executed if executed.exists() else notebook, as_version=4)
    title = _title(content, notebook.stem)
    if executed.exists():
        page = f"{notebook.stem}.html"
        with atomic(output / page) as path:
            path.write_text(render(content, notebook.stem, title), encoding="utf-8")
    return Run(
        name=notebook.stem,
        title=title,
        seconds=seconds,
        command=command([_named(notebook)], parameters),
        parameters=parameters,
        page=page,
        error=error,
        figures=[name for name, written in _drawn(folder).items() if drawn.get(name) != written],
        records=read_records()[recorded:],
    )


def command(notebooks: Sequence[str], parameters: Mapping[str, Any]) -> str:
    """The command line that runs notebooks with parameters and reports on them; it can be pasted into a shell."""
    parts = ["llmlab", "report", *notebooks]
    for name, value in parameters.items():
        parts += ["-p", f"{name}={_as_argument(value)}"]
    return shlex.join(parts)


def _as_argument(value: Any) -> str:
    """A value as -p reads it back: text as it is unless it would be read as JSON, everything else as JSON."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)


def _named(notebook: Path) -> str:
    """What `find_notebooks` finds this notebook by: its name if it is one of the lab's, else its path."""
    return notebook.stem if notebook.resolve().parent == (home() / "notebooks").resolve() else str(notebook)


def _drawn(folder: Path) -> dict[str, int]:
    """The figures in a folder now, by name, with when they were written."""
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.png")}


def _title(content: Any, name: str) -> str:
    """The notebook's first heading."""
    for cell in content.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("# "):
            return str(cell.source.splitlines()[0].removeprefix("# "))
    return name
