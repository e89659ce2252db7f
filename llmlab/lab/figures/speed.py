"""Figures of where time goes: tokens a second by width, time by module, and the roofline."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.figure import Figure

from llmlab.lab.figures import draw
from llmlab.measure.roofline import Peaks

GROUPS = {  # as in `measure.profile`
    "MLP": draw.BLUE, "attention projections": draw.SKY, "attention core": draw.ORANGE, "output head": draw.GREEN,
    "embedding": draw.PINK, "norms and the rest": draw.SILVER,
}  # fmt: skip


@draw.style()
def throughput(table: pd.DataFrame, title: str) -> Figure:
    """Tokens/s of one forward pass over its number of tokens, log-log, with intervals; a line per dtype.

    Columns `tokens`, `dtype`, `seconds` of the pass, and their interval `low`, `high`.
    """
    tokens = table["tokens"]
    rates = table.assign(rate=tokens / table["seconds"], low=tokens / table["high"], high=tokens / table["low"])
    rates["ideal"] = rates.groupby("dtype")["rate"].transform("first") * tokens
    figure, axes = draw.canvas(title, xlabel="tokens in one forward pass", ylabel="tokens per second", yscale="log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens.unique(), tokens.unique().astype(str))
    axes.minorticks_off()
    axes.set_ylim(rates["low"].min() / 1.5, rates["high"].max() * 3)
    draw.lines(axes, rates, "tokens", "rate", "dtype", ideal=("ideal", ":"))
    words = "dotted: if every further token were free"
    draw.note(axes, words, (0.03, 0.93), (0, 0), xycoords="axes fraction", color=draw.GREY)
    return figure


@draw.style()
def module_shares(tables: Mapping[str, pd.DataFrame], title: str) -> Figure:
    """Share of time by kind of module, one stacked bar a phase.

    `tables`: phase ("prefill", "decode") -> columns `group`, `share`, `seconds`, from measure.profile.
    """
    shares = pd.DataFrame({phase: table.set_index("group")["share"] * 100 for phase, table in tables.items()})
    shares.columns = [f"{phase}\n{table['seconds'].sum() * 1000:,.0f} ms" for phase, table in tables.items()]
    figure, axes = draw.canvas(title, 7, 1.5 + 0.75 * len(tables))
    for bars in draw.stacked(axes, shares.reindex(list(GROUPS)).fillna(0).T, GROUPS, edgecolor="white"):
        words = [f"{bar.get_width():.0f}" if bar.get_width() >= 4 else "" for bar in bars]
        axes.bar_label(bars, words, label_type="center", color="white", size=9)
    axes.set(xlabel="share of the forward pass (%)", xlim=(0, 100))
    axes.grid(visible=False)
    draw.legend_below(axes, 3)
    return figure


@draw.style()
def roofline(peaks: Sequence[Peaks], points: pd.DataFrame, title: str) -> Figure:
    """The measured roofline of a device, a line a dtype, with what was reached under it.

    `points`: columns `label`, `dtype`, `intensity` (FLOP/byte), `flops` (FLOP/s).
    """
    ridges = [peak.ridge for peak in peaks]
    low, high = min(0.1, points["intensity"].min() / 2), max(points["intensity"].max() * 4, max(ridges) * 30)
    figure, axes = draw.canvas(title, 7, 4.4, xscale="log", yscale="log", xlim=(low, high), ylabel="GFLOP/s")
    palette = draw.looks(pd.Series([peak.dtype for peak in peaks]))
    for peak in peaks:
        colour, roof = palette[peak.dtype]["color"], peak.flops.value / 1e9
        axes.plot([low, peak.ridge, high], [peak.attainable(low) / 1e9, roof, roof], color=colour)
        words = f"{peak.dtype}: {roof:,.0f} GFLOP/s"
        draw.note(axes, words, (peak.ridge, roof), (24, 8), color=colour, size=9, weight="bold")
        reached = points.loc[points["dtype"] == peak.dtype, ["label", "intensity", "flops"]]
        for label, intensity, flops in reached.itertuples(index=False):
            words = f"{label} ({flops / peak.attainable(intensity):.0%})"
            axes.plot(intensity, flops / 1e9, markersize=7, **palette[peak.dtype])
            draw.note(axes, words, (intensity, flops / 1e9), (9, 0), color=colour)
    slope, middle = peaks[0].bandwidth.value / 1e9, min(ridges) / 3
    draw.note(axes, f"memory: {slope:.0f} GB/s", (middle, slope * middle), (10, -12), color=draw.GREY, size=9)
    axes.set_xlabel("arithmetic intensity (FLOP per byte of weights read)")
    return figure
