"""What every figure shares: the style, saving and showing, and the chores of drawing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Rectangle

from llmlab.base.paths import atomic, figures_folder

if TYPE_CHECKING:
    from IPython.display import Image
    from matplotlib.typing import LegendLocType

# Safe for colour-blind readers.
BLUE, AMBER, GREEN, ORANGE, PINK, _, _, SILVER, _, SKY = sns.color_palette("colorblind").as_hex()
GREY, PALE = "#6E6E6E", "#DDE7EE"
COLOURS = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY, "black")
MARKERS = "osD^v<>"
FONT = "DejaVu Sans"
STYLE = {
    **sns.axes_style("ticks", {"font.sans-serif": [FONT], "grid.color": "#E2E2E2", "axes.grid": True}),
    **sns.plotting_context("paper", font_scale=1.06, rc={"axes.titlesize": 11, "lines.markersize": 6}),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "patch.force_edgecolor": False,
}
# Given a value and both ends of its interval (`with_ends`), seaborn draws the middle one, and a whisker over all.
INTERVAL = {"estimator": "median", "errorbar": ("pi", 100)}
SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


@contextmanager
def style() -> Iterator[None]:
    """The look of every figure, for figures of your own: `with figures.style(): ...`, or `@figures.style()`."""
    with plt.rc_context(STYLE):
        yield


def save(figure: Figure, name: str, alt: str, folder: Path | None = None) -> Path:
    """Write NAME.png (200 dpi) and NAME.svg into `folder` (`paths.figures_folder()`), each whole or not at all.

    The alt text goes into their metadata.

    Returns the path of the PNG.
    """
    folder = folder or figures_folder()
    with plt.rc_context({"svg.hashsalt": name, "svg.fonttype": "none", "savefig.dpi": 200}):
        for suffix in ("svg", "png"):
            metadata = {"Title": name, "Description": alt} | ({"Date": None} if suffix == "svg" else {})
            with atomic(folder / f"{name}.{suffix}") as path:
                figure.savefig(path, metadata=metadata)
    return folder / f"{name}.png"


def show(figure: Figure, name: str, alt: str) -> Image:
    """Save a figure and return it as an image that carries its alt text into notebooks and reports."""
    from IPython.display import Image

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
    usual: dict[str, Any] = {"va": "center", "size": 8.5}
    axes.annotate(text, at, shift, textcoords="offset points", **(usual | look))


def rule(axes: Axes, at: float, text: str, *, colour: str = GREY, horizontal: bool = False) -> None:
    """A dashed line across the axes, with words where it begins: at the top, or at the left if it is horizontal."""
    line = axes.axhline if horizontal else axes.axvline
    line(at, color=colour, linestyle="--", linewidth=1, zorder=1)
    if horizontal:
        note(axes, text, (0, at), (4, 3), xycoords=axes.get_yaxis_transform(), va="bottom", color=colour)
    else:
        note(axes, text, (at, 1), (4, -1), xycoords=axes.get_xaxis_transform(), va="top", color=colour)


def looks(names: pd.Series[str]) -> tuple[dict[str, str], list[str]]:
    """A colour and a marker for each distinct name."""
    palette = dict(zip(names.unique(), cycle(COLOURS), strict=False))
    return palette, list(islice(cycle(MARKERS), len(palette)))


def with_ends(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Every row three times: with its value, and with both ends of its interval (`low`, `high`) in the value's place.

    For seaborn with INTERVAL. Where there is no interval the value stands in for its ends.
    """
    numbers = table[[value, "low", "high"]].astype(float)
    ends = numbers[value], numbers[[value, "low"]].min(axis=1), numbers[[value, "high"]].max(axis=1)
    return pd.concat([table.assign(**{value: end}) for end in ends], ignore_index=True)


def lines(axes: Axes, table: pd.DataFrame, x: str, y: str, hue: str, ideal: tuple[str, str] | None = None) -> None:
    """A line for each value of `hue`, named behind its last point; with whiskers if there are columns `low`, `high`.

    Scales and limits must be set before, as names keep a distance. `ideal`: a column drawn thin, and its line style.
    """
    palette, markers = looks(table[hue])
    shared = {"x": x, "hue": hue, "palette": palette, "legend": False, "ax": axes}
    bars = {"err_style": "bars", "err_kws": {"capsize": 3}, **INTERVAL} if "low" in table else {}
    data = with_ends(table, y) if bars else table
    sns.lineplot(data, y=y, style=hue, markers=markers, dashes=False, **shared, **bars)
    if ideal:
        sns.lineplot(table, y=ideal[0], linestyle=ideal[1], linewidth=1, **shared)
    axes.autoscale_view()
    ends = table.sort_values(x).groupby(hue, sort=False).last().sort_values(y)
    heights = (axes.transData + axes.transAxes.inverted()).transform(ends[[x, y]])[:, 1]  # shares of the axes
    line_height = 0.2 * axes.figure.dpi / axes.get_window_extent().height  # a fifth of an inch
    place = -math.inf
    for name, last, height in zip(ends.index, ends[x], heights, strict=True):
        place = max(height, place + line_height)
        at = {"xycoords": ("data", "axes fraction"), "size": 9}
        note(axes, drawable(str(name)), (last, place), (8, 0), color=palette[name], **at)


def dots(
    axes: Axes, table: pd.DataFrame, x: str, y: str, hue: str, texts: pd.Series[str], *, legend: bool = False
) -> pd.Series[float]:
    """A row for each value of `y`, in it a dot with a whisker for each of `hue`; columns `low` and `high`.

    Args:
        texts: words behind each whisker, or behind the table's column `beside` where that is farther.

    Returns the height of each dot.
    """
    palette, markers = looks(table[hue])
    gap, last = 0.22, len(palette) - 1
    sns.pointplot(
        with_ends(table, x), x=x, y=y, hue=hue, palette=palette, markers=markers, markersize=7, linestyle="none",
        dodge=gap * last, capsize=0.07, err_kws={"linewidth": 1.5}, legend=legend, ax=axes, **INTERVAL,
    )  # fmt: skip
    heights = pd.Series(table[y].factorize()[0] + gap * (table[hue].factorize()[0] - last / 2), table.index)
    ends = table.reindex(columns=[x, "high", "beside"]).astype(float).max(axis=1)
    for text, end, height, name in zip(texts, ends, heights, table[hue], strict=True):
        note(axes, text, (end, height), size=8, color=palette[name])
    axes.set(ylabel="", ylim=(heights.max() // 1 + 0.6, -0.6))
    return heights


def stacked(axes: Axes, table: pd.DataFrame, colours: Mapping[str, str], **look: Any) -> list[BarContainer]:
    """A bar for each row of the table, the first one on top; its parts are the columns named in `colours`.

    Returns the bars of each part.
    """
    parts = table[list(colours)]
    begins = parts.cumsum(axis=1) - parts
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return [
        axes.barh(parts.index, parts[part], left=begins[part], color=colour, label=part, height=0.66, **look)
        for part, colour in colours.items()
    ]


def legend_below(axes: Axes, columns: int, at: LegendLocType = "outside lower center") -> None:
    """The legend of these axes at the bottom of their figure."""
    handles, labels = axes.get_legend_handles_labels()
    if legend := axes.get_legend():
        legend.remove()
    axes.figure.legend(handles, labels, loc=at, ncols=columns, fontsize=9)


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
