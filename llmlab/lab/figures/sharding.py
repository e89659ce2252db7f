"""Figures of sharding: memory of every layout, timelines, a projection beside the leaderboard."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from llmlab.lab.figures.common import BLUE, GREEN, GREY, ORANGE, style
from llmlab.sharding.plan import Plan
from llmlab.sharding.timeline import Timeline

PARTS = {"weights": BLUE, "kv_cache": ORANGE, "activations": GREEN, "reserve": GREY}
SHADES = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999", "#332288")


def memory(plans: Sequence[Plan], title: str) -> Figure:
    """GiB on the fullest device by part, a bar a layout, and the memory that a device has.

    Args:
        plans: of one model and device; several with different bits.
        title: the figure's message.
    """
    with style():
        bars = [(f"{p.bits} bits, {layout.name}", layout) for p in plans for layout in sorted(p.layouts, key=str)]
        figure, axes = plt.subplots(figsize=(7.4, 1.4 + 0.34 * len(bars)))
        for row, (_, layout) in enumerate(bars):
            left = 0.0
            for part, colour in PARTS.items():
                width = getattr(layout, part) / 2**30
                axes.barh(row, width, left=left, color=colour, height=0.66, alpha=1.0 if layout.fits else 0.45)
                left += width
            axes.text(left, row, f"  {left:.1f}" + ("" if layout.fits else "  does not fit"), va="center", size=8.5)
        limit = plans[0].memory / 2**30
        axes.axvline(limit, color="black", linewidth=1, linestyle="--")
        axes.annotate(f"{limit:.0f} GiB", (limit, -0.6), (4, 0), textcoords="offset points", size=9)
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.set_ylim(len(bars) - 0.4, -1)
        axes.set_xlim(0, max(limit, *(layout.bytes / 2**30 for _, layout in bars)) * 1.25)
        axes.set_xlabel("GiB on the fullest device")
        axes.grid(axis="y", visible=False)
        handles = [Patch(color=colour) for colour in PARTS.values()]
        names = [part.replace("kv_cache", "KV cache") for part in PARTS]
        figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize=9)
        axes.set_title(title)
    return figure


def timelines(runs: dict[str, Timeline], title: str, unit: str = "rank") -> Figure:
    """Gantt charts one above the other on one time axis; neighbouring batches differ in shade, white is waiting.

    Args:
        runs: name -> timeline, simulated or measured.
        title: the figure's message.
        unit: what a line is called.
    """
    with style():
        lines = max(t.ranks for t in runs.values())
        figure, all_axes = plt.subplots(
            len(runs), 1, figsize=(7.4, 0.5 + len(runs) * (0.7 + 0.24 * lines)), sharex=True, squeeze=False
        )
        for axes, (name, timeline) in zip(all_axes[:, 0], runs.items(), strict=True):
            begin = min(span.start for span in timeline.spans)
            for span in timeline.spans:
                axes.barh(
                    span.task.rank, span.end - span.start, left=span.start - begin, height=0.8,
                    color=SHADES[span.task.batch % len(SHADES)], linewidth=0,
                )  # fmt: skip
            axes.set_yticks(range(timeline.ranks), [f"{unit} {k}" for k in range(timeline.ranks)], fontsize=8)
            axes.invert_yaxis()
            axes.grid(axis="y", visible=False)
            axes.set_title(f"{name}: {timeline.seconds:.1f} s, bubble {timeline.bubble:.0%}", size=9.5, weight="normal")
        all_axes[-1, 0].set_xlabel("seconds (a colour a batch, white: waiting)")
        figure.suptitle(title, x=0.01, ha="left", size=11, weight="bold")
    return figure


def projection(rows: pd.DataFrame, title: str) -> Figure:
    """Seconds for the whole set on a log axis: measured results of 2023 and projections, told apart by colour.

    Args:
        rows: columns `name`, `seconds`, `kind` ("measured in 2023" or "projected").
        title: the figure's message.
    """
    with style():
        rows = rows.sort_values("seconds", ascending=False).reset_index(drop=True)
        figure, axes = plt.subplots(figsize=(7.4, 1.2 + 0.34 * len(rows)))
        for row, (seconds, kind) in enumerate(rows[["seconds", "kind"]].itertuples(index=False)):
            colour = GREY if kind == "measured in 2023" else BLUE
            axes.plot(seconds, row, "s" if kind == "measured in 2023" else "o", color=colour)
            text = f"{seconds:,.0f} s"
            axes.annotate(text, (seconds, row), (8, 0), textcoords="offset points", va="center", size=8.5)
        axes.set_yticks(range(len(rows)), rows["name"])
        axes.set_xscale("log")
        axes.set_xlim(float(rows["seconds"].min()) * 0.7, float(rows["seconds"].max()) * 1.6)
        axes.set_xlabel("seconds for the whole set (log); squares: measured in 2023, circles: projected")
        axes.set_title(title)
    return figure
