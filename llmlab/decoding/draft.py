"""What every draft has in common: what it proposes, a chain or tree of tokens, and how it is asked."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import torch

from llmlab.decoding.engine import Engine
from llmlab.decoding.plain_engine import Decoder
from llmlab.decoding.sampling import Sampling as Sampling

S = TypeVar("S")
LEAST = 0.02  # a token accepted less often is not worth its part of any pass


@dataclass
class Proposal:
    """Tokens drafted for one row: a chain, or a tree of alternatives.

    Attributes:
        tokens: drafted ids; a token stands behind its parent.
        parents: for each the index of the token before it, -1 for the row's last token.
        chances: for each the probability, as its draft sees it, that it follows once its parent is accepted.
        probs: [tokens, vocabulary], the distributions they were drawn from; None if the draft did not sample. Then
            `chances` must not depend on the tokens drawn: what is left out because of its value biases the samples.
        source: name of the draft.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)
    probs: torch.Tensor | None = None
    source: str = ""

    @classmethod
    def chain(cls, tokens: list[int], source: str = "", probs: torch.Tensor | None = None) -> Proposal:
        """Tokens one behind the other, of which the draft says nothing but that it guesses them."""
        return cls(tokens, list(range(-1, len(tokens) - 1)), [1.0] * len(tokens), probs, source)

    def add(self, token: int, parent: int, chance: float) -> int:
        """The index of a token behind its parent, added if it is new; of two chances the better one counts."""
        for index, sibling in enumerate(zip(self.parents, self.tokens, strict=True)):
            if sibling == (parent, token):
                self.chances[index] = max(chance, self.chances[index])
                return index
        self.tokens.append(token)
        self.parents.append(parent)
        self.chances.append(chance)
        return len(self.tokens) - 1

    @property
    def children(self) -> dict[tuple[int, int], int]:
        """The index of each drafted token by its parent's index and its id."""
        return {(p, t): i for i, (p, t) in enumerate(zip(self.parents, self.tokens, strict=True))}

    @property
    def paths(self) -> list[list[int]]:
        """The drafted tokens down to each one, itself included; first the empty path, to the row's last token."""
        paths: list[list[int]] = [[]]
        for token, parent in zip(self.tokens, self.parents, strict=True):
            paths.append([*paths[parent + 1], token])
        return paths

    @property
    def depths(self) -> list[int]:
        """How deep each token stands: 1 behind the row's last token."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    @property
    def reach(self) -> list[float]:
        """The probability that each token is accepted: the product of the chances on the way to it."""
        reach: list[float] = []
        for parent, chance in zip(self.parents, self.chances, strict=True):
            reach.append(chance if parent < 0 else reach[parent] * chance)
        return reach

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before it."""
        return self.parents == list(range(-1, len(self.parents) - 1))

    def cut(self, depth: int) -> Proposal:
        """The same down to a depth."""
        return self.only([index for index, deep in enumerate(self.depths) if deep <= depth])

    def best(self, n: int) -> Proposal:
        """The n tokens most likely to be accepted. No token is likelier than its parent, so that it is among them."""
        reach = self.reach
        return self.only(sorted(sorted(range(len(reach)), key=lambda index: -reach[index])[:n]))

    def only(self, indices: list[int]) -> Proposal:
        """Some of the tokens, in their order, with all their parents."""
        if len(indices) == len(self.tokens):
            return self
        numbers = {-1: -1} | {index: number for number, index in enumerate(indices)}
        return Proposal(
            [self.tokens[index] for index in indices],
            [numbers[self.parents[index]] for index in indices],
            [self.chances[index] for index in indices],
            None if self.probs is None else self.probs[indices],
            self.source,
        )

    def calibrated(self, rate: float) -> Proposal:
        """The same with every chance times `rate`: how often such guesses were right for each time they should be."""
        return replace(self, chances=[min(1.0, chance * rate) for chance in self.chances])

    def joined(self, other: Proposal) -> Proposal:
        """Both in one tree. What was sampled stands alone: of two, one of them sampled, the more promising one."""
        if not (self.tokens and other.tokens) or self.probs is not None or other.probs is not None:
            return max(self, other, key=lambda proposal: sum(proposal.reach))
        both = Proposal([*self.tokens], [*self.parents], [*self.chances], None, f"{self.source} and {other.source}")
        places = {-1: -1}
        for index, (token, parent) in enumerate(zip(other.tokens, other.parents, strict=True)):
            places[index] = both.add(token, places[parent], other.chances[index])
        return both

    def tested(self, tokens: list[int]) -> tuple[int, int, float]:
        """What became of it when the row went on with `tokens`.

        Returns:
            How many of them it holds from the root downwards; how many it was tried on, the first wrong one included;
            how many should have been right by its chances.
        """
        chances: dict[int, float] = {}  # by parent: that one of its children follows
        for parent, chance in zip(self.parents, self.chances, strict=True):
            chances[parent] = chances.get(parent, 0.0) + chance
        children, node, hits, promised = self.children, -1, 0, 0.0
        for token in tokens:
            if node not in chances:
                return hits, hits, promised
            promised += min(1.0, chances[node])
            if (node, token) not in children:
                return hits, hits + 1, promised
            node, hits = children[node, token], hits + 1
        return hits, hits, promised


def grow(
    source: str, root: S, successors: Callable[[S], Iterable[tuple[int, float, S]]], tokens: int, depth: int
) -> Proposal:
    """The tree of the likeliest tokens, found best first, as Medusa finds its own (arXiv 2401.10774, section 2.3.3).

    Args:
        source: name of the draft.
        root: the draft's state behind the row's last token.
        successors: of a state: tokens that may follow, each with its chance and the state behind it.
        tokens: in the tree at most.
        depth: of the tree at most.
    """
    tree = Proposal(source=source)
    border: list[tuple[float, int, int, int, float, int, S]] = []  # a heap; the likeliest token is first
    count = itertools.count()  # settles ties: what came first

    def open_(node: int, reach: float, deep: int, state: S) -> None:
        for token, chance, behind in successors(state):
            if reach * chance > LEAST:
                heapq.heappush(border, (-reach * chance, next(count), node, token, chance, deep + 1, behind))

    open_(-1, 1.0, 0, root)
    while border and len(tree.tokens) < tokens:
        reach, _, parent, token, chance, deep, state = heapq.heappop(border)
        node = tree.add(token, parent, chance)
        if deep < depth:
            open_(node, -reach, deep, state)
    return tree


class Draft(Protocol):
    """What proposes tokens."""

    name: str
    free: bool  # whether proposing costs next to nothing
    prior: float  # the acceptance rate to expect before a row has tried it

    @property
    def engine(self) -> Engine | None:
        """The model that drafts, if one does."""

    def begin(self, target: Decoder, prompts: list[list[int]], length: int) -> None:
        """Get ready for a batch; a row gets `length` tokens at most, those of its prompt included."""

    def propose(self, contexts: list[list[int]], k: int, sampling: Sampling) -> list[Proposal]:
        """Up to `k` tokens (a tree: in depth) behind each row's context, its last token included."""

    def learn(self, tokens: list[list[int]], logits: torch.Tensor) -> None:
        """What a pass of the model over each row's tokens gave: logits [batch, width, vocabulary], rows padded."""

    def select(self, rows: list[int]) -> None:
        """Only these rows go on."""

    def seconds(self) -> float:
        """Seconds that one more token of every row costs."""


class Free:
    """What drafts without a model have in common: nothing to get ready, nothing to pay."""

    free, prior = True, 0.7
    engine: Engine | None = None

    def begin(self, target: Decoder, prompts: list[list[int]], length: int) -> None:
        """Nothing to get ready."""

    def learn(self, tokens: list[list[int]], logits: torch.Tensor) -> None:
        """Nothing to learn from logits."""

    def select(self, rows: list[int]) -> None:
        """No row has anything of its own."""

    def seconds(self) -> float:
        """Zero: asking costs next to nothing."""
        return 0.0
