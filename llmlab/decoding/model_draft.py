"""The classic draft: a smaller model with the same tokenizer and a cache of its own (Leviathan et al. 2022)."""

from __future__ import annotations

import torch

from llmlab.base.errors import InputError
from llmlab.decoding.draft import Draft, Proposal, Sampling
from llmlab.decoding.engine import Engine
from llmlab.decoding.plain_engine import Decoder
from llmlab.decoding.self_draft import SelfDraft, draft_chain
from llmlab.model.lm import LM

MOST_K = 64  # tokens that may be drafted at once


class ModelDraft:
    """A smaller model with the same tokenizer. It stays in step by reading what was accepted."""

    free, prior = False, 0.7

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.name = f"draft {lm.name}"
        self.engine = Engine(lm)
        self.vocabulary = lm.card.vocab_size  # of the model that verifies
        self.seen: list[list[int]] = []  # tokens of each row that stand in its cache

    def check(self, target: LM, length: int) -> None:
        """Raise InputError for another tokenizer, or a context of less than `length` tokens."""
        check_tokenizers(target, self.lm)
        context = self.lm.card.context_length
        if length > context:
            raise InputError(f"the draft {self.lm.name} has a context of {context} tokens, the job needs {length}.")

    def begin(self, target: Decoder, prompts: list[list[int]], length: int) -> None:
        """Reads the prompts. Raises what `check` raises."""
        self.check(target.lm, length)
        if isinstance(target, Engine):
            self.engine.times.agree = target.times.agree
        self.vocabulary = target.lm.model.get_output_embeddings().weight.shape[0]
        self.engine.start(len(prompts), length + MOST_K)
        self.engine.prefill([self._known(ids) for ids in prompts])
        self.seen = [list(ids) for ids in prompts]

    def propose(self, contexts: list[list[int]], k: int, sampling: Sampling) -> list[Proposal]:
        """k tokens for each row, a pass a token."""
        fresh = []
        for row, ids in enumerate(contexts):
            seen = self.seen[row]
            stop = min(len(seen), len(ids) - 1)
            # What was drafted last may have been rejected; what was accepted before that stands.
            same = next((i for i in range(max(0, stop - 64), stop) if seen[i] != ids[i]), stop)
            self.engine.cache.lengths[row] = same
            self.seen[row] = list(ids)
            fresh.append(self._known(ids[same:]))
        proposals = draft_chain(self.engine, fresh, k, sampling, self.name, vocabulary=self.vocabulary)
        for row, proposal in enumerate(proposals):
            # What was drafted behind the context stands in the cache, its last token excepted.
            self.engine.cache.lengths[row] += len(proposal.tokens) - 1
            self.seen[row] = self.seen[row] + proposal.tokens[:-1]
        return proposals

    def _known(self, ids: list[int]) -> list[int]:
        """The same ids, those that the draft has no embedding for replaced: they are padding, which no text holds."""
        size = self.lm.model.get_input_embeddings().weight.shape[0]
        return [min(token, size - 1) for token in ids]

    def learn(self, tokens: list[list[int]], logits: torch.Tensor) -> None:
        """It learns nothing."""

    def select(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self.engine.select(rows)
        self.seen = [self.seen[row] for row in rows]

    def seconds(self) -> float:
        """Seconds of one pass of the smaller model."""
        return self.engine.seconds(1)


def as_draft(target: LM, draft: Draft | LM) -> Draft:
    """A draft as it is; a model of the target's shape as a version of it, any other as a smaller model."""
    if not isinstance(draft, LM):
        return draft
    shapes = [(c.layers, c.hidden_size, c.kv_heads, c.head_dim, c.vocab_size) for c in (target.card, draft.card)]
    if shapes[0] == shapes[1]:
        return SelfDraft(draft)
    check_tokenizers(target, draft)
    return ModelDraft(draft)


def check_tokenizers(target: LM, draft: LM) -> None:
    """Raise InputError where two models do not number the same tokens alike; says which token differs first."""
    if target.tokenizer is None or draft.tokenizer is None:
        if target.card.vocab_size != draft.card.vocab_size:
            raise InputError(
                f"{draft.name} has {draft.card.vocab_size} tokens, {target.name} {target.card.vocab_size}."
            )
        return
    ids, draft_ids = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ids == draft_ids:
        return
    token = min(
        (t for t in ids.keys() | draft_ids.keys() if ids.get(t) != draft_ids.get(t)),
        key=lambda t: (min(ids.get(t, 1 << 40), draft_ids.get(t, 1 << 40)), ids.get(t, 1 << 40)),
    )
    raise InputError(
        f"{draft.name} cannot draft for {target.name}: the token {token!r} is number {ids.get(token, 'none')} in one "
        f"and {draft_ids.get(token, 'none')} in the other; both need the same tokenizer."
    )
