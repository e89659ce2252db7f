"""What the command line prints and the files that it writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic, check_writable, home

if TYPE_CHECKING:
    from llmlab.base.stats import Metric

console = Console()


def check_file(json_file: Path | None) -> None:
    """Raise InputError if --json cannot be written at the end."""
    if json_file is not None:
        if json_file.is_dir():
            raise InputError(f"--json {json_file} is a folder: give the name of a file.")
        check_writable(json_file.absolute().parent)


def write_json(path: Path | None, payload: dict[str, Any]) -> None:
    """Write the file of --json, whole or not at all; nothing without one."""
    if path is not None:
        with atomic(path.absolute()) as temporary:
            temporary.write_text(json.dumps(payload, indent=1, default=str) + "\n", encoding="utf-8")


def print_line(text: object, style: str = "") -> None:
    """Print a text as it is: nothing in it is markup, and the console breaks no line."""
    console.print(str(text), style=style, markup=False, highlight=False, soft_wrap=True)


def make_table(
    title: str, rows: Sequence[Mapping[Any, object]], *, caption: str = "", styles: Sequence[str] = ()
) -> Table:
    """Rows with the same keys as a table: numbers to the right, four digits of a float, nothing taken as markup.

    `styles` has a style of rich for each row; without it all are plain.
    """
    table = Table(title=escape(title), title_justify="left", caption=escape(caption), caption_justify="left")
    shown = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    for index, column in enumerate(rows[0]):
        numbers = all(cells[index][:1] in "+-0123456789" for cells in shown)
        table.add_column(escape(column), justify="right" if numbers else "left", overflow="fold")
    for cells, style in zip(shown, styles or [""] * len(rows), strict=True):
        table.add_row(*map(escape, cells), style=style)
    return table


def print_metrics(title: str, metrics: dict[str, Metric], protocol: str) -> None:
    """Print measurements as a table, the protocol below it."""
    rows: list[dict[str, object]] = []
    for name, metric in metrics.items():
        interval = "" if metric.low is None or metric.high is None else f"{metric.low:.4g} – {metric.high:.4g}"
        rows.append({"metric": name, "value": metric.value, "95 % interval": interval, "unit": metric.unit})
    console.print(make_table(title, rows, caption=protocol))


def doctor_table(found: dict[str, Any]) -> Table:
    """The inventory of measure.environment as one table."""
    machine = found["hardware"]
    title = f"llmlab {found['llmlab']} ({found['commit'] or 'no checkout'})"
    table = Table("what", Column("here", overflow="fold"), title=title, title_justify="left")

    def row(what: str, here: str, style: str = "") -> None:
        table.add_row(escape(what), escape(here), style=style)

    row("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}")
    row("memory", f"{machine['memory'] / 2**30:.1f} GiB")
    row("system", f"{machine['system']}, Python {sys.version.split()[0]}")
    for gpu in machine["gpus"]:
        name = f"{gpu['name']}, capability {gpu['capability'] or 'unknown'}, {gpu['memory'] / 2**30:.0f} GiB"
        row("GPU", name if gpu["usable"] else f"{name}: not usable", "" if gpu["usable"] else "red")
    if not machine["gpus"]:
        row("GPU", "none")
    row("built-in model", found["builtin_model"]["where"])
    row("records, figures", str(home()))
    table.add_section()
    for name, version in found["libraries"].items():
        row(name, version or "not installed", "" if version else "dim")
    table.add_section()
    for kernel in found["kernels"]:
        answer, style = ("usable", "green") if kernel["usable"] else ("no", "yellow")
        row(kernel["kernel"], f"{answer}: {kernel['reason']}", style)
    for operation, speed in found["fast"].items():
        row(operation, f"{speed['rate'] / 1e9:.1f} G{speed['unit']}")
    row("default dtype", found["default_dtype"])
    row("advice", found["advice"], "bold")
    for energy in found["energy"]:
        answer, style = ("measured", "green") if energy["usable"] else ("not measured here", "yellow")
        row(energy["device"], f"{answer}: {energy['reason']}", style)
    return table
