"""score(): questions in, predictions and accuracies out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmlab.base.errors import InputError
from llmlab.base.progress import progress
from llmlab.base.stats import Metric, proportion
from llmlab.data import Question, fingerprint
from llmlab.model.lm import LM
from llmlab.scoring import reference, shared
from llmlab.scoring.encode import Sequence, encode

METHODS = ("shared", "reference")


@dataclass(frozen=True)
class ScoreResult:
    """Scores of N questions.

    Attributes:
        log_probs: log-probability of each ending given its context, in nats: N lists, one value an ending.
        predictions: the most probable ending (acc).
        predictions_norm: the same after division by the ending's characters (acc_norm, as lm-evaluation-harness).
        predictions_norm_token: the same after division by the ending's tokens (acc_norm_token).
        labels: the right endings.
        method: "shared" or "reference".
        tokens: tokens that went through the model, padding left out.
        tokens_full: tokens of all contexts with all endings, as the reference path computes them.
        passes: forward passes.
        padding: share of places computed for nothing by the reference path's batches; the shared path has none.
        seconds_inference: forward passes, from the first batch to the last result.
        seconds_total: the same with tokenization and metrics; loading the model is not in it.
    """

    task: str
    data: str
    log_probs: list[list[float]]
    predictions: list[int]
    predictions_norm: list[int]
    predictions_norm_token: list[int]
    labels: list[int]
    method: str
    tokens: int
    tokens_full: int
    passes: int
    padding: float
    seconds_inference: float
    seconds_total: float
    seed: int | None = None
    memory_bytes: int | None = None

    @property
    def settings(self) -> dict[str, str]:
        """What was run, for a Record."""
        return {"method": self.method}

    @property
    def n(self) -> int:
        """Number of questions."""
        return len(self.labels)

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
    def protocol(self) -> str:
        """How the numbers came about, in one line."""
        return (
            "log p(ending | context), text rules and split as lm-evaluation-harness; "
            f"{self.method} path, longest first, {self.passes} passes, {self.tokens:,} tokens computed for "
            f"{self.tokens_full:,}, padding {self.padding:.1%}"
        )

    def metrics(self) -> dict[str, Metric]:
        """The measurements with their units, for a Record."""
        return {
            "acc": self.acc,
            "acc_norm": self.acc_norm,
            "acc_norm_token": self.acc_norm_token,
            "seconds_inference": Metric(self.seconds_inference, "s"),
            "seconds_total": Metric(self.seconds_total, "s"),
            "questions_per_second": Metric(self.n / self.seconds_inference, "1/s"),
            "tokens_per_second": Metric(self.tokens / self.seconds_inference, "token/s"),
            "tokens": Metric(self.tokens, "token"),
            "tokens_full": Metric(self.tokens_full, "token"),
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        accuracies = {"acc": self.acc, "acc_norm": self.acc_norm, "acc_norm_token": self.acc_norm_token}
        return {
            "task": self.task,
            "n": self.n,
            **{name: metric.value for name, metric in accuracies.items()},
            **{f"{name}_interval": [metric.low, metric.high] for name, metric in accuracies.items()},
            "predictions": self.predictions,
            "predictions_norm": self.predictions_norm,
            "predictions_norm_token": self.predictions_norm_token,
            "labels": self.labels,
            "log_probs": self.log_probs,
            "method": self.method,
            "tokens": self.tokens,
            "tokens_full": self.tokens_full,
            "passes": self.passes,
            "padding": self.padding,
            "seconds_inference": self.seconds_inference,
            "seconds_total": self.seconds_total,
            "protocol": self.protocol,
            "data": self.data,
        }


def score(lm: LM, questions: list[Question], *, method: str = "shared", batch_size: int = 8) -> ScoreResult:
    """Score multiple-choice questions.

    Both methods are exact: "shared" computes what endings have in common once (see `shared`), "reference" every ending
    in full, and a test holds one against the other on the real model.

    Args:
        lm: the model.
        questions: from `llmlab.data`, or your own, with any number of endings.
        method: "shared" or "reference".
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
    table: list[list[float]] = [[float("nan")] * len(q.endings) for q in questions]
    with progress(len(sequences), f"scoring {questions[0].source}", "ending") as bar:
        answered: list[bool] = []

        def show(batch: list[Sequence], values: list[float]) -> None:
            for sequence, value in zip(batch, values, strict=True):
                row = table[sequence.question]
                row[sequence.ending] = value
                if not any(map(np.isnan, row)):
                    answered.append(int(np.argmax(row)) == questions[sequence.question].label)
            if answered:
                bar.set_postfix_str(f"acc {sum(answered) / len(answered):.3f} of {len(answered)}", refresh=False)
            bar.update(len(batch))

        begin_inference = time.perf_counter()
        if method == "shared":
            work = shared.log_probs(lm, sequences, on_batch=show).work
            cost = (work.nodes, work.passes, 0.0)
        else:
            _, padding = reference.log_probs(lm, sequences, batch_size=batch_size, on_batch=show)
            cost = (sum(len(s.ids) for s in sequences), -(-len(sequences) // batch_size), padding)
        end_inference = time.perf_counter()
    seconds = (end_inference - begin_inference, time.perf_counter() - begin)
    return summarize(questions, sequences, table, method, cost, seconds)


def summarize(
    questions: list[Question],
    sequences: list[Sequence],
    table: list[list[float]],
    method: str,
    cost: tuple[int, int, float],
    seconds: tuple[float, float],
) -> ScoreResult:
    """Log-probabilities to predictions.

    Args:
        questions: what was asked.
        sequences: as they were encoded.
        table: log-probability of each ending of each question.
        method: the path that computed them.
        cost: tokens that went through the model, passes, share of padding.
        seconds: of the inference, of everything.
    """
    characters = [[len(e) for e in q.endings] for q in questions]
    tokens: list[list[int]] = [[0] * len(q.endings) for q in questions]
    for sequence in sequences:
        tokens[sequence.question][sequence.ending] = sequence.n_ending
    return ScoreResult(
        task=questions[0].source,
        data=fingerprint(questions),
        log_probs=table,
        predictions=[int(np.argmax(row)) for row in table],
        predictions_norm=[_argmax_per(row, length) for row, length in zip(table, characters, strict=True)],
        predictions_norm_token=[_argmax_per(row, length) for row, length in zip(table, tokens, strict=True)],
        labels=[q.label for q in questions],
        method=method,
        tokens=cost[0],
        tokens_full=sum(len(s.ids) for s in sequences),
        passes=cost[1],
        padding=cost[2],
        seconds_inference=seconds[0],
        seconds_total=seconds[1],
    )


def check_options(method: str, batch_size: int) -> None:
    """Raise InputError for options that make no sense; needs no model."""
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: give a positive number.")


def _argmax_per(values: list[float], lengths: list[int]) -> int:
    return int(np.argmax(np.array(values) / np.array(lengths, dtype=np.float64)))
