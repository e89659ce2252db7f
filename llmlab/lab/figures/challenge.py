"""The leaderboard of the 2023 challenge drawn with projections beside it."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from llmlab.data import FULL_SET
from llmlab.lab.figures import draw

KINDS = {  # kind -> colour, hatch, what the legend says
    "baseline": ("#4D4D4D", None, "baseline, measured in 2023"),
    "team": ("#ABABAB", None, "teams, measured in 2023 (exact track)"),
    "exact track": (draw.BLUE, "////", "exact track: projection, not a measurement"),
    "open track": (draw.ORANGE, r"\\\\", "open track: projection, not a measurement"),
}


@draw.style()
def beside_leaderboard(rows: pd.DataFrame, title: str, limit: tuple[float, str] | None = None) -> Figure:
    """Seconds for the whole set as bars, the longest cut short; projections are hatched.

    Columns `name`, `seconds` and `kind`, one of KINDS, as from `leaderboard.results` and `leaderboard.projections`;
    `slow` where there is a second, more cautious number, to which a line is drawn. `limit`: seconds that nothing of its
    kind can beat, and what they are.
    """
    rows = rows.sort_values("seconds", ascending=False, ignore_index=True)
    rows = rows.reindex(columns=["name", "seconds", "kind", "slow"])
    base = rows.loc[rows["kind"] == "baseline", "seconds"].max()
    end = 1.28 * rows.loc[rows["kind"] != "baseline", "seconds"].max()
    figure, axes = draw.canvas(title, 8.2, 1.6 + 0.31 * len(rows), xlim=(0, end * 1.02))
    axes.set(ylim=(-0.6, len(rows) + (0.3 if limit else -0.4)))
    line = "; line: transformers' norms" if rows["slow"].notna().any() else ""
    axes.set_xlabel(f"seconds for {FULL_SET:,} questions (x: baseline over it{line})")
    for y, seconds, kind, slow in rows[["seconds", "kind", "slow"]].itertuples():
        colour, hatch, meaning = KINDS[kind]
        look = {"color": "white" if hatch else colour, "edgecolor": colour, "hatch": hatch, "label": meaning}
        whisker = {"xerr": draw.spread([seconds], [seconds], [slow]), "ecolor": colour, "capsize": 4}
        axes.barh(y, min(seconds, end), height=0.68, **look, **({} if pd.isna(slow) else whisker))
        text = f"{seconds:,.0f} to {slow:,.0f} s" if slow > 0 else f"{seconds:,.{0 if hatch else 2}f} s"
        text += "" if kind == "baseline" else f", {base / seconds:.1f}x"
        if seconds > end:
            axes.plot([end * 0.955, end * 0.975], [y - 0.5, y + 0.5], color="white", linewidth=4)
            draw.note(axes, f"{text}: bar cut", (end, y), (-32, 0), ha="right", color="white")
        else:
            draw.note(axes, text, (np.fmax(seconds, slow), y))
    if limit:
        draw.rule(axes, limit[0], draw.drawable(limit[1]))
    axes.set_yticks(range(len(rows)), [draw.drawable(name) for name in rows["name"]])
    axes.grid(axis="y", visible=False)
    draw.legend_below(axes, 2)
    return figure
