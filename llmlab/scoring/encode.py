"""Questions to token ids, one sequence per ending, exactly as lm-evaluation-harness splits them."""

from __future__ import annotations

from dataclasses import dataclass

from llmlab.base.errors import InputError
from llmlab.data import Question
from llmlab.model.lm import LM


@dataclass(frozen=True)
class Sequence:
    """One question with one of its endings.

    Attributes:
        question: index of the question.
        ending: index of the ending.
        ids: token ids of context and ending, length S.
        n_context: how many of them are context; positions n_context .. S-1 are the ending's tokens.
    """

    question: int
    ending: int
    ids: list[int]
    n_context: int

    @property
    def n_ending(self) -> int:
        """Tokens of the ending."""
        return len(self.ids) - self.n_context


def encode(lm: LM, questions: list[Question]) -> list[Sequence]:
    """Tokenize every question with every ending.

    The context is tokenized alone, then with the ending: the ending's tokens are those behind as many as the context
    has alone. Where the tokenizer merges across the border (": C" as one token), the model still reads the context's
    own tokens, and the ending loses what the merge took (lm-evaluation-harness's rule, `_encode_pair`).

    Raises:
        InputError: a sequence is longer than the model's context, or an ending has no token; names the question.
    """
    sequences: list[Sequence] = []
    for index, question in enumerate(questions):
        # A trailing space of the context belongs to the ending's first token.
        context = question.context.rstrip()
        gap = question.context[len(context) :] + " "
        before = lm.input_ids(context)
        for number, ending in enumerate(question.endings):
            ids = before + lm.input_ids(context + gap + ending)[len(before) :]
            if len(ids) > lm.card.context_length:
                raise InputError(
                    f"question {index} with ending {number} has {len(ids)} tokens, more than the context of "
                    f"{lm.card.context_length} tokens of {lm.name}: shorten or remove it."
                )
            if not before or len(ids) == len(before):
                part = f"ending {number}" if before else "context"
                raise InputError(f"question {index}: its {part} has no token of its own; remove the question.")
            sequences.append(Sequence(index, number, ids, len(before)))
    return sequences
