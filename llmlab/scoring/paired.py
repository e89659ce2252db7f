"""Two ways of scoring the same questions, compared question by question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from llmlab.base.stats import Metric, clustered_mean, mcnemar


class Outcomes(Protocol):
    """What two results are compared by: `ScoreResult` has it, and a task's `EvalResult`.

    Attributes:
        data: fingerprint of the questions.
        predictions: what was answered to each.
        right: 1 for a right answer, 0 for a wrong one; or another score.
        clusters: which questions belong together, a name for each.
        log_probs: of each question's endings, in nats; empty where texts were written.
    """

    @property
    def data(self) -> str: ...
    @property
    def predictions(self) -> Sequence[object]: ...
    @property
    def right(self) -> Sequence[float]: ...
    @property
    def clusters(self) -> Sequence[str]: ...
    @property
    def log_probs(self) -> Sequence[Sequence[float]]: ...


@dataclass(frozen=True)
class Paired:
    """How far method B is from method A on the same questions.

    Attributes:
        n: questions.
        flips: questions whose prediction (acc) differs.
        max_abs_delta: largest |Δ log-probability| of an ending, in nats.
        gained, lost: questions that only B, or only A, answers rightly (whose score is higher, or lower).
        p_value: exact McNemar test of "equally accurate".
        difference: of the mean scores, B - A, with its interval: the standard error of the questions' own differences
            (Miller 2024, arXiv 2411.00640, section 4), clustered.
    """

    n: int
    flips: list[int]
    max_abs_delta: float
    gained: int
    lost: int
    p_value: float
    difference: Metric

    def __str__(self) -> str:
        return (
            f"{len(self.flips)} of {self.n} predictions differ, max |Δ log-prob| {self.max_abs_delta:.2g} nats; "
            f"{self.gained} gained, {self.lost} lost, McNemar p = {self.p_value:.2f}, difference {self.difference}"
        )


def paired(a: Outcomes, b: Outcomes) -> Paired:
    """Compare two results on the same questions. Raises ValueError if the questions differ."""
    if a.data != b.data:
        raise ValueError(f"the results are of different questions: {a.data} and {b.data}")
    deltas = [np.abs(np.subtract(x, y)).max() for x, y in zip(a.log_probs, b.log_probs, strict=True) if x]
    better, worse = np.greater(b.right, a.right), np.less(b.right, a.right)
    return Paired(
        n=len(a.right),
        flips=[i for i, (x, y) in enumerate(zip(a.predictions, b.predictions, strict=True)) if x != y],
        max_abs_delta=float(max(deltas, default=0.0)),
        gained=int(better.sum()),
        lost=int(worse.sum()),
        p_value=mcnemar(worse.tolist(), better.tolist()),
        difference=clustered_mean(np.subtract(b.right, a.right, dtype=float).tolist(), a.clusters),
    )
