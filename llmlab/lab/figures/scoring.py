"""Figures of scoring: the endings of a question, its trie and mask, accuracies, and what each optimization saved."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from numpy.typing import NDArray

from llmlab.base.stats import Metric
from llmlab.lab.figures import draw


@draw.style()
def endings(tokens: list[list[str]], log_probs: list[list[float]], right: int, title: str) -> Figure:
    """The endings of one question, a box a token, shaded by how much the model is surprised by it.

    A list an ending: the tokens' text, and their log-probabilities in nats. `right`: index of the right ending.
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
    """Accuracies (variant -> metric name -> share) with 95 % intervals, a row a metric, a colour a variant.

    `chance`: accuracy of guessing, drawn as a line.
    """
    rows = [(v, name, m.value, m.low, m.high) for v, metrics in results.items() for name, m in metrics.items()]
    table = pd.DataFrame(rows, columns=["variant", "metric", "accuracy", "low", "high"])
    table[["accuracy", "low", "high"]] *= 100
    figure, axes = draw.canvas(title, 7, 1.6 + 0.5 * len(results) * table["metric"].nunique() ** 0.5)
    texts = table["accuracy"].map("{:.1f} %, ".format) + table["variant"]
    draw.dots(axes, table, "accuracy", "metric", "variant", texts.tolist())
    draw.rule(axes, chance * 100, "guessing")
    axes.set_xlabel("right answers (%), bars: 95 % Wilson interval")
    return figure


@draw.style()
def waterfall(steps: pd.DataFrame, title: str) -> Figure:
    """Seconds of each step of an ablation, every step keeping the ones before it; what it saved, dimmed.

    `steps`: from `bench.ablation.ablation`: `step`, `seconds`, `low`, `high`.
    """
    seconds, first = steps["seconds"], steps["seconds"].iloc[0]
    before, names = seconds.shift().fillna(first), steps["step"]
    figure, axes = draw.canvas(title, 7, 0.9 + 0.42 * len(steps), ylim=(len(steps) - 0.5, -0.5))
    axes.barh(names, before, color=draw.PALE, height=0.62)
    whiskers = draw.spread(seconds, steps["low"], steps["high"])
    axes.barh(names, seconds, xerr=whiskers, color=draw.BLUE, height=0.62, error_kw={"elinewidth": 1.2})
    for row, end in enumerate(pd.concat([before, seconds, steps["high"]], axis=1).max(axis=1)):
        draw.note(axes, f"{seconds.iloc[row]:.1f} s, {first / seconds.iloc[row]:.2f}x", (end, row))
    axes.set_xlabel("seconds (black: 95 % interval of the median; light: saved)")
    axes.grid(axis="y", visible=False)
    return figure


@draw.style()
def trie(tokens: Sequence[str], depths: Sequence[int], parents: Sequence[int], n_context: int, title: str) -> Figure:
    """The trie of one question below its context: a node a token, lines to their parents.

    Nodes are depth-first and a root's parent is -1; of the first `n_context`, the context, only the last is drawn.
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
    figure, axes = draw.canvas(title, 4.6, 4.6, xlabel="node that is seen (key)", ylabel="node that looks (query)")
    axes.imshow(visible, cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
    axes.grid(visible=False)
    for line in (axes.axhline, axes.axvline):
        line(n_context - 0.5, color=draw.ORANGE, linewidth=1)
    draw.note(axes, "context", (n_context / 2, -0.5), (0, 7), ha="center", color=draw.ORANGE)
    axes.set_title(title, pad=14)
    return figure
