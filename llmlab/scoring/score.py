"""score(): questions in, predictions and accuracies out."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from llmlab.base.errors import InputError
from llmlab.base.progress import progress
from llmlab.base.stats import Metric, proportion
from llmlab.data import Question, fingerprint, ids_fingerprint
from llmlab.model.lm import LM
from llmlab.scoring import reference, shared
from llmlab.scoring.encode import Sequence, encode
from llmlab.scoring.scores import OnBatch, Scores

if TYPE_CHECKING:
    from tqdm import tqdm

METHODS = ("shared", "reference")


@dataclass(frozen=True)
class ScoreResult:
    """Scores of N questions.

    Attributes:
        task, data: the questions' source and fingerprint.
        log_probs: log-probability of each ending given its context, in nats: N lists, one value an ending.
        predictions: the most probable ending (acc).
        predictions_norm: the same after division by the ending's characters (acc_norm, as lm-evaluation-harness).
        predictions_norm_token: the same after division by the ending's tokens (acc_norm_token).
        labels: the right endings.
        tokens: tokens that went through the model, padding left out.
        tokens_full: tokens of all contexts with all endings, as the reference path computes them.
        passes: forward passes.
        padding: share of places computed for nothing: in the reference path's batches, and in GPUs' slots of tries.
        seconds_inference: forward passes, from the first batch to the last result.
        seconds_total: the same with tokenization and metrics; loading the model is not in it.
        settings: how it was scored: `method`, `batch_size` of the reference path; over ranks their number, `layout` and
            `schedule`; `token_ids`, a fingerprint of what the model read and of where endings begin.
        memory_bytes: of the weights on all ranks together; None for one process: those of its model.
        seed: None, nothing is drawn.
    """

    task: str
    data: str
    log_probs: list[list[float]]
    predictions: list[int]
    predictions_norm: list[int]
    predictions_norm_token: list[int]
    labels: list[int]
    tokens: int
    tokens_full: int
    passes: int
    padding: float
    seconds_inference: float
    seconds_total: float
    settings: dict[str, str]
    memory_bytes: int | None = None
    seed: int | None = None

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.labels)

    @property
    def right(self) -> list[int]:
        """1 for each question that acc counts, else 0."""
        return [int(p == label) for p, label in zip(self.predictions, self.labels, strict=True)]

    @property
    def clusters(self) -> list[str]:
        """Each question by itself: a question does not tell its source."""
        return [str(number) for number in range(self.n)]

    @property
    def method(self) -> str:
        """The path, "shared" or "reference", with the layout where several ranks scored."""
        return ", ".join(self.settings[name] for name in ("method", "layout") if name in self.settings)

    @property
    def acc(self) -> Metric:
        """Share of right answers by the sum of log-probabilities, with Wilson's 95 % interval."""
        return self._accuracy(self.predictions)

    @property
    def acc_norm(self) -> Metric:
        """Accuracy with log-probabilities per character."""
        return self._accuracy(self.predictions_norm)

    @property
    def acc_norm_token(self) -> Metric:
        """Accuracy with log-probabilities per token."""
        return self._accuracy(self.predictions_norm_token)

    def _accuracy(self, predictions: list[int]) -> Metric:
        return proportion([p == label for p, label in zip(predictions, self.labels, strict=True)])

    @property
    def accuracies(self) -> dict[str, Metric]:
        """All three by name."""
        return {"acc": self.acc, "acc_norm": self.acc_norm, "acc_norm_token": self.acc_norm_token}

    @property
    def protocol(self) -> str:
        """How the numbers came about, in one line."""
        return (
            "log p(ending | context), text rules and split as lm-evaluation-harness; "
            f"{self.method} path, longest first, {self.passes} passes, {self.tokens:,} tokens computed for "
            f"{self.tokens_full:,}, padding {self.padding:.1%}"
        )

    def metrics(self) -> dict[str, Metric]:
        """The measurements with their units, for a Record."""
        return self.accuracies | {
            "seconds_inference": Metric(self.seconds_inference, "s"),
            "seconds_total": Metric(self.seconds_total, "s"),
            "questions_per_second": Metric(self.n / self.seconds_inference, "1/s"),
            "tokens_per_second": Metric(self.tokens / self.seconds_inference, "token/s"),
            "tokens": Metric(self.tokens, "token"),
            "tokens_full": Metric(self.tokens_full, "token"),
        }

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        values = {name: metric.value for name, metric in self.accuracies.items()}
        intervals = {f"{name}_interval": [metric.low, metric.high] for name, metric in self.accuracies.items()}
        return {"n": self.n, **values, **intervals, **asdict(self), "method": self.method, "protocol": self.protocol}


def score(lm: LM, questions: list[Question], *, method: str = "shared", batch_size: int = 8) -> ScoreResult:
    """Score multiple-choice questions.

    Both methods are exact: "shared" computes what endings have in common once (see `shared`), "reference" every ending
    in full, and a test holds one against the other on the real model.

    Args:
        lm: the model.
        questions: from `llmlab.data`, or your own, with any number of endings.
        method: "shared" or "reference". A model for which "shared" is not exact (see `shared.serves`) is scored by
            "reference" with a warning, and the result says so.
        batch_size: sequences a forward pass of the reference path.

    Raises:
        InputError: nothing to score, or a question that does not fit (see `encode`).
        NumericalError: a log-probability is not finite.
    """
    if not questions:
        raise InputError("there are no questions to score: give at least one.")
    check_options(method, batch_size)
    begin = time.perf_counter()
    sequences = encode(lm, questions)
    if method == "shared" and not shared.serves(lm, sequences):
        method = "reference"
    with progress(len(sequences), f"scoring {questions[0].source}", "ending") as bar:
        begin_inference = time.perf_counter()
        if method == "shared":
            scores = shared.in_tries(lm, sequences, on_batch=_showing(bar, questions))
        else:
            scores = reference.log_probs(lm, sequences, batch_size=batch_size, on_batch=_showing(bar, questions))
        end = time.perf_counter()
    return summarize(questions, sequences, scores, scores.settings, (end - begin_inference, end - begin))


def _showing(bar: tqdm[object], questions: list[Question]) -> OnBatch:
    """Moves a progress bar; beside it the accuracy of the questions that are done."""
    log_probs: dict[int, dict[int, float]] = defaultdict(dict)  # of each question's endings so far
    hits: list[bool] = []

    def show(batch: list[Sequence], values: list[float]) -> None:
        for sequence, value in zip(batch, values, strict=True):
            question, endings = questions[sequence.question], log_probs[sequence.question]
            endings[sequence.ending] = value
            if len(endings) == len(question.endings):
                hits.append(max(endings, key=lambda ending: endings[ending]) == question.label)
        if hits:
            bar.set_postfix_str(f"acc {sum(hits) / len(hits):.3f} of {len(hits)}", refresh=False)
        bar.update(len(batch))

    return show


def summarize(
    questions: list[Question],
    sequences: list[Sequence],
    scores: Scores,
    settings: dict[str, str],
    seconds: tuple[float, float],
    memory_bytes: int | None = None,
) -> ScoreResult:
    """Log-probabilities to predictions.

    Args:
        questions: what was asked.
        sequences: as they were encoded.
        scores: of the sequences.
        settings, memory_bytes: as in `ScoreResult`.
        seconds: of the inference, of everything.
    """
    log_probs = [[0.0] * len(q.endings) for q in questions]
    tokens = [[0] * len(q.endings) for q in questions]
    for sequence, value in zip(sequences, scores.log_probs, strict=True):
        log_probs[sequence.question][sequence.ending] = value
        tokens[sequence.question][sequence.ending] = sequence.n_ending
    return ScoreResult(
        task=questions[0].source,
        data=fingerprint(questions),
        log_probs=log_probs,
        predictions=_best(log_probs, [[1] * len(row) for row in log_probs]),
        predictions_norm=_best(log_probs, [[len(e) for e in q.endings] for q in questions]),
        predictions_norm_token=_best(log_probs, tokens),
        labels=[q.label for q in questions],
        tokens=scores.work.tokens,
        tokens_full=sum(len(s.ids) for s in sequences),
        passes=scores.work.passes,
        padding=scores.work.padding,
        seconds_inference=seconds[0],
        seconds_total=seconds[1],
        settings=settings | {"token_ids": ids_fingerprint([s.n_context, *s.ids] for s in sequences)},
        memory_bytes=memory_bytes,
    )


def _best(log_probs: list[list[float]], lengths: list[list[int]]) -> list[int]:
    """Of each question the ending with the largest log-probability by unit of length."""
    return [int(np.argmax(np.divide(row, length))) for row, length in zip(log_probs, lengths, strict=True)]


def check_options(method: str, batch_size: int) -> None:
    """Raise InputError for options that make no sense; needs no model."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: give a positive number.")
