"""A plan drawn: what each layout needs on its fullest device, and how long it is predicted to take."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from llmlab.lab.figures.common import BLUE, GREY, style
from llmlab.lab.figures.drawable import drawable
from llmlab.lab.figures.sharding import PARTS
from llmlab.sharding.plan import Plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def layouts(plan: Plan, title: str, job: str = "the job") -> Figure:
    """A row a layout: GiB on its fullest device by part beside the predicted time, or why it cannot be used.

    Args:
        plan: with a device and a workload, so that there are predictions.
        title: the figure's message.
        job: what the predicted seconds are for.
    """
    with style():
        rows = plan.layouts
        figure, (memory, time) = plt.subplots(1, 2, figsize=(9.2, 1.7 + 0.34 * len(rows)), sharey=True)
        for row, layout in enumerate(rows):
            left = 0.0
            for part, colour in PARTS.items():
                width = getattr(layout, part) / 2**30
                memory.barh(row, width, left=left, color=colour, height=0.66, alpha=1.0 if layout.fits else 0.4)
                left += width
            _beside(memory, left, row, f"{left:.1f}")
            if layout.predicted:
                seconds = layout.predicted.seconds
                time.barh(row, seconds, color=BLUE, height=0.66)
                _beside(time, seconds, row, _duration(seconds))
            else:
                _beside(time, 0, row, layout.problem or "", GREY)
        limit = plan.memory / 2**30
        memory.axvline(limit, color="black", linewidth=1, linestyle="--")
        memory.annotate(f"{limit:.4g} GiB", (limit, -0.6), (4, 0), textcoords="offset points", size=9)
        memory.set_yticks(range(len(rows)), [layout.name for layout in rows])
        memory.set_ylim(len(rows) - 0.4, -1)
        memory.set_xlim(0, max(limit, *(layout.bytes / 2**30 for layout in rows)) * 1.25)
        memory.set_xlabel("GiB on the fullest device")
        longest = max((layout.predicted.seconds for layout in rows if layout.predicted), default=1.0)
        time.set_xlim(0, longest * 1.3)
        time.set_xlabel(f"predicted seconds for {job}")
        for axes in (memory, time):
            axes.grid(axis="y", visible=False)
        handles = [Patch(color=colour) for colour in PARTS.values()]
        names = [part.replace("kv_cache", "KV cache") for part in PARTS]
        figure.legend(handles, names, loc="outside lower left", ncols=4, fontsize=9)
        figure.suptitle(drawable(title), x=0.01, ha="left", size=11, weight="bold")
    return figure


def _beside(axes: Axes, x: float, y: float, text: str, colour: str = "black") -> None:
    axes.annotate(text, (x, y), (5, 0), textcoords="offset points", va="center", size=8.5, color=colour)


def _duration(seconds: float) -> str:
    return f"{seconds:,.0f} s" if seconds >= 10 else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
