"""What quantizing a model cost and lost."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TypedDict

import pandas as pd

from llmlab.quantization.fit import in_short


class LinearReport(TypedDict):
    """What became of one matrix: relative output `error` on the calibration text (NaN for RTN), Babai's `bound` on it
    if no weight is clipped, `damping` needed, and the calibration `tokens` that came to it (an expert gets those that
    are routed to it)."""

    name: str
    rows: int
    columns: int
    error: float
    bound: float
    damping: float
    seconds: float
    tokens: int


@dataclass
class Report:
    """What quantizing a model cost and lost.

    Attributes:
        linears: a `LinearReport` for each packed matrix in order of treatment.
        kept: names of matrices that stayed as they were, with the reason.
        seconds: of the whole walk.
        tokens: of calibration text.
    """

    linears: list[LinearReport] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    kept: dict[str, str] = field(default_factory=dict)

    def table(self) -> pd.DataFrame:
        """A row a packed matrix."""
        return pd.DataFrame(self.linears)

    def warn(self) -> None:
        """Warn about what a reader of the result must know: matrices left as they were, experts without enough text."""
        if self.kept:
            reason = next(iter(self.kept.values()))
            warnings.warn(
                f"{len(self.kept)} matrices stay as they are: {in_short(self.kept)} ({reason}).", stacklevel=4
            )
        experts = [m for m in self.linears if self.tokens and m["tokens"] < m["columns"] and m["tokens"] < self.tokens]
        if experts:
            rounded = sum(m["tokens"] == 0 for m in experts)
            warnings.warn(
                f"{len(experts)} experts' matrices saw fewer calibration tokens than they have columns, "
                f"{rounded} of them none (those were rounded to nearest): give more text.",
                stacklevel=4,
            )
