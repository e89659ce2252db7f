"""How much to draft: what each row and each draft have had accepted so far, against what passes cost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from llmlab.decoding.cost import Rate, best_depth, best_k, worth
from llmlab.decoding.draft import Draft, Proposal, Sampling
from llmlab.decoding.plain_engine import Decoder

MOST = 16  # drafted tokens a row where k adapts
PROBE = 24  # passes without a costly draft after which it is tried again


@dataclass
class Row:
    """A prompt, what was written behind it, and how well that was guessed.

    Attributes:
        number: of the prompt.
        prompt, new: token ids.
        limit: new tokens at most.
        open: whether it goes on.
        rates: acceptance by draft.
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

    def observe(self, proposal: Proposal, tokens: list[int]) -> None:
        """Compare what was proposed with the tokens that a pass brought, whether it was verified or not."""
        self.pace.observe(len(tokens), 1)
        children, inner = proposal.children, set(proposal.parents)
        node, hits, trials = -1, 0, 0
        for token in tokens:
            if node not in inner:
                break
            trials += 1
            if (node, token) not in children:
                break
            node = children[node, token]
            hits += 1
        if trials:
            self.rates[proposal.source].observe(hits, trials)


class Pace:
    """Asks the drafts of a batch, in turn, and decides how deep the verifying pass goes.

    Args:
        engine: of the model that verifies.
        drafts: a row takes the first guess it gets.
        k: drafted tokens (a tree: depth) a pass; None adapts it to acceptance and cost, down to none at all.
    """

    def __init__(self, engine: Decoder, drafts: Sequence[Draft], k: int | None) -> None:
        self.engine, self.drafts, self.k = engine, drafts, k
        self.idle = 0  # passes since a costly draft was asked
        self.draft_seconds = 0.0  # predicted for the drafts of the last proposals

    def propose(self, rows: list[Row], sampling: Sampling) -> list[Proposal]:
        """What the drafts guess for each row, as far as it may still write."""
        proposals = [Proposal() for _ in rows]
        contexts = [row.prompt + row.new for row in rows]
        most = min(MOST if self.k is None else self.k, max(row.left for row in rows))
        self.idle, self.draft_seconds = self.idle + 1, 0.0
        for draft in self.drafts:
            lacking = [place for place, p in enumerate(proposals) if not p.tokens and rows[place].left > 0]
            if not lacking or most < 1:
                break
            depth = most if draft.free or self.k is not None else self._worth(draft, [rows[p] for p in lacking])
            if depth == 0:
                continue
            guesses = draft.propose(contexts, depth, sampling)
            if not draft.free:
                self.idle = 0
                self.draft_seconds += depth * draft.seconds()
            for place in lacking:
                proposals[place] = guesses[place]
        return [proposal.cut(row.left) for proposal, row in zip(proposals, rows, strict=True)]

    def _worth(self, draft: Draft, rows: list[Row]) -> int:
        """How many tokens to ask a costly draft for; 0 if that does not pay."""
        if self.idle > PROBE:
            return 1
        rate = sum(row.rates[draft.name].value for row in rows) / len(rows)
        return best_k(rate, self.engine.seconds, draft.seconds(), MOST // 2)

    def cut(self, rows: list[Row], proposals: list[Proposal]) -> list[Proposal]:
        """What of the proposals is verified: all of them cut at the depth that is best for the batch.

        What a costly draft has drafted is there: from here on only the verifying pass costs.
        """
        if self.k is not None or not any(p.tokens for p in proposals):
            return proposals
        depths = [proposal.depths for proposal in proposals]
        deepest = [max(of_row, default=0) for of_row in depths]
        rates = [row.rates[p.source].value if p.tokens else 0.0 for row, p in zip(rows, proposals, strict=True)]
        weights = worth([row.left for row in rows], [row.pace.value for row in rows])

        def width(cut: int) -> int:
            return 1 + max(sum(depth <= cut for depth in of_row) for of_row in depths)

        depth = best_depth(rates, deepest, width, self.engine.seconds, weights)
        return [proposal.cut(depth) for proposal in proposals]
