"""Figures of decoding: what a pass costs by its width, and what drafts bring, predicted and measured."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from llmlab.lab.figures.common import BLUE, GREEN, GREY, ORANGE, PINK, style

COLOURS = (BLUE, ORANGE, GREEN, PINK)
MARKERS = "osD^"


def pass_cost(profiles: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    """Milliseconds of one pass over its number of tokens; dashed: if each token cost as much as the first.

    Args:
        profiles: name -> width -> seconds, from `Engine.profile`.
        title: the figure's message.
    """
    with style():
        figure, axes = plt.subplots(figsize=(7, 3.8))
        top = max(max(found.values()) for found in profiles.values()) * 1e3
        for (name, found), colour, marker in zip(profiles.items(), COLOURS, MARKERS, strict=False):
            widths, times = list(found), [seconds * 1e3 for seconds in found.values()]
            axes.plot(widths, times, marker=marker, color=colour)
            axes.annotate(
                name, (widths[-1], times[-1]), (8, 0), textcoords="offset points", va="center", color=colour, size=9
            )
            axes.plot(widths, [times[0] * w for w in widths], color=colour, linestyle="--", linewidth=1)
        axes.text(
            0.5, 0.93, "dashed: if every token cost as much as the first", transform=axes.transAxes, color=GREY, size=9
        )
        axes.set_ylim(0, top * 1.6)
        ticks = sorted({width for found in profiles.values() for width in found})
        axes.set_xticks(ticks)
        axes.set_xlim(0, ticks[-1] * 1.28)
        axes.set_xlabel("tokens in one pass (1 = plain decoding)")
        axes.set_ylabel("milliseconds of the pass")
        axes.set_title(title)
    return figure


def speedups(table: pd.DataFrame, title: str) -> Figure:
    """Measured speed of each draft over plain decoding by kind of prompt, beside what the cost model predicts.

    Args:
        table: columns `draft`, `kind`, `acceptance_rate`, `speedup_vs_plain` with `speedup_low` and `speedup_high`,
            `predicted_speedup`.
        title: the figure's message.
    """
    with style():
        drafts, kinds = list(dict.fromkeys(table["draft"])), list(dict.fromkeys(table["kind"]))
        figure, axes = plt.subplots(figsize=(7.4, 1.5 + 0.26 * len(drafts) * len(kinds)))
        for index, (draft, colour, marker) in enumerate(zip(drafts, COLOURS, MARKERS, strict=False)):
            mine = table[table["draft"] == draft].set_index("kind").loc[kinds]
            y = [row + (index - (len(drafts) - 1) / 2) * 0.22 for row in range(len(kinds))]
            axes.hlines(y, mine["speedup_low"], mine["speedup_high"], color=colour, linewidth=1.5)
            axes.plot(mine["speedup_vs_plain"], y, marker, color=colour, label=draft)
            axes.plot(mine["predicted_speedup"], y, "|", color="black", markersize=13, markeredgewidth=1.5)
            for height, (_, row) in zip(y, mine.iterrows(), strict=True):
                right = max(row["speedup_high"], row["predicted_speedup"])
                axes.annotate(
                    f"{row['acceptance_rate']:.0%} accepted", (right, height), (8, 0), textcoords="offset points",
                    va="center", size=7.5, color=colour,
                )  # fmt: skip
        axes.plot([], [], "|", color="black", markersize=13, markeredgewidth=1.5, label="predicted")
        axes.axvline(1, color=GREY, linestyle="--", linewidth=1)
        axes.set_yticks(range(len(kinds)), kinds)
        axes.invert_yaxis()
        axes.set_xlim(left=min(0.8, float(table["speedup_low"].min()) * 0.95))
        axes.set_xlim(right=axes.get_xlim()[1] * 1.12)
        axes.set_xlabel("speed over plain decoding (x; line: slowest to fastest run)")
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside lower center", ncols=len(drafts) + 1, fontsize=9)
        axes.set_title(title)
    return figure
