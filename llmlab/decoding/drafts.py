"""Drafts: cheap guesses at the next tokens, to be verified by the model in one pass.

* `PromptLookup`: what followed the same n-gram earlier in the prompt or the output (Saxena 2023, prompt lookup
  decoding). Costs nothing; several earlier places give several guesses, a tree.
* `SelfDraft`: a cheaper version of the same model: its own 4-bit copy, or its first layers. It reads the keys and
  values that the exact model left in the cache (its own are overwritten by the verifying pass), so it needs neither a
  prefill nor a cache of its own, and sees an exact past.
* `ModelDraft`: a smaller model with the same tokenizer and a cache of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from llmlab.base.errors import InputError
from llmlab.decoding.engine import Engine
from llmlab.decoding.sampling import next_token_probs
from llmlab.model.lm import LM


@dataclass
class Proposal:
    """Tokens drafted for one row.

    Attributes:
        tokens: drafted ids.
        parents: for each the index of the token before it, -1 for the row's last token.
        probs: [tokens, vocabulary], the distributions they were drawn from; None if the draft did not sample.
        source: name of the draft.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: torch.Tensor | None = None
    source: str = ""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 is greedy."""

    temperature: float
    top_p: float
    generator: torch.Generator


class Draft(Protocol):
    """What proposes tokens."""

    name: str
    free: bool  # whether proposing costs next to nothing

    @property
    def engine(self) -> Engine | None:
        """The model that drafts, if one does."""

    def begin(self, target: Engine, prompts: list[list[int]], room: int) -> None:
        """Get ready for a batch; `room` tokens a row at most, drafted ones included."""

    def propose(self, contexts: list[list[int]], k: int, sampling: Sampling) -> list[Proposal]:
        """Up to `k` tokens (a tree: in depth) behind each row's context, its last token included."""

    def select(self, rows: list[int]) -> None:
        """Only these rows go on."""

    def seconds(self) -> float:
        """For one more token of every row."""


class PromptLookup:
    """Prompt lookup: the tokens that followed the longest n-gram at the end of the text where it stood before.

    Args:
        longest: n-gram to look for first; shorter ones follow, down to `shortest`.
        shortest: n-gram below which no guess is made.
        branches: different continuations that are tried at once, as a tree; the latest place first.
    """

    name, free = "lookup", True
    engine: Engine | None = None

    def __init__(self, longest: int = 4, shortest: int = 2, branches: int = 1) -> None:
        if not 1 <= shortest <= longest or branches < 1:
            raise InputError(f"lookup of {shortest} to {longest} tokens, {branches} branches: not a range.")
        self.longest, self.shortest, self.branches = longest, shortest, branches
        self.places: list[dict[tuple[int, ...], list[int]]] = []
        self.read: list[int] = []

    def begin(self, target: Engine, prompts: list[list[int]], room: int) -> None:
        """An index of n-grams for each row, empty."""
        del target, room
        self.places = [{} for _ in prompts]
        self.read = [0] * len(prompts)

    def propose(self, contexts: list[list[int]], k: int, sampling: Sampling) -> list[Proposal]:
        """Continuations from earlier places."""
        del sampling
        return [self._row(row, ids, k) for row, ids in enumerate(contexts)]

    def _row(self, row: int, ids: list[int], k: int) -> Proposal:
        places = self.places[row]
        # Index every n-gram with a token behind it: place = where that token stands.
        for end in range(max(1, self.read[row]), len(ids)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                places.setdefault(tuple(ids[end - n : end]), []).append(end)
        self.read[row] = len(ids)
        found: list[list[int]] = []
        for n in range(min(self.longest, len(ids)), self.shortest - 1, -1):
            for place in reversed(places.get(tuple(ids[-n:]), [])):
                guess = ids[place : place + k]
                if not any(other[: len(guess)] == guess for other in found):
                    found.append(guess)
                if len(found) == self.branches:
                    return _tree(found)
        return _tree(found)

    def select(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self.places = [self.places[row] for row in rows]
        self.read = [self.read[row] for row in rows]

    def seconds(self) -> float:
        """Next to nothing."""
        return 0.0


def _tree(guesses: list[list[int]]) -> Proposal:
    """Guesses with common first tokens merged."""
    made = Proposal(source="lookup")
    children: dict[tuple[int, int], int] = {}
    for guess in guesses:
        node = -1
        for token in guess:
            if (node, token) not in children:
                children[node, token] = len(made.tokens)
                made.tokens.append(token)
                made.parents.append(node)
            node = children[node, token]
    return made


class SelfDraft:
    """A cheaper version of the model itself as its draft, on the model's own cache.

    Args:
        lm: such as `llmlab.quantize(model, bits=4)`; with `layers` the model itself.
        layers: early exit: use the first N layers, then norm and head (LayerSkip, arXiv 2404.16710, untrained).
    """

    free = False

    def __init__(self, lm: LM, *, layers: int | None = None) -> None:
        if layers is not None and not 1 <= layers < lm.card.layers:
            raise InputError(f"early exit after {layers} layers: give 1 to {lm.card.layers - 1}.")
        self.lm, self.layers = lm, layers
        self.name = f"first {layers} layers" if layers else f"self, {lm.transformation}"
        self.engine: Engine | None = None

    def begin(self, target: Engine, prompts: list[list[int]], room: int) -> None:
        """Takes the cache of `target`."""
        del prompts, room
        one, other = target.lm.card, self.lm.card
        if (one.layers, one.kv_heads, one.head_dim) != (other.layers, other.kv_heads, other.head_dim):
            raise InputError(f"{self.lm.name} is not a version of {target.lm.name}: give it as a model draft.")
        if self.engine is None or self.engine.owner is not target:
            self.engine = Engine(self.lm, cache_of=target, layers=self.layers)

    def propose(self, contexts: list[list[int]], k: int, sampling: Sampling) -> list[Proposal]:
        """k tokens, one pass each."""
        assert self.engine is not None
        return _chain(self.engine, [ids[-1:] for ids in contexts], k, sampling, self.name)

    def select(self, rows: list[int]) -> None:
        """The cache is the model's."""

    def seconds(self) -> float:
        """Of one pass."""
        assert self.engine is not None
        return self.engine.seconds(1)


class ModelDraft:
    """A smaller model with the same tokenizer. It stays in step by reading what was accepted."""

    free = False

    def __init__(self, lm: LM) -> None:
        self.lm = lm
        self.name = f"draft {lm.name}"
        self.engine = Engine(lm)
        self.held: list[list[int]] = []

    def begin(self, target: Engine, prompts: list[list[int]], room: int) -> None:
        """Reads the prompts. Raises InputError for another tokenizer."""
        check_tokenizers(target.lm, self.lm)
        if room > self.lm.card.context_length + 64:
            raise InputError(
                f"the draft {self.lm.name} has a context of {self.lm.card.context_length} tokens, the job needs {room}."
            )
        self.engine.start(len(prompts), room)
        self.engine.prefill(prompts)
        self.held = [list(ids) for ids in prompts]

    def propose(self, contexts: list[list[int]], k: int, sampling: Sampling) -> list[Proposal]:
        """k tokens, one pass each."""
        fresh = []
        for row, ids in enumerate(contexts):
            held = self.held[row]
            stop = min(len(held), len(ids) - 1)
            # What was drafted last may have been rejected; what was accepted before that stands.
            same = next((i for i in range(max(0, stop - 64), stop) if held[i] != ids[i]), stop)
            self.engine.cache.lengths[row] = same
            self.held[row] = list(ids)
            fresh.append(ids[same:])
        found = _chain(self.engine, fresh, k, sampling, self.name, keep=True)
        for row, proposal in enumerate(found):
            # What was drafted behind the context stands in the cache, its last token excepted.
            self.engine.cache.lengths[row] += len(proposal.tokens) - 1
            self.held[row] = self.held[row] + proposal.tokens[:-1]
        return found

    def select(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self.engine.cache.select(rows)
        self.held = [self.held[row] for row in rows]

    def seconds(self) -> float:
        """Of one pass."""
        return self.engine.seconds(1)


def _chain(
    engine: Engine, fresh: list[list[int]], k: int, sampling: Sampling, name: str, *, keep: bool = False
) -> list[Proposal]:
    """Draft k tokens behind each row's fresh ones, which stay in the cache if `keep`, a pass a token."""
    tokens, ahead = fresh, 0
    drafted: list[torch.Tensor] = []
    probs: list[torch.Tensor] = []
    for _ in range(k):
        logits = engine.forward(tokens, ahead=ahead)  # [batch, width, vocabulary]
        logits = logits[torch.arange(len(tokens)), [len(ids) - 1 for ids in tokens]]  # [batch, vocabulary]
        if keep and not drafted:
            engine.keep([list(range(len(ids))) for ids in tokens])
        else:
            ahead += 1
        if sampling.temperature == 0:
            picked = logits.argmax(dim=-1)
        else:
            distribution = next_token_probs(logits, sampling.temperature, sampling.top_p)
            probs.append(distribution)
            picked = torch.multinomial(distribution, 1, generator=sampling.generator).squeeze(-1)
        drafted.append(picked)
        tokens = [[token] for token in picked.tolist()]
    columns = torch.stack(drafted, dim=1).tolist()  # [batch][k]
    by_row = torch.stack(probs, dim=1) if probs else None  # [batch, k, vocabulary]
    parents = list(range(-1, k - 1))
    return [
        Proposal(ids, list(parents), None if by_row is None else by_row[row], name) for row, ids in enumerate(columns)
    ]


def as_draft(target: LM, draft: Draft | LM) -> Draft:
    """A draft as it is; a model of the target's shape as a version of it, any other as a smaller model."""
    if not isinstance(draft, LM):
        return draft
    one, other = target.card, draft.card
    alike = (one.layers, one.hidden_size, one.kv_heads, one.head_dim, one.vocab_size)
    if alike == (other.layers, other.hidden_size, other.kv_heads, other.head_dim, other.vocab_size):
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
    one, other = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if one == other:
        return
    token = min(
        (t for t in one.keys() | other.keys() if one.get(t) != other.get(t)),
        key=lambda t: (min(one.get(t, 1 << 40), other.get(t, 1 << 40)), one.get(t, 1 << 40)),
    )
    raise InputError(
        f"{draft.name} cannot draft for {target.name}: the token {token!r} is number {one.get(token, 'none')} in one "
        f"and {other.get(token, 'none')} in the other; both need the same tokenizer."
    )
