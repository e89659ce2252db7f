"""What papers measured, to stand beside ours: data/published/*.csv, with its datasheet in data/README.md."""

from __future__ import annotations

import pandas as pd

from llmlab.base.errors import InputError
from llmlab.base.paths import builtin_data

TABLES = ("quantization", "speculation", "formulas")
UNITS = {  # of each metric
    "perplexity": "",
    "mse": "",
    "acceptance rate": "",
    "speed-up": "x",
    "tokens a pass": "tokens",
    "latency": "ms/token",
    "time to quantize": "min",
}
STATUS = ("checked", "quoted")  # against the paper's own text; from somebody who read it
TYPES = {"table": "str", "bits": "Int64", "group": "Int64", "value": "float64", "year": "int64", "arxiv": "str"}


def published(name: str, /, **where: object) -> pd.DataFrame:
    """Rows of a table of published figures, with the `authors`, `year` and `arxiv` number of each paper.

    Columns of "quantization" and "speculation": `paper`, `table`, `model`, `method`, `bits` and `group` (Int64; -1 is
    a whole row, missing where there is none), `task`, `metric`, `value`, `unit`, `status` ("checked" against the
    paper's own text, or "quoted"); of "formulas": `paper`, `table`, `quantity`, `formula` (for `pandas.eval`),
    `symbols`, `status`.

    Args:
        name: "quantization", "speculation" or "formulas".
        where: columns and the value that they must have, such as `paper="GPTQ", bits=4`.

    Raises InputError for an unknown table or column.
    """
    if name not in TABLES:
        raise InputError(f"unknown table {name!r} of published figures: choose one of {', '.join(TABLES)}.")
    rows = _read(name).merge(_read("papers"), on="paper", validate="many_to_one")
    if "metric" in rows:
        rows.insert(list(rows.columns).index("value") + 1, "unit", rows["metric"].map(UNITS))
    if unknown := where.keys() - set(rows.columns):
        raise InputError(f"the table {name} has no column {unknown.pop()!r}: choose among {', '.join(rows.columns)}.")
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows.reset_index(drop=True)


def _read(name: str) -> pd.DataFrame:
    path = builtin_data(f"published/{name}.csv")
    columns = pd.read_csv(path, nrows=0).columns
    return pd.read_csv(path, dtype={column: TYPES[column] for column in columns if column in TYPES})
