"""Numbers with their uncertainty: intervals for proportions, means and medians, and tests for paired methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True)
class Metric:
    """A measured value with its unit and, where it was estimated, the 95 % interval from `low` to `high`."""

    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval} {self.unit}".rstrip()


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion (Wilson 1927); unlike mean +- 2σ it stays inside [0, 1]."""
    if not 0 <= successes <= n or n == 0:
        raise ValueError(f"expected 0 <= successes <= n and n > 0, got {successes} of {n}")
    p, z2 = successes / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At 0 and n successes the bounds are exactly 0 and 1; rounding must not move them.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == n else centre + half)


def proportion(hits: Sequence[bool]) -> Metric:
    """The share of true values with Wilson's interval."""
    successes, n = sum(map(bool, hits)), len(hits)
    low, high = wilson(successes, n)
    return Metric(successes / n, "", low, high)


def clustered_mean(values: Sequence[float], clusters: Sequence[str]) -> Metric:
    """Mean of questions' scores with a 95 % interval that allows for questions of a cluster succeeding together.

    With s_ic the score of question i of cluster c (Miller 2024, arXiv 2411.00640, section 2.2):
    SE² = SE_CLT² + 1/n² Σ_c Σ_i Σ_j≠i (s_ic - mean)(s_jc - mean), SE_CLT² = Σ_i (s_i - mean)² / (n (n - 1)).
    """
    scores, n = np.asarray(values, dtype=np.float64), len(values)
    mean = float(scores.mean())
    off = scores - mean
    sums = np.bincount(np.unique(clusters, return_inverse=True)[1], off)  # of each cluster
    variance = off @ off / (n * max(1, n - 1)) + (sums @ sums - off @ off) / n**2
    half = Z95 * math.sqrt(max(0.0, float(variance)))
    return Metric(mean, "", mean - half, mean + half)


def mean_score(values: Sequence[float], clusters: Sequence[str]) -> Metric:
    """The same; with Wilson's interval where it says more: for 0 and 1 if each question is a cluster, or all are equal.

    In the latter case no spread is seen, and a cluster counts as one question.
    """
    plain = clustered_mean(values, clusters)
    count = len(set(clusters))
    if set(values) <= {0, 1} and (count == len(values) or plain.value in (0, 1)):
        return Metric(plain.value, "", *wilson(round(plain.value * count), count))
    return plain


def median_interval(values: Sequence[float], *, draws: int = 2000) -> tuple[float, float, float]:
    """Median and its bootstrap 95 % interval (percentile method) as (median, low, high)."""
    sample = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(sample, size=(draws, sample.size)), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(np.median(sample)), float(low), float(high)


def mcnemar(hits_a: Sequence[bool], hits_b: Sequence[bool]) -> float:
    """Exact two-sided McNemar test on paired right/wrong answers of two methods: the p-value of "equally accurate".

    Only the items on which the methods differ count; under the null hypothesis each goes either way like a coin.
    """
    if len(hits_a) != len(hits_b):
        raise ValueError(f"paired methods need the same items: got {len(hits_a)} and {len(hits_b)}")
    only_a = sum(bool(a) and not b for a, b in zip(hits_a, hits_b, strict=True))
    only_b = sum(bool(b) and not a for a, b in zip(hits_a, hits_b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    return float(min(1.0, 2 * tail))
