"""The command line's verbs of the lab: notebooks run as a report or over a grid of their parameters."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from typer import Argument, Option

from llmlab.base.errors import InputError
from llmlab.base.paths import home
from llmlab.cli.options import Payload
from llmlab.cli.terminal import console, make_table, print_line

if TYPE_CHECKING:
    from llmlab.lab.report import Run

COLOURS = {"finished": "", "failed": "red", "interrupted": "yellow", "waiting": "dim"}
METRICS = 4  # columns of the sweep's table; --json has all


def report(
    notebooks: Annotated[list[str] | None, Argument(help="Names, numbers or paths; by default all.")] = None,
    output: Annotated[Path | None, Option(help="Folder of the report; by default report/.")] = None,
    parameter: Annotated[
        list[str] | None, Option("--parameter", "-p", help="NAME=VALUE (JSON or text) for the notebooks.")
    ] = None,
    pdf: Annotated[bool, Option("--pdf", help="Print every page to a PDF, too (needs Chromium).")] = False,
) -> Payload:
    """Run notebooks with papermill and render them to HTML with an index page. Status 1 if a notebook failed."""
    with _demo_packages("report"):
        from llmlab.lab import report as lab

    values = dict(map(_name_and_value, parameter or []))
    chosen = lab.find_notebooks(notebooks or [])
    folder = output or home() / "report"
    started: list[str] = []
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as live:
        line = live.add_task("")

        def start(name: str) -> None:
            started.append(name)
            what = f"{len(started)} of {len(chosen)}, {name}: running, {len(chosen) - len(started)} to come"
            live.reset(line, description=what)
            if not console.is_terminal:  # a log has no line that lives
                print_line(what)

        def end(run: Run) -> None:
            state, style = ("failed", "red") if run.failed else ("finished", "green")
            print_line(f"{len(started)} of {len(chosen)}, {run.name}: {state} in {run.seconds:.1f} s", style)
            if run.error:
                print_line(f"    {run.error}")

        runs = lab.report(chosen, output=folder, parameters=values, pdf=pdf, on_start=start, on_end=end)
    index = folder / "index.html"
    print_line(f"report:   {index}")
    return {"index": str(index), "runs": [asdict(run) for run in runs], "failed": sum(run.failed for run in runs)}


def sweep(
    grid: Annotated[Path, Argument(metavar="GRID.yaml", help="Notebook, parameters, and limits of each run.")],
    output: Annotated[Path | None, Option(help="Folder of the runs; by default data/runs/sweeps/GRID.")] = None,
    executor: Annotated[str, Option(help="local or ray.")] = "local",
    address: Annotated[str | None, Option(help="Of a Ray cluster; by default a local Ray is started.")] = None,
    retry_failed: Annotated[bool, Option("--retry-failed", help="Run again what failed before.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="List the runs and how they stand; run none.")] = False,
) -> Payload:
    """Run a notebook over a grid of its parameters, each run in its own process; status 1 if one has no result.

    Finished runs are skipped: a killed sweep that is started again goes on. The file names a `notebook` and has `grid`
    (parameter names with lists of values: all combinations) or `list` (combinations written out); it may have
    `exclude`, `fixed`, and for each run `timeout` (seconds), `memory` (4GiB), `cores` and `gpus`.
    """
    with _demo_packages("sweep"):
        from llmlab.lab import sweep as lab

    if dry_run:
        frame = lab.status(grid, output=output)
    else:
        frame = lab.sweep(grid, output=output, executor=executor, address=address, retry_failed=retry_failed)
    columns = ["run", *frame.attrs["varying"], "status", "seconds", *frame.attrs["metrics"][:METRICS]]
    columns += ["error"] if frame["error"].notna().any() else []
    rows = frame[columns].astype(object).where(frame.notna(), "").to_dict("records")
    styles = [COLOURS[status] for status in frame["status"]]
    console.print(make_table(f"{grid.stem}: {len(frame)} runs", rows, styles=styles))
    counts = ", ".join(f"{count} {status}" for status, count in frame["status"].value_counts().items())
    folder = Path(frame["folder"].iloc[0]).parent
    print_line(f"{counts}; runs: {folder}")
    failed = 0 if dry_run else int((frame["status"] != "finished").sum())
    return {"output": str(folder), "runs": json.loads(frame.to_json(orient="records")), "failed": failed}


def _name_and_value(pair: str) -> tuple[str, object]:
    """A parameter NAME=VALUE: its value as JSON or, where it is none, as text."""
    name, equals, value = pair.partition("=")
    if not name or not equals:
        raise InputError(f"parameter {pair!r}: write NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


@contextmanager
def _demo_packages(verb: str) -> Iterator[None]:
    """Turns a package that is not installed into a sentence that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(f"the {verb} needs the package {error.name}: run pip install 'llmlab[demo]'.") from None
