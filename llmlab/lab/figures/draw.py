"""What every figure shares: the style, saving and showing, and the chores of drawing."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle
from matplotlib.typing import LegendLocType
from numpy.typing import ArrayLike, NDArray

from llmlab.base.paths import atomic, figures_folder

# Safe for colour-blind readers.
BLUE, AMBER, GREEN, ORANGE, PINK, _, _, SILVER, _, SKY = SHADES = sns.color_palette("colorblind").as_hex()
GREY, PALE = "#6E6E6E", "#DDE7EE"
COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, "black")
MARKERS = "osD^v<>"
FONT = "DejaVu Sans"
STYLE = {
    **sns.axes_style("ticks", {"font.sans-serif": [FONT], "grid.color": "#E2E2E2", "axes.grid": True}),
    **sns.plotting_context("paper", font_scale=1.06, rc={"axes.titlesize": 11, "lines.markersize": 6}),
    **{"axes.spines.right": False, "axes.spines.top": False, "axes.titlelocation": "left", "axes.titleweight": "bold"},
    **{"figure.constrained_layout.use": True, "legend.frameon": False, "lines.linewidth": 1.6},
    "patch.force_edgecolor": False,
}
SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure, for figures of your own: `with figures.style(): ...`, or `@figures.style()`."""
    with plt.rc_context(STYLE):
        yield


def save(figure: Figure, name: str, alt: str, folder: Path | None = None) -> Path:
    """Write NAME.png (200 dpi) and NAME.svg, alt text in their metadata, each whole or not at all; the PNG's path.

    `folder` is `paths.figures_folder()` by default.
    """
    folder = folder or figures_folder()
    with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "savefig.dpi": 200}):
        for suffix, more in (("svg", {"Date": None}), ("png", {})):
            with atomic(folder / f"{name}.{suffix}") as path:
                figure.savefig(path, metadata={"Title": name, "Description": alt} | more)
    return folder / f"{name}.png"


def show(figure: Figure, name: str, alt: str) -> Image:
    """Save a figure and return it as an image that carries its alt text into notebooks and reports."""
    path = save(figure, name, alt)
    plt.close(figure)
    return Image(data=path.read_bytes(), format="png", width=round(figure.get_figwidth() * 100), alt=alt)


def drawable(text: str) -> str:
    """Text that matplotlib draws as it is: no formula between dollar signs, no line break, no warning for a glyph.

    Characters that the lab's font lacks become □. Escaped for `Text`; not meant for `parse_math=False`.
    """
    shown = (SIGNS.get(c, c) for c in text)
    return "".join(c if _font().get_char_index(ord(c)) else "□" for c in shown).replace("$", r"\$")


@cache
def _font() -> FT2Font:
    return font_manager.get_font(font_manager.findfont(FONT))


def canvas(title: str, width: float = 7.0, height: float = 3.8, **settings: Any) -> tuple[Figure, Axes]:
    """A figure of so many inches with one pair of axes under its title; settings as for `Axes.set`."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set(title=drawable(title), **settings)
    return figure, axes


def note(axes: Axes, text: str, at: tuple[float, float], shift: tuple[float, float] = (7, 0), **look: Any) -> None:
    """Words beside a point of the data, `shift` points (1/72 inch) away from it."""
    usual: dict[str, Any] = {"textcoords": "offset points", "va": "center", "size": 8.5}
    axes.annotate(text, at, shift, **(usual | look))


def rule(axes: Axes, at: float, text: str, *, colour: str = GREY, horizontal: bool = False) -> None:
    """A dashed line across the axes, with words where it begins: at the top, or at the left if it is horizontal."""
    line = axes.axhline if horizontal else axes.axvline
    line(at, color=colour, linestyle="--", linewidth=1, zorder=1)
    if horizontal:
        note(axes, text, (0, at), (4, 3), xycoords=axes.get_yaxis_transform(), va="bottom", color=colour)
    else:
        note(axes, text, (at, 1), (4, -1), xycoords=axes.get_xaxis_transform(), va="top", color=colour)


def looks(names: pd.Series) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each distinct name."""
    pairs = zip(names.unique(), cycle(COLOURS), cycle(MARKERS), strict=False)
    return {name: {"color": colour, "marker": marker, "markeredgecolor": "white"} for name, colour, marker in pairs}


def spread(value: ArrayLike, low: ArrayLike, high: ArrayLike) -> NDArray[np.float64]:
    """How far an interval reaches below and above a value, as matplotlib wants it; 0 where there is none."""
    return np.fmax(0, [np.subtract(value, low), np.subtract(high, value)])


def lines(axes: Axes, table: pd.DataFrame, x: str, y: str, hue: str, ideal: tuple[str, str] | None = None) -> None:
    """A line for each value of `hue`, named behind its last point; with whiskers if there are columns `low`, `high`.

    Scales and limits must be set before, as names keep a distance. `ideal`: a column drawn thin, and its line style.
    """
    palette, table = looks(table[hue]), table.sort_values(x)
    for name, look in palette.items():
        rows = table[table[hue] == name]
        whiskers = spread(rows[y], rows["low"], rows["high"]) if "low" in table else None
        axes.errorbar(rows[x], rows[y], whiskers, capsize=3, **look)
        if ideal:
            axes.plot(rows[x], rows[ideal[0]], ideal[1], color=look["color"], linewidth=1)
    axes.autoscale_view()
    ends = table.groupby(hue, sort=False).last().sort_values(y)
    heights = (axes.transData + axes.transAxes.inverted()).transform(ends[[x, y]])[:, 1]  # shares of the axes
    line_height = 0.2 * axes.figure.dpi / axes.get_window_extent().height  # a fifth of an inch
    place = -math.inf
    for name, last, height in zip(ends.index, ends[x], heights, strict=True):
        place, colour = max(height, place + line_height), palette[name]["color"]
        at = {"xycoords": ("data", "axes fraction"), "size": 9}
        note(axes, drawable(str(name)), (last, place), (8, 0), color=colour, **at)


def dots(axes: Axes, table: pd.DataFrame, x: str, y: str, hue: str, texts: Sequence[str]) -> list[float]:
    """A row for each value of `y`, in it a dot with a whisker for each of `hue`; columns `low` and `high`.

    `texts` stand behind each whisker, or behind the table's column `beside` where that is farther. Returns the height
    of each dot.
    """
    palette, (rows, names) = looks(table[hue]), table[y].factorize()
    heights = list(rows + 0.22 * (table[hue].factorize()[0] - (len(palette) - 1) / 2))
    ends = table.reindex(columns=[x, "high", "beside"]).astype(float).max(axis=1)
    for height, text, end, (_, row) in zip(heights, texts, ends, table.iterrows(), strict=True):
        look, whisker = palette[row[hue]] | {"markersize": 9}, spread([row[x]], [row["low"]], [row["high"]])
        axes.errorbar(row[x], height, xerr=whisker, capsize=3, fmt="none", color=look["color"], zorder=1)
        axes.plot(row[x], height, linestyle="none", label=row[hue], **look)
        note(axes, text, (end, height), size=8, color=look["color"])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(max(heights) // 1 + 0.6, -0.6)
    axes.grid(axis="y", visible=False)
    return heights


def stacked(axes: Axes, table: pd.DataFrame, colours: Mapping[str, str], **look: Any) -> list[BarContainer]:
    """A bar for each row of the table, the first on top; its parts, whose bars it returns, are named in `colours`."""
    parts = table[list(colours)]
    begins, look = parts.cumsum(axis=1) - parts, {"height": 0.66} | look
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return [axes.barh(parts.index, parts[p], left=begins[p], color=c, label=p, **look) for p, c in colours.items()]


def legend_below(axes: Axes, columns: int, at: LegendLocType = "outside lower center") -> None:
    """The legend of these axes, each name once, at the bottom of their figure."""
    handles, names = axes.get_legend_handles_labels()
    once = dict(zip(names, handles, strict=True))
    axes.figure.legend(list(once.values()), list(once), loc=at, ncols=columns, fontsize=9)


def token_rows(axes: Axes, names: Sequence[str], width: float, top: float = -0.55) -> None:
    """Axes for rows of `token_box`: a name beside each row, the first one on top, and no frame."""
    axes.set(xlim=(-0.5, width), ylim=(len(names) - 0.4, top), xticks=[])
    axes.set_yticks(range(len(names)), [drawable(name) for name in names])
    axes.tick_params(length=0)
    axes.grid(visible=False)
    sns.despine(ax=axes, left=True, bottom=True)


def token_width(text: str) -> float:
    """Room for the text of a token and its box."""
    return max(3.0, len(text.strip()) + 1.8)


def token_box(axes: Axes, x: float, y: float, text: str, ink: str, **look: Any) -> float:
    """The text of a token in a box that begins at x, in row y; its look as for `Rectangle`. Returns where it ends."""
    width = token_width(text)
    axes.add_patch(Rectangle((x, y - 0.36), width - 0.4, 0.72, **look))
    note(axes, drawable(text.strip(" ")) or "␣", (x + width / 2 - 0.2, y), (0, 0), ha="center", size=7.5, color=ink)
    return x + width
