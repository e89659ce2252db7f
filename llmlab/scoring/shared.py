"""Shared-prefix scoring: one forward pass over a row of tries instead of one sequence per ending. Exact.

Against the plain path it saves the context of three endings in four and the first tokens that endings share, all
padding, and the output head wherever nothing is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmlab.kernels.plain import fastest_matmuls
from llmlab.model.lm import LM
from llmlab.scoring.attention import ancestor_mask, tries_attend
from llmlab.scoring.encode import Sequence, check_finite
from llmlab.scoring.pack import Passes, profile
from llmlab.scoring.trie import Trie, question_tries

SOFTMAX_ROWS = 64  # of logits at once: a few MB in fp32


@dataclass(frozen=True)
class Work:
    """What a job cost.

    Attributes:
        nodes: tokens that went through the model; nothing is padded.
        asked: positions at which the output head worked.
        passes: forward passes.
    """

    nodes: int
    asked: int
    passes: int


@dataclass(frozen=True)
class Scores:
    """Log-probability of each sequence's ending in nats, whether greedy decoding would write it, and the cost."""

    log_probs: list[float]
    greedy: list[bool]
    work: Work


@dataclass(frozen=True)
class Forward:
    """What one pass found: for each (node, token, sequence) triple log p(token) and whether it is the argmax."""

    scored: list[tuple[int, int, int]]
    log_probs: list[float]
    greedy: list[bool]
    asked: int


@torch.inference_mode()
def log_probs(
    lm: LM,
    sequences: list[Sequence],
    *,
    budget: int | None = None,
    on_batch: Callable[[list[Sequence], list[float]], None] | None = None,
) -> Scores:
    """Score each sequence's ending given its context, in the order given.

    Args:
        lm: the model.
        sequences: from `encode`.
        budget: nodes a forward pass; by default what this device's profile says (see `pack`).
        on_batch: called after each pass with the sequences that it finished and their log-probabilities.

    Raises:
        NumericalError: a log-probability is NaN or infinite; names the batch and the question.
    """
    totals, greedy = [0.0] * len(sequences), [True] * len(sequences)
    waiting = Passes(question_tries(sequences), lm.card.vocab_size)
    measured = profile(lm)
    nodes = asked = passes = 0
    with tries_attend(lm), fastest_matmuls(lm.model):
        while waiting.waiting:
            limit = budget or measured.budget()
            begin = time.perf_counter()
            tries = waiting.take(limit)
            found = forward(lm, tries)
            for (_, _, number), value, best in zip(found.scored, found.log_probs, found.greedy, strict=True):
                totals[number] += value
                greedy[number] &= best
            size = sum(map(len, tries))
            if budget is None:
                measured.observe(limit, size, time.perf_counter() - begin)
            finished = sorted({number for _, _, number in found.scored})
            batch, sums = [sequences[n] for n in finished], [totals[n] for n in finished]
            check_finite(batch, sums, passes, lm.dtype)
            nodes, asked, passes = nodes + size, asked + found.asked, passes + 1
            if on_batch:
                on_batch(batch, sums)
    return Scores(totals, greedy, Work(nodes, asked, passes))


@dataclass(frozen=True)
class Inputs:
    """What one pass asks the model.

    Attributes:
        model: keyword arguments of the model's forward pass.
        scored: (node, token, sequence) triples.
        where: [triples], which row of the logits belongs to each; on CPU, so that to sort them waits for no GPU.
        targets: [triples], the tokens.
    """

    model: dict[str, Any]
    scored: list[tuple[int, int, int]]
    where: torch.Tensor
    targets: torch.Tensor

    @property
    def nodes(self) -> int:
        """Tokens that go through the model."""
        return int(self.model["input_ids"].shape[1])


@torch.inference_mode()
def forward(lm: LM, tries: list[Trie], *, head_everywhere: bool = False) -> Forward:
    """One forward pass over tries in a row, within `tries_attend`.

    `head_everywhere` lets the output head work at every node, as a plain forward pass does: for the ablation.
    """
    asked = inputs(lm, tries, head_everywhere=head_everywhere)
    return read(asked, lm.model(**asked.model).logits[0])


def inputs(lm: LM, tries: list[Trie], *, head_everywhere: bool = False) -> Inputs:
    """The tensors of one pass, on the model's device."""
    scored: list[tuple[int, int, int]] = []
    start = 0
    for trie in tries:
        scored.extend((start + node, token, sequence) for node, token, sequence in trie.scored)
        start += len(trie)
    device = lm.device
    asking = torch.tensor([node for node, _, _ in scored])
    nodes, where = torch.unique(asking, return_inverse=True)  # [asked], [triples]
    if head_everywhere:
        nodes, where = torch.arange(start), asking
    model = {
        "input_ids": torch.tensor([[i for t in tries for i in t.ids]], device=device),  # [1, nodes]
        "position_ids": torch.tensor([[d for t in tries for d in t.depths]], device=device),
        "trie_masks": [ancestor_mask(trie, lm.model.dtype, device) for trie in tries],
        "use_cache": False,
        "logits_to_keep": nodes.to(device),  # the output head works only where a token is asked for
    }
    targets = torch.tensor([token for _, token, _ in scored], device=device)
    return Inputs(model, scored, where, targets)


def read(asked: Inputs, logits: torch.Tensor) -> Forward:
    """Log-probabilities out of a pass's logits [asked, vocabulary]."""
    values = torch.empty(len(asked.where), device=logits.device)
    greedy = torch.empty(len(asked.where), dtype=torch.bool, device=logits.device)
    # Soft-max in fp32 over a few rows at a time. As log_softmax, not logsumexp: torch's CPU kernels differ by 1e-5 nats
    # a token, and the reference path and lm-evaluation-harness use this one.
    for chunk, few in enumerate(torch.split(logits, SOFTMAX_ROWS)):
        here = (asked.where // SOFTMAX_ROWS == chunk).nonzero().squeeze(-1)  # the triples that ask these rows
        if len(here):
            row, here = (asked.where[here] % SOFTMAX_ROWS).to(logits.device), here.to(logits.device)
            predictions = few.float().log_softmax(dim=-1)  # [rows, vocabulary]
            values[here] = predictions[row, asked.targets[here]]
            greedy[here] = values[here] == predictions.amax(dim=-1)[row]
    return Forward(asked.scored, values.tolist(), greedy.tolist(), len(logits))
