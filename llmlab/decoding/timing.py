"""Seconds of a pass by rows and width: measured at a few points, between them by lines. What speculation reckons with.

Matrices are read once for all tokens of a pass, so rows x width decides.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Sequence
from functools import partial

import torch

from llmlab.base.clock import seconds_of
from llmlab.decoding.cache import Cache
from llmlab.kernels.replay import RECORD

Forward = Callable[[list[list[int]]], torch.Tensor]
LEARN = 0.1  # how far a pass corrects what is known of it, and of the one before it
ODD = 2.0  # times what is known: what takes longer was disturbed, and counts as this


def padded(width: int, widths: Sequence[int]) -> int:
    """The least of these widths, in rising order, that a pass of `width` tokens a row fits in; above them its own."""
    return next((w for w in widths if w >= width), width)


class PassTimes:
    """What passes of one engine take; `widths` are the numbers of tokens a row to which it pads them.

    `agree`: what ranks that share a model make of the seconds that each of them measured, so that all go equally wide.
    """

    def __init__(self, widths: Sequence[int], agree: Callable[[Sequence[float]], list[float]] = list) -> None:
        self.widths, self.agree = widths, agree
        self.measured: dict[tuple[int, int], float] = {}  # by rows and width
        self.last: tuple[tuple[int, int], float] | None = None  # the pass before: its rows and width, its seconds

    def seconds(self, rows: int, width: int) -> float:
        """Seconds of a pass over `width` tokens of each row, padded as the engine does it."""
        width = padded(width, self.widths)
        if (rows, width) in self.measured:
            return self.measured[rows, width]
        points = sorted((r * w, seconds) for (r, w), seconds in self.measured.items())
        times = dict(points)  # of as many tokens the longest
        sizes = list(times)
        place = min(bisect(sizes, rows * width), len(sizes) - 1)  # above all that was measured the last line goes on
        low, high = sizes[max(0, place - 1)], sizes[place]
        slope = (times[high] - times[low]) / max(1, high - low)
        return times[low] + slope * max(0, rows * width - low)

    def reach(self, rows: int) -> bool:
        """Whether as many rows were measured, or more: what they cost is not known from fewer."""
        return any(measured >= rows for measured, _ in self.measured)

    def observe(self, rows: int, width: int, seconds: float) -> None:
        """Learn from a pass of the decoding itself: what was measured in a bad moment would mislead for good.

        A machine changes its pace, that of all passes alike, so that a pass is held against the one before it where
        that was of another size: both share what their ratio differs by. Ranks do not learn: each has a clock of its
        own, and they must decide alike.
        """
        point = rows, padded(width, self.widths)
        if point not in self.measured or self.agree is not list:
            return
        before, its_seconds = self.last or (point, seconds)
        if before != point:
            error = (seconds / self.measured[point]) / (its_seconds / self.measured[before])
            correction = min(ODD, max(1 / ODD, error)) ** LEARN
            self.measured[point] *= correction
            self.measured[before] /= correction
        self.last = point, seconds

    def measure(self, forward: Forward, cache: Cache) -> dict[int, float]:
        """Seconds by width at the batch size of the cache; measures what is missing. Keeps nothing in the cache."""
        batch, lengths = cache.batch, cache.lengths
        most = max(max(lengths) + 1, min(cache.capacity // 2, cache.capacity - self.widths[-1]))
        widths = [w for w in self.widths if most + w <= cache.capacity]
        # A batch shrinks when rows end: a point or two of a row alone tell what fewer rows cost.
        for rows, some in ((batch, widths), (1, [w for w in widths if w in (1, 5)])):
            missing = [w for w in some if (rows, w) not in self.measured]
            cache.batch = rows
            cache.lengths = [max(1, most - row % 2) for row in range(rows)]  # they differ in length, as they do later
            self._time(forward, rows, missing)
            cache.batch, cache.lengths = batch, lengths
        return {w: self.measured[batch, w] for w in widths}

    def _time(self, forward: Forward, rows: int, widths: list[int], repeats: int = 3) -> None:
        runs: dict[int, list[float]] = {w: [] for w in widths}
        for turn in range(RECORD + 1 + repeats):
            for width in widths:
                seconds = seconds_of(partial(forward, [[0] * width] * rows))
                if turn > RECORD:  # those before are warm-ups, and record the passes
                    runs[width].append(seconds)
        # A pass over more tokens is never cheaper: that would be noise.
        least = 0.0
        shortest = self.agree([min(times) for times in runs.values()])  # what disturbs makes passes longer
        for width, seconds in zip(runs, shortest, strict=True):
            least = max(least, seconds)
            larger = [known for (r, w), known in self.measured.items() if r * w >= rows * width]
            self.measured[rows, width] = min([least, *larger])
