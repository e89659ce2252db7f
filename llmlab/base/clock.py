"""Fair clocks: warm-up, interleaved repeats, medians with intervals. Every choice that is measured asks here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from llmlab.base.stats import Metric, median_interval

HOPELESS = 4.0  # this many times slower than the fastest: not worth another round


@dataclass(frozen=True)
class Timing:
    """Wall-clock seconds of every repeat of one candidate, warm-up left out."""

    name: str
    seconds: list[float]
    warmup: int

    @property
    def median(self) -> Metric:
        """Median seconds with its bootstrap 95 % interval."""
        value, low, high = median_interval(self.seconds)
        return Metric(value, "s", low, high)


def synchronize() -> None:
    """Wait until the GPUs have done all that this process asked of them.

    Those where it has no memory were asked nothing; to wait for one would open a context there, half a GB of it.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no hints for it
        for index in range(torch.cuda.device_count()):
            if torch.cuda.memory_reserved(index):
                torch.cuda.synchronize(index)
    if torch.backends.mps.is_available():
        torch.mps.synchronize()


def seconds_of(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, its work on GPUs included; what it returns is dropped."""
    synchronize()
    begin = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - begin


def rounds(
    candidates: Mapping[str, Callable[[], object]], *, counted: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each candidate, one after the other in every round: for choices made while a program runs.

    A HOPELESS candidate keeps its time of the last warm-up alone: nobody waits for what will not be chosen.

    Args:
        candidates: name to function.
        counted: rounds that count.
        warmup: rounds before them, at least one.
    """
    for _ in range(warmup):
        first = {name: seconds_of(run) for name, run in candidates.items()}
    bound = HOPELESS * min(first.values())
    times = {name: [] if seconds <= bound else [seconds] for name, seconds in first.items()}
    for _ in range(counted):
        for name, seconds in first.items():
            if seconds <= bound:
                times[name].append(seconds_of(candidates[name]))
    return times


def faster(candidate: Callable[[], object], baseline: Callable[[], object], *, counted: int = 7) -> float:
    """How many times faster `candidate` is than `baseline`, here and now: ratio of medians of interleaved rounds."""
    times = rounds({"baseline": baseline, "candidate": candidate}, counted=counted)
    return statistics.median(times["baseline"]) / statistics.median(times["candidate"])


def compare(
    candidates: dict[str, Callable[[], object]],
    *,
    warmup: int = 1,
    min_runs: int = 5,
    min_seconds: float = 0.0,
    max_runs: int = 1000,
) -> dict[str, Timing]:
    """Time several candidates side by side.

    Each round runs every candidate once, in an order that turns by one from round to round, so that a machine that
    slows down or a neighbour that wakes up hits all of them alike. Rounds go on until each candidate has `min_runs`
    *and* `min_seconds` of measured time, or `max_runs`.

    Args:
        candidates: name to function; what it returns is dropped.
        warmup: rounds that are run first and not counted.
        min_runs: at least this many counted rounds, >= 1.
        min_seconds: at least this much measured time for each candidate.
        max_runs: the bound on rounds.
    """
    if not candidates or min_runs < 1 or max_runs < min_runs or warmup < 0:
        raise ValueError("compare needs candidates, warmup >= 0 and 1 <= min_runs <= max_runs")
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(warmup + max_runs):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            taken = seconds_of(candidates[name])
            if turn >= warmup:
                seconds[name].append(taken)
        runs = turn + 1 - warmup
        if runs >= min_runs and min(map(sum, seconds.values())) >= min_seconds:
            break
    return {name: Timing(name, seconds[name], warmup) for name in names}


def speedup(baseline: Timing, candidate: Timing) -> Metric:
    """How many times faster `candidate` is: `paired_speedup` of two timings of one `compare`."""
    return paired_speedup(baseline.seconds, candidate.seconds)


def paired_speedup(baseline: Sequence[float], candidate: Sequence[float]) -> Metric:
    """How many times faster runs of `candidate` are than those of `baseline` beside them: the median of the ratios.

    The interval (95 %) is that median's. A machine whose pace changes from one pair to the next changes no ratio.
    Raises ValueError if there are not as many of the one as of the other.
    """
    if len(baseline) != len(candidate):
        raise ValueError("a speedup needs two timings of the same rounds")
    middle, low, high = median_interval([slow / fast for slow, fast in zip(baseline, candidate, strict=True)])
    return Metric(middle, "x", low, high)
