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
    """Rows with the same keys as a table, maybe with a style of rich for each; nothing in them is taken as markup."""
    table = Table(title=escape(title), title_justify="left", caption=escape(caption), caption_justify="left")
    shown = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    for index, name in enumerate(rows[0]):
        numbers = all(cells[index][:1] in "+-0123456789" for cells in shown)
        table.add_column(escape(name), justify="right" if numbers else "left", overflow="fold")
    for cells, style in zip(shown, styles or [""] * len(rows), strict=True):
        table.add_row(*map(escape, cells), style=style)
    return table


def print_metrics(title: str, metrics: dict[str, Metric], protocol: str) -> None:
    """Print measurements as a table, the protocol below it."""
    rows = [
        {"metric": name, "value": m.value, "95 % interval": "" if m.low is None else f"{m.low:.4g} – {m.high:.4g}"}
        | {"unit": m.unit}
        for name, m in metrics.items()
    ]
    console.print(make_table(title, rows, caption=protocol))


def doctor_table(inventory: dict[str, Any]) -> Table:
    """The inventory of measure.environment as one table."""
    machine = inventory["hardware"]
    title = f"llmlab {inventory['llmlab']} ({inventory['commit'] or 'no checkout'})"
    table = Table("what", Column("here", overflow="fold"), title=title, title_justify="left")

    def row(what: str, here: str, style: str = "") -> None:
        table.add_row(escape(what), escape(here), style=style)

    def able(what: str, entry: dict[str, Any], words: tuple[str, str]) -> None:
        row(entry[what], f"{words[not entry['usable']]}: {entry['reason']}", "green" if entry["usable"] else "yellow")

    row("processor", f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']}")
    row("memory", f"{machine['memory'] / 2**30:.1f} GiB")
    row("system", f"{machine['system']}, Python {sys.version.split()[0]}")
    for gpu in machine["gpus"]:
        name = f"{gpu['name']}, capability {gpu['capability'] or 'unknown'}, {gpu['memory'] / 2**30:.0f} GiB"
        row("GPU", name if gpu["usable"] else f"{name}: not usable", "" if gpu["usable"] else "red")
    if not machine["gpus"]:
        row("GPU", "none")
    row("built-in model", inventory["builtin_model"]["where"])
    row("records, figures", str(home()))
    table.add_section()
    for name, version in inventory["libraries"].items():
        row(name, version or "not installed", "" if version else "dim")
    table.add_section()
    for kernel in inventory["kernels"]:
        able("kernel", kernel, ("usable", "no"))
    for operation, speed in inventory["fast"].items():
        row(operation, f"{speed['rate'] / 1e9:.1f} G{speed['unit']}")
    row("default dtype", inventory["default_dtype"])
    row("advice", inventory["advice"], "bold")
    for energy in inventory["energy"]:
        able("device", energy, ("measured", "not measured here"))
    table.add_section()
    for kept in inventory["checks"]:
        said = f"used: {kept['difference']:.1g} nats off the plain pass at most"
        said, style = (said, "green") if kept["passed"] else (f"not used: {kept['reason']}", "yellow")
        what = [kept["path"], kept["model"], kept["transformation"], kept["dtype"]]
        row(", ".join(name for name in what if name != "none"), said, style)
    return table
