"""Solutions of notebook 06."""

import math


def advice(points, loss):
    allowed = points["precision"] == "fp32"
    if loss > 0:
        allowed |= points["perplexity_ratio"] <= 1 + loss
    return points[allowed].sort_values("decode_speedup")["name"].iloc[-1]


def mcnemar(gained, lost):
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2**n
    return min(1.0, 2 * tail)
