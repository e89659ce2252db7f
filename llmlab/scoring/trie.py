"""Token tries: what several sequences share is computed once.

    four endings of one question         the same as a trie
    A man opens | the door and leaves    A ── man ── opens ── the ── door ── and
    A man opens | the door and sings                   │       │       │      └ predicts leaves, sings
    A man opens | the sea                              │       │       └ predicts and
    A man opens | bread                                │       └ predicts door, sea
                                                       └ predicts the, bread
    23 tokens                            6 nodes

A node stands at the position of its depth and attends to its ancestors alone, so its hidden state is that of the plain
sequence: sharing is exact. The last token of a sequence predicts nothing that is asked for and needs no node.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmlab.scoring.encode import Sequence

if TYPE_CHECKING:
    import torch


@dataclass(eq=False)
class Stem:
    """Tokens before the roots of several tries, as few-shot examples stand before every question of a task.

    Attributes:
        ids: the tokens, P of them.
        layers: attention module -> the keys and values [1, KV heads, P, d] that the stem's own pass left.
    """

    ids: list[int]
    layers: dict[torch.nn.Module, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def trie(self) -> Trie:
        """The stem as a trie without a branch at which nothing is asked: its own pass."""
        length = len(self.ids)
        return Trie(self.ids, [*range(length)], [length] * length, [], self)


@dataclass(frozen=True)
class Trie:
    """The nodes of a trie in depth-first order, parents before children.

    Attributes:
        ids: token of each node.
        depths: its position in every sequence that it belongs to.
        subtree_ends: node j is an ancestor of node i, or i itself, exactly when j <= i < subtree_ends[j].
        scored: (node, token, sequence) triples: the node's logits give log p(token), a term of that sequence's sum.
        stem: what stands before the root, if the root's depth is not 0: all nodes see it; or what this trie itself is.
    """

    ids: list[int]
    depths: list[int]
    subtree_ends: list[int]
    scored: list[tuple[int, int, int]]
    stem: Stem | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def asked(self) -> int:
        """Nodes at which the output head has to work."""
        return len({node for node, _, _ in self.scored})


def build(
    sequences: list[Sequence], numbers: list[int], most_shared: int = sys.maxsize, stem: Stem | None = None
) -> Trie:
    """The trie of some sequences, behind the `stem` with which all begin; `numbers` are what `scored` calls them.

    In lexicographic order every sequence leaves the path of the one before it at their longest common prefix, so
    appending the rest yields the depth-first order, and the nodes left behind are the ends of subtrees. Two sequences
    share at most their first `most_shared` tokens.
    """
    trie = Trie([], [], [], [], stem)
    start = len(stem.ids) if stem else 0
    path: list[int] = []  # nodes from the root to the tip
    before: list[int] = []
    for sequence, number in sorted(zip(sequences, numbers, strict=True), key=lambda pair: pair[0].ids):
        tokens = sequence.ids[start:-1]
        shared = min(common(before, tokens), most_shared)
        _close(trie, path, shared)
        for depth in range(shared, len(tokens)):
            path.append(len(trie.ids))
            trie.ids.append(tokens[depth])
            trie.depths.append(start + depth)
            trie.subtree_ends.append(0)
        asked = range(sequence.n_context, len(sequence.ids))
        trie.scored.extend((path[k - 1 - start], sequence.ids[k], number) for k in asked)
        before = tokens
    _close(trie, path, 0)
    return trie


def question_tries(sequences: list[Sequence], *, share_endings: bool = True) -> list[Trie]:
    """One trie a question, in the order of the questions.

    `share_endings=False` shares only the context: the ablation's "redundant token sharing".
    """
    groups: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        groups.setdefault(sequence.question, []).append(number)
    tries = []
    for numbers in groups.values():
        endings = [sequences[n] for n in numbers]
        most_shared = sys.maxsize if share_endings else min(s.n_context for s in endings)
        tries.append(build(endings, numbers, most_shared))
    return tries


def common(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    return next(i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1])


def _close(trie: Trie, path: list[int], shared: int) -> None:
    """Leave the path behind its first `shared` nodes: their subtrees end here."""
    for node in path[shared:]:
        trie.subtree_ends[node] = len(trie.ids)
    del path[shared:]
