"""What the command line prints and the files that it writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic, check_writable, home

if TYPE_CHECKING:
    import pandas as pd

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


def print_metrics(title: str, metrics: dict[str, Metric], protocol: str) -> None:
    """Print measurements as a table, the protocol below it."""
    table = Table(title=escape(title), title_justify="left", caption=escape(protocol), caption_justify="left")
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("unit")
    for name, metric in metrics.items():
        interval = "" if metric.low is None or metric.high is None else f"{metric.low:.4g} – {metric.high:.4g}"
        table.add_row(name, f"{metric.value:.4g}", interval, metric.unit)
    console.print(table)


def plan_table(title: str, frame: pd.DataFrame) -> Table:
    """A plan's layouts as a table; what does not fit is dimmed."""
    table = Table(
        title=escape(title), title_justify="left", caption="GiB on the fullest device", caption_justify="left"
    )
    for column in frame.columns:
        table.add_column(str(column), justify="left" if column in ("layout", "verdict") else "right")
    for row in frame.itertuples(index=False):
        cells = [f"{value:.2f}" if isinstance(value, float) else str(value) for value in row]
        table.add_row(*map(escape, cells), style="dim" if cells[-1] != "fits" else "")
    return table


def ablation_table(steps: list[dict[str, Any]]) -> Table:
    """The ablation's steps, each keeping the ones before it."""
    table = Table(title="ablation (every step keeps the ones before it)", title_justify="left")
    for column in ("step", "dtype", "tokens", "padding", "seconds", "speed", "MFU", "max |Δ|"):
        table.add_column(column, justify="left" if column in ("step", "dtype") else "right")
    for step in steps:
        table.add_row(
            escape(step["step"]),
            step["dtype"],
            f"{step['tokens']:,}",
            f"{step['padding']:.1%}",
            f"{step['seconds']:.2f}",
            f"{step['speedup']:.2f}x",
            f"{step['mfu']:.0%}",
            f"{step['max_abs_delta']:.1g}",
        )
    return table


def doctor_table(found: dict[str, Any]) -> Table:
    """The inventory of measure.environment as one table."""
    machine = found["hardware"]
    table = Table(title=f"llmlab {found['llmlab']} ({found['commit'] or 'no checkout'})", title_justify="left")
    table.add_column("what")
    table.add_column("here", overflow="fold")

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
        usable = kernel["usable"]
        row(kernel["kernel"], f"{'usable' if usable else 'no'}: {kernel['reason']}", "green" if usable else "yellow")
    for operation, speed in found["fast"].items():
        row(operation, f"{speed['rate'] / 1e9:.1f} G{speed['unit']}")
    row("default dtype", found["default_dtype"])
    row("advice", found["advice"], "bold")
    for energy in found["energy"]:
        usable = energy["usable"]
        answer = "measured" if usable else "not measured here"
        row(energy["device"], f"{answer}: {energy['reason']}", "green" if usable else "yellow")
    return table
