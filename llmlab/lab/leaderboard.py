"""The leaderboard of the 2023 challenge, and what this lab's planner says of the same server and programs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from llmlab.data import ENDING_TOKENS, FULL_SET, QUESTION_TOKENS
from llmlab.model.load import model_card
from llmlab.sharding import costs
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.plan import assumptions, plan
from llmlab.sharding.predict import Nodes, Workload, predict, workload

BOARD: dict[str, Any] = json.loads((Path(__file__).parent / "leaderboard.json").read_text(encoding="utf-8"))
TRACKS = {16: ("exact track", "fp16"), 4: ("open track", "4-bit weights")}
LATER_MATMUL = 101 / 125  # of a V100's peak, by a cuBLAS later than devices.json's paper: NVIDIA forum 79781
QUESTION, ENDING = QUESTION_TOKENS.mean, ENDING_TOKENS.mean
PLAIN = QUESTION + ENDING - 1  # tokens of one ending with its question; the last predicts nothing that is asked for
ONCE = QUESTION + 4 * ENDING  # tokens of a question with its four endings
# Programs of 2023 as their authors describe them: name, measured seconds, the job, where the description is.
PROGRAMS = (
    (
        BOARD["baseline"]["name"],
        BOARD["baseline"]["seconds"],
        Workload("hellaswag", 4 * FULL_SET * PLAIN, 4 * FULL_SET * PLAIN, PLAIN, 16 * PLAIN, costs.EAGER, naive=True),
        "every ending with its question, longest first, batches of 16 (little padding), logits everywhere, one stage "
        "at a time (accelerate); round_two_tutorial",
    ),
    (
        "redundant token sharing",
        478.86,
        Workload("hellaswag", FULL_SET * ONCE, FULL_SET * 4 * ENDING, ONCE, 16 * ONCE, costs.EAGER),
        "a question with its four endings in one row, an attention bias, logits of answers; a filled pipeline and "
        "batches of 16 questions assumed; dongwonjo.github.io/portfolio/cechallenge",
    ),
    (
        BOARD["teams"][0]["name"],
        BOARD["teams"][0]["seconds"],
        workload("hellaswag"),
        "the shared question's keys and values reused, kernels of its own, batches that fill the pipeline without "
        "padding; Seoul National University news, 2023",
    ),
)


def results() -> pd.DataFrame:
    """Baseline and teams: `name`, `seconds` for the whole set, `kind` ("baseline" or "team")."""
    rows = pd.DataFrame([BOARD["baseline"], *BOARD["teams"]])[["name", "seconds"]]
    return rows.assign(kind=["baseline"] + ["team"] * len(BOARD["teams"]))


def replayed() -> pd.DataFrame:
    """What the planner says of programs of 2023 on that server, LLaMA-30B on a pipeline of four V100.

    Nothing is fitted to the results. Columns: `name`, `measured` and `predicted` seconds, `error` (predicted over
    measured, less 1), `assumptions`: all that went into the number, and where the description is.
    """
    card, on, rows = model_card("llama-30b"), costs.device("v100"), []
    for name, measured, job, described in PROGRAMS:
        predicted = predict(card, Cuts(pipeline=4), on, job).seconds
        told = f"{described}; {assumptions(on, job, 4, Nodes())}"
        rows.append((name, measured, predicted, predicted / measured - 1, told))
    return pd.DataFrame(rows, columns=["name", "measured", "predicted", "error", "assumptions"])


def steps() -> pd.DataFrame:
    """What brings this lab's own pipeline of four V100 down, step by step: `step`, `seconds`, `mfu`."""
    card, on, job = model_card("llama-30b"), costs.device("v100"), workload("hellaswag")
    faster = f"matmuls at {LATER_MATMUL:.0%} of peak, as a later cuBLAS (NVIDIA forum 79781)"
    runs = (
        (costs.FAMILY.name, on, costs.FAMILY),
        (costs.FUSED.name, on, costs.FUSED),
        (faster, replace(on, matmul=LATER_MATMUL), costs.FUSED),
    )
    rows = [(name, predict(card, Cuts(pipeline=4), at, replace(job, kernels=kernels))) for name, at, kernels in runs]
    return pd.DataFrame([(name, p.seconds, p.mfu) for name, p in rows], columns=["step", "seconds", "mfu"])


def projections(model: str = "llama-30b", devices: int = 4, device: str = "v100") -> pd.DataFrame:
    """What the planner predicts for that server: fp16 (exact track) and 4-bit weights (open track).

    Columns as `results`; `slow`, the seconds with transformers' own norms; `kwh` of the devices; and `assumptions`,
    all that went into the numbers. Raises InputError if the model fits no layout.
    """
    card, on, rows = model_card(model), costs.device(device), []
    for bits, (track, weights) in TRACKS.items():
        planned = plan(card, bits=bits, devices=devices, device=device, workload="hellaswag")
        best = planned.best
        assert best.predicted  # there are a device and a workload
        job = replace(workload("hellaswag"), kernels=costs.FAMILY)
        slow = predict(card, best, on, job, bits=bits).seconds
        name = f"llmlab, {weights}, {best.name}"
        rows.append((name, best.predicted.seconds, slow, track, best.predicted.kwh, planned.assumptions))
    return pd.DataFrame(rows, columns=["name", "seconds", "slow", "kind", "kwh", "assumptions"])
