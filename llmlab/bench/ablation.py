"""The challenge's optimizations one by one: what each step saves, and that none changes the answers.

arrival order -> sorted -> length-profiled batches -> shared question -> trie -> answer-only head -> oneDNN's matmuls
(fp32 on CPU, where they are faster) -> bf16 (where that is fast). Every step keeps those before it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import pandas as pd

from llmlab.base.clock import compare
from llmlab.base.stats import median_interval
from llmlab.data import Question
from llmlab.kernels.plain import fastest_matmuls, onednn_helps
from llmlab.model.lm import LM
from llmlab.scoring.encode import Sequence, encode
from llmlab.scoring.pack import profile
from llmlab.scoring.reference import in_groups, score_batches
from llmlab.scoring.scores import Scores
from llmlab.scoring.shared import score_tries
from llmlab.scoring.trie import Trie, question_tries

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One step of the ablation: what it runs, in which dtype, and its FLOPs without padding."""

    name: str
    dtype: str
    run: Callable[[], Scores]
    flops: int


def ablation(
    lm: LM, half: LM | None, questions: list[Question], matmul_rates: dict[str, float], *, min_runs: int = 3
) -> pd.DataFrame:
    """Time every step interleaved.

    Args:
        lm: the model in fp32 (or the dtype that counts as exact).
        half: the same model in bf16 or fp16; None where neither is fast.
        questions: what to score.
        matmul_rates: measured FLOP/s of the model's own matmuls by dtype, for MFU.
        min_runs: counted rounds.

    Returns:
        A row a step: `step`, `dtype`, `tokens`, `padding` (share), `seconds` with `low` and `high`, `speedup` over the
        first step, `mfu`, `max_abs_delta` (of an ending's log-probability against the first step, in nats).
    """
    sequences = encode(lm, questions)
    steps = [*_plain_steps(lm, sequences), *_shared_steps(lm, half, sequences)]
    runs, scores = keeping({step.name: step.run for step in steps})
    timings = compare(runs, warmup=0, min_runs=min_runs)
    rows = []
    first = steps[0].name
    for step in steps:
        seconds, low, high = median_interval(timings[step.name].seconds)
        pairs = zip(scores[first].log_probs, scores[step.name].log_probs, strict=True)
        rows.append(
            {
                "step": step.name,
                "dtype": step.dtype,
                "tokens": scores[step.name].work.tokens,
                "padding": scores[step.name].work.padding,
                "seconds": seconds,
                "low": low,
                "high": high,
                "speedup": timings[first].median.value / seconds,
                "mfu": step.flops / seconds / matmul_rates[step.dtype],
                "max_abs_delta": max(abs(a - b) for a, b in pairs),
            }
        )
    return pd.DataFrame(rows)


def keeping(runs: dict[str, Callable[[], T]]) -> tuple[dict[str, Callable[[], object]], dict[str, T]]:
    """The same functions for a clock that drops what they return, and a dictionary with what each returned last."""
    results: dict[str, T] = {}

    def keep(name: str, run: Callable[[], T]) -> None:
        results[name] = run()

    return {name: partial(keep, name, run) for name, run in runs.items()}, results


def scoring_flops(lm: LM, tries: list[Trie], head_positions: int) -> int:
    """FLOPs of a forward pass over tries: every node through the layers, attention over its ancestors, some heads."""
    layers = sum(lm.card.flops_per_token(depth, head=False) for trie in tries for depth in trie.depths)
    return layers + 2 * lm.card.head_parameters * head_positions


def _plain_steps(lm: LM, sequences: list[Sequence]) -> list[Step]:
    """Every ending with its context, in three orders of batches."""
    arrival = list(range(len(sequences)))
    longest_first = sorted(arrival, key=lambda i: -len(sequences[i].ids))
    flops = sum(lm.card.sequence_flops(len(s.ids)) for s in sequences)
    orders = {
        "arrival order, batches of 8": in_groups(arrival, 8),
        "sorted by length": in_groups(longest_first, 8),
        "length-profiled batches": _by_tokens(sequences, longest_first, profile(lm).budget()),
    }
    return [Step(name, lm.dtype, partial(score_batches, lm, sequences, order), flops) for name, order in orders.items()]


def _by_tokens(sequences: list[Sequence], order: list[int], budget: int) -> list[list[int]]:
    """Batches whose padded size keeps to the budget: more short rows than long ones."""
    batches: list[list[int]] = []
    for i in order:
        if not batches or len(sequences[batches[-1][0]].ids) * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def _shared_steps(lm: LM, half: LM | None, sequences: list[Sequence]) -> list[Step]:
    budget = profile(lm).budget()
    stars, tries = question_tries(sequences, share_endings=False), question_tries(sequences)
    asked = sum(trie.asked for trie in tries)

    def run(model: LM, row: list[Trie], head_everywhere: bool, fastest: bool) -> Scores:
        with fastest_matmuls(model.model) if fastest else nullcontext():
            return score_tries(model, sequences, row, budget=budget, head_everywhere=head_everywhere)

    def step(name: str, model: LM, row: list[Trie], head_everywhere: bool = False, fastest: bool = False) -> Step:
        flops = scoring_flops(model, row, sum(map(len, row)) if head_everywhere else asked)
        return Step(name, model.dtype, partial(run, model, row, head_everywhere, fastest), flops)

    steps = [
        step("shared question", lm, stars, head_everywhere=True),
        step("token trie", lm, tries, head_everywhere=True),
        step("answer-only head", lm, tries),
    ]
    if onednn_helps(lm.model):
        steps.append(step("oneDNN matmuls", lm, tries, fastest=True))
    if half:
        steps.append(step(half.dtype, half, tries, fastest=True))
    return steps
