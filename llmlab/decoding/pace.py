"""How much to draft: what each row and each draft have had accepted so far, against what passes cost."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmlab.decoding.cost import MARGIN, Rate, best_k, best_size, speedup, worth
from llmlab.decoding.draft import Draft, Proposal, Sampling
from llmlab.decoding.plain_engine import Decoder

MOST = 16  # drafted tokens a row where k adapts
PROBE = 24  # passes without a costly draft after which it is tried again
SHARE = 0.01  # of the time, that free drafts may take while nothing comes of them


@dataclass
class Row:
    """A prompt, what was written behind it, and how well that was guessed.

    Attributes:
        number: of the prompt.
        prompt, new: token ids.
        limit: new tokens at most.
        open: whether it goes on.
        rates: acceptance by draft: of a chain's tokens; of a tree's, over what its chances promise.
        pace: tokens that a pass brings it.
    """

    number: int
    prompt: list[int]
    limit: int
    new: list[int] = field(default_factory=list)
    open: bool = True
    rates: dict[str, Rate] = field(default_factory=lambda: defaultdict(Rate))
    pace: Rate = field(default_factory=lambda: Rate(prior=1.5, weight=4.0))

    @property
    def left(self) -> int:
        """Tokens that may be drafted: a pass adds one of the model's own."""
        return self.limit - len(self.new) - 1 if self.open else 0

    def observe(self, guesses: list[Proposal], tokens: list[int]) -> None:
        """Compare what was guessed with the tokens that a pass brought, whether it was verified or not."""
        self.pace.observe(len(tokens), 1)
        for guess in guesses:
            hits, _, promised = guess.tested(tokens)
            self.rates[guess.source].observe(hits, promised)


class Pace:
    """Asks the drafts of a batch and decides what of their guesses the verifying pass reads.

    Several drafts are a cascade: the guesses of the free ones become one tree, each token with the chance that its
    draft gives it, times how often such guesses of that draft came true in this row; a costly draft is asked where it
    promises more speed than they do. Of the tree those tokens are verified that pay for their part of the pass. Even
    free drafts take a little time, a tree of each row: while none of it is verified they are asked from time to time.

    Args:
        engine: of the model that verifies.
        drafts: any number.
        k: drafted tokens (a tree: depth) a pass; None adapts it to acceptance and cost, down to none at all.
    """

    def __init__(self, engine: Decoder, drafts: Sequence[Draft], k: int | None) -> None:
        self.engine, self.drafts, self.k = engine, sorted(drafts, key=lambda draft: not draft.free), k
        self.idle = 0  # passes since a costly draft was asked
        self.seconds = 0.0  # predicted for the last proposals: drafts (free ones: measured) and the verifying pass
        self.rest = 0  # passes for which free drafts are not asked
        self.asking: dict[int, float] = {}  # seconds that it takes to ask them, by rows
        self.guesses: list[list[Proposal]] = []  # of each row, the last ones, as the drafts made them

    def propose(self, rows: list[Row], sampling: Sampling) -> list[Proposal]:
        """What of the drafts' guesses for each row is verified."""
        most = min(MOST if self.k is None else self.k, max(row.left for row in rows))
        proposals, self.guesses = [Proposal() for _ in rows], [[] for _ in rows]
        self.idle, self.rest, self.seconds, asking = self.idle + 1, self.rest - 1, 0.0, 0.0
        for draft in self.drafts if most > 0 else []:
            for row in rows:
                row.rates.setdefault(draft.name, Rate(prior=draft.prior))
            if not draft.free and (depth := min(most, self._worth(draft, rows, proposals))):
                self.idle = 0
                self.seconds += depth * draft.seconds()
                proposals = self._ask(draft, depth, rows, proposals, sampling)
            elif draft.free and self.rest <= 0:
                begin = time.perf_counter()
                proposals = self._ask(draft, most, rows, proposals, sampling)
                asking += time.perf_counter() - begin
        size = self._best(rows, proposals)[0] if self.k is None else max(MOST, 4 * self.k)
        if size == 0 and asking:
            self.rest = self._pause(len(rows), asking)
        verified = [proposal.best(size) for proposal in proposals]
        if self.drafts:
            self.seconds += asking + self.engine.seconds(1 + max(len(proposal.tokens) for proposal in verified))
        return verified

    def _ask(
        self, draft: Draft, depth: int, rows: list[Row], proposals: list[Proposal], sampling: Sampling
    ) -> list[Proposal]:
        """The proposals and what a draft guesses beside them, as likely as its guesses came true in each row."""
        guesses = draft.propose([row.prompt + row.new for row in rows], depth, sampling)
        guesses = [guess.cut(row.left) for row, guess in zip(rows, guesses, strict=True)]
        for known, guess in zip(self.guesses, guesses, strict=True):
            known.append(guess)
        return [
            proposal.joined(guess.calibrated(row.rates[guess.source].value))
            for row, proposal, guess in zip(rows, proposals, guesses, strict=True)
        ]

    def _pause(self, rows: int, asking: float) -> int:
        """For how many passes free drafts are not asked, when asking took so long and nothing was worth verifying."""
        if rows not in self.asking:  # the first time: ranks wait for each other to agree
            self.asking[rows] = self.engine.agreed(asking)
        return min(PROBE, int(self.asking[rows] / (SHARE * self.engine.seconds(1))))

    def observe(self, rows: list[Row], steps: Mapping[int, list[int]]) -> None:
        """What a pass brought each open row, by the row's number."""
        for row, guesses in zip(rows, self.guesses, strict=True):
            if row.open:
                row.observe(guesses, steps[row.number])

    def _worth(self, draft: Draft, rows: list[Row], proposals: list[Proposal]) -> int:
        """How many tokens to ask a costly draft for; 0 if that does not pay."""
        if self.k is not None:
            return 0 if all(p.tokens for p, row in zip(proposals, rows, strict=True) if row.left > 0) else self.k
        rate, seconds = sum(row.rates[draft.name].value for row in rows) / len(rows), draft.seconds()
        k, gain = best_k(rate, self.engine.seconds, seconds, MOST), self._best(rows, proposals)[1]
        if speedup(rate, k, self.engine.seconds, seconds) > MARGIN * gain:
            return k
        return int(gain == 1 and self.idle > PROBE)

    def _best(self, rows: list[Row], proposals: list[Proposal]) -> tuple[int, float]:
        """How many drafted tokens of each row to verify, and the speed over plain decoding that this promises.

        What a costly draft has drafted is there: only the verifying pass costs.
        """
        reach = [sorted(proposal.reach, reverse=True)[:MOST] for proposal in proposals]
        weights = worth([row.left for row in rows], [row.pace.value for row in rows])
        return best_size(reach, self.engine.seconds, weights)
