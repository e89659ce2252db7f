"""Prompt lookup: guess what followed the same n-gram earlier in the prompt or the output (Saxena 2023).

It costs nothing; several earlier places give several guesses, a tree.
"""

from __future__ import annotations

from llmlab.base.errors import InputError
from llmlab.decoding.draft import Free, Proposal, Sampling
from llmlab.decoding.plain_engine import Decoder


class PromptLookup(Free):
    """Prompt lookup: the tokens that followed the longest n-gram at the end of the text where it stood before.

    Args:
        longest: n-gram to look for first; shorter ones follow, down to `shortest`.
        shortest: n-gram below which no guess is made.
        branches: different continuations that are tried at once, as a tree; the latest place first.
    """

    name = "lookup"

    def __init__(self, longest: int = 4, shortest: int = 2, branches: int = 1) -> None:
        if not 1 <= shortest <= longest or branches < 1:
            raise InputError(f"lookup of {shortest} to {longest} tokens, {branches} branches: not a range.")
        self.longest, self.shortest, self.branches = longest, shortest, branches
        self.places: list[
            dict[tuple[int, ...], list[int]]
        ] = []  # of each n-gram of a row: what follows it stands there
        self.read: list[int] = []  # tokens of each row that are in its index

    def begin(self, target: Decoder, prompts: list[list[int]], length: int) -> None:
        """An index of n-grams for each row, of its prompt."""
        del target, length
        self.places = [{} for _ in prompts]
        self.read = [0] * len(prompts)
        for row, ids in enumerate(prompts):
            self._index(row, ids)

    def propose(self, contexts: list[list[int]], k: int, sampling: Sampling) -> list[Proposal]:
        """Continuations from earlier places."""
        del sampling
        for row, ids in enumerate(contexts):
            self._index(row, ids)
        return [_tree(self._guesses(row, ids, k)) for row, ids in enumerate(contexts)]

    def _index(self, row: int, ids: list[int]) -> None:
        """Every n-gram with a token behind it; its place is where that token stands."""
        for end in range(max(1, self.read[row]), len(ids)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                self.places[row].setdefault(tuple(ids[end - n : end]), []).append(end)
        self.read[row] = len(ids)

    def _guesses(self, row: int, ids: list[int], k: int) -> list[list[int]]:
        """Up to `branches` continuations, none the beginning of another; longest n-gram first, latest place first."""
        guesses: list[list[int]] = []
        for n in range(min(self.longest, len(ids)), self.shortest - 1, -1):
            for place in reversed(self.places[row].get(tuple(ids[-n:]), [])):
                guess = ids[place : place + k]
                if not any(other[: len(guess)] == guess for other in guesses):
                    guesses.append(guess)
                if len(guesses) == self.branches:
                    return guesses
        return guesses

    def select(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self.places = [self.places[row] for row in rows]
        self.read = [self.read[row] for row in rows]


def _tree(guesses: list[list[int]]) -> Proposal:
    """Guesses with common first tokens merged."""
    tree = Proposal(source="lookup")
    for guess in guesses:
        node = -1
        for token in guess:
            node = tree.add(token, node, 1.0)
    return tree
