"""The loop of text generation, with and without speculation: draft, verify in one pass, keep what is accepted.

It is batched: each row keeps what it may, and ends by itself. What is accepted, and why that is exact: see `verify`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from llmlab.base.errors import NumericalError
from llmlab.decoding.cost import Tally, plain_seconds
from llmlab.decoding.draft import Draft, Proposal, Sampling
from llmlab.decoding.pace import MOST, Pace, Row
from llmlab.decoding.plain_engine import Decoder
from llmlab.decoding.verify import verify


@dataclass(frozen=True)
class Step:
    """What one pass did to one row.

    Attributes:
        source: the draft; empty without one.
        drafted: its tokens (a tree in the order of `parents`).
        parents: see `Proposal`.
        accepted: how many tokens of `tokens` were drafted ones.
        tokens: what the row got: accepted ones, then the model's own.
    """

    source: str
    drafted: list[int]
    parents: list[int]
    accepted: int
    tokens: list[int]


@dataclass(frozen=True)
class Settings:
    """How to decode.

    Attributes:
        max_new_tokens: at most so many for each row.
        sampling: how tokens are chosen.
        finished: told a row's prompt and all its new tokens, whether it ends with the last of them.
        k: drafted tokens (a tree: depth) a pass; None adapts it to acceptance and cost, down to none at all.
    """

    max_new_tokens: int
    sampling: Sampling
    finished: Callable[[list[int], list[int]], bool]
    k: int | None = None

    def length(self, prompts: list[list[int]]) -> int:
        """Tokens of the longest row, prompt and new ones."""
        return max(map(len, prompts)) + self.max_new_tokens

    def room(self, prompts: list[list[int]]) -> int:
        """Tokens that a row of the cache must hold: those and a tree of drafted ones."""
        return self.length(prompts) + max(MOST if self.k is None else self.k, MOST // 4) * 4 + 2


@torch.inference_mode()
def decode(
    engine: Decoder,
    prompts: list[list[int]],
    settings: Settings,
    drafts: Sequence[Draft] = (),
    tally: Tally | None = None,
) -> Iterator[dict[int, Step]]:
    """Continue a batch of prompts; yields after each pass what the rows that were still open got.

    Args:
        engine: of the model. Its cache is started anew.
        prompts: token ids, each with `max_new_tokens` of room in the model's context.
        settings: how.
        drafts: asked together, see `Pace`.
        tally: takes the count.

    Raises NumericalError if logits are not finite.
    """
    tally = tally or Tally()
    rows = everyone = [Row(number, ids, settings.max_new_tokens) for number, ids in enumerate(prompts)]
    pace = Pace(engine, drafts, settings.k)
    engine.start(len(prompts), settings.room(prompts))
    logits = engine.prefill(prompts)
    _best(logits, engine)
    firsts = [_choose(row, Proposal(), logits[row.number, None], settings.sampling)[1] for row in rows]
    yield {row.number: _give(row, Step("", [], [], 0, [firsts[row.number]]), settings) for row in rows}
    for draft in drafts:
        draft.begin(engine, prompts, settings.length(prompts))
        draft.learn([ids[-1:] for ids in prompts], logits[:, None])
    while any(row.open for row in rows):
        rows = _without_ended(rows, engine, drafts)
        proposals = pace.propose(rows, settings.sampling)
        steps = _verified(engine, rows, proposals, drafts, settings.sampling)
        pace.observe(rows, {number: step.tokens for number, step in steps.items()})
        _count(tally, rows, proposals, steps, pace)
        yield {row.number: _give(row, steps[row.number], settings) for row in rows if row.open}
    if drafts:
        tally.plain_seconds += plain_seconds([len(row.new) - 1 for row in everyone], lambda n: engine.seconds(1, n))


def _give(row: Row, step: Step, settings: Settings) -> Step:
    """Give a row its tokens, up to where it ends; the step as far as it counts."""
    for count, token in enumerate(step.tokens, start=1):
        row.new.append(token)
        if settings.finished(row.prompt, row.new) or len(row.new) >= row.limit:
            row.open = False
            return replace(step, accepted=min(step.accepted, count), tokens=step.tokens[:count])
    return step


def _without_ended(rows: list[Row], engine: Decoder, drafts: Sequence[Draft]) -> list[Row]:
    """Leave rows out that have ended, once half of them have.

    Until then they go along, idle: a batch of another size is another shape to record.
    """
    still = [place for place, row in enumerate(rows) if row.open]
    if 2 * len(still) > len(rows):
        return rows
    engine.select(still)
    for draft in drafts:
        draft.select(still)
    return [rows[place] for place in still]


def _verified(
    engine: Decoder, rows: list[Row], proposals: list[Proposal], drafts: Sequence[Draft], sampling: Sampling
) -> dict[int, Step]:
    """One pass over what was drafted; what it brings each open row, by the row's number."""
    tokens = [[row.new[-1], *p.tokens] for row, p in zip(rows, proposals, strict=True)]
    trees = not all(p.is_chain for p in proposals)
    parents = [[-1, *(parent + 1 for parent in p.parents)] for p in proposals] if trees else None
    begin, recorded = time.perf_counter(), engine.seconds_recording
    logits = engine.forward(tokens, parents)
    best = _best(logits, engine)
    if engine.seconds_recording == recorded:
        engine.observe(max(map(len, tokens)), time.perf_counter() - begin)
    for draft in drafts:
        draft.learn(tokens, logits)
    steps: dict[int, Step] = {}
    kept: list[list[int]] = [[] for _ in rows]
    for place, (row, proposal) in enumerate(zip(rows, proposals, strict=True)):
        if row.open:
            path, token = _choose(row, proposal, logits[place, : len(tokens[place])], sampling, best[place])
            kept[place] = [0, *(node + 1 for node in path)]
            accepted = [proposal.tokens[node] for node in path]
            steps[row.number] = Step(proposal.source, proposal.tokens, proposal.parents, len(path), [*accepted, token])
    engine.keep(kept)
    return steps


def _choose(
    row: Row, proposal: Proposal, logits: torch.Tensor, sampling: Sampling, best: list[int] | None = None
) -> tuple[list[int], int]:
    """`verify`, each position with the bias and penalties that the tokens before it call for."""
    if sampling.adjusts:
        logits, best = sampling.adjusted(logits, row.prompt, row.new, proposal.paths), None
    return verify(proposal, logits, sampling, best)


def _best(logits: torch.Tensor, engine: Decoder) -> list[list[int]]:
    """The argmax of each row, [batch][width] or [batch]. Raises NumericalError for NaN and infinity: they are it."""
    best = logits.argmax(dim=-1, keepdim=True)
    # A number tells both, so that a step waits for a GPU once.
    told = best.where(logits.gather(-1, best).isfinite(), -1).squeeze(-1).cpu()
    if (told < 0).any():
        raise NumericalError(f"the logits of {engine.lm.name} are not finite in {engine.lm.dtype}: try fp32.")
    ids: list[list[int]] = told.tolist()
    return ids


def _count(tally: Tally, rows: list[Row], verified: list[Proposal], steps: dict[int, Step], pace: Pace) -> None:
    """Count one pass."""
    tally.passes += 1
    for row, proposal in zip(rows, verified, strict=True):
        if row.open:
            tally.observe(proposal, steps[row.number].tokens)
    tally.seconds += pace.seconds
