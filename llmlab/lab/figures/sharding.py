"""Figures of sharding: memory and predicted time of every layout, and timelines."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmlab.lab.figures import draw
from llmlab.sharding.plan import Plan
from llmlab.sharding.timeline import Timeline

# Columns of `Plan.table`.
PARTS = {"weights": draw.BLUE, "KV cache": draw.ORANGE, "activations": draw.GREEN, "reserve": draw.GREY}
SUPTITLE = {"x": 0.01, "ha": "left", "size": 11, "weight": "bold"}


@draw.style()
def memory(plans: Sequence[Plan], title: str) -> Figure:
    """GiB on the fullest device by part, a bar a layout, and the memory that a device has.

    The plans are of one model and device, with different bits.
    """
    tables = {f"{plan.bits} bits, ": plan.table().sort_values("layout", ascending=False) for plan in plans}
    table = pd.concat(tables, names=["bits", ""]).reset_index("bits")
    table = table.set_index(table["bits"] + table["layout"])
    figure, axes = draw.canvas(title, 7.4, 1.4 + 0.34 * len(table))
    _memory(axes, table, plans[0].memory, remark=", does not fit")
    draw.legend_below(axes, len(PARTS))
    return figure


@draw.style()
def layouts(plan: Plan, title: str, job: str = "the job") -> Figure:
    """A row a layout: GiB on its fullest device by part beside the predicted time, or why it cannot be used.

    The plan is with a device and a workload, so that there are predictions; `job`: what the seconds are for.
    """
    table = plan.table().set_index("layout")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 1.7 + 0.34 * len(table)), sharey=True)
    _memory(left, table, plan.memory)
    seconds = pd.to_numeric(table["seconds"], errors="coerce")  # NaN for a layout that cannot be used
    right.barh(table.index, seconds, color=draw.BLUE, height=0.66)
    right.grid(axis="y", visible=False)
    for row, (time, verdict) in enumerate(zip(seconds, table["verdict"], strict=True)):
        if verdict == "fits":
            draw.note(right, _duration(time), (time, row))
        else:
            draw.note(right, verdict, (0, row), color=draw.GREY)
    right.set(xlabel=f"predicted seconds for {job}", xlim=(0, seconds.fillna(0).max() * 1.3 or 1))
    draw.legend_below(left, len(PARTS), "outside lower left")
    figure.suptitle(draw.drawable(title), **SUPTITLE)
    return figure


def _memory(axes: Axes, table: pd.DataFrame, limit: int, remark: str = "") -> None:
    """Stacked bars of the rows of `Plan.table`; those that do not fit are pale, with a remark. `limit`: bytes."""
    parts = draw.stacked(axes, table, PARTS)
    for row, (needed, fits) in enumerate(zip(table["needed"], table["verdict"] == "fits", strict=True)):
        plt.setp([bars[row] for bars in parts], alpha=1.0 if fits else 0.4)
        draw.note(axes, f"{needed:.1f}" + ("" if fits else remark), (needed, row))
    draw.rule(axes, limit / 2**30, f"{limit / 2**30:.4g} GiB", colour="black")
    axes.set(xlabel="GiB on the fullest device", ylim=(len(table) - 0.4, -1))
    axes.set_xlim(0, max(limit / 2**30, table["needed"].max()) * 1.25)


@draw.style()
def timelines(runs: Mapping[str, Timeline], title: str, unit: str = "rank") -> Figure:
    """Gantt charts of simulated or measured runs, one above the other on one time axis, a line a `unit`.

    Neighbouring batches differ in shade, white is waiting.
    """
    most = max(timeline.ranks for timeline in runs.values())
    size = (7.4, 0.5 + len(runs) * (0.7 + 0.24 * most))
    figure, panels = plt.subplots(len(runs), figsize=size, sharex=True, squeeze=False)
    for axes, (name, timeline) in zip(panels.flat, runs.items(), strict=True):
        begin = min(span.start for span in timeline.spans)
        for span in timeline.spans:
            shade = draw.SHADES[span.task.batch % len(draw.SHADES)]
            axes.barh(span.task.rank, span.end - span.start, left=span.start - begin, color=shade, linewidth=0)
        axes.set_yticks(range(timeline.ranks), [f"{unit} {k}" for k in range(timeline.ranks)], fontsize=8)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_title(f"{name}: {timeline.seconds:.1f} s, bubble {timeline.bubble:.0%}", size=9.5, weight="normal")
    axes.set_xlabel("seconds (a colour a batch, white: waiting)")
    figure.suptitle(draw.drawable(title), **SUPTITLE)
    return figure


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
