"""The trade-off explorer: any two metrics of records against each other, filtered, within a budget."""

import itertools
import math

import ipywidgets
import pandas as pd

from llmlab.base.errors import InputError
from llmlab.lab.figures import tradeoffs as trade
from llmlab.lab.widgets.view import Twin, View, dropdown, slider

FILTERS = ("task", "model", "transformation", "dtype", "device")
QUALITY = ("acc_norm", "acc", "perplexity")
LOSSES = (0.0, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)
ABOUT = ("model", "transformation", "dtype", "device", "n", "protocol", "time", "id")


def tradeoff_explorer(
    frame: pd.DataFrame, *, x: str | None = None, y: str | None = None, name: str = "trade_offs"
) -> View:
    """Records over two metrics with their Pareto front; the mouse over a point shows its record.

    Controls: `x` and `y`, the metrics, to begin with quality upwards and the first metric that goes with it; `x_budget`
    and `y_budget`, how much worse than the best a record may be; and a filter for each of task, model, transformation,
    dtype and device in which the records (from `llmlab.records()`) differ. `name` is of the figure that stands in.

    Raises InputError for an unknown metric or records that have no two metrics in one row.
    """
    known = trade.metrics(frame)
    for metric in (x, y):
        if metric is not None and metric not in known:
            raise InputError(f"unknown metric {metric!r}: the records have {', '.join(known) or 'none'}.")
    x, y = _first_pair(frame, known, x, y)

    def make() -> dict[str, ipywidgets.ValueWidget]:
        controls = {"x": dropdown("x", known, value=x), "y": dropdown("y", known, value=y)}
        losses = [*((f"{loss * 100:g} %", loss) for loss in LOSSES), ("any", math.inf)]
        for axis in ("x", "y"):
            controls[f"{axis}_budget"] = slider(f"{axis} worse than best by at most", losses, value=math.inf)
        for column in FILTERS:
            values = sorted(map(str, frame[column].dropna().unique())) if column in frame else []
            if len(values) > 1:
                controls[column] = dropdown(column, ["all", *values])
        return controls

    def draw(x: str, y: str, x_budget: float, y_budget: float, **filters: str) -> str:
        chosen = frame
        for column, value in filters.items():
            chosen = chosen if value == "all" else chosen[chosen[column].astype(str) == value]
        records = trade.with_both(chosen, x, y)
        losses = {x: x_budget, y: y_budget}
        budgets = {m: trade.worst_allowed(records, m, loss) for m, loss in losses.items() if loss < math.inf}
        labels, inside = trade.names(records), trade.within(records, budgets)
        best = records[trade.pareto(records, x, y) & inside].sort_values(x).index
        columns = {metric.replace("_", " "): [_value(records, place, metric) for place in best] for metric in (x, y)}
        table = pd.DataFrame({"record": [labels[place] for place in best]} | columns)
        counted = f"<p>{inside.sum()} of {len(records)} records within the budget. Of these, on the front:</p>"
        hover = {f"record-{place}": _record(records, place, label) for place, label in enumerate(labels)}
        drawn = _twin(name, records, x, y, budgets).svg(hover)
        return drawn + counted + (table.to_html(index=False, border=0, justify="left") if len(table) else "")

    return View(make, draw, [_twin(name, trade.with_both(frame, x, y), x, y, {})])


def _first_pair(frame: pd.DataFrame, known: list[str], x: str | None, y: str | None) -> tuple[str, str]:
    """The metrics asked for, or the first two that stand in one row: quality upwards, something with a unit below."""
    units = frame.attrs.get("units", {})
    upwards = [y] if y else [m for m in QUALITY if m in known] + [m for m in known if m not in QUALITY]
    below = [x] if x else sorted(known, key=lambda m: (m in QUALITY, not units.get(m)))
    for second, first in itertools.product(upwards, below):
        if first != second and (frame[first].notna() & frame[second].notna()).any():
            return first, second
    raise InputError("no record has two metrics to compare: join the records of one combination into one row.")


def _twin(name: str, records: pd.DataFrame, x: str, y: str, budgets: dict[str, float]) -> Twin:
    front, names = trade.pareto(records, x, y), trade.names(records)
    title = f"{y.replace('_', ' ')} against {x.replace('_', ' ')}: {front.sum()} of {len(records)} on the Pareto front"
    drawn = f"{trade.label(records, y)} over {trade.label(records, x)} of {len(records)} records"
    alt = f"{drawn}. Not dominated: {'; '.join(names[place] for place in records[front].sort_values(x).index)}."
    return Twin(name, alt, lambda: trade.pareto_front(records, x, y, title, budgets))


def _value(records: pd.DataFrame, place: int, metric: str) -> str:
    row, unit = records.iloc[place], records.attrs.get("units", {}).get(metric, "")
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    return f"{row[metric]:.4g}{f' [{low:.4g}, {high:.4g}]' if pd.notna(low) else ''} {unit}".strip()


def _record(records: pd.DataFrame, place: int, name: str) -> str:
    """A record in lines: its name, its metrics, how it was made."""
    row = records.iloc[place].dropna()
    measured = [f"{m}: {_value(records, place, m)}" for m in trade.metrics(records) if m in row]
    return "\n".join([name, *measured, *(f"{column}: {row[column]}" for column in ABOUT if column in row)])
