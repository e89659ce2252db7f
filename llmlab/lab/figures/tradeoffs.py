"""Trade-offs among records: which are worth using (the Pareto front), named and drawn with their uncertainty."""

from collections.abc import Mapping
from dataclasses import fields
from itertools import count

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import NDArray

from llmlab.base.errors import InputError
from llmlab.lab.figures import draw
from llmlab.measure.compare import direction
from llmlab.measure.record import Record

LIGHT = "#B8B8B8"
RECORD = {f.name for f in fields(Record)}
SAME = {"id", "time", "commit", "protocol", "data", "revision", "seed", "n", "repeats", "warmup", "cpu"}
SAME |= {"cpu_capability"}
ROOM = 12.0  # points (1/72 inch) that a dot or a number takes
MOST_NAMED = 30  # records; of more, only those of the front are named


def metrics(frame: pd.DataFrame) -> list[str]:
    """Columns of records that are measurements: numbers that are neither interval bounds nor settings of the run."""
    numbers = frame.select_dtypes("number").columns
    bounds = {f"{name}_{end}" for name in numbers for end in ("low", "high")}
    return [name for name in numbers if name not in bounds | RECORD and frame[name].notna().any()]


def pareto(frame: pd.DataFrame, x: str, y: str) -> pd.Series:
    """Which records nothing dominates, as booleans: no other is as good in both metrics and better in one.

    Units in `frame.attrs["units"]` tell which way is better, as in `llmlab.records()`. Records that lack one of the
    metrics are not on the front.
    """
    goodness = np.stack([_goodness(frame, metric) for metric in (x, y)])
    rivals, records = goodness[:, :, None], goodness[:, None, :]
    dominated = ((rivals >= records).all(axis=0) & (rivals > records).any(axis=0)).any(axis=0)
    return pd.Series(~np.isnan(goodness).any(axis=0) & ~dominated, index=frame.index)


def worst_allowed(frame: pd.DataFrame, metric: str, loss: float) -> float:
    """The value that is worse than the best one by a share of it: a budget, such as 0.02 of the accuracy."""
    best = float(np.nanmax(_goodness(frame, metric)))
    return _sign(frame, metric) * (best - loss * abs(best))


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
    """Records over two metrics, numbered and named: the Pareto front blue, dominated ones grey; intervals on both axes.

    Records with both metrics are drawn, their intervals from the columns METRIC_low and METRIC_high. `budgets`: metric
    -> the worst value still allowed; records beyond it fade. Raises InputError if no record has both metrics.
    """
    records, budgets = with_both(frame, x, y), budgets or {}
    inside, labels = within(records, budgets), [draw.drawable(name) for name in names(records)]
    best = pareto(records, x, y)
    front, named = (records[part].sort_values(x) for part in (best, best | (len(records) <= MOST_NAMED)))
    order = [*front.index, *named.index.difference(front.index, sort=False)]
    figure, axes = draw.canvas(title, 8.6, max(4.2, 1.4 + 0.22 * len(order)))
    corner = "steps-pre" if _sign(records, x) > 0 else "steps-post"
    axes.plot(front[x], front[y], drawstyle=corner, color=draw.SKY, linewidth=2.5, alpha=0.6, zorder=2)
    bounds = [f"{metric}_{end}" for metric in (x, y) for end in ("low", "high")]
    ends = records.reindex(columns=[x, y, *bounds]).to_numpy(dtype=float)
    for place, (at_x, at_y, x_low, x_high, y_low, y_high) in enumerate(ends):
        size, colour, above = (13, draw.BLUE, 4) if place in front.index else (11, draw.GREY, 3)
        axes.errorbar(
            at_x, at_y, draw.spread([at_y], [y_low], [y_high]), draw.spread([at_x], [x_low], [x_high]), fmt="o",
            color=colour, markersize=size, markeredgecolor="white", elinewidth=1, capsize=2,
            alpha=1.0 if inside[place] else 0.25, zorder=above, gid=f"record-{place}",
        )  # fmt: skip
    line_height = 0.2 / (figure.get_figheight() * 0.75)
    inks = [(draw.BLUE if place in front.index else draw.GREY) if inside[place] else LIGHT for place in order]
    for number, (place, ink) in enumerate(zip(order, inks, strict=True), start=1):
        name = labels[place] if len(labels[place]) <= 48 else labels[place][:47] + "…"
        at = (1.03, 1 - line_height * (number - 0.5))
        draw.note(axes, f"{number}: {name}", at, (0, 0), xycoords="axes fraction", color=ink)
    for axis, metric in ((axes.xaxis, x), (axes.yaxis, y)):
        better = "more" if _sign(records, metric) > 0 else "less"
        axis.set_label_text(f"{draw.drawable(label(records, metric))}, {better} is better")
        if _unit(records, metric) == "B":
            axis.set_major_formatter(EngFormatter("B"))
    for metric, limit in budgets.items():
        draw.rule(axes, limit, f"budget {limit:.4g}", colour=draw.ORANGE, horizontal=metric != x)
    figure.draw_without_rendering()  # only now it is known where the dots lie
    dots = axes.transData.transform(ends[order, :2]) * 72 / figure.dpi
    for number, (place, ink, up) in enumerate(zip(order, inks, heights(dots), strict=True), start=1):
        look = {"ha": "center", "size": 7.5, "color": ink if up else "white", "weight": "bold", "zorder": 5}
        draw.note(axes, str(number), tuple(ends[place, :2]), (0, up), gid=f"record-{place}", **look)
    return figure


def heights(dots: NDArray[np.float64]) -> list[float]:
    """How far above its dot each number stands so that none covers another: 0, in the dot, where there is room.

    `dots` [dots, 2] and the heights are in points (1/72 inch).
    """
    numbers, ups = list[tuple[float, float]](), list[float]()
    for x, y in dots:
        for up in count(0.0, ROOM):
            rivals = [*numbers, *(dots if up else ())]
            if all(max(abs(x - a), abs(y + up - b)) > 0.9 * ROOM for a, b in rivals):
                break
        numbers.append((x, y + up))
        ups.append(up)
    return ups


def with_both(frame: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The records that have both metrics, numbered from 0. Raises InputError if there are none."""
    records = frame.dropna(subset=[x, y]).reset_index(drop=True) if {x, y} <= {*frame} else frame.iloc[:0]
    if records.empty:
        raise InputError(f"no record has both {x} and {y}: choose other metrics, or filter less.")
    return records


def within(frame: pd.DataFrame, budgets: Mapping[str, float]) -> pd.Series:
    """Which records keep every budget (metric -> the worst value still allowed)."""
    kept = [_goodness(frame, metric) >= _sign(frame, metric) * limit for metric, limit in budgets.items()]
    return pd.Series(np.logical_and.reduce([np.ones(len(frame), bool), *kept]), index=frame.index)


def label(frame: pd.DataFrame, metric: str) -> str:
    """A metric in words with its unit."""
    return metric.replace("_", " ") + (f" ({_unit(frame, metric)})" if _unit(frame, metric) else "")


def _unit(frame: pd.DataFrame, metric: str) -> str:
    return str(frame.attrs.get("units", {}).get(metric, ""))


def _sign(frame: pd.DataFrame, metric: str) -> int:
    return -1 if direction(metric, _unit(frame, metric)) < 0 else 1


def _goodness(frame: pd.DataFrame, metric: str) -> NDArray[np.float64]:
    return frame[metric].to_numpy(dtype=float) * _sign(frame, metric)
