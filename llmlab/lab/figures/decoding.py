"""Figures of decoding: what a pass costs by its width, what drafts bring, and what each pass of a completion did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llmlab.lab.figures import draw

WIDEST = 118  # characters of a row of tokens
KINDS = {  # of a token -> face, edge and ink of its box
    "accepted": (draw.GREEN, draw.GREEN, "white"),
    "rejected": ("white", "#D0D0D0", draw.GREY),
    "the model's own": ("white", draw.BLUE, "black"),
}


@dataclass(frozen=True)
class Pass:
    """One pass in words.

    Attributes:
        source: the draft; empty without one.
        accepted, rejected: text of each drafted token; a list a branch of what was rejected.
        own: text of the token that the model added; None if the completion ended before it.
    """

    source: str
    accepted: list[str]
    rejected: list[list[str]]
    own: str | None

    @property
    def tokens(self) -> list[str]:
        """What the pass brought."""
        return self.accepted + ([] if self.own is None else [self.own])

    @property
    def drafted(self) -> int:
        """How many tokens were drafted."""
        return len(self.accepted) + sum(map(len, self.rejected))


@draw.style()
def pass_cost(profiles: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    """Milliseconds of one pass over its number of tokens; dashed: if each token cost as much as the first.

    `profiles`: name -> width -> seconds, from `Engine.profile`.
    """
    series = {name: pd.Series(profile) * 1e3 for name, profile in profiles.items()}
    table = pd.concat(series, names=["model", "tokens"]).rename("milliseconds").reset_index()
    table["linear"] = table.groupby("model")["milliseconds"].transform("first") * table["tokens"]
    ticks, words = table["tokens"].unique(), "dashed: if every token cost as much as the first"
    figure, axes = draw.canvas(title, xticks=ticks, ylabel="milliseconds of the pass")
    axes.set(ylim=(0, table["milliseconds"].max() * 1.6), xlim=(0, ticks.max() * 1.03))
    axes.set_xlabel("tokens in one pass (1 = plain decoding)")
    draw.lines(axes, table, "tokens", "milliseconds", "model", ideal=("linear", "--"))
    draw.note(axes, words, (0.99, 0.93), (0, 0), xycoords="axes fraction", ha="right", color=draw.GREY)
    return figure


@draw.style()
def speedups(table: pd.DataFrame, title: str) -> Figure:
    """Measured speed of each draft over plain decoding by kind of prompt, beside what the cost model predicts.

    Columns `draft`, `kind`, `acceptance_rate`, `predicted_speedup`, `speedup_vs_plain`, `speedup_low`, `speedup_high`.
    """
    drafts, kinds = table["draft"].nunique(), table["kind"].nunique()
    figure, axes = draw.canvas(title, 7.4, 1.5 + 0.26 * drafts * kinds)
    table = table.rename(columns={"speedup_low": "low", "speedup_high": "high", "predicted_speedup": "beside"})
    accepted = table["acceptance_rate"].map("{:.0%} accepted".format).tolist()
    heights = draw.dots(axes, table, "speedup_vs_plain", "kind", "draft", accepted)
    axes.plot(table["beside"], heights, "k|", markersize=13, markeredgewidth=1.5, label="predicted")
    draw.rule(axes, 1, "plain")
    axes.set_xlabel("speed over plain decoding (x; line: slowest to fastest run)")
    draw.legend_below(axes, drafts + 1)
    return figure


@draw.style()
def steps(passes: Sequence[Pass], title: str, *, first: int = 12) -> Figure:
    """The first passes, a row each and a box a token: accepted ones green, rejected ones struck out, own framed."""
    rows = [_kinds(row) for row in passes[:first]]
    widest = min(max(60.0, *(sum(draw.token_width(text) for text, _ in row) for row in rows)), WIDEST)
    figure, axes = draw.canvas(title, widest * 0.082 + 1.9, 0.42 * len(rows) + 1.25)
    names = ["0: prompt", *(f"{k}: {row.source or 'no draft'}" for k, row in enumerate(passes[1:first], start=1))]
    draw.token_rows(axes, [name if len(name) < 28 else name[:27] + "…" for name in names], widest + 4, top=-1.3)
    _row(axes, -0.9, [(kind, kind) for kind in KINDS], gap=1)
    for line, row in enumerate(rows):
        _row(axes, line, row)
    return figure


def _kinds(row: Pass) -> list[tuple[str, str]]:
    """The tokens of a pass with what became of them."""
    rejected = [(text, "rejected") for branch in row.rejected for text in branch]
    own = [] if row.own is None else [(row.own, "the model's own")]
    return [(text, "accepted") for text in row.accepted] + rejected + own


def _row(axes: Axes, y: float, row: Sequence[tuple[str, str]], gap: float = 0) -> None:
    """A row of boxes, as many as there is room for; then how many more there are."""
    x = 0.0
    for place, (text, kind) in enumerate(row):
        if x + draw.token_width(text) > WIDEST:
            draw.note(axes, f"+{len(row) - place}", (x, y), (0, 0))
            return
        face, edge, ink = KINDS[kind]
        end = draw.token_box(axes, x, y, text, ink, facecolor=face, edgecolor=edge, linewidth=1.4)
        if kind == "rejected":
            axes.plot([x + 0.5, end - 0.9], [y, y], color=draw.ORANGE, linewidth=1.1)
        x = end + gap
