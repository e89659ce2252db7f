"""One function a figure: numbers in, Figure out, drawn in one style."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from llmlab.base.paths import PACKAGE, atomic, figures_folder
from llmlab.base.stats import Metric
from llmlab.measure.roofline import Peaks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STYLE = PACKAGE / "lab" / "figures" / "llmlab.mplstyle"
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6E6E6E"
GROUP_COLOURS = {
    "MLP": "#0072B2",
    "attention projections": "#56B4E9",
    "attention core": "#D55E00",
    "output head": "#009E73",
    "embedding": "#CC79A7",
    "norms and the rest": "#8C8C8C",
}


def style() -> contextlib.AbstractContextManager[Any]:
    """The look of every figure, for figures of your own: `with figures.style(): ...`."""
    return plt.style.context(STYLE)


def save(figure: Figure, name: str, alt: str, folder: Path | None = None) -> Path:
    """Write NAME.png (200 dpi) and NAME.svg into `folder` (`paths.figures_folder()`), each whole or not at all.

    The alt text goes into their metadata.

    Returns the path of the PNG.
    """
    folder = folder or figures_folder()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "savefig.dpi": 200}):
        for suffix in ("svg", "png"):
            metadata = {"Title": name, "Description": alt} | ({"Date": None} if suffix == "svg" else {})
            with atomic(folder / f"{name}.{suffix}") as path:
                figure.savefig(path, metadata=metadata)
    return folder / f"{name}.png"


def show(figure: Figure, name: str, alt: str) -> Any:
    """Save a figure and return it as an image that carries its alt text into notebooks and reports."""
    from IPython.display import Image

    path = save(figure, name, alt)
    width = round(figure.get_figwidth() * 100)
    plt.close(figure)
    return Image(data=path.read_bytes(), format="png", width=width, alt=alt)


def endings(tokens: list[list[str]], log_probs: list[list[float]], right: int, title: str) -> Figure:
    """The endings of one question, a box a token, shaded by how much the model is surprised by it.

    Args:
        tokens: the tokens' text, one list an ending.
        log_probs: their log-probabilities in nats.
        right: index of the right ending.
        title: the figure's message.
    """
    with style():
        widths = [[max(3, len(t) + 1.4) for t in row] for row in tokens]
        longest = max(map(sum, widths))
        figure, axes = plt.subplots(figsize=(max(7.0, 0.088 * longest + 2.2), 0.62 * len(tokens) + 1.35))
        shades = plt.get_cmap("Blues")
        worst = max(-value for row in log_probs for value in row)
        for line, (row, values) in enumerate(zip(tokens, log_probs, strict=True)):
            x = 0.0
            for text, value, width in zip(row, values, widths[line], strict=True):
                shade = 0.08 + 0.85 * -value / worst
                axes.add_patch(Rectangle((x, line - 0.36), width - 0.3, 0.72, color=shades(shade), linewidth=0))
                ink = "white" if shade > 0.55 else "black"
                axes.text(x + width / 2, line - 0.05, text.strip(), ha="center", va="center", size=7.5, color=ink)
                axes.text(x + width / 2, line + 0.26, f"{value:.1f}", ha="center", va="center", size=5.5, color=ink)
                x += width
            mark = "  right" if line == right else ""
            weight = "bold" if sum(values) == max(map(sum, log_probs)) else "normal"
            axes.text(x + 0.8, line, f"{sum(values):.1f}{mark}", va="center", size=9, weight=weight)
        axes.set_xlim(-0.5, longest + 12)
        axes.set_ylim(len(tokens) - 0.45, -0.55)
        axes.set_yticks(range(len(tokens)), [f"ending {k}" for k in range(len(tokens))])
        axes.set_xticks([])
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("small numbers: log-probability of the token (nats); at the end their sum, the choice in bold")
        axes.set_title(title)
    return figure


def accuracies(results: dict[str, dict[str, Metric]], chance: float, title: str) -> Figure:
    """Accuracies with their 95 % intervals, one group of dots a metric, one colour a variant.

    Args:
        results: variant -> metric name -> share with interval.
        chance: accuracy of guessing, drawn as a line.
        title: the figure's message.
    """
    with style():
        figure, axes = plt.subplots(figsize=(7, 1.6 + 0.5 * len(results) * len(next(iter(results.values()))) ** 0.5))
        names = list(next(iter(results.values())))
        for index, (variant, metrics) in enumerate(results.items()):
            offset = (index - (len(results) - 1) / 2) * 0.24
            y = np.arange(len(names)) + offset
            values = [metrics[name].value * 100 for name in names]
            spread = [
                [(metrics[n].value - (metrics[n].low or 0)) * 100 for n in names],
                [((metrics[n].high or 0) - metrics[n].value) * 100 for n in names],
            ]
            bars = axes.errorbar(values, y, xerr=spread, fmt="osD^v"[index % 5], capsize=3)
            right_end = values[0] + spread[1][0]
            colour = bars.lines[0].get_color()
            axes.annotate(
                variant, (right_end, y[0]), (8, 0), textcoords="offset points", va="center", size=9, color=colour
            )
            for value, height in zip(values, y, strict=True):
                below = index % 2 == 1
                axes.annotate(
                    f"{value:.1f}", (value, height), (0, -6 if below else 6), textcoords="offset points",
                    ha="center", va="top" if below else "bottom", size=8,
                )  # fmt: skip
        axes.axvline(chance * 100, color=GREY, linestyle="--", linewidth=1)
        axes.text(chance * 100, len(names) - 0.45, " guessing", color=GREY, va="bottom", size=9)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("right answers (%), bars: 95 % Wilson interval")
        axes.grid(axis="y", visible=False)
        axes.set_title(title)
        axes.set_xlim(right=axes.get_xlim()[1] + 8)  # room for the names beside the bars
    return figure


def throughput(table: pd.DataFrame, title: str) -> Figure:
    """Tokens/s of one forward pass over its number of tokens, log-log, with intervals; a line per dtype.

    Args:
        table: columns `tokens`, `dtype`, `seconds`, `low`, `high` (seconds of the pass with their interval).
        title: the figure's message.
    """
    with style():
        figure, axes = plt.subplots()
        for (dtype, rows), colour, marker in zip(
            table.groupby("dtype", sort=False), (BLUE, ORANGE), "os", strict=False
        ):
            rate = rows["tokens"] / rows["seconds"]
            spread = [rate - rows["tokens"] / rows["high"], rows["tokens"] / rows["low"] - rate]
            axes.errorbar(rows["tokens"], rate, yerr=spread, marker=marker, color=colour, capsize=3)
            _label_end(axes, rows["tokens"].iloc[-1], rate.iloc[-1], str(dtype), colour)
            alone = rate.iloc[0]
            axes.plot(rows["tokens"], alone * rows["tokens"], color=colour, linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_ylim(top=float((table["tokens"] / table["low"]).max()) * 3)
        ticks = sorted(table["tokens"].unique())
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens in one forward pass")
        axes.set_ylabel("tokens per second")
        axes.text(
            0.03,
            0.95,
            "dotted: if every further token were free",
            transform=axes.transAxes,
            color=GREY,
            size=9,
            va="top",
        )
        axes.set_title(title)
    return figure


def module_shares(tables: dict[str, pd.DataFrame], title: str) -> Figure:
    """Share of time by kind of module, one stacked bar a phase.

    Args:
        tables: phase ("prefill", "decode") -> columns `group`, `share`, `seconds`, from measure.profile.
        title: the figure's message.
    """
    with style():
        figure, axes = plt.subplots(figsize=(7, 1.5 + 0.75 * len(tables)))
        for row, table in enumerate(tables.values()):
            left = 0.0
            shares = table.set_index("group")["share"] * 100
            for group, colour in GROUP_COLOURS.items():
                width = float(shares.get(group, 0.0))
                axes.barh(row, width, left=left, color=colour, edgecolor="white", height=0.62)
                if width >= 4:
                    axes.text(left + width / 2, row, f"{width:.0f}", ha="center", va="center", color="white", size=9)
                left += width
        seconds = [table["seconds"].sum() * 1000 for table in tables.values()]
        labels = [f"{phase}\n{ms:,.0f} ms" for phase, ms in zip(tables, seconds, strict=True)]
        axes.set_yticks(range(len(tables)), labels)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("share of the forward pass (%)")
        axes.grid(visible=False)
        handles = [Patch(color=colour) for colour in GROUP_COLOURS.values()]
        figure.legend(handles, GROUP_COLOURS, loc="outside lower center", ncols=3, fontsize=9)
        axes.set_title(title)
    return figure


def waterfall(steps: pd.DataFrame, title: str) -> Figure:
    """Seconds of each step of an ablation, every step keeping the ones before it; what it saved, dimmed.

    Args:
        steps: from `measure.ablation`: `step`, `seconds`, `low`, `high`, `tokens`.
        title: the figure's message.
    """
    with style():
        figure, axes = plt.subplots(figsize=(7, 0.9 + 0.42 * len(steps)))
        columns = zip(*(steps[c].astype(float) for c in ("seconds", "low", "high")), strict=True)
        first = before = float(steps["seconds"].iloc[0])
        for row, (seconds, low, high) in enumerate(columns):
            if before > seconds:
                axes.barh(row, before - seconds, left=seconds, color="#DDE7EE", height=0.62)
            axes.barh(row, seconds, color=BLUE, height=0.62)
            axes.plot([low, high], [row, row], color="black", linewidth=1.2)
            axes.annotate(
                f"{seconds:.1f} s, {first / seconds:.2f}x", (max(seconds, before, high), row), (6, 0),
                textcoords="offset points", va="center", size=8.5,
            )  # fmt: skip
            before = seconds
        axes.set_yticks(range(len(steps)), steps["step"])
        axes.invert_yaxis()
        axes.set_xlim(0, float(steps[["seconds", "high"]].max().max()) * 1.25)
        axes.set_xlabel("seconds (black: 95 % interval of the median; light: saved)")
        axes.grid(axis="y", visible=False)
        axes.set_title(title)
    return figure


def trie(tokens: Sequence[str], depths: Sequence[int], parents: Sequence[int], n_context: int, title: str) -> Figure:
    """The trie of one question below its context: a node a token, lines to their parents.

    Args:
        tokens, depths, parents: of every node, depth-first; a root's parent is -1.
        n_context: nodes of the context; only its last one is drawn.
        title: the figure's message.
    """
    with style():
        shown = [k for k in range(len(tokens)) if k >= n_context - 1]
        children = {k: [c for c in shown if parents[c] == k] for k in shown}
        rows: dict[int, float] = {}
        leaves = 0
        for k in reversed(shown):  # children before parents
            mine = [rows[c] for c in children[k]]
            rows[k] = sum(mine) / len(mine) if mine else float(leaves)
            leaves += not mine
        figure, axes = plt.subplots(figsize=(9.5, 0.9 + 0.55 * leaves))
        for k in shown:
            x, y = depths[k] - n_context + 1, rows[k]
            if k != shown[0]:
                axes.plot([x - 1, x - 0.6, x], [rows[parents[k]], y, y], color=GREY, linewidth=0.8, zorder=1)
            label = tokens[k].strip() if k != shown[0] else f"… {tokens[k].strip()}"
            box = {
                "boxstyle": "round,pad=0.25",
                "facecolor": "#DDE7EE" if k == shown[0] else "white",
                "edgecolor": BLUE,
            }
            axes.text(x, y, label, ha="center", va="center", size=8, bbox=box, zorder=2)
        axes.set_xlim(-0.8, max(depths) - n_context + 1.8)
        axes.set_ylim(-0.7, leaves - 0.3)
        axes.set_axis_off()
        axes.set_title(title)
    return figure


def mask(visible: np.ndarray[Any, Any], n_context: int, title: str) -> Figure:
    """Which node (row) sees which node (column): dark where it does. `visible`: [nodes, nodes] bool."""
    with style():
        figure, axes = plt.subplots(figsize=(4.6, 4.6))
        axes.imshow(visible, cmap="Blues", vmin=0, vmax=1.3, interpolation="nearest")
        axes.axhline(n_context - 0.5, color=ORANGE, linewidth=1)
        axes.axvline(n_context - 0.5, color=ORANGE, linewidth=1)
        axes.annotate(
            "context", (n_context / 2, 0), (0, 4), textcoords="offset points", ha="center", size=8, color=ORANGE
        )
        axes.set_xlabel("node that is seen (key)")
        axes.set_ylabel("node that looks (query)")
        axes.grid(visible=False)
        axes.set_title(title, pad=14)
    return figure


def roofline(peaks: Sequence[Peaks], points: pd.DataFrame, title: str) -> Figure:
    """The measured roofline of a device with what was reached under it.

    Args:
        peaks: one per dtype.
        points: columns `label`, `dtype`, `intensity` (FLOP/byte), `flops` (FLOP/s).
        title: the figure's message.
    """
    with style():
        figure, axes = plt.subplots(figsize=(7, 4.4))
        low = min(0.1, float(points["intensity"].min()) / 2)
        high = max(float(points["intensity"].max()) * 4, max(p.ridge for p in peaks) * 30)
        x = np.geomspace(low, high, 200)
        for peak, colour, marker in zip(peaks, (BLUE, ORANGE, GREEN), "osD", strict=False):
            axes.plot(x, [peak.attainable(i) / 1e9 for i in x], color=colour)
            roof = peak.flops.value / 1e9
            axes.annotate(
                f"{peak.dtype}: {roof:,.0f} GFLOP/s", (peak.ridge, roof), (24, 4), textcoords="offset points",
                color=colour, size=9, weight="bold",
            )  # fmt: skip
            mine = points[points["dtype"] == peak.dtype]
            axes.plot(mine["intensity"], mine["flops"] / 1e9, marker, color=colour, markeredgecolor="white")
            for _, point in mine.iterrows():
                share = point["flops"] / peak.attainable(point["intensity"])
                axes.annotate(
                    f"{point['label']} ({share:.0%})", (point["intensity"], point["flops"] / 1e9), (9, 0),
                    textcoords="offset points", size=8, va="center", color=colour,
                )  # fmt: skip
        slope, middle = peaks[0].bandwidth.value / 1e9, min(p.ridge for p in peaks) / 3
        axes.annotate(
            f"memory: {slope:.0f} GB/s", (middle, slope * middle), (10, -6), textcoords="offset points",
            color=GREY, size=9, va="top",
        )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(low, high)
        axes.set_xlabel("arithmetic intensity (FLOP per byte of weights read)")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(title)
    return figure


def _label_end(axes: Axes, x: float, y: float, text: str, colour: str) -> None:
    axes.annotate(text, (x, y), (8, 0), textcoords="offset points", color=colour, va="center", weight="bold")
