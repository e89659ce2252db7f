"""The leaderboard of the 2023 challenge with this lab's projections beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from llmlab.data import FULL_SET
from llmlab.lab.figures.common import BLUE, GREY, ORANGE, style
from llmlab.lab.figures.drawable import drawable
from llmlab.model.load import model_card
from llmlab.sharding.plan import plan
from llmlab.sharding.predict import MOST_MFU

BOARD: dict[str, Any] = json.loads((Path(__file__).parent / "leaderboard.json").read_text(encoding="utf-8"))
CAUTIOUS = 0.5  # of the peak: what a less tuned program reaches
RANGE = f"{MOST_MFU:.0%} to {CAUTIOUS:.0%} of peak"
KINDS = {  # kind -> colour, hatch, what the legend says
    "baseline": ("#4D4D4D", None, "baseline, measured in 2023"),
    "team": ("#ABABAB", None, "teams, measured in 2023 (exact track)"),
    "exact track": (BLUE, "////", f"exact track: projection, not a measurement ({RANGE})"),
    "open track": (ORANGE, r"\\\\", f"open track: projection, not a measurement ({RANGE})"),
}


def leaderboard() -> pd.DataFrame:
    """Baseline and teams: `name`, `seconds` for the whole set, `kind` ("baseline" or "team")."""
    rows = [BOARD["baseline"] | {"kind": "baseline"}, *({**team, "kind": "team"} for team in BOARD["teams"])]
    return pd.DataFrame(rows)[["name", "seconds", "kind"]]


def projections(model: str = "llama-30b", devices: int = 4, device: str = "v100") -> pd.DataFrame:
    """What the planner predicts for that server: fp16 (exact track) and 4-bit weights (open track).

    Columns as `leaderboard`; `slow`, the seconds if devices reached CAUTIOUS of their peak only; and `assumptions`, all
    that went into the number.

    Raises InputError if the model fits no layout.
    """
    rows = []
    for bits, kind in ((16, "exact track"), (4, "open track")):
        found, slow = (
            plan(model_card(model), devices=devices, device=device, bits=bits, workload="hellaswag", mfu=mfu)
            for mfu in (MOST_MFU, CAUTIOUS)
        )
        best, other = found.best, slow.best
        assert best.predicted and other.predicted  # there are a device and a workload
        rows.append(
            {
                "name": f"llmlab, {'fp16' if bits == 16 else f'{bits}-bit weights'}, {best.name}",
                "seconds": best.predicted.seconds,
                "slow": other.predicted.seconds,
                "kind": kind,
                "assumptions": found.assumptions,
            }
        )
    return pd.DataFrame(rows)


def beside_leaderboard(rows: pd.DataFrame, title: str, limit: tuple[float, str] | None = None) -> Figure:
    """Seconds for the whole set as bars, the longest cut short; projections are hatched.

    Args:
        rows: columns `name`, `seconds` and `kind`, one of KINDS, as from `leaderboard` and `projections`; `slow` where
            there is a second, more cautious number, to which a line is drawn.
        title: the figure's message.
        limit: seconds that nothing of its kind can beat, and what they are.
    """
    with style():
        rows = rows.sort_values("seconds", ascending=False, ignore_index=True)
        rows["slow"] = rows["slow"].fillna(rows["seconds"]) if "slow" in rows else rows["seconds"]
        figure, axes = plt.subplots(figsize=(8.2, 1.6 + 0.31 * len(rows)))
        base = float(rows.loc[rows["kind"] == "baseline", "seconds"].max())
        end = 1.28 * float(rows.loc[rows["kind"] != "baseline", "seconds"].max())
        for y, (name, seconds, kind, slow) in enumerate(
            rows[["name", "seconds", "kind", "slow"]].itertuples(index=False)
        ):
            colour, hatch, _ = KINDS[kind]
            ours = hatch is not None
            axes.barh(
                y, min(seconds, end), height=0.68, color="white" if ours else colour, edgecolor=colour, hatch=hatch,
                label=drawable(str(name)),
            )  # fmt: skip
            text = f"{seconds:,.0f}" if ours else f"{seconds:,.2f} s"
            text += f" to {slow:,.0f} s" if slow > seconds else ""
            text += f", {base / seconds:.1f}x" if kind != "baseline" else ""
            cut = seconds > end
            if slow > seconds:
                axes.plot([seconds, slow], [y, y], "-|", color=colour, linewidth=1.2, markersize=8)
            if cut:
                text = f"{text}: bar cut"
                axes.plot([end * 0.955, end * 0.975], [y - 0.5, y + 0.5], color="white", linewidth=4)
            axes.annotate(
                text, (min(slow, end), y), (-32 if cut else 5, 0), textcoords="offset points", va="center",
                ha="right" if cut else "left", size=8.5, color="white" if cut else "black",
            )  # fmt: skip
        if limit:
            axes.axvline(limit[0], color=GREY, linestyle="--", linewidth=1)
            axes.annotate(
                drawable(limit[1]), (limit[0], len(rows) - 0.4), (4, 0), textcoords="offset points", size=8, color=GREY
            )
        axes.set_yticks(range(len(rows)), [drawable(str(name)) for name in rows["name"]])
        axes.set_ylim(-0.6, len(rows) + (0.3 if limit else -0.4))
        axes.set_xlim(0, end * 1.02)
        axes.set_xlabel(f"seconds for {FULL_SET:,} questions (x: baseline over it)")
        axes.grid(axis="y", visible=False)
        present = [kind for kind in KINDS if kind in set(rows["kind"])]
        handles = [_key(kind) for kind in present]
        figure.legend(handles, [KINDS[kind][2] for kind in present], loc="outside lower center", ncols=2, fontsize=8)
        axes.set_title(drawable(title))
    return figure


def _key(kind: str) -> Patch:
    colour, hatch, _ = KINDS[kind]
    return Patch(facecolor="white" if hatch else colour, edgecolor=colour, hatch=hatch)
