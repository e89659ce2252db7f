"""What speculation should bring: expected tokens a pass from the acceptance rate, seconds from measured passes.

With each drafted token accepted with probability a, independently, a verifying pass over k drafted tokens yields

    E(a, k) = 1 + a + a^2 + ... + a^k = (1 - a^(k+1)) / (1 - a)

tokens (Leviathan et al. 2022, arXiv 2211.17192, equation 1). It takes t(k + 1) + k d seconds, with t(w) a pass of the
model over w tokens a row and d a pass of the draft. Plain decoding yields 1 token in t(1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


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

    def observe(self, hits: int, trials: int) -> None:
        """`hits` of `trials` drafted tokens were accepted."""
        keep = self.memory**trials
        self.hits, self.trials = self.hits * keep + hits, self.trials * keep + trials

    @property
    def value(self) -> float:
        """The estimate, in (0, 1)."""
        return (self.hits + self.prior * self.weight) / (self.trials + self.weight)


def best_depth(
    rates: Sequence[float],
    depths: Sequence[int],
    width: Callable[[int], int],
    seconds: Callable[[int], float],
    draft_seconds: float,
) -> tuple[int, float]:
    """How deep to go with the proposals of a batch, and the tokens a second that this should bring.

    Args:
        rates: acceptance rate expected in each row.
        depths: how deep each row's proposal reaches (0: none).
        width: tokens a row of a pass over proposals cut at a depth, the last accepted token included.
        seconds: of a pass by its width.
        draft_seconds: for one more token of all rows.
    """  # fmt: skip
    best, most = 0, 0.0
    for depth in range(max(depths, default=0) + 1):
        tokens = sum(expected_tokens(a, min(depth, d)) for a, d in zip(rates, depths, strict=True))
        speed = tokens / (seconds(width(depth)) + depth * draft_seconds)
        if speed > most * 1.001:
            best, most = depth, speed
    return best, most


@dataclass
class Tally:
    """What speculation did in a run, and what the model of its cost says about it.

    Attributes:
        passes: verifying passes, those without drafted tokens included.
        rows: rows in all those passes; each yields its accepted tokens and one more.
        drafted, accepted: tokens.
        trials: drafted tokens that were tested; those behind a rejected one were not.
        by_source: (hits, trials) of each draft.
        seconds: predicted for all passes, drafts included.
        depths: (source, depth) of each row's proposal, by how often it came.
    """

    passes: int = 0
    rows: int = 0
    drafted: int = 0
    accepted: int = 0
    trials: int = 0
    seconds: float = 0.0
    plain_seconds: float = 0.0
    by_source: dict[str, tuple[int, int]] = field(default_factory=dict)
    depths: dict[tuple[str, int], int] = field(default_factory=dict)

    def observe(self, source: str, depth: int, drafted: int, hits: int, trials: int) -> None:
        """One row of one pass."""
        self.rows, self.drafted, self.accepted, self.trials = (
            self.rows + 1, self.drafted + drafted, self.accepted + hits, self.trials + trials,
        )  # fmt: skip
        self.depths[source, depth] = self.depths.get((source, depth), 0) + 1
        if trials:
            before = self.by_source.get(source, (0, 0))
            self.by_source[source] = (before[0] + hits, before[1] + trials)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over tested drafted tokens (0 if none was tested)."""
        return self.accepted / self.trials if self.trials else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a row got out of a pass: its accepted ones and one more. 1 without speculation."""
        return 1 + self.accepted / self.rows if self.rows else 1.0

    @property
    def expected(self) -> float:
        """Tokens that E(a, k) gives for each row and pass, with the measured acceptance of each draft."""
        tokens = 0.0
        for (source, depth), count in self.depths.items():
            hits, trials = self.by_source.get(source, (0, 0))
            tokens += count * (expected_tokens(hits / trials, depth) if trials else 1.0)
        return tokens

    @property
    def predicted_tokens_per_second(self) -> float:
        """Of the whole run."""
        return self.expected / self.seconds if self.seconds else 0.0

    @property
    def predicted_speedup(self) -> float:
        """Over plain decoding of the same rows, which takes a pass of width 1 for each token."""
        if not (self.rows and self.plain_seconds):
            return 1.0
        plain = self.rows / self.plain_seconds  # tokens a second: each row of each pass would get one
        return self.predicted_tokens_per_second / plain
