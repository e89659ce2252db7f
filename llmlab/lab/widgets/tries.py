"""The trie viewer: question by question, what its endings share and which node sees which."""

from functools import cache
from html import escape

import numpy as np
import torch
from matplotlib.figure import Figure

from llmlab.base.errors import InputError
from llmlab.data import Question
from llmlab.lab.figures import scoring
from llmlab.lab.figures.draw import drawable
from llmlab.lab.widgets.view import Twin, View, slider
from llmlab.model.lm import LM
from llmlab.scoring.attention import ancestor_mask
from llmlab.scoring.encode import encode
from llmlab.scoring.trie import question_tries

TRIE = "The endings of one question as a trie: a common stem that branches where the endings differ."
MASK = "Which node of the trie sees which: a full triangle for the context, then only each ending's own branch."


def trie_viewer(lm: LM, questions: list[Question], *, name: str = "question") -> View:
    """A slider over questions; below it the question's trie and attention mask.

    Control: `question`, its number. The LM's tokenizer cuts the texts; no weight is used. NAME_trie and NAME_mask are
    the figures that stand in.

    Raises InputError if there is no question, or the first one does not fit the model.
    """
    if not questions:
        raise InputError("there are no questions: give at least one.")
    drawings = cache(lambda number: _drawings(lm, questions[number], name))

    def draw(question: int) -> str:
        asked = questions[question]
        marks = [" <b>(right)</b>" if k == asked.label else "" for k in range(len(asked.endings))]
        endings = "".join(f"<li>{escape(text)}{mark}</li>" for text, mark in zip(asked.endings, marks, strict=True))
        drawn = "".join(twin.svg(shrink=False) for twin in drawings(question))
        row = f'<div style="display: flex; flex-wrap: wrap; gap: 8px; overflow-x: auto">{drawn}</div>'
        return f'<p>{escape(asked.context)} …</p><ol start="0">{endings}</ol>{row}'

    return View(lambda: {"question": slider("question", range(len(questions)))}, draw, drawings(0))


def _drawings(lm: LM, question: Question, name: str) -> list[Twin]:
    """The trie of one question and its mask. Raises InputError if it does not fit the model."""
    sequences = encode(lm, [question])
    trie, n_context = question_tries(sequences)[0], sequences[0].n_context
    sees = (ancestor_mask(trie, torch.float32, torch.device("cpu")) == 0).numpy()
    parents = [max(np.flatnonzero(row[:node]).tolist(), default=-1) for node, row in enumerate(sees)]
    tokens = [drawable(lm.decode([token])) for token in trie.ids]

    def draw_trie() -> Figure:
        title = f"{sum(len(s.ids) for s in sequences)} tokens become {len(trie)} nodes"
        figure = scoring.trie(tokens, trie.depths, parents, n_context, title)
        columns = max(trie.depths) - n_context + 2.6
        pairs = [len(tokens[k]) + len(tokens[parents[k]]) for k in range(n_context, len(trie))]
        figure.set_figwidth(max(5.0, columns * (0.1 + 0.034 * max(pairs, default=8))))  # as its longest ending needs
        return figure

    def draw_mask() -> Figure:
        return scoring.mask(sees, n_context, "A node sees its ancestors alone")

    return [Twin(f"{name}_trie", TRIE, draw_trie), Twin(f"{name}_mask", MASK, draw_mask)]
