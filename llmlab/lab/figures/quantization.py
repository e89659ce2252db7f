"""Figures of quantization: a grid, errors by layer, quality over size."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from llmlab.lab.figures.common import BLUE, GREEN, GREY, ORANGE, style


def grids(weights: np.ndarray, rounded: dict[str, tuple[np.ndarray, np.ndarray]], title: str) -> Figure:
    """The weights of one group, and the levels to which they go.

    Args:
        weights: [columns], one group of one row.
        rounded: a row of the picture each: name -> (levels [2^bits], quantized weights [columns]).
        title: the figure's message.
    """
    with style():
        figure, axes = plt.subplots(figsize=(7, 1.3 + 0.75 * len(rounded)))
        axes.plot(weights, np.zeros(len(weights)), "|", color="black", markersize=16, markeredgewidth=0.8)
        for row, (levels, values) in enumerate(rounded.values(), start=1):
            colour = (BLUE, ORANGE, GREEN)[(row - 1) % 3]
            axes.plot(levels, np.full(len(levels), row), "|", color=GREY, markersize=24, markeredgewidth=0.8)
            taken, counts = np.unique(values.round(6), return_counts=True)
            axes.scatter(taken, np.full(len(taken), row), s=8 + 14 * counts, color=colour, zorder=3)
            rms = float(np.sqrt(np.mean((values - weights) ** 2)))
            axes.annotate(
                f"moved by {rms:.3f} (rms)", (1.01, row), xycoords=("axes fraction", "data"), va="center", size=8.5
            )
        axes.set_yticks(range(len(rounded) + 1), ["weights", *rounded])
        axes.set_ylim(len(rounded) + 0.6, -0.6)
        axes.set_xlabel("weight (grey: levels of the grid; a dot's size: how many weights went there)")
        axes.grid(visible=False)
        axes.set_title(title)
    return figure


def layer_errors(table: pd.DataFrame, title: str) -> Figure:
    """Relative squared error of each Linear's output over the decoder layers, a line per kind of Linear.

    Args:
        table: `quantization.calibrate.Report.table()`: columns `name` ("model.layers.3.mlp.up_proj"), `error`.
        title: the figure's message.
    """
    with style():
        figure, axes = plt.subplots(figsize=(7, 4.2))
        parts = table["name"].str.extract(r"\.(?P<layer>\d+)\.(?P<kind>.+)$")
        kinds = parts["kind"].str.split(".").str[-1]
        ends = []
        for kind in kinds.unique():
            mine = kinds == kind
            x, y = parts["layer"][mine].astype(int), table["error"][mine]
            (line,) = axes.plot(x, y, marker=".", linewidth=1.2)
            ends.append((float(y.iloc[-1]), kind, line.get_color(), int(x.iloc[-1])))
        axes.set_yscale("log")
        low, high = np.log10(axes.get_ylim())
        place = -np.inf
        for value, kind, colour, last in sorted(ends):  # labels keep a distance
            place = max(np.log10(value), place + (high - low) / 22)
            axes.annotate(
                kind, (last, 10**place), (8, 0), textcoords="offset points", va="center", color=colour, size=9
            )
        axes.set_xlabel("decoder layer")
        axes.set_ylabel("‖(W − Q) X‖² / ‖W X‖²")
        axes.set_title(title)
    return figure


def quality_over_size(rows: pd.DataFrame, title: str) -> Figure:
    """Perplexity as a multiple of the unquantized model's, over bits a weight; a colour and marker per method.

    Args:
        rows: columns `method`, `bits_per_weight`, `ratio` and its interval `low`, `high`.
        title: the figure's message.
    """
    with style():
        figure, axes = plt.subplots(figsize=(7, 4.2))
        left = float(rows["bits_per_weight"].min())
        for (method, mine), colour, marker in zip(
            rows.groupby("method", sort=False), (GREY, BLUE, ORANGE, GREEN, "#CC79A7"), "sodv^", strict=False
        ):
            mine = mine.sort_values("bits_per_weight")
            spread = [mine["ratio"] - mine["low"], mine["high"] - mine["ratio"]]
            axes.errorbar(
                mine["bits_per_weight"],
                mine["ratio"],
                yerr=spread,
                marker=marker,
                color=colour,
                capsize=3,
                label=method,
            )
        axes.axhline(1, color="black", linewidth=1, linestyle="--")
        axes.annotate("not quantized", (left, 1), (0, 3), textcoords="offset points", size=9)
        axes.set_yscale("log")
        ticks = [t for t in (1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100) if t <= float(rows["high"].max()) * 1.1]
        axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("bits a weight as saved (grids included)")
        axes.set_ylabel("perplexity / fp32's (log; bars: paired 95 %)")
        axes.legend()
        axes.set_title(title)
    return figure
