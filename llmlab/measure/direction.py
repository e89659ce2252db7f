"""Which way a metric is good: the one definition that comparisons, figures and widgets share."""

from __future__ import annotations

import re

LOWER = re.compile(r"perplexity|nll|_over_|delta|error|seconds|bubble|joules|bytes|bits_per")
HIGHER = re.compile(r"^acc(_|$)|speedup|agreement|acceptance|mfu|mbu|per_second|tokens_per_pass|equal|kept")
COSTS = {"s", "B", "J", "nat", "bit"}  # less is better of them, alone or for each of something: nat/token


def direction(name: str, unit: str = "") -> int:
    """1 where more is better, -1 where less is, 0 where it is not known; the name counts before the unit.

    Rates ("token/s", "B/s") and factors ("x") are gains, amounts of time, memory, energy and loss are costs.
    """
    if HIGHER.search(name):
        return 1
    if LOWER.search(name):
        return -1
    amount, _, per = unit.partition("/")
    if unit == "x" or per == "s":
        return 1
    return -1 if amount in COSTS else 0
