"""What both ways of scoring return, and what they say while they work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from llmlab.base.errors import NumericalError
from llmlab.scoring.encode import Sequence

# Shows progress: called with the sequences that a batch finished and their log-probabilities.
OnBatch = Callable[[list[Sequence], list[float]], None]


@dataclass(frozen=True)
class Work:
    """What a scoring job cost.

    Attributes:
        tokens: that went through the model, padding left out.
        passes: forward passes.
        asked: positions at which the output head worked.
        padding: share of the positions that were computed for nothing.
    """

    tokens: int
    passes: int
    asked: int
    padding: float = 0.0


@dataclass(frozen=True)
class Scores:
    """Scores of sequences, in the order in which they were given.

    Attributes:
        log_probs: log-probability of each sequence's ending given its context, in nats.
        work: what that cost.
        greedy: whether greedy decoding would write the ending.
        settings: the path that ran: `method` "shared" or "reference", and the latter's `batch_size`.
    """

    log_probs: list[float]
    work: Work
    greedy: list[bool] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)


def check_finite(batch: list[Sequence], log_probs: list[float], number: int, dtype: str) -> None:
    """Raise NumericalError for the first log-probability of a batch that is NaN or infinite; names its question."""
    for sequence, value in zip(batch, log_probs, strict=True):
        if not math.isfinite(value):
            raise NumericalError(
                f"batch {number}: question {sequence.question}, ending {sequence.ending} has a log-probability that is "
                f"not finite in {dtype}: try fp32, and check the weights."
            )
