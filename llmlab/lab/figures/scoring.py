"""Figures of scoring: the endings of a question, its trie and mask, accuracies, and what each optimization saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from numpy.typing import NDArray

from llmlab.base.stats import Metric
from llmlab.lab.figures import draw


@draw.style()
def endings(tokens: list[list[str]], log_probs: list[list[float]], right: int, title: str) -> Figure:
    """The endings of one question, a box a token, shaded by how much the model is surprised by it.

    Args:
        tokens: the tokens' text, one list an ending.
        log_probs: their log-probabilities in nats.
        right: index of the right ending.
    """
    longest = max(sum(map(draw.token_width, row)) for row in tokens)
    figure, axes = draw.canvas(title, max(7.0, 0.088 * longest + 2.2), 0.62 * len(tokens) + 1.35)
    draw.token_rows(axes, [f"ending {k}" for k in range(len(tokens))], longest + 12)
    shades, lowest = plt.get_cmap("Blues"), min(map(min, log_probs))
    best = max(map(sum, log_probs))
    for line, (texts, values) in enumerate(zip(tokens, log_probs, strict=True)):
        x = 0.0
        for text, value in zip(texts, values, strict=True):
            shade = 0.08 + 0.85 * value / lowest
            ink = "white" if shade > 0.55 else "black"
            end = draw.token_box(axes, x, line, text.strip(), ink, color=shades(shade), linewidth=0)
            middle = (x + end - 0.4) / 2, line + 0.24
            draw.note(axes, f"{value:.1f}", middle, (0, 0), ha="center", size=5.5, color=ink)
            x = end
        total = f"{sum(values):.1f}" + ("  right" if line == right else "")
        draw.note(axes, total, (x, line), (2, 0), size=9, weight="bold" if sum(values) == best else "normal")
    axes.set_xlabel("small numbers: log-probability of the token (nats); at the end their sum, the choice in bold")
    return figure


@draw.style()
def accuracies(results: Mapping[str, Mapping[str, Metric]], chance: float, title: str) -> Figure:
    """Accuracies with their 95 % intervals, one group of dots a metric, one colour a variant.

    Args:
        results: variant -> metric name -> share with interval.
        chance: accuracy of guessing, drawn as a line.
    """
    columns = ["variant", "metric", "accuracy", "low", "high"]
    rows = [(v, name, m.value, m.low, m.high) for v, metrics in results.items() for name, m in metrics.items()]
    table = pd.DataFrame(rows, columns=columns)
    table[columns[2:]] *= 100
    figure, axes = draw.canvas(title, 7, 1.6 + 0.5 * len(results) * table["metric"].nunique() ** 0.5)
    texts = table["accuracy"].map("{:.1f} %, ".format) + table["variant"]
    draw.dots(axes, table, "accuracy", "metric", "variant", texts)
    draw.rule(axes, chance * 100, "guessing")
    axes.set_xlabel("right answers (%), bars: 95 % Wilson interval")
    return figure


@draw.style()
def waterfall(steps: pd.DataFrame, title: str) -> Figure:
    """Seconds of each step of an ablation, every step keeping the ones before it; what it saved, dimmed.

    Args:
        steps: from `bench.ablation.ablation`: `step`, `seconds`, `low`, `high`.
    """
    first = steps["seconds"].iloc[0]
    table = steps.assign(before=steps["seconds"].shift().fillna(first))
    figure, axes = draw.canvas(title, 7, 0.9 + 0.42 * len(steps))
    look = {"y": "step", "width": 0.62, "saturation": 1, "ax": axes}
    whisker = {"color": "black", "linewidth": 1.2}
    sns.barplot(table, x="before", color=draw.PALE, **look)
    table = draw.with_ends(table, "seconds")
    sns.barplot(table, x="seconds", color=draw.BLUE, err_kws=whisker, **look, **draw.INTERVAL)
    for row, end in enumerate(table[["seconds", "before"]].max(axis=1).groupby(table["step"], sort=False).max()):
        seconds = steps["seconds"].iloc[row]
        draw.note(axes, f"{seconds:.1f} s, {first / seconds:.2f}x", (end, row))
    axes.set(xlabel="seconds (black: 95 % interval of the median; light: saved)", ylabel="")
    return figure


@draw.style()
def trie(tokens: Sequence[str], depths: Sequence[int], parents: Sequence[int], n_context: int, title: str) -> Figure:
    """The trie of one question below its context: a node a token, lines to their parents.

    Args:
        tokens, depths, parents: of every node, depth-first; a root's parent is -1.
        n_context: nodes of the context; only its last one is drawn.
    """
    root = n_context - 1
    heights: dict[int, float] = {}
    leaves = 0
    for node in range(len(tokens) - 1, root - 1, -1):  # children before parents
        below = [height for child, height in heights.items() if parents[child] == node]
        heights[node] = sum(below) / len(below) if below else float(leaves)
        leaves += not below
    figure, axes = draw.canvas(title, 9.5, 0.9 + 0.55 * leaves)
    for node, y in heights.items():
        x, text, fill = depths[node] - root, tokens[node].strip(), "white"
        if node == root:
            text, fill = f"… {text}", draw.PALE
        else:
            axes.plot([x - 1, x - 0.6, x], [heights[parents[node]], y, y], color=draw.GREY, linewidth=0.8, zorder=1)
        box = {"boxstyle": "round,pad=0.25", "facecolor": fill, "edgecolor": draw.BLUE}
        draw.note(axes, text, (x, y), (0, 0), ha="center", size=8, bbox=box, zorder=2)
    axes.set(xlim=(-0.8, max(depths) - root + 0.8), ylim=(-0.7, leaves - 0.3))
    axes.set_axis_off()
    return figure


@draw.style()
def mask(visible: NDArray[np.bool_], n_context: int, title: str) -> Figure:
    """Which node (row) sees which node (column): dark where it does. `visible`: [nodes, nodes] bool."""
    figure, axes = draw.canvas(title, 4.6, 4.6)
    look = {"cmap": "Blues", "vmin": 0, "vmax": 1.3, "cbar": False, "square": True, "rasterized": True}
    sns.heatmap(visible, xticklabels=10, yticklabels=10, ax=axes, **look)
    axes.tick_params(axis="y", labelrotation=0)
    axes.axhline(n_context, color=draw.ORANGE, linewidth=1)
    axes.axvline(n_context, color=draw.ORANGE, linewidth=1)
    draw.note(axes, "context", (n_context / 2, 0), (0, 7), ha="center", color=draw.ORANGE)
    axes.set(xlabel="node that is seen (key)", ylabel="node that looks (query)")
    axes.set_title(title, pad=14)
    return figure
