"""Trade-offs among records: which are worth using (the Pareto front), named and drawn with their uncertainty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from llmlab.base.errors import InputError
from llmlab.lab.figures.common import BLUE, ORANGE, style
from llmlab.lab.figures.drawable import drawable
from llmlab.measure.direction import direction
from llmlab.measure.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    told = [c for c in frame if c not in SAME | set(metrics(frame)) and any(isinstance(v, str) for v in frame[c])]
    told = [c for c in told if frame[c].nunique(dropna=False) > 1] or [c for c in ("model", "dtype") if c in frame]
    rows = frame[told].astype(object).itertuples(index=False)
    return [", ".join(str(v) for v in row if isinstance(v, str) and v not in ("", "none")) or "plain" for row in rows]


def pareto_front(
    frame: pd.DataFrame, x: str, y: str, title: str, budgets: Mapping[str, float] | None = None
) -> Figure:  # fmt: skip
    """Records over two metrics: the Pareto front numbered and named, dominated ones grey, intervals on both axes.

    Args:
        frame: records; those with both metrics are drawn. Intervals are in the columns METRIC_low and METRIC_high.
        x, y: metrics.
        title: the figure's message.
        budgets: metric -> the worst value still allowed; records beyond it fade.

    Raises InputError if no record has both metrics.
    """
    records = with_both(frame, x, y)
    front, inside = pareto(records, x, y), within(records, budgets or {})
    labels = names(records)
    with style():
        winners = [int(place) for place in records[front].sort_values(x).index]
        figure, axes = plt.subplots(figsize=(8.6, max(4.2, 1.4 + 0.27 * len(winners))))
        for place in range(len(records)):
            number = winners.index(place) + 1 if place in winners else None
            _point(axes, records.iloc[place], (x, y), number, faded=not inside[place], gid=f"record-{place}")
        corner = "steps-post" if _costs(records, x) else "steps-pre"
        axes.plot(
            records[x][winners],
            records[y][winners],
            color="#56B4E9",
            linewidth=2.5,
            alpha=0.6,
            drawstyle=corner,
            zorder=2,
        )
        for metric, limit in (budgets or {}).items():
            _budget(axes, limit, vertical=metric == x)
        height = figure.get_figheight() * 0.75
        for number, place in enumerate(winners, start=1):
            name = drawable(labels[place])
            name = name if len(name) <= 44 else name[:43] + "…"
            axes.annotate(
                f"{number}: {name}", (1.03, 1 - 0.25 * (number - 0.5) / height), xycoords="axes fraction",
                va="center", size=8.5, color=BLUE if inside[place] else LIGHT,
            )  # fmt: skip
        for axis, metric in ((axes.xaxis, x), (axes.yaxis, y)):
            better = "less" if _costs(records, metric) else "more"
            axis.set_label_text(f"{drawable(label(records, metric))}, {better} is better")
            if records.attrs.get("units", {}).get(metric) == "B":
                axis.set_major_formatter(EngFormatter("B"))
        axes.set_title(drawable(title))
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


def _point(
    axes: Axes, row: pd.Series[Any], metrics: tuple[str, str], number: int | None, *, faded: bool, gid: str
) -> None:
    x, y = (float(row[metric]) for metric in metrics)
    spread = [_spread(row, metric) for metric in metrics]
    alpha, colour, order = 0.25 if faded else 1.0, BLUE if number else LIGHT, 4 if number else 3
    axes.errorbar(x, y, xerr=spread[0], yerr=spread[1], color=colour, linewidth=1, capsize=2, alpha=alpha, zorder=order)
    (marker,) = axes.plot(
        x, y, "o", color=colour, markersize=13 if number else 8, markeredgecolor="white", alpha=alpha, zorder=order
    )
    marker.set_gid(gid)
    if number:
        text = axes.annotate(
            str(number), (x, y), ha="center", va="center", size=7.5, color="white", weight="bold", zorder=5
        )
        text.set_gid(gid)


def _budget(axes: Axes, limit: float, *, vertical: bool) -> None:
    if vertical:
        axes.axvline(limit, color=ORANGE, linewidth=1.2, linestyle="--", zorder=1)
        place, where, shift = (limit, 0.99), ("data", "axes fraction"), (-3, 0)
    else:
        axes.axhline(limit, color=ORANGE, linewidth=1.2, linestyle="--", zorder=1)
        place, where, shift = (0.99, limit), ("axes fraction", "data"), (0, 3)
    axes.annotate(
        f"budget {limit:.4g}", place, shift, xycoords=where, textcoords="offset points", size=8.5, color=ORANGE,
        ha="right", va="top" if vertical else "bottom", rotation=90 if vertical else 0,
    )  # fmt: skip


def _spread(row: pd.Series[Any], metric: str) -> list[list[float]] | None:
    """How far its interval reaches below and above a value, as matplotlib wants it."""
    low, high = row.get(f"{metric}_low"), row.get(f"{metric}_high")
    return None if pd.isna(low) or pd.isna(high) else [[row[metric] - low], [high - row[metric]]]


def _costs(frame: pd.DataFrame, metric: str) -> bool:
    return direction(metric, frame.attrs.get("units", {}).get(metric, "")) < 0


def _goodness(frame: pd.DataFrame, metric: str) -> np.ndarray[Any, Any]:
    values = frame[metric].to_numpy(dtype=float)
    return -values if _costs(frame, metric) else values
