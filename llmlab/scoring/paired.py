"""Two ways of scoring the same questions, compared question by question."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmlab.base.stats import mcnemar
from llmlab.scoring.score import ScoreResult


@dataclass(frozen=True)
class Paired:
    """How far method B is from method A on the same questions.

    Attributes:
        n: questions.
        flips: questions whose prediction (acc) differs.
        max_abs_delta: largest |Δ log-probability| of an ending, in nats.
        gained, lost: questions that only B, or only A, answers rightly.
        p_value: exact McNemar test of "equally accurate".
    """

    n: int
    flips: list[int]
    max_abs_delta: float
    gained: int
    lost: int
    p_value: float

    def __str__(self) -> str:
        return (
            f"{len(self.flips)} of {self.n} predictions differ, max |Δ log-prob| {self.max_abs_delta:.2g} nats; "
            f"{self.gained} gained, {self.lost} lost, McNemar p = {self.p_value:.2f}"
        )


def paired(a: ScoreResult, b: ScoreResult) -> Paired:
    """Compare two results on the same questions. Raises ValueError if the questions differ."""
    if a.data != b.data:
        raise ValueError(f"the results are of different questions: {a.data} and {b.data}")
    right_a = [p == label for p, label in zip(a.predictions, a.labels, strict=True)]
    right_b = [p == label for p, label in zip(b.predictions, b.labels, strict=True)]
    deltas = [np.abs(np.subtract(x, y)).max() for x, y in zip(a.log_probs, b.log_probs, strict=True)]
    return Paired(
        n=a.n,
        flips=[i for i, (x, y) in enumerate(zip(a.predictions, b.predictions, strict=True)) if x != y],
        max_abs_delta=float(max(deltas)),
        gained=sum(y and not x for x, y in zip(right_a, right_b, strict=True)),
        lost=sum(x and not y for x, y in zip(right_a, right_b, strict=True)),
        p_value=mcnemar(right_a, right_b),
    )
