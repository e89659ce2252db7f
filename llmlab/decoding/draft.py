"""What every draft has in common: what it proposes, a chain or tree of tokens, and how it is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from llmlab.decoding.engine import Engine
from llmlab.decoding.plain_engine import Decoder
from llmlab.decoding.sampling import Sampling as Sampling


@dataclass
class Proposal:
    """Tokens drafted for one row: a chain, or a tree of alternatives.

    Attributes:
        tokens: drafted ids; a token stands behind its parent.
        parents: for each the index of the token before it, -1 for the row's last token.
        probs: [tokens, vocabulary], the distributions they were drawn from; None if the draft did not sample.
        source: name of the draft.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    probs: torch.Tensor | None = None
    source: str = ""

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
    def depth(self) -> int:
        """How deep the deepest token stands; 0 if there is none."""
        return max(self.depths, default=0)

    @property
    def is_chain(self) -> bool:
        """Whether each token follows the one before it."""
        return self.parents == list(range(-1, len(self.parents) - 1))

    def cut(self, depth: int) -> Proposal:
        """The same down to a depth. Tokens stand behind their parents, so it is enough to renumber them."""
        depths = self.depths
        if max(depths, default=0) <= depth:
            return self
        numbers: dict[int, int] = {-1: -1}
        part = Proposal(source=self.source, probs=None if self.probs is None else self.probs[:depth])
        for index, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if depths[index] <= depth:
                numbers[index] = len(part.tokens)
                part.tokens.append(token)
                part.parents.append(numbers[parent])
        return part


class Draft(Protocol):
    """What proposes tokens."""

    name: str
    free: bool  # whether proposing costs next to nothing

    @property
    def engine(self) -> Engine | None:
        """The model that drafts, if one does."""

    def begin(self, target: Decoder, prompts: list[list[int]], length: int) -> None:
        """Get ready for a batch; a row gets `length` tokens at most, those of its prompt included."""

    def propose(self, contexts: list[list[int]], k: int, sampling: Sampling) -> list[Proposal]:
        """Up to `k` tokens (a tree: in depth) behind each row's context, its last token included."""

    def select(self, rows: list[int]) -> None:
        """Only these rows go on."""

    def seconds(self) -> float:
        """Seconds that one more token of every row costs."""
