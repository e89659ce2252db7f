"""The verb `compare`: a regression watch over two sets of records."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from llmlab.cli.options import Json
from llmlab.cli.terminal import check_file, console, write_json

if TYPE_CHECKING:
    import pandas as pd

COLOURS = {"better": "green", "worse": "red", "changed": "yellow"}


def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Before: a .jsonl file of records or a folder of them.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="After: the same.")],
    json_file: Json = None,
) -> None:
    """What changed beyond noise between two sets of records. Status 1 if something became worse."""
    check_file(json_file)
    from llmlab.measure import compare as records

    changes = records.compare(a, b)
    for key, rows in changes[changes["verdict"] != "equal"].groupby(list(records.KEY), sort=False, dropna=False):
        console.print(changes_table(records.title(key), rows))
    console.print("change: of A, with its 95 % interval; verdicts at 5 % over all metrics together (Holm)", style="dim")
    for note in changes.attrs["notes"]:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    counts = changes["verdict"].str.partition(":")[0].value_counts()
    console.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()), highlight=False)
    rows = json.loads(changes.to_json(orient="records", double_precision=15))
    write_json(json_file, {"a": str(a), "b": str(b), "notes": changes.attrs["notes"], "changes": rows})
    if "worse" in counts:
        raise typer.Exit(1)


def changes_table(title: str, rows: pd.DataFrame) -> Table:
    """The metrics of one run as a table: both sides, the change with its interval, the verdict."""
    table = Table(title=escape(title), title_justify="left")
    for column in ("metric", "A", "B", "change", "verdict"):
        table.add_column(column, justify="left" if column in ("metric", "verdict") else "right", overflow="fold")
    for row in rows.to_dict("records"):
        values = ("" if row[side] != row[side] else f"{row[side]:.4g} {row['unit']}".rstrip() for side in "ab")
        style = COLOURS.get(row["verdict"], "" if row["p"] >= 0 else "dim")
        table.add_row(*map(escape, (row["metric"], *values, _change(row), row["verdict"])), style=style)
    return table


def _change(row: dict[Hashable, Any]) -> str:
    if row["change"] != row["change"]:
        return ""
    form = "{:+.1%}" if row["scale"] == "ratio" else "{:+.3g}"
    change, *interval = (form.format(row[name]) for name in ("change", "change_low", "change_high"))
    return f"{change} [{', '.join(interval)}]" if row["p"] >= 0 else change
