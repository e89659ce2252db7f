"""The leaderboard of the 2023 challenge, and what this lab's planner predicts for the same server."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from llmlab.model.load import model_card
from llmlab.sharding.plan import plan
from llmlab.sharding.predict import MOST_MFU

BOARD: dict[str, Any] = json.loads((Path(__file__).parent / "leaderboard.json").read_text(encoding="utf-8"))
CAUTIOUS = 0.5  # of the peak: what a less tuned program reaches
TRACKS = {16: ("exact track", "fp16"), 4: ("open track", "4-bit weights")}


def results() -> pd.DataFrame:
    """Baseline and teams: `name`, `seconds` for the whole set, `kind` ("baseline" or "team")."""
    rows = pd.DataFrame([BOARD["baseline"], *BOARD["teams"]])[["name", "seconds"]]
    return rows.assign(kind=["baseline"] + ["team"] * len(BOARD["teams"]))


def projections(model: str = "llama-30b", devices: int = 4, device: str = "v100") -> pd.DataFrame:
    """What the planner predicts for that server: fp16 (exact track) and 4-bit weights (open track).

    Columns as `results`; `slow`, the seconds if devices reached CAUTIOUS of their peak only; and `assumptions`, all
    that went into the number. Raises InputError if the model fits no layout.
    """
    card, how, rows = model_card(model), {"devices": devices, "device": device, "workload": "hellaswag"}, []
    for bits, (track, weights) in TRACKS.items():
        fast, slow = (plan(card, bits=bits, mfu=mfu, **how) for mfu in (MOST_MFU, CAUTIOUS))  # type: ignore[arg-type]
        best, cautious = fast.best.predicted, slow.best.predicted
        assert best and cautious  # there are a device and a workload
        name = f"llmlab, {weights}, {fast.best.name}"
        rows.append((name, best.seconds, cautious.seconds, track, fast.assumptions))
    return pd.DataFrame(rows, columns=["name", "seconds", "slow", "kind", "assumptions"])
