"""The challenge's optimizations one by one: what each step saves, and that none changes the answers.

arrival order -> sorted -> length-profiled batches -> shared question -> trie -> answer-only head -> last layer pruned
-> oneDNN's matmuls (fp32 on CPU, where they are faster) -> bf16 (where that is fast). Every step keeps those before it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import pandas as pd
import torch

from llmlab.base.clock import compare
from llmlab.base.stats import median_interval
from llmlab.data import Question
from llmlab.kernels.plain import fastest_matmuls, onednn_helps
from llmlab.model.lm import LM
from llmlab.scoring import reference, shared
from llmlab.scoring.attention import tries_attend
from llmlab.scoring.encode import Sequence, encode
from llmlab.scoring.pack import Passes, profile
from llmlab.scoring.trie import Trie, question_tries


@dataclass
class Step:
    """One step of the ablation: what it runs and what that costs."""

    name: str
    dtype: str
    run: Callable[[], list[float]]
    tokens: int  # that carry information
    places: int  # that the Linears compute, padding included
    flops: int  # of the tokens, without padding


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
    steps = _steps(lm, half, encode(lm, questions))
    values: dict[str, list[float]] = {}

    def keeping(step: Step) -> Callable[[], None]:
        def run() -> None:
            values[step.name] = step.run()

        return run

    timings = compare({s.name: keeping(s) for s in steps}, warmup=0, min_runs=min_runs)
    rows = []
    first = steps[0].name
    for step in steps:
        seconds, low, high = median_interval(timings[step.name].seconds)
        rows.append(
            {
                "step": step.name,
                "dtype": step.dtype,
                "tokens": step.tokens,
                "padding": 1 - step.tokens / step.places,
                "seconds": seconds,
                "low": low,
                "high": high,
                "speedup": median_interval(timings[first].seconds)[0] / seconds,
                "mfu": step.flops / seconds / matmul_rates[step.dtype],
                "max_abs_delta": max(abs(a - b) for a, b in zip(values[first], values[step.name], strict=True)),
            }
        )
    return pd.DataFrame(rows)


def scoring_flops(lm: LM, tries: list[Trie], head_positions: int) -> int:
    """FLOPs of a forward pass over tries: every node through the layers, attention over its ancestors, some heads."""
    layers = sum(lm.card.flops_per_token(depth, head=False) for trie in tries for depth in trie.depths)
    return layers + 2 * lm.card.head_parameters * head_positions


def _steps(lm: LM, half: LM | None, sequences: list[Sequence]) -> list[Step]:
    budget = profile(lm).budget()
    longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i].ids))
    tries, stars = question_tries(sequences), question_tries(sequences, share_endings=False)
    asked = sum(trie.asked for trie in tries)
    steps = [
        _padded(lm, "arrival order, batches of 8", sequences, _by_count(list(range(len(sequences))), 8)),
        _padded(lm, "sorted by length", sequences, _by_count(longest_first, 8)),
        _padded(lm, "length-profiled batches", sequences, _by_tokens(sequences, longest_first, budget)),
    ]
    for name, model, made, everywhere, pruned, fastest in (
        ("shared question", lm, stars, True, False, False),
        ("token trie", lm, tries, True, False, False),
        ("answer-only head", lm, tries, False, False, False),
        ("last layer pruned", lm, tries, False, True, False),
        *([("oneDNN matmuls", lm, tries, False, True, True)] if onednn_helps(lm.model) else []),
        *([(half.dtype, half, tries, False, True, True)] if half else []),
    ):
        nodes = sum(map(len, made))
        flops = scoring_flops(model, made, nodes if everywhere else asked)
        run = _shared(model, made, budget, len(sequences), everywhere, pruned, fastest)
        steps.append(Step(name, model.dtype, run, nodes, nodes, flops))
    return steps


def _padded(lm: LM, name: str, sequences: list[Sequence], batches: list[list[int]]) -> Step:
    def run() -> list[float]:
        totals = [0.0] * len(sequences)
        for batch in batches:
            found = reference.token_log_probs(lm, [sequences[i] for i in batch])
            for i, tokens in zip(batch, found, strict=True):
                totals[i] = float(tokens.sum())
        return totals

    tokens = sum(len(s.ids) for s in sequences)
    places = sum(max(len(sequences[i].ids) for i in batch) * len(batch) for batch in batches)
    return Step(name, lm.dtype, run, tokens, places, sum(lm.card.sequence_flops(len(s.ids)) for s in sequences))


def _by_count(order: list[int], size: int) -> list[list[int]]:
    return [order[k : k + size] for k in range(0, len(order), size)]


def _by_tokens(sequences: list[Sequence], order: list[int], budget: int) -> list[list[int]]:
    """Batches whose padded size keeps to the budget: more short rows than long ones."""
    batches: list[list[int]] = []
    for i in order:
        if not batches or len(sequences[batches[-1][0]].ids) * (len(batches[-1]) + 1) > budget:
            batches.append([])
        batches[-1].append(i)
    return batches


def _shared(
    lm: LM, tries: list[Trie], budget: int, count: int, head_everywhere: bool, pruned: bool, fastest: bool
) -> Callable[[], list[float]]:
    def run() -> list[float]:
        totals = [0.0] * count
        waiting = Passes(tries, lm.card.vocab_size)
        with tries_attend(lm), fastest_matmuls(lm.model) if fastest else nullcontext():
            while waiting.waiting:
                batch = waiting.take(budget)
                with last_layer_pruned(lm, batch if pruned else []):
                    found = shared.forward(lm, batch, head_everywhere=head_everywhere)
                for (_, _, number), value in zip(found.scored, found.log_probs, strict=True):
                    totals[number] += value
        return totals

    return run


@contextmanager
def last_layer_pruned(lm: LM, tries: list[Trie]) -> Iterator[None]:
    """In the last decoder layer, query, output projection and MLP work at the nodes that predict something alone.

    Only keys and values of the other nodes are needed there. Exact. It saves (1 - asked/nodes) of 1/layers of the
    work: about half a percent for the built-in model, which is why `score` does without.
    """
    start, rows = 0, []
    for trie in tries:
        rows += sorted({start + node for node, _, _ in trie.scored})
        start += len(trie)
    layer = lm.model.base_model.layers[-1] if tries and lm.card.model_type == "llama" else None
    modules = [layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp] if layer is not None else []
    index = torch.tensor(rows, device=lm.device)

    def on_rows(plain: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            some = plain(x[:, index])
            return some.new_zeros(1, x.shape[1], some.shape[-1]).index_copy_(1, index, some)

        return forward

    for module in modules:
        module.forward = on_rows(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # the class's own again


def branch_and_bound(lm: LM, questions: list[Question]) -> dict[str, float]:
    """How much could be left out if an ending stopped once it cannot win any more: an upper bound, as a share of nodes.

    Log-probabilities only fall, so an ending whose partial sum is below a rival's total has lost (`acc`); over its full
    length the partial sum bounds its normalised score (`acc_norm`). Counted with an oracle that finishes the winner
    first and asks after every token; real orders save less, and every stop needs a pass of its own.
    """
    sequences = encode(lm, questions)
    waiting = Passes(question_tries(sequences), lm.card.vocab_size)
    nodes = sum(map(len, waiting.waiting))
    terms: list[list[float]] = [[] for _ in sequences]
    with tries_attend(lm):
        while waiting.waiting:
            found = shared.forward(lm, waiting.take(profile(lm).budget()))
            for (_, _, number), value in zip(found.scored, found.log_probs, strict=True):
                terms[number].append(value)
    saved = {"acc": 0, "acc_norm": 0}
    for index, question in enumerate(questions):
        mine = [(s, terms[n]) for n, s in enumerate(sequences) if s.question == index]
        for metric in saved:
            lengths = [len(question.endings[s.ending]) if metric == "acc_norm" else 1 for s, _ in mine]
            best = max(sum(values) / length for (_, values), length in zip(mine, lengths, strict=True))
            for (_, values), length in zip(mine, lengths, strict=True):
                partial = list(itertools.accumulate(values))
                lost = next((k for k, total in enumerate(partial) if total / length < best), len(values) - 1)
                saved[metric] += len(values) - 1 - lost
    return {metric: tokens / nodes for metric, tokens in saved.items()}
