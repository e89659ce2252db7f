"""A model with its drafts and settings, ready to write: what `generate`, `stream` and the benchmark run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from llmlab.decoding.cost import Tally
from llmlab.decoding.draft import Draft
from llmlab.decoding.engine import storage_bytes
from llmlab.decoding.loop import Settings, Step, decode
from llmlab.decoding.plain_engine import Decoder


@dataclass(frozen=True)
class Run:
    """A batch of prompts decoded against the clock.

    Attributes:
        ids: new tokens of each prompt, up to and with its end token.
        decoded: tokens behind the first pass, all prompts together.
        seconds_first: from the prompts to the first token.
        seconds_decode: the rest, recording of passes left out.
        seconds_recording: recording and compiling passes.
        steps: of each prompt, what each pass did.
        speculation: what drafts did in this run and those of the same writer before it; None without drafts.
    """

    ids: list[list[int]]
    decoded: int
    seconds_first: float
    seconds_decode: float
    seconds_recording: float = 0.0
    steps: list[list[Step]] = field(default_factory=list)
    speculation: Tally | None = None


@dataclass
class Writer:
    """A model with its drafts (maybe none) and how it decodes; `tally` counts over all batches."""

    engine: Decoder
    settings: Settings
    drafts: list[Draft] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)

    def warm_up(self, prompts: list[list[int]], batch_size: int) -> float:
        """Measure (and so record) the passes of the model and its drafts; returns the seconds that took.

        The cost model needs them, and no clock should run meanwhile.
        """
        begin, batch = time.perf_counter(), min(batch_size, len(prompts))
        self.engine.start(batch, self.settings.room(prompts))
        self.engine.profile()
        for draft in self.drafts:
            draft.begin(self.engine, [[0]] * batch, self.settings.length(prompts))
            draft.seconds()
        return time.perf_counter() - begin

    def passes(self, prompts: list[list[int]]) -> Iterator[dict[int, Step]]:
        """Decode a batch pass by pass; see `decode`."""
        return decode(self.engine, prompts, self.settings, self.drafts, self.tally)

    def run(self, prompts: list[list[int]]) -> Run:
        """Decode a batch to its end, against the clock."""
        steps: list[list[Step]] = [[] for _ in prompts]
        times, recorded = [time.perf_counter()], self._seconds_recording()
        for after_pass in self.passes(prompts):
            if len(times) == 1:
                times.append(time.perf_counter())
            for number, step in after_pass.items():
                steps[number].append(step)
        begin, first = times
        recording = self._seconds_recording() - recorded
        seconds = time.perf_counter() - first - recording
        ids = [[token for step in of_prompt for token in step.tokens] for of_prompt in steps]
        decoded, tally = sum(map(len, ids)) - len(ids), self.tally if self.drafts else None
        return Run(ids, decoded, first - begin, seconds, recording, steps, tally)

    @property
    def memory_bytes(self) -> int:
        """Bytes that the model and its drafts hold: weights, copies of them and caches."""
        return storage_bytes(tensor for engine in self._engines() for tensor in engine.tensors())

    def _engines(self) -> list[Decoder]:
        return [engine for engine in (self.engine, *(draft.engine for draft in self.drafts)) if engine]

    def _seconds_recording(self) -> float:
        return sum(engine.seconds_recording for engine in self._engines())
