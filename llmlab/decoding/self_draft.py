"""Self-speculation: a cheaper version of the same model, such as its own 4-bit copy, drafts token by token.

It reads the keys and values that the exact model left in the cache (its own are overwritten by the verifying pass), so
it needs neither a prefill nor a cache of its own, and sees an exact past.
"""

from __future__ import annotations

import torch

from llmlab.base.errors import InputError
from llmlab.decoding.draft import Proposal, Sampling
from llmlab.decoding.engine import Engine
from llmlab.decoding.plain_engine import Decoder
from llmlab.model.lm import LM


class SelfDraft:
    """A cheaper version of the model itself as its draft, on the model's own cache.

    Args:
        lm: such as `llmlab.self_4bit(model)` or `llmlab.quantize(model, bits=4)`.
    """

    free, prior = False, 0.9

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.name = f"self, {lm.transformation}"
        self.engine: Engine | None = None

    def begin(self, target: Decoder, prompts: list[list[int]], length: int) -> None:
        """Takes the cache of `target`."""
        del prompts, length
        own, other = self.lm.card, target.lm.card
        same = (own.layers, own.kv_heads, own.head_dim) == (other.layers, other.kv_heads, other.head_dim)
        if not same or not isinstance(target, Engine):
            raise InputError(f"{self.lm.name} is not a version of {target.lm.name}: give it as a model draft.")
        if self.engine is None or self.engine.owner is not target:
            self.engine = Engine(self.lm, cache_of=target)

    def propose(self, contexts: list[list[int]], k: int, sampling: Sampling) -> list[Proposal]:
        """k tokens for each row, a pass a token."""
        assert self.engine is not None
        return draft_chain(self.engine, [ids[-1:] for ids in contexts], k, sampling, self.name)

    def learn(self, tokens: list[list[int]], logits: torch.Tensor) -> None:
        """It learns nothing."""

    def select(self, rows: list[int]) -> None:
        """The cache is the model's."""

    def seconds(self) -> float:
        """Seconds of one pass of the copy."""
        assert self.engine is not None
        return self.engine.seconds(1)


def draft_chain(
    engine: Engine, fresh: list[list[int]], k: int, sampling: Sampling, name: str, *, vocabulary: int | None = None
) -> list[Proposal]:
    """Draft k tokens behind each row's fresh ones, a pass a token.

    `vocabulary`: of the model that verifies, for a draft with a cache of its own, in which the fresh ones stay. Models
    with one tokenizer may pad theirs to different sizes: what the draft lacks it never drafts, nor what it has alone.
    Bias and penalties are left to the model that verifies: a draft without them is accepted less often, never wrong.
    """
    tokens, ahead = fresh, 0
    drafted: list[list[int]] = []  # [k][batch]
    probs: list[torch.Tensor] = []
    for _ in range(k):
        logits = engine.forward(tokens, ahead=ahead)  # [batch, width, vocabulary]
        logits = logits[torch.arange(len(tokens)), [len(ids) - 1 for ids in tokens]]  # [batch, vocabulary]
        if vocabulary is not None and logits.shape[-1] != vocabulary:
            logits = torch.nn.functional.pad(logits, (0, vocabulary - logits.shape[-1]), value=float("-inf"))
        if vocabulary is not None and not drafted:
            engine.keep([list(range(len(ids))) for ids in tokens])
        else:
            ahead += 1
        if sampling.temperature == 0:
            picked = logits.argmax(dim=-1)
        else:
            distribution = sampling.probs(logits)
            probs.append(distribution)
            picked = torch.multinomial(distribution, 1, generator=sampling.generator).squeeze(-1)
        drafted.append(picked.tolist())
        tokens = [[token] for token in drafted[-1]]
    columns = list(map(list, zip(*drafted, strict=True)))  # [batch][k]
    by_row = torch.stack(probs, dim=1) if probs else [None] * len(columns)  # [batch, k, vocabulary]
    return [Proposal.chain(ids, name, q) for ids, q in zip(columns, by_row, strict=True)]
