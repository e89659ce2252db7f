"""Speculation made visible: what each pass drafted, what was accepted, and what the model added itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from llmlab.base.errors import InputError
from llmlab.decoding.loop import Step
from llmlab.decoding.result import Completion
from llmlab.lab.figures.common import BLUE, GREEN, GREY, ORANGE, style
from llmlab.lab.figures.drawable import drawable
from llmlab.model.lm import LM

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW = 32  # earlier tokens that a token's text is read after: enough for spaces and characters of several tokens
WIDEST = 118  # characters of a row in the figure


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


def read_passes(completion: Completion, tokenizer: Any) -> list[Pass]:
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


def steps(passes: Sequence[Pass], title: str, *, first: int = 12) -> Figure:
    """The first passes, a row each and a box a token: accepted ones green, rejected ones struck out, own ones framed.

    Args:
        passes: from `read_passes`.
        title: the figure's message.
        first: how many of them are drawn.
    """
    with style():
        rows = passes[:first]
        widest = max(max(sum(_width(t) for t, _ in _boxes(row)) for row in rows), 60)
        figure, axes = plt.subplots(figsize=(min(widest, WIDEST) * 0.082 + 1.9, 0.42 * len(rows) + 1.25))
        for line, row in enumerate(rows):
            x, boxes = 0.0, _boxes(row)
            for place, (text, kind) in enumerate(boxes):
                if x + _width(text) > WIDEST:
                    axes.text(x, line, f"+{len(boxes) - place}", va="center", size=8)
                    break
                _box(axes, x, line, text, kind)
                x += _width(text)
        names = [f"{k}: {drawable(row.source) or ('prompt' if k == 0 else 'no draft')}" for k, row in enumerate(rows)]
        axes.set_yticks(range(len(rows)), [name if len(name) < 28 else name[:27] + "…" for name in names], fontsize=8.5)
        axes.set_xlim(-0.5, min(widest, WIDEST) + 4)
        axes.set_ylim(len(rows) - 0.4, -1.3)
        x = 0.0
        for text, kind in (("accepted", "accepted"), ("rejected", "rejected"), ("the model's own", "own")):
            _box(axes, x, -0.9, text, kind)
            x += _width(text) + 1
        axes.set_xticks([])
        axes.grid(visible=False)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.tick_params(length=0)
        axes.set_title(drawable(title))
    return figure


def _boxes(row: Pass) -> list[tuple[str, str]]:
    rejected = [(text, "rejected") for branch in row.rejected for text in branch]
    own = [] if row.own is None else [(row.own, "own")]
    return [(text, "accepted") for text in row.accepted] + rejected + own


def _width(text: str) -> float:
    return max(3.0, len(text.strip()) + 1.8)


def _box(axes: Axes, x: float, y: float, text: str, kind: str) -> None:
    width = _width(text) - 0.4
    face, edge, ink = {
        "accepted": (GREEN, GREEN, "white"),
        "rejected": ("white", "#D0D0D0", GREY),
        "own": ("white", BLUE, "black"),
    }[kind]
    axes.add_patch(Rectangle((x, y - 0.36), width, 0.72, facecolor=face, edgecolor=edge, linewidth=1.4))
    axes.text(x + width / 2, y + 0.02, drawable(text.strip(" ")) or "␣", ha="center", va="center", size=7.5, color=ink)
    if kind == "rejected":
        axes.plot([x + 0.5, x + width - 0.5], [y, y], color=ORANGE, linewidth=1.1)


def _pieces(tokenizer: Any, before: list[int], ids: list[int]) -> list[str]:
    """The text that each token adds behind those before it; "" for one that only begins a character."""

    def text(ids: list[int]) -> str:
        # A character that is not whole yet decodes to U+FFFD.
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).rstrip("\ufffd")

    before = before[-WINDOW:]
    said, pieces = text(before) if before else "", []
    for end in range(1, len(ids) + 1):
        now = text(before + ids[:end])
        pieces.append(now[len(said) :])
        said = now
    return pieces


def _rejected(step: Step) -> list[tuple[list[int], list[int]]]:
    """The branches of a drafted tree that were not accepted: the tokens above each and its own."""
    node_of = {pair: node for node, pair in enumerate(zip(step.parents, step.drafted, strict=True))}
    accepted: list[int] = []
    for token in step.tokens[: step.accepted]:
        accepted.append(node_of[accepted[-1] if accepted else -1, token])
    branches: list[list[int]] = []
    for node, parent in enumerate(step.parents):
        grown = next((branch for branch in branches if branch[-1] == parent), None)
        if node in accepted:
            continue
        if grown is None:
            branches.append([node])
        else:
            grown.append(node)
    return [
        ([step.drafted[node] for node in _above(step, branch[0])], [step.drafted[node] for node in branch])
        for branch in branches
    ]


def _above(step: Step, node: int) -> list[int]:
    parent = step.parents[node]
    return [*_above(step, parent), parent] if parent >= 0 else []
