"""Trade-offs among records: which are worth using (the Pareto front), named and drawn with their uncertainty."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import fields

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from llmlab.base.errors import InputError
from llmlab.lab.figures import draw
from llmlab.measure.direction import direction
from llmlab.measure.record import Record

LIGHT = "#B8B8B8"
RECORD = {f.name for f in fields(Record)}
SAME = {"id", "time", "commit", "protocol", "data", "revision", "seed", "n", "repeats", "warmup", "cpu"}


def metrics(frame: pd.DataFrame) -> list[str]:
    """Columns of records that are measurements: numbers that are neither interval bounds nor settings of the run."""
    numbers = frame.select_dtypes("number").columns
    bounds = {f"{name}_{end}" for name in numbers for end in ("low", "high")}
    return [name for name in numbers if name not in bounds | RECORD and frame[name].notna().any()]


def pareto(frame: pd.DataFrame, x: str, y: str) -> pd.Series:
    """Which records nothing dominates: no other is as good in both metrics and better in one.

    Args:
        frame: records as from `llmlab.records()`; units in `frame.attrs["units"]` tell which way is better.
        x, y: two metrics. Records that lack one of them are not on the front.

    Returns:
        Booleans with the frame's index.
    """
    goodness = [_goodness(frame, metric) for metric in (x, y)]
    as_good = np.logical_and.reduce([g[:, None] >= g for g in goodness])  # [rival, record]
    better = np.logical_or.reduce([g[:, None] > g for g in goodness])
    whole = np.logical_and.reduce([~np.isnan(g) for g in goodness])
    return pd.Series(whole & ~(as_good & better).any(axis=0), index=frame.index)


def worst_allowed(frame: pd.DataFrame, metric: str, loss: float) -> float:
    """The value that is worse than the best one by a share of it: a budget, such as 0.02 of the accuracy."""
    best = float(_goodness(frame, metric)[frame[metric].notna()].max())
    return (-1 if _costs(frame, metric) else 1) * (best - loss * abs(best))


def names(frame: pd.DataFrame) -> list[str]:
    """What tells records apart, in short: the text columns in which they differ, or their column `name`."""
    if "name" in frame:
        return [str(name) for name in frame["name"]]
    texts = frame.drop(columns=[*SAME, *metrics(frame)], errors="ignore")
    texts = texts.loc[:, [any(isinstance(value, str) for value in texts[c]) for c in texts]]
    differ = texts.loc[:, texts.nunique(dropna=False) > 1]
    if differ.empty:
        differ = texts[texts.columns.intersection(["model", "dtype"])]
    rows = differ.astype(object).itertuples(index=False)
    return [", ".join(v for v in row if isinstance(v, str) and v not in ("", "none")) or "plain" for row in rows]


@draw.style()
def pareto_front(
    frame: pd.DataFrame, x: str, y: str, title: str, budgets: Mapping[str, float] | None = None
) -> Figure:  # fmt: skip
    """Records over two metrics: the Pareto front numbered and named, dominated ones grey, intervals on both axes.

    Args:
        frame: records; those with both metrics are drawn. Intervals are in the columns METRIC_low and METRIC_high.
        x, y: metrics.
        budgets: metric -> the worst value still allowed; records beyond it fade.

    Raises InputError if no record has both metrics.
    """
    records, budgets = with_both(frame, x, y), budgets or {}
    inside, labels, rows = within(records, budgets), names(records), records.to_dict("records")
    front = records[pareto(records, x, y)].sort_values(x)
    figure, axes = draw.canvas(title, 8.6, max(4.2, 1.4 + 0.27 * len(front)))
    corner = "steps-post" if _costs(records, x) else "steps-pre"
    axes.plot(front[x], front[y], drawstyle=corner, color=draw.SKY, linewidth=2.5, alpha=0.6, zorder=2)
    for place, row in enumerate(rows):
        size, colour, order = (13, draw.BLUE, 4) if place in front.index else (8, LIGHT, 3)
        xerr, yerr = (_spread(row, metric) for metric in (x, y))
        axes.errorbar(
            row[x], row[y], xerr=xerr, yerr=yerr, fmt="o", color=colour, markersize=size, markeredgecolor="white",
            elinewidth=1, capsize=2, alpha=1.0 if inside[place] else 0.25, zorder=order, gid=f"record-{place}",
        )  # fmt: skip
    line_height = 0.25 / (figure.get_figheight() * 0.75)
    for number, place in enumerate(front.index.tolist(), start=1):
        at, gid, name = (rows[place][x], rows[place][y]), f"record-{place}", draw.drawable(labels[place])
        white = {"ha": "center", "size": 7.5, "color": "white", "weight": "bold", "zorder": 5}
        draw.note(axes, str(number), at, (0, 0), gid=gid, **white)
        text = f"{number}: {name if len(name) <= 44 else name[:43] + '…'}"
        at, colour = (1.03, 1 - line_height * (number - 0.5)), draw.BLUE if inside[place] else LIGHT
        draw.note(axes, text, at, (0, 0), xycoords="axes fraction", color=colour)
    for axis, metric in ((axes.xaxis, x), (axes.yaxis, y)):
        better = "less" if _costs(records, metric) else "more"
        axis.set_label_text(f"{draw.drawable(label(records, metric))}, {better} is better")
        if records.attrs.get("units", {}).get(metric) == "B":
            axis.set_major_formatter(EngFormatter("B"))
    for metric, limit in budgets.items():
        draw.rule(axes, limit, f"budget {limit:.4g}", colour=draw.ORANGE, horizontal=metric != x)
    return figure


def with_both(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The records that have both metrics, numbered from 0. Raises InputError if there are none."""
    missing = [metric for metric in (x, y) if metric not in frame]
    records = frame.iloc[:0] if missing else frame[frame[x].notna() & frame[y].notna()].reset_index(drop=True)
    if records.empty:
        raise InputError(f"no record has both {x} and {y}: choose other metrics, or filter less.")
    return records


def within(frame: pd.DataFrame, budgets: Mapping[str, float]) -> pd.Series:
    """Which records keep every budget (metric -> the worst value still allowed)."""
    kept = pd.Series(True, index=frame.index)
    for metric, limit in budgets.items():
        kept &= frame[metric] <= limit if _costs(frame, metric) else frame[metric] >= limit
    return kept


def label(frame: pd.DataFrame, metric: str) -> str:
    """A metric in words with its unit."""
    unit = frame.attrs.get("units", {}).get(metric, "")
    return metric.replace("_", " ") + (f" ({unit})" if unit else "")


def _spread(row: Mapping[Hashable, float], metric: str) -> NDArray[np.float64]:
    """How far its interval reaches below and above a value, as matplotlib wants it; 0 where there is none."""
    value = row[metric]
    ends = value - row.get(f"{metric}_low", value), row.get(f"{metric}_high", value) - value
    return np.fmax(0, ends).reshape(2, 1)


def _costs(frame: pd.DataFrame, metric: str) -> bool:
    return direction(metric, frame.attrs.get("units", {}).get(metric, "")) < 0


def _goodness(frame: pd.DataFrame, metric: str) -> NDArray[np.float64]:
    values = frame[metric].to_numpy(dtype=float)
    return -values if _costs(frame, metric) else values
