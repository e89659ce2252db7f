"""Notebooks to a report: papermill runs them, nbconvert renders them, one index page ties them together."""

from __future__ import annotations

import datetime
import re
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import nbformat
import papermill
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError
from PIL import Image

from llmlab.errors import InputError
from llmlab.measure.challenge import Submission
from llmlab.measure.environment import cpu_name, git_commit, gpus, hardware, versions
from llmlab.measure.record import Record
from llmlab.paths import PACKAGE, atomic, check_writable, home

TEMPLATES = PACKAGE / "lab" / "templates"


@dataclass(frozen=True)
class Run:
    """One executed notebook. `page` is its HTML beside the index; `error` is one line if it failed."""

    name: str
    title: str
    seconds: float
    parameters: dict[str, Any] = field(default_factory=dict)
    page: str | None = None
    error: str | None = None

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
    on_start: Callable[[str], None] = lambda name: None,
    on_end: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """Run notebooks one after another and write their pages and `index.html` into `output`.

    A notebook that fails leaves its executed copy, traceback included, and the others still run.

    Args:
        notebooks: from `find_notebooks`; they run in their own folder.
        output: the report's folder; executed copies go to `output`/notebooks.
        parameters: values for every one of the notebooks; each must have a parameter of each name.
        on_start, on_end: called around each notebook.

    Returns:
        One Run per notebook, failed ones included.

    Raises:
        InputError: before the first notebook runs: an unknown parameter, an unreadable notebook, an unwritable folder.
    """
    parameters = parameters or {}
    for notebook in notebooks:
        check_parameters(notebook, parameters)
    check_writable(output / "notebooks")
    check_writable(home() / "figures")
    begin = time.time()
    runs = []
    for notebook in notebooks:
        on_start(notebook.stem)
        run = run_notebook(notebook, output, parameters)
        runs.append(run)
        on_end(run)
    write_index(runs, output, seconds=time.time() - begin, since=begin)
    return runs


def run_notebook(notebook: Path, output: Path, parameters: dict[str, Any]) -> Run:
    """Execute one notebook into `output`/notebooks and render `output`/NAME.html. Its failure is in the Run."""
    executed = output / "notebooks" / notebook.name
    begin = time.perf_counter()
    error = None
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters=parameters,
            cwd=str(notebook.parent),
            progress_bar=False,
            coalesce_streams=True,  # a progress bar leaves its last state, not a line per refresh
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
    except PapermillExecutionError as failure:
        error = f"{failure.ename}: {failure.evalue}"
    except Exception as failure:  # a kernel that dies or cannot start: reported, and the others still run
        error = f"{type(failure).__name__}: {' '.join(str(failure).split())}"
    seconds = time.perf_counter() - begin
    page = None
    source = executed if executed.exists() else notebook
    content = nbformat.read(source, as_version=4)
    if executed.exists():
        page = f"{notebook.stem}.html"
        with atomic(output / page) as path:
            path.write_text(render(content, notebook.stem), encoding="utf-8")
    return Run(notebook.stem, _title(content, notebook.stem), seconds, parameters, page, error)


def render(content: Any, name: str) -> str:
    """A notebook as one HTML page that asks nothing of the network; outputs are escaped by nbconvert."""
    for cell in content.cells:
        if cell.cell_type == "markdown":  # notebooks link to one another; in the report their pages do
            cell.source = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.html)", cell.source)
    exporter = HTMLExporter(template_name="llmlab", extra_template_basedirs=[str(TEMPLATES)], embed_images=True)
    body, _ = exporter.from_notebook_node(content, resources={"metadata": {"name": name}})
    return str(body)


def write_index(runs: Sequence[Run], output: Path, *, seconds: float, since: float) -> Path:
    """The page that ties the report together: notebooks, figures drawn since `since`, environment, command."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        runs=runs,
        seconds=seconds,
        figures=_copy_figures(output, since),
        environment=_environment_rows(),
        time=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        command=_command(runs),
    )
    with atomic(output / "index.html") as path:
        path.write_text(page, encoding="utf-8")
    return output / "index.html"


def write_challenge_page(submission: Submission, record: Record, output: Path) -> Path:
    """One page about one run of the challenge's job: challenge.html in `output`."""
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    page = environment.get_template("challenge.html.j2").render(submission=submission, record=record)
    with atomic(output / "challenge.html") as path:
        path.write_text(page, encoding="utf-8")
    return output / "challenge.html"


def _copy_figures(output: Path, since: float) -> list[dict[str, str]]:
    """Copy the figures that this run drew beside the index, so that the folder can be moved."""
    target = output / "figures"
    target.mkdir(parents=True, exist_ok=True)
    found = []
    for png in sorted((home() / "figures").glob("*.png")):
        if png.stat().st_mtime < since - 1:
            continue
        with Image.open(png) as image:
            alt = str(image.info.get("Description", png.stem))
        for file in (png, png.with_suffix(".svg")):
            shutil.copy2(file, target / file.name)
        found.append({"png": f"figures/{png.name}", "svg": f"figures/{png.stem}.svg", "alt": alt})
    return found


def _environment_rows() -> list[tuple[str, str]]:
    machine = hardware()
    cards = ", ".join(f"{gpu['name']} ({gpu['memory'] / 2**30:.0f} GiB)" for gpu in gpus()) or "none"
    rows = [
        ("processor", f"{cpu_name()}, {machine['cores']} cores, {machine['cpu_capability']}"),
        ("memory", f"{machine['memory'] / 2**30:.1f} GiB"),
        ("GPUs", cards),
        ("system", machine["system"]),
        ("llmlab commit", git_commit() or "not a checkout"),
    ]
    return rows + list(versions((*("papermill", "nbconvert"), "torch", "transformers", "numpy")).items())


def _command(runs: Sequence[Run]) -> str:
    parts = ["llmlab", "report", *(run.name for run in runs)]
    for name, value in (runs[0].parameters if runs else {}).items():
        parts += ["-p", f"{name}={value}"]
    return shlex.join(parts)


def _title(content: Any, name: str) -> str:
    """The notebook's first heading."""
    for cell in content.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("# "):
            return str(cell.source.splitlines()[0].removeprefix("# "))
    return name
