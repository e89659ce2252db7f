"""A completion pass by pass, as text: what was drafted, what was accepted, and what the model added itself."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from llmlab.base.errors import InputError
from llmlab.decoding.loop import Step
from llmlab.decoding.result import Completion
from llmlab.model.lm import LM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WINDOW = 32  # earlier tokens that a token's text is read after: enough for spaces and characters of several tokens


@dataclass(frozen=True)
class Pass:
    """One pass in words.

    Attributes:
        source: the draft; empty without one.
        accepted: text of each drafted token that was kept.
        rejected: text of those that were not, a list a branch; drafts that are no trees have one branch.
        own: text of the token that the model added; None if the completion ended before it.
    """

    source: str
    accepted: list[str]
    rejected: list[list[str]]
    own: str | None

    @property
    def tokens(self) -> list[str]:
        """What the pass brought."""
        return self.accepted + ([] if self.own is None else [self.own])

    @property
    def drafted(self) -> int:
        """How many tokens were drafted."""
        return len(self.accepted) + sum(map(len, self.rejected))


def read_passes(completion: Completion, tokenizer: PreTrainedTokenizerBase | LM) -> list[Pass]:
    """The passes of a completion with their tokens as text.

    Args:
        completion: from `llmlab.generate`, with its steps.
        tokenizer: of its model, or the LM itself. A character of several tokens stands at the last of them.

    Raises InputError if there are no steps or there is no tokenizer.
    """
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, LM) else tokenizer
    if tokenizer is None:
        raise InputError("a model with random weights has no tokenizer, so its tokens have no text: load a real model.")
    if not completion.steps:
        raise InputError("this completion has no steps: show one that llmlab.generate returned.")
    passes, before = [], list[int]()
    for step in completion.steps:
        texts = _pieces(tokenizer, before, step.tokens)
        rejected = [_pieces(tokenizer, before + above, branch) for above, branch in _rejected(step)]
        own = texts[step.accepted] if len(texts) > step.accepted else None
        passes.append(Pass(step.source, texts[: step.accepted], rejected, own))
        before = before + step.tokens
    return passes


def _pieces(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> list[str]:
    """The text that each token adds behind those before it; "" for one that only begins a character."""

    def text(ids: list[int]) -> str:
        # A character that is not whole yet decodes to U+FFFD.
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).rstrip("\ufffd")

    before = before[-WINDOW:]
    texts = [text(before + ids[:end]) for end in range(len(ids) + 1)]
    return [longer[len(shorter) :] for shorter, longer in pairwise(texts)]


def _rejected(step: Step) -> list[tuple[list[int], list[int]]]:
    """The branches of a drafted tree that were not accepted: the tokens above each and its own."""
    node_of = {pair: node for node, pair in enumerate(zip(step.parents, step.drafted, strict=True))}
    accepted: list[int] = []
    for token in step.tokens[: step.accepted]:
        accepted.append(node_of[accepted[-1] if accepted else -1, token])
    branches: list[list[int]] = []
    for node, parent in enumerate(step.parents):
        if node in accepted:
            continue
        branch = next((branch for branch in branches if branch[-1] == parent), None)
        if branch is None:
            branches.append([node])
        else:
            branch.append(node)
    return [
        ([step.drafted[node] for node in _above(step, branch[0])], [step.drafted[node] for node in branch])
        for branch in branches
    ]


def _above(step: Step, node: int) -> list[int]:
    parent = step.parents[node]
    return [*_above(step, parent), parent] if parent >= 0 else []
