"""Notebooks to a report: papermill runs them, nbconvert renders them, one index page ties them together."""

import json
import re
import shutil
import time
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path

import nbformat

from llmlab.base.errors import InputError, Interrupted
from llmlab.base.paths import atomic, check_writable
from llmlab.lab.attempt import ATTEMPTS, Attempt, Job, alone
from llmlab.lab.notebooks import check_parameters, command
from llmlab.lab.report.course import lesson
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
    """Run notebooks one after another, each in its own folder, and write their pages and `index.html` into `output`.

    Executed copies go to `output`/notebooks, a failed one's with its traceback, figures to `output`/figures. The
    `parameters` (JSON values) are for every notebook; `pdf` prints every page as well; `on_start` and `on_end` are
    called around each notebook. Returns one Run per notebook, failed ones included.

    Raises:
        InputError: before the first notebook runs: an unknown parameter, an unreadable notebook, an unwritable folder,
            a notebook that would be overwritten, another report at work in the folder, a PDF without Chromium.
        Interrupted: by Ctrl-C or SIGTERM; nothing is left running, and the index shows the notebooks that finished.
    """
    parameters, output, chromium = parameters or {}, output.absolute(), find_chromium() if pdf else None
    for notebook in notebooks:
        check_parameters(notebook, parameters)
    check_copies(output / "notebooks", notebooks)
    for folder in ("notebooks", "figures"):
        check_writable(output / folder)
    begin, runs, names = time.perf_counter(), list[Run](), page_names(notebooks)

    def write() -> Path:
        seconds = time.perf_counter() - begin
        return write_index(runs, output, seconds=seconds, command=command(notebooks, parameters))

    with alone(output, "report"):
        shutil.rmtree(output / ATTEMPTS, ignore_errors=True)  # what a killed one left
        for notebook, name in names.items():
            on_start(name)
            started = time.perf_counter()
            try:
                runs.append(run_notebook(notebook, names, output, parameters))
            except KeyboardInterrupt:
                where = f"{name} after {time.perf_counter() - started:.0f} s"
                finished = f"{len(runs)} of {len(notebooks)} notebooks are in {write()}"
                raise Interrupted(f"interrupted in {where}; {finished}.") from None
            on_end(runs[-1])
        index = write()
        for page in [index, *(output / run.page for run in runs if run.page)] if chromium else []:
            write_pdf(str(chromium), page)
    return runs


def check_copies(folder: Path, notebooks: Iterable[Path]) -> None:
    """Raise InputError if a folder for executed copies holds a notebook that no report wrote, or one to be run."""
    sources = {notebook.resolve() for notebook in notebooks}
    for path in folder.glob("*.ipynb"):
        try:
            copied = "papermill" in json.loads(path.read_bytes())["metadata"]
        except (OSError, ValueError, LookupError, TypeError):
            copied = False
        if not copied or path.resolve() in sources:
            raise InputError(f"the executed copies would go to {folder}, where {path.name} is: give another --output.")


def page_names(notebooks: Iterable[Path]) -> dict[Path, str]:
    """Each notebook's name in the report: its file's, less what Windows forbids, numbered where it is taken."""
    names: dict[Path, str] = {}
    taken = {"index", "challenge"}  # pages of their own

    def key(name: str) -> str:  # some file systems take names that differ in case or in how é is written for one
        return unicodedata.normalize("NFC", name).casefold()

    for notebook in notebooks:
        name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", notebook.stem)
        numbered = (name if k == 1 else f"{name}-{k}" for k in count(1))
        names[notebook] = next(free for free in numbered if key(free) not in taken)
        taken.add(key(names[notebook]))
    return names


def run_notebook(
    notebook: Path, names: Mapping[Path, str], output: Path, parameters: Mapping[str, object]
) -> Run:  # fmt: skip
    """Execute one notebook into `output`/notebooks and render `output`/NAME.html. Its failure is in the Run."""
    name, path = names[notebook], notebook.absolute()
    place = output / ATTEMPTS / name
    attempt = Attempt(Job(path, parameters, place, folder=path.parent))
    outcome = attempt.wait()
    executed, drawn, page = place / "notebook.ipynb", place / "figures", None
    content = nbformat.read(executed if executed.exists() else path, as_version=4)
    figures, again = sorted(figure.stem for figure in drawn.glob("*.png")), command([notebook], parameters)
    pages = {other.resolve(): f"{its}.html" for other, its in names.items()}
    if executed.exists():
        page = f"{name}.html"
        with atomic(output / page) as file:
            file.write_text(render(content, name, path.parent, pages, dict.fromkeys(figures, again)), encoding="utf-8")
        executed.replace(output / "notebooks" / f"{name}.ipynb")
    if drawn.exists():
        shutil.copytree(drawn, output / "figures", dirs_exist_ok=True, copy_function=shutil.move)
    shutil.rmtree(place, ignore_errors=True)
    records = [row for row in read_records() if row.get("attempt") == attempt.work.name]
    return Run(
        name, title(content, name), lesson(content, path, pages), outcome.seconds or 0.0, again, dict(parameters), page,
        outcome.error, figures, records,
    )  # fmt: skip
