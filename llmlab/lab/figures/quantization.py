"""Figures of quantization: a grid, errors by layer, quality over size."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter, StrMethodFormatter
from numpy.typing import NDArray

from llmlab.lab.figures import draw

Weights = NDArray[np.float32]
RATIOS = (1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100)


@draw.style()
def grids(weights: Weights, rounded: Mapping[str, tuple[Weights, Weights]], title: str) -> Figure:
    """The weights [columns] of one group of one row, and the levels to which they go.

    `rounded`: a row of the picture each: name -> (levels [2^bits], quantized weights [columns]).
    """
    figure, axes = draw.canvas(title, 7, 1.3 + 0.75 * len(rounded), ylim=(len(rounded) + 0.6, -0.6))
    axes.plot(weights, np.zeros(len(weights)), "k|", markersize=16, markeredgewidth=0.8)
    for row, (levels, values) in enumerate(rounded.values(), start=1):
        axes.plot(levels, np.full(len(levels), row), "|", color=draw.GREY, markersize=24, markeredgewidth=0.8)
        counts, colour = pd.Series(values.round(6)).value_counts(), draw.COLOURS[row % len(draw.COLOURS) - 1]
        axes.scatter(counts.index, np.full(len(counts), row), s=8 + 14 * counts, color=colour, zorder=3)
        rms = np.sqrt(np.mean((values - weights) ** 2))
        draw.note(axes, f"moved by {rms:.3f} (rms)", (1.01, row), (0, 0), xycoords=axes.get_yaxis_transform())
    axes.set_yticks(range(len(rounded) + 1), ["weights", *rounded])
    axes.set_xlabel("weight (grey: levels of the grid; a dot's size: how many weights went there)")
    axes.grid(visible=False)
    return figure


@draw.style()
def layer_errors(table: pd.DataFrame, title: str) -> Figure:
    """Relative squared error of each Linear's output over the decoder layers, a line per kind of Linear.

    `table`: `quantization.walk.Report.table()`: columns `name` ("model.layers.3.mlp.up_proj"), `error`, and `bound`,
    Babai's, drawn dotted in the same colour.
    """
    parts = table["name"].str.extract(r"\.(?P<layer>\d+)\.(?:.+\.)?(?P<kind>.+)$").astype({"layer": int})
    figure, axes = draw.canvas(title, 7, 4.2, yscale="log", xlabel="decoder layer")
    axes.set_ylabel("‖(W − Q) X‖² / ‖W X‖² of each layer's output")
    draw.lines(axes, parts.assign(**table[["error", "bound"]]), "layer", "error", "kind", ideal=("bound", ":"))
    return figure


@draw.style()
def grid_losses(table: pd.DataFrame, title: str) -> Figure:
    """What a group of weights loses over the scale of its grid, a line a way to choose the zero point.

    Columns `scale`, as a share of the whole range's, `loss`, as a share of the group's energy, `grid`.
    """
    figure, axes = draw.canvas(title, 7, 3.6, xlabel="scale, as a share of the whole range's")
    axes.set_ylabel("Σ h (w − q)² / Σ h w²")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    draw.lines(axes, table, "scale", "loss", "grid")
    return figure


@draw.style()
def drift(table: pd.DataFrame, title: str) -> Figure:
    """How far hidden states of other text are off behind each layer: columns `layer`, `lost` (a share), `method`."""
    figure, axes = draw.canvas(title, 7, 3.8, xlabel="decoder layer", xticks=table["layer"].unique())
    axes.set_ylabel("energy of hidden states lost")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    draw.lines(axes, table, "layer", "lost", "method")
    return figure


@draw.style()
def quality_over_size(rows: pd.DataFrame, title: str) -> Figure:
    """Perplexity as a multiple of the unquantized model's, over bits a weight; a colour and marker per method.

    Columns `method`, `bits_per_weight`, `ratio` and its interval `low`, `high`.
    """
    figure, axes = draw.canvas(title, 7, 4.2, yscale="log", ylabel="perplexity / fp32's (log; bars: paired 95 %)")
    draw.lines(axes, rows, "bits_per_weight", "ratio", "method")
    draw.rule(axes, 1, "not quantized", horizontal=True, colour="black")
    axes.minorticks_off()
    axes.set_xlabel("bits a weight as saved (grids included)")
    axes.set_yticks([ratio for ratio in RATIOS if ratio <= rows["high"].max() * 1.1])
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    return figure
