"""What speculation should bring: expected tokens a pass from the acceptance rate, seconds from measured passes.

With each drafted token accepted with probability a, independently, a verifying pass over k drafted tokens yields

    E(a, k) = 1 + a + a^2 + ... + a^k = (1 - a^(k+1)) / (1 - a)

tokens (Leviathan et al. 2022, arXiv 2211.17192, equation 1). It takes t(k + 1) + k d seconds, with t(w) a pass of the
model over w tokens a row and d a pass of the draft. Plain decoding yields 1 token in t(1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmlab.base.stats import Metric
from llmlab.decoding.draft import Proposal

MARGIN = 1.05  # a gain below it is within what is not known of rates and times


def expected_tokens(acceptance: float, k: float) -> float:
    """E(a, k): tokens that a pass over k drafted tokens yields."""
    if acceptance >= 1:
        return k + 1.0
    return float((1 - acceptance ** (k + 1)) / (1 - acceptance))


def speedup(acceptance: float, k: int, seconds: Callable[[int], float], draft_seconds: float) -> float:
    """Predicted speed over plain decoding; `seconds(w)` of a pass over w tokens a row."""
    return expected_tokens(acceptance, k) * seconds(1) / (seconds(k + 1) + k * draft_seconds)


def best_k(acceptance: float, seconds: Callable[[int], float], draft_seconds: float, most: int) -> int:
    """The k in 0 .. most with the highest predicted speed; 0 where speculation does not pay."""
    return max(range(most + 1), key=lambda k: speedup(acceptance, k, seconds, draft_seconds))


@dataclass
class Rate:
    """A running estimate of an acceptance rate; older trials weigh less, so that it follows the text.

    Starts from `prior` as if it had been seen in `weight` trials.
    """

    prior: float = 0.7
    weight: float = 2.0
    memory: float = 0.97
    hits: float = 0.0
    trials: float = 0.0

    def observe(self, hits: int, trials: float) -> None:
        """`hits` of `trials` drafted tokens were accepted; of a tree with chances: of so many that should have been."""
        keep = self.memory**trials
        self.hits, self.trials = self.hits * keep + hits, self.trials * keep + trials

    @property
    def value(self) -> float:
        """The estimate: in (0, 1), or above where a tree promised less than it kept."""
        return (self.hits + self.prior * self.weight) / (self.trials + self.weight)


def best_size(
    reach: Sequence[Sequence[float]], seconds: Callable[[int], float], weights: Sequence[float]
) -> tuple[int, float]:
    """How many drafted tokens a row to verify, and the predicted speed over plain decoding.

    A drafted token counts as often as it is accepted: a tree yields 1 plus the sum over its tokens of the probability
    that they and all before them are right (Medusa, arXiv 2401.10774, section 2.3.3), a chain E(a, k).

    Args:
        reach: of each row, this probability of each drafted token, the likeliest first.
        seconds: of a pass by its width.
        weights: what a token of each row is worth.
    """

    def speed(size: int) -> float:
        rows = zip(reach, weights, strict=True)
        return sum(weight * (1 + sum(of_row[:size])) for of_row, weight in rows) / seconds(1 + size)

    most = max(map(len, reach), default=0)
    if most == 0:  # plain decoding, of which nobody asks what a pass costs
        return 0, 1.0
    best = max(range(most + 1), key=speed)
    gain = speed(best) / speed(0)
    return (best, gain) if gain > MARGIN else (0, 1.0)


def worth(left: Sequence[int], pace: Sequence[float]) -> list[float]:
    """What a token of each row is worth to a batch that is done when its last row is.

    A row with `left` tokens to go at `pace` tokens a pass needs left / pace more passes. The batch waits for the row
    that needs the most, so a token counts by the fourth power of that share: rows that are far ahead must not make the
    passes of the others wider.
    """
    passes = [n / p for n, p in zip(left, pace, strict=True)]
    longest = max(passes, default=0.0)
    return [(n / longest) ** 4 if longest else 1.0 for n in passes]


def plain_seconds(lengths: Sequence[int], seconds: Callable[[int], float]) -> float:
    """Seconds of plain decoding rows of these many tokens together; the batch halves when half of its rows have ended.

    `seconds(rows)`: of a pass over one token of each row.
    """
    total, rows, done = 0.0, len(lengths), 0
    for step in range(max(lengths, default=0)):
        done = sum(n <= step for n in lengths)
        if 2 * (len(lengths) - done) <= rows:
            rows = len(lengths) - done
        total += seconds(rows)
    return total


@dataclass
class Tally:
    """What speculation did in a run, and what the model of its cost says about it.

    Attributes:
        passes: verifying passes, those without drafted tokens included.
        rows: rows in all those passes; each yields its accepted tokens and one more.
        drafted, accepted: tokens.
        trials: drafted tokens that were tested; those behind a rejected one were not.
        expected: tokens that the passes were expected to bring, each by what was accepted before it.
        seconds: predicted for all passes, drafts included.
        tokens: that all rows got out of them.
        plain_seconds: predicted for the same tokens without speculation.
    """

    passes: int = 0
    rows: int = 0
    drafted: int = 0
    accepted: int = 0
    trials: int = 0
    seconds: float = 0.0
    tokens: int = 0
    plain_seconds: float = 0.0
    expected: float = 0.0

    def observe(self, proposal: Proposal, tokens: list[int]) -> None:
        """One row of one pass: what was verified, and what the row got."""
        hits, trials, _ = proposal.tested(tokens)
        self.rows += 1
        self.tokens += len(tokens)
        self.drafted += len(proposal.tokens)
        self.accepted += hits
        self.trials += trials
        self.expected += 1 + sum(proposal.reach)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over tested drafted tokens (0 if none was tested)."""
        return self.accepted / self.trials if self.trials else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a row got out of a pass: its accepted ones and one more. 1 without speculation."""
        return 1 + self.accepted / self.rows if self.rows else 1.0

    @property
    def predicted_tokens_per_second(self) -> float:
        """Predicted speed of the whole run."""
        return self.expected / self.seconds if self.seconds else 0.0

    @property
    def predicted_speedup(self) -> float:
        """Over plain decoding of the same rows."""
        if not (self.tokens and self.plain_seconds):
            return 1.0
        return self.predicted_tokens_per_second / (self.tokens / self.plain_seconds)

    def metrics(self) -> dict[str, Metric]:
        """The main numbers with their units."""
        return {
            "acceptance_rate": Metric(self.acceptance_rate),
            "tokens_per_pass": Metric(self.tokens_per_pass, "token"),
            "predicted_tokens_per_second": Metric(self.predicted_tokens_per_second, "token/s"),
            "predicted_speedup": Metric(self.predicted_speedup, "x"),
        }
