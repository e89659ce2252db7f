"""The trie viewer: question by question, what its endings share and which node sees which."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from html import escape
from typing import Any

import ipywidgets
import numpy as np
import torch
from matplotlib.figure import Figure

from llmlab.base.errors import InputError
from llmlab.data import Question
from llmlab.lab.figures import scoring
from llmlab.lab.figures.draw import drawable
from llmlab.lab.widgets.svg import inline
from llmlab.lab.widgets.view import DESCRIBED, Twin, View
from llmlab.model.lm import LM
from llmlab.scoring.attention import ancestor_mask
from llmlab.scoring.encode import encode
from llmlab.scoring.trie import Trie, question_tries

TRIE = "The endings of one question as a trie: a common stem that branches where the endings differ."
MASK = "Which node of the trie sees which: a full triangle for the context, then only each ending's own branch."


@dataclass(frozen=True)
class Seen:
    """A question's trie with what is drawn of it."""

    trie: Trie
    tokens: list[str]
    sees: np.ndarray[Any, Any]
    n_context: int
    n_full: int

    @cached_property
    def parents(self) -> list[int]:
        """Of each node; -1 for the root."""
        return [max(np.flatnonzero(row[:node]).tolist(), default=-1) for node, row in enumerate(self.sees)]

    def draw_trie(self) -> Figure:
        """The trie, as wide as its longest ending needs."""
        title = f"{self.n_full} tokens become {len(self.trie)} nodes"
        figure = scoring.trie(self.tokens, self.trie.depths, self.parents, self.n_context, title)
        columns = max(self.trie.depths) - self.n_context + 2.6
        below = range(self.n_context, len(self.trie))
        pairs = [len(self.tokens[k]) + len(self.tokens[self.parents[k]]) for k in below]
        figure.set_figwidth(max(5.0, columns * (0.1 + 0.034 * max(pairs, default=8))))
        return figure

    def draw_mask(self) -> Figure:
        """The attention mask."""
        return scoring.mask(self.sees, self.n_context, "A node sees its ancestors alone")


def trie_viewer(lm: LM, questions: list[Question], *, name: str = "question") -> View:
    """A slider over questions; below it the question's trie and attention mask.

    Control: `question`, its number.

    Args:
        lm: the model whose tokenizer cuts the texts; no weight is used.
        questions: as from `llmlab.data`.
        name: the figures that stand in for the widget are NAME_trie and NAME_mask.

    Raises InputError if there is no question, or the first one does not fit the model.
    """
    if not questions:
        raise InputError("there are no questions: give at least one.")
    seen = cache(lambda number: look(lm, questions[number]))
    seen(0)

    def make() -> dict[str, Any]:
        last = len(questions) - 1
        slider = ipywidgets.IntSlider(
            0, 0, last, description="question", style=DESCRIBED, continuous_update=False,
            layout=ipywidgets.Layout(width="400px"),
        )  # fmt: skip
        return {"question": slider}

    def draw(question: int) -> str:
        one, asked = seen(question), questions[question]
        endings = "".join(
            f"<li>{escape(ending)}{' <b>(right)</b>' if k == asked.label else ''}</li>"
            for k, ending in enumerate(asked.endings)
        )
        text = f'<p>{escape(asked.context)} …</p><ol start="0">{endings}</ol>'
        drawn = "".join(inline(d, alt, shrink=False) for d, alt in ((one.draw_trie(), TRIE), (one.draw_mask(), MASK)))
        return f'{text}<div style="display: flex; flex-wrap: wrap; gap: 8px; overflow-x: auto">{drawn}</div>'

    first = seen(0)
    return View(make, draw, [Twin(f"{name}_trie", TRIE, first.draw_trie), Twin(f"{name}_mask", MASK, first.draw_mask)])


def look(lm: LM, question: Question) -> Seen:
    """The trie of one question. Raises InputError if it does not fit the model."""
    sequences = encode(lm, [question])
    trie = question_tries(sequences)[0]
    sees = (ancestor_mask(trie, torch.float32, torch.device("cpu")) == 0).numpy()
    tokens = [drawable(lm.decode([token])) for token in trie.ids]
    return Seen(trie, tokens, sees, sequences[0].n_context, sum(len(s.ids) for s in sequences))
