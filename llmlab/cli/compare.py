"""The verb `compare`: a regression watch over two sets of records."""

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any

from typer import Argument

from llmlab.cli.options import Payload
from llmlab.cli.terminal import console, make_table, print_line

COLOURS = {"better": "green", "worse": "red", "changed": "yellow"}


def compare(
    a: Annotated[Path, Argument(metavar="A", help="Before: a .jsonl file of records or a folder of them.")],
    b: Annotated[Path, Argument(metavar="B", help="After: the same.")],
) -> Payload:
    """What changed beyond noise between two sets of records. Status 1 if something became worse."""
    from llmlab.measure import compare as records

    changes = records.compare(a, b)
    for key, part in changes[changes["verdict"] != "equal"].groupby(list(records.KEY), sort=False, dropna=False):
        rows = part.to_dict("records")
        styles = [COLOURS.get(row["verdict"], "" if row["p"] >= 0 else "dim") for row in rows]
        console.print(make_table(records.title(key), [_shown(row) for row in rows], styles=styles))
    print_line("change: of A, with its 95 % interval; verdicts at 5 % over all metrics together (Holm)", "dim")
    for note in changes.attrs["notes"]:
        print_line(f"note: {note}", "yellow")
    counts = changes["verdict"].str.partition(":")[0].value_counts()
    print_line(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    told = json.loads(changes.to_json(orient="records", double_precision=15))
    worse = int(counts.get("worse", 0))
    return {"a": str(a), "b": str(b), "notes": changes.attrs["notes"], "changes": told, "failed": worse}


def _shown(row: dict[Hashable, Any]) -> dict[str, object]:
    """Both sides, the change with its interval, the verdict; blank what is missing (NaN)."""
    sides = {side.upper(): "" if row[side] != row[side] else f"{row[side]:.4g} {row['unit']}".rstrip() for side in "ab"}
    form = "{:+.1%}" if row["scale"] == "ratio" else "{:+.3g}"
    change, *interval = (form.format(row[name]) for name in ("change", "change_low", "change_high"))
    change = "" if row["change"] != row["change"] else f"{change} [{', '.join(interval)}]" if row["p"] >= 0 else change
    return {"metric": row["metric"]} | sides | {"change": change, "verdict": row["verdict"]}
