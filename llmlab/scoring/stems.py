"""What many questions begin with is computed once: the few-shot examples of a task, say.

    Q: 1+1? A: 2 | Q: 3+4? A:  (7)         stem (a pass of its own)      tries behind it
    Q: 1+1? A: 2 | Q: 2+9? A:  (11)        Q: 1+1? A: 2  ──────────┬──  Q: 3+4? A:
                                           its keys and values stay └──  Q: 2+9? A:

Exact, as tries are: a node at depth P + i attends to the P tokens of the stem as in the plain sequence.
"""

from __future__ import annotations

from itertools import pairwise

from llmlab.kernels.cuda import free_bytes
from llmlab.model.lm import LM
from llmlab.scoring.encode import Sequence
from llmlab.scoring.pack import profile
from llmlab.scoring.trie import Stem, Trie, build, common

SHORTEST = 64  # tokens of a stem: fewer are cheaper to compute again than to fetch for every trie
STEM_SHARE = 8  # of a GPU's free memory the keys and values of a stem may take one part in so many


def few_shot_tries(lm: LM, sequences: list[Sequence]) -> list[Trie]:
    """One trie a question; on one stem where many questions have a long beginning, within their contexts, in common.

    Questions are sorted by their contexts; where two neighbours share less than half of what one of them shares with
    its other neighbour, another group begins. A group has a stem if that saves more than a pass of the smallest size.
    """
    numbers: dict[int, list[int]] = {}
    for number, sequence in enumerate(sequences):
        numbers.setdefault(sequence.question, []).append(number)
    questions = sorted((_context([sequences[n] for n in of_question]), of_question) for of_question in numbers.values())
    links = [0, *(common(a, b) for (a, _), (b, _) in pairwise(questions)), 0]
    longest, saving, groups = [max(pair) for pair in pairwise(links)], min(profile(lm).budgets), [[0]]
    for index in range(1, len(questions)):
        if 2 * links[index] < max(longest[index - 1 : index + 1]):
            groups.append([])
        groups[-1].append(index)
    tries = []
    for group in groups:
        shared = min([_room(lm), *(links[index] for index in group[1:])]) if group[1:] else 0
        pays = shared >= SHORTEST and (len(group) - 1) * shared > saving
        stem = Stem(questions[group[0]][0][:shared]) if pays else None
        for _, of_question in (questions[index] for index in group):
            tries.append(build([sequences[n] for n in of_question], of_question, stem=stem))
    return tries


def _context(sequences: list[Sequence]) -> list[int]:
    """What the sequences of a question begin with, without the context's last token, which predicts the endings."""
    contexts = [s.ids[: s.n_context - 1] for s in sequences]
    return contexts[0][: min(common(contexts[0], context) for context in contexts)]


def _room(lm: LM) -> int:
    """The most tokens of a stem."""
    if lm.device.type != "cuda":
        return lm.card.context_length
    a_token = lm.card.layers * lm.card.kv_heads * (lm.card.head_dim + lm.card.value_dim) * lm.model.dtype.itemsize
    return int(free_bytes(lm.device) // STEM_SHARE // a_token)
