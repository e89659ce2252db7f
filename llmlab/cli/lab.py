"""The command line's verbs of the lab: notebooks run as a report or over a grid of their parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from llmlab.base.errors import InputError
from llmlab.base.paths import home
from llmlab.cli.options import Json
from llmlab.cli.terminal import check_file, console, write_json

if TYPE_CHECKING:
    import pandas as pd

    from llmlab.lab.report import Run

COLOURS = {"finished": "", "failed": "red", "interrupted": "yellow", "waiting": "dim"}
METRICS = 4  # columns of the sweep's table; --json has all


def report(
    notebooks: Annotated[list[str] | None, typer.Argument(help="Names, numbers or paths; by default all.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the report; by default report/.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="NAME=VALUE (JSON or text) for the notebooks.")
    ] = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="Print every page to a PDF, too (needs Chromium).")] = False,
    json_file: Json = None,
) -> None:
    """Run notebooks with papermill and render them to HTML with an index page. Status 1 if a notebook failed."""
    check_file(json_file)
    try:
        from llmlab.lab import report as lab
    except ModuleNotFoundError as error:
        raise InputError(f"the report needs the package {error.name}: run pip install 'llmlab[demo]'.") from None

    values = _parameters(parameter or [])
    chosen = lab.find_notebooks(notebooks or [])
    folder = output or home() / "report"

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as live:
        names: list[str] = []
        line = live.add_task("")

        def start(name: str) -> None:
            names.append(name)
            what = f"{len(names)} of {len(chosen)}, {name}: running, {len(chosen) - len(names)} to come"
            live.reset(line, description=what)
            if not console.is_terminal:  # a log has no line that lives
                console.print(what, highlight=False, soft_wrap=True)

        def end(run: Run) -> None:
            state = "[red]failed[/red]" if run.failed else "[green]finished[/green]"
            console.print(f"{len(names)} of {len(chosen)}, {run.name}: {state} in {run.seconds:.1f} s", highlight=False)
            if run.error:
                console.print(f"    {run.error}", markup=False, highlight=False)

        runs = lab.report(chosen, output=folder, parameters=values, pdf=pdf, on_start=start, on_end=end)
    console.print(f"report:   {folder / 'index.html'}", highlight=False, soft_wrap=True)
    write_json(json_file, {"index": str(folder / "index.html"), "runs": [vars(run) for run in runs]})
    if any(run.failed for run in runs):
        raise typer.Exit(1)


def sweep(
    grid: Annotated[Path, typer.Argument(metavar="GRID.yaml", help="Notebook, parameters, and limits of each run.")],
    output: Annotated[Path | None, typer.Option(help="Folder of the runs; by default data/runs/sweeps/GRID.")] = None,
    executor: Annotated[str, typer.Option(help="local or ray.")] = "local",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster; by default a local Ray is started.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what failed before.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs and how they stand; run none.")] = False,
    json_file: Json = None,
) -> None:
    """Run a notebook over a grid of its parameters, each run in its own process; status 1 if one has no result.

    Finished runs are skipped: a killed sweep that is started again goes on. The file names a `notebook` and has `grid`
    (parameter names with lists of values: all combinations) or `list` (combinations written out); it may have
    `exclude`, `fixed`, and for each run `timeout` (seconds), `memory` (4GiB), `cores` and `gpus`.
    """
    check_file(json_file)
    try:
        from llmlab.lab import sweep as lab
    except ModuleNotFoundError as error:
        raise InputError(f"the sweep needs the package {error.name}: run pip install 'llmlab[demo]'.") from None

    if dry_run:
        frame = lab.status(grid, output=output)
    else:
        frame = lab.sweep(grid, output=output, executor=executor, address=address, retry_failed=retry_failed)
    console.print(_sweep_table(f"{grid.stem}: {len(frame)} runs", frame))
    counts = ", ".join(f"{count} {status}" for status, count in frame["status"].value_counts().items())
    folder = Path(frame["folder"].iloc[0]).parent
    console.print(f"{counts}; runs: {folder}", highlight=False, markup=False, soft_wrap=True)
    write_json(json_file, {"output": str(folder), "runs": json.loads(frame.to_json(orient="records"))})
    if not dry_run and (frame["status"] != "finished").any():
        raise typer.Exit(1)


def _sweep_table(title: str, frame: pd.DataFrame) -> Table:
    """The parameters that vary, how each run stands, its first metrics and what went wrong."""
    metrics, failed = frame.attrs["metrics"][:METRICS], frame["error"].notna().any()
    table = Table(title=escape(title), title_justify="left")
    for column in ("run", *frame.attrs["varying"], "status"):
        table.add_column(escape(column), overflow="fold")
    for column in ("seconds", *metrics):
        table.add_column(escape(column), justify="right")
    if failed:
        table.add_column("error", overflow="fold")
    for row in frame.astype(object).where(frame.notna(), None).to_dict("records"):
        numbers = ["" if row[name] is None else f"{row[name]:.4g}" for name in ("seconds", *metrics)]
        cells = [row["run"], *(str(row[name]) for name in frame.attrs["varying"]), row["status"], *numbers]
        cells += [row["error"] or ""] if failed else []
        table.add_row(*map(escape, cells), style=COLOURS[row["status"]])
    return table


def _parameters(pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise InputError(f"parameter {pair!r}: write NAME=VALUE.")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
