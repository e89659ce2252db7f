"""Suffix: guess what followed the longest end of the text wherever it stood before (SuffixDecoding, arXiv 2411.04975).

Lookup takes the latest place of an n-gram of four tokens. Here a suffix automaton holds all substrings of the row's
text, and of earlier answers, in a number of states that is linear in the text (Blumer et al. 1985): the longest end of
the text that occurred before is known after every token without a search, with all tokens that followed it and how
often. As in the paper there is an index of the row (prompt and output) and one of earlier answers, the one that knows
more of the text's end guesses, and its tree grows by frequencies, the likeliest token first.
"""

from __future__ import annotations

from llmlab.decoding.draft import LEAST, Free, Proposal, Sampling, grow
from llmlab.decoding.plain_engine import Decoder

TOKENS = 16  # of a tree; the cost model verifies the best of them
END = -1  # stands between two answers
Place = tuple[int, int]  # a state of an automaton, and how many tokens of the text's end are alike


class Automaton:
    """All substrings of a text. A state stands for those that end at the same places.

    Attributes:
        follow: of each state: the state behind it by token.
        link: the state of its longest end that also occurs elsewhere; 0 is the empty text.
        length: of its longest substring.
        count: how often its substrings occur.
    """

    def __init__(self) -> None:
        self.follow: list[dict[int, int]] = [{}]
        self.link, self.length, self.count = [-1], [0], [0]
        self.last = 0  # the state of the whole text

    def append(self, token: int) -> None:
        """One more token."""
        state, self.last = self.last, self._state({}, self.length[self.last] + 1, 0)
        while state >= 0 and token not in self.follow[state]:
            self.follow[state][token] = self.last
            state = self.link[state]
        self.link[self.last] = self._shortened(state, token) if state >= 0 else 0
        state = self.last
        while state > 0:  # every end of the text occurs once more
            self.count[state] += 1
            state = self.link[state]

    def _shortened(self, state: int, token: int) -> int:
        """The state of a state's own substrings with the token behind them, split from longer ones if it must be."""
        behind = self.follow[state][token]
        if self.length[behind] == self.length[state] + 1:
            return behind
        split = self._state(dict(self.follow[behind]), self.length[state] + 1, self.count[behind])
        self.link[split], self.link[behind] = self.link[behind], split
        while state >= 0 and self.follow[state].get(token) == behind:
            self.follow[state][token] = split
            state = self.link[state]
        return split

    def _state(self, follow: dict[int, int], length: int, count: int) -> int:
        self.follow.append(follow)
        self.link.append(0)
        self.length.append(length)
        self.count.append(count)
        return len(self.link) - 1

    def read(self, place: Place, token: int) -> Place:
        """Where a text that was at `place` is one token later: at its longest end that occurs."""
        state, alike = place
        while token not in self.follow[state]:
            state = self.link[state]
            if state < 0:
                return 0, 0
            alike = self.length[state]
        return self.follow[state][token], alike + 1

    def behind(self, place: Place) -> list[tuple[int, float, Place]]:
        """What may follow, see `grow`: n tokens alike are trusted n / (n + 1), what remains goes to shorter ends."""
        state, alike = place
        left, likely = 1.0, dict[int, tuple[float, Place]]()
        while state > 0 and left > LEAST:
            followers, trust = self.follow[state], alike / (alike + 1)
            total = sum(self.count[after] for after in followers.values())
            for token, after in followers.items():
                before, there = likely.get(token, (0.0, (after, alike + 1)))
                likely[token] = before + left * trust * self.count[after] / total, there
            left *= 1 - trust if followers else 1
            state = self.link[state]
            alike = self.length[state]
        return [(token, chance, there) for token, (chance, there) in likely.items() if token != END]


class Suffix(Free):
    """What followed the longest end of the text that occurred before, in it or in earlier answers, as a tree.

    Keep the object: the answers it has seen serve the next prompts.
    """

    name = "suffix"

    def __init__(self) -> None:
        self.answers = Automaton()
        self.own: list[Automaton] = []  # of each row, its text so far
        self.texts: list[list[int]] = []
        self.prompts: list[int] = []  # tokens of each prompt
        self.places: list[Place] = []  # of each row in the answers

    def begin(self, target: Decoder, prompts: list[list[int]], length: int) -> None:
        """An index of each row's prompt; what the rows before wrote is kept as answers."""
        del target, length
        self.select([])
        self.own, self.texts = [Automaton() for _ in prompts], [[] for _ in prompts]
        self.prompts, self.places = [len(ids) for ids in prompts], [(0, 0) for _ in prompts]
        for row, ids in enumerate(prompts):
            self._read(row, ids)

    def propose(self, contexts: list[list[int]], k: int, sampling: Sampling) -> list[Proposal]:
        """A tree behind each row's text, from where more of its end is alike."""
        del sampling
        return [self._guess(row, ids, k) for row, ids in enumerate(contexts)]

    def _read(self, row: int, ids: list[int]) -> None:
        """What of a row's text is new."""
        for token in ids[len(self.texts[row]) :]:
            self.own[row].append(token)
            self.places[row] = self.answers.read(self.places[row], token)
        self.texts[row] = ids

    def _guess(self, row: int, ids: list[int], k: int) -> Proposal:
        self._read(row, ids)
        own = self.own[row]
        state = own.link[own.last]  # the longest end of the text that occurs elsewhere in it
        here, elsewhere = (state, own.length[state]), self.places[row]
        index, place = (self.answers, elsewhere) if elsewhere[1] > here[1] else (own, here)
        return grow(self.name, place, index.behind, TOKENS, k)

    def select(self, rows: list[int]) -> None:
        """Only these rows go on; what the others wrote is kept as answers."""
        for row, ids in enumerate(self.texts):
            if row not in rows:
                for token in [*ids[self.prompts[row] :], END]:
                    self.answers.append(token)
        self.texts, self.own = [self.texts[row] for row in rows], [self.own[row] for row in rows]
        self.prompts, self.places = [self.prompts[row] for row in rows], [self.places[row] for row in rows]
