"""Notebooks to a report: papermill runs them, nbconvert renders them, one index page ties them together."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import nbformat

from llmlab.base.errors import Interrupted
from llmlab.base.paths import atomic, check_writable
from llmlab.lab.attempt import ATTEMPTS, Attempt, Job, alone
from llmlab.lab.notebooks import check_parameters, command
from llmlab.lab.report.pages import Run, render, title, write_index
from llmlab.lab.report.pdf import find_chromium, write_pdf
from llmlab.measure.record import read_records


def report(
    notebooks: Sequence[Path],
    *,
    output: Path,
    parameters: Mapping[str, object] | None = None,
    pdf: bool = False,
    on_start: Callable[[str], object] = lambda name: None,
    on_end: Callable[[Run], object] = lambda run: None,
) -> list[Run]:
    """Run notebooks one after another and write their pages and `index.html` into `output`.

    A notebook that fails leaves its executed copy, traceback included, and the others still run. Each draws its figures
    into a folder of its own; when it has ended they move to `output`/figures.

    Args:
        notebooks: from `find_notebooks`; they run in their own folder.
        output: the report's folder; executed copies go to `output`/notebooks.
        parameters: JSON values for every one of the notebooks, which must have a parameter of each name.
        pdf: print every page to a PDF beside it as well.
        on_start, on_end: called around each notebook.

    Returns:
        One Run per notebook, failed ones included.

    Raises:
        InputError: before the first notebook runs: an unknown parameter, an unreadable notebook, an unwritable folder,
            another report at work in it, a PDF without Chromium.
        Interrupted: by Ctrl-C or SIGTERM; nothing is left running, and the index shows the notebooks that finished.
    """
    parameters, output, chromium = parameters or {}, output.absolute(), find_chromium() if pdf else None
    for notebook in notebooks:
        check_parameters(notebook, parameters)
    for folder in ("notebooks", "figures"):
        check_writable(output / folder)
    begin, runs = time.perf_counter(), list[Run]()

    def write() -> Path:
        seconds = time.perf_counter() - begin
        return write_index(runs, output, seconds=seconds, command=command(notebooks, parameters))

    with alone(output, "report"):
        shutil.rmtree(output / ATTEMPTS, ignore_errors=True)  # what a killed one left
        for notebook in notebooks:
            on_start(notebook.stem)
            started = time.perf_counter()
            try:
                run = run_notebook(notebook, output, parameters)
            except KeyboardInterrupt:
                where = f"{notebook.stem} after {time.perf_counter() - started:.0f} s"
                finished = f"{len(runs)} of {len(notebooks)} notebooks are in {write()}"
                raise Interrupted(f"interrupted in {where}; {finished}.") from None
            runs.append(run)
            on_end(run)
        index = write()
        if chromium:
            for page in [index, *(output / run.page for run in runs if run.page)]:
                write_pdf(chromium, page)
    return runs


def run_notebook(notebook: Path, output: Path, parameters: Mapping[str, object]) -> Run:
    """Execute one notebook into `output`/notebooks and render `output`/NAME.html. Its failure is in the Run."""
    name, path, recorded = notebook.stem, notebook.absolute(), len(read_records())
    place = output / ATTEMPTS / name
    outcome = Attempt(Job(path, parameters, place, folder=path.parent)).wait()
    executed, drawn, page = place / "notebook.ipynb", place / "figures", None
    content = nbformat.read(executed if executed.exists() else path, as_version=4)
    if executed.exists():
        page = f"{name}.html"
        with atomic(output / page) as file:
            file.write_text(render(content, name), encoding="utf-8")
        executed.replace(output / "notebooks" / notebook.name)
    figures = sorted(figure.stem for figure in drawn.glob("*.png"))
    if drawn.exists():
        shutil.copytree(drawn, output / "figures", dirs_exist_ok=True, copy_function=shutil.move)
    shutil.rmtree(place, ignore_errors=True)
    seconds, again, records = outcome.seconds or 0.0, command([notebook], parameters), read_records()[recorded:]
    return Run(name, title(content, name), seconds, again, dict(parameters), page, outcome.error, figures, records)
