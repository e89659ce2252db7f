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

    Context and ending are tokenized *together* and split at the length of the context alone: where the tokenizer
    would merge the last character of the context with the ending, the merged token belongs to whichever side the
    count says (lm-evaluation-harness's rule; with `" "` between the two it does not happen for most tokenizers).

    Raises:
        InputError: a sequence is longer than the model's context, or an ending has no token; names the question.
    """
    sequences: list[Sequence] = []
    for index, question in enumerate(questions):
        # A trailing space of the context belongs to the ending's first token.
        context = question.context.rstrip()
        gap = question.context[len(context) :] + " "
        n_context = len(lm.encode(context))
        for number, ending in enumerate(question.endings):
            ids = lm.encode(context + gap + ending)
            if len(ids) > lm.card.context_length:
                raise InputError(
                    f"question {index} with ending {number} has {len(ids)} tokens, more than the context of "
                    f"{lm.card.context_length} tokens of {lm.name}: shorten or remove it."
                )
            if n_context == 0 or len(ids) == n_context:
                part = "context" if n_context == 0 else f"ending {number}"
                raise InputError(f"question {index}: its {part} has no token of its own; remove the question.")
            sequences.append(Sequence(index, number, ids, n_context))
    return sequences
