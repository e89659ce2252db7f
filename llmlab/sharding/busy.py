"""When a rank's device works: what a pipeline's bubble is measured by."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

Moment = float | torch.cuda.Event


class Busy:
    """Spans of work on one device, in seconds after this object was made.

    On CPU a clock tells them. A GPU does later what is asked of it now, and waits there for what other ranks send: CUDA
    events in its stream tell when work began behind such a wait and when it ended. Nothing here waits for them until
    `spans` does.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._moments: list[tuple[Moment, Moment]] = []
        self._start = self._now()

    @contextmanager
    def working(self) -> Iterator[None]:
        """What is asked of the device within the block is one span."""
        begin = self._now()
        yield
        self._moments.append((begin, self._now()))

    def spans(self) -> list[tuple[float, float]]:
        """(start, end) of each span; waits for the last one's end."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return [(self._seconds(begin), self._seconds(end)) for begin, end in self._moments]

    def _now(self) -> Moment:
        if self.device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch has no hints for it
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self, moment: Moment) -> float:
        if isinstance(moment, torch.cuda.Event):
            assert isinstance(self._start, torch.cuda.Event)
            return float(self._start.elapsed_time(moment)) / 1000  # milliseconds
        assert isinstance(self._start, float)
        return moment - self._start
