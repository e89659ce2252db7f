"""The challenge's optimizations one by one: what each step saves, and that none changes the answers.

arrival order -> sorted -> length-profiled batches -> shared question -> trie -> answer-only head -> oneDNN's matmuls
(fp32 on CPU, where they are faster) -> bf16 (where that is fast). Every step keeps those before it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
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


class Step(NamedTuple):
    """One step of the ablation: what it runs, in which dtype, and its FLOPs without padding."""

    name: str
    dtype: str
    run: Callable[[], Scores]
    flops: int


def ablation(
    lm: LM, half: LM | None, questions: list[Question], matmul_rates: dict[str, float], *, min_runs: int = 3
) -> pd.DataFrame:
    """Time every step, interleaved in `min_runs` counted rounds.

    `half` is the same model in bf16 or fp16, or None where neither is fast; `matmul_rates` the measured FLOP/s of the
    model's own matmuls by dtype, for MFU.

    Returns a row a step: `step`, `dtype`, `tokens`, `padding` (share), `seconds` with `low` and `high`, `speedup` over
    the first step, `mfu`, `max_abs_delta` (of an ending's log-probability against the first step, in nats).
    """
    sequences = encode(lm, questions)
    steps = [*_plain_steps(lm, sequences), *_shared_steps(lm, half, sequences)]
    runs, scores = keeping({step.name: step.run for step in steps})
    timings = compare(runs, warmup=0, min_runs=min_runs)
    first, rows = steps[0].name, []
    for step in steps:
        seconds, low, high = median_interval(timings[step.name].seconds)
        work, row = scores[step.name].work, dict[str, object](step=step.name, dtype=step.dtype)
        row |= {"tokens": work.tokens, "padding": work.padding, "seconds": seconds, "low": low, "high": high}
        row |= {
            "speedup": timings[first].median.value / seconds,
            "mfu": step.flops / seconds / matmul_rates[step.dtype],
        }
        rows.append(row | {"max_abs_delta": max_delta(scores[first].log_probs, scores[step.name].log_probs)})
    return pd.DataFrame(rows)


def max_delta(a: list[float], b: list[float]) -> float:
    """The largest absolute difference of two lists of log-probabilities, in nats."""
    return float(np.abs(np.subtract(a, b)).max())


def keeping(runs: dict[str, Callable[[], T]]) -> tuple[dict[str, Callable[[], object]], dict[str, T]]:
    """The same functions for a clock that drops what they return, and a dictionary with what each returned last."""
    results: dict[str, T] = {}

    def keep(name: str) -> None:
        results[name] = runs[name]()

    return {name: partial(keep, name) for name in runs}, results


def scoring_flops(lm: LM, tries: list[Trie], head_positions: int) -> int:
    """FLOPs of a forward pass over tries: every node through the layers, attention over its ancestors, some heads."""
    layers = sum(lm.card.flops_per_token(depth, head=False) for trie in tries for depth in trie.depths)
    return layers + 2 * lm.card.head_parameters * head_positions


def _plain_steps(lm: LM, sequences: list[Sequence]) -> list[Step]:
    """Every ending with its context, in three orders of batches."""
    arrival = list(range(len(sequences)))
    longest_first, budget = sorted(arrival, key=lambda i: -len(sequences[i].ids)), profile(lm).budget()
    by_tokens: list[list[int]] = []  # their padded size keeps to the budget: more short rows than long ones
    for i in longest_first:
        if not by_tokens or len(sequences[by_tokens[-1][0]].ids) * (len(by_tokens[-1]) + 1) > budget:
            by_tokens.append([])
        by_tokens[-1].append(i)
    orders = {
        "arrival order, batches of 8": in_groups(arrival, 8),
        "sorted by length": in_groups(longest_first, 8),
        "length-profiled batches": by_tokens,
    }
    flops = sum(lm.card.sequence_flops(len(s.ids)) for s in sequences)
    return [Step(name, lm.dtype, partial(score_batches, lm, sequences, order), flops) for name, order in orders.items()]


def _shared_steps(lm: LM, half: LM | None, sequences: list[Sequence]) -> list[Step]:
    budget = profile(lm).budget()
    stars, tries = question_tries(sequences, share_endings=False), question_tries(sequences)

    def run(model: LM, row: list[Trie], head_everywhere: bool, fastest: bool) -> Scores:
        with fastest_matmuls(model.model) if fastest else nullcontext():
            return score_tries(model, sequences, row, budget=budget, head_everywhere=head_everywhere)

    def step(name: str, model: LM, row: list[Trie], head_everywhere: bool = False, fastest: bool = False) -> Step:
        flops = scoring_flops(model, row, sum(len(trie) if head_everywhere else trie.asked for trie in row))
        return Step(name, model.dtype, partial(run, model, row, head_everywhere, fastest), flops)

    steps = [step("shared question", lm, stars, True), step("token trie", lm, tries, True)]
    steps.append(step("answer-only head", lm, tries))
    if onednn_helps(lm.model):
        steps.append(step("oneDNN matmuls", lm, tries, fastest=True))
    return steps + ([step(half.dtype, half, tries, fastest=True)] if half else [])
