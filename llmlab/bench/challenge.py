"""The 2023 challenge's job as its rules define it: score the whole set, report accuracy and both timings.

Latency was the time to process the whole set. `challenge.md` left data pre-processing out; the round-two FAQ counted
everything: model load, tokenization, warm-up, scoring. Both are reported: seconds_inference and seconds_total.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import psutil
import torch

from llmlab.base.clock import seconds_of
from llmlab.base.errors import InputError
from llmlab.base.stats import Metric
from llmlab.bench.ablation import scoring_flops
from llmlab.data import ENDING_TOKENS, FULL_SET, QUESTION_TOKENS, Question, Spread
from llmlab.jobs.over_ranks import ranks
from llmlab.kernels.fast import default_dtype
from llmlab.model.layerwise import stream
from llmlab.model.lm import LM, check_device
from llmlab.model.load import load
from llmlab.scoring import shared
from llmlab.scoring.encode import Sequence, encode
from llmlab.scoring.score import ScoreResult, score
from llmlab.scoring.trie import question_tries
from llmlab.sharding.plan import plan


@dataclass(frozen=True)
class Submission:
    """One run of the challenge's job.

    Attributes:
        n: questions; the full set has 10,042.
        tokens_full: tokens of every question with every ending; tokens: nodes that were computed.
        flops: of those nodes; flops_per_second over the inference time.
        result: the scores behind it, None for random weights.
        seed: of random weights and synthetic tokens.
    """

    model: str
    layers: int
    n: int
    tokens_full: int
    tokens: int
    flops: int
    seconds_load: float
    seconds_inference: float
    seconds_total: float
    result: ScoreResult | None
    seed: int | None = None
    task: str = "challenge"

    @property
    def synthetic(self) -> bool:
        """Whether weights and tokens are random: such a run measures speed alone."""
        return self.result is None

    @property
    def data(self) -> str:
        """Fingerprint of the questions."""
        return self.result.data if self.result else "synthetic: published token statistics"

    @property
    def protocol(self) -> str:
        """How the numbers came about, in one line."""
        what = "random weights and synthetic tokens: speed only" if self.synthetic else "every question, every ending"
        return (
            f"{self.n:,} of {FULL_SET:,} questions, {what}; exact shared-prefix scoring, {self.tokens:,} tokens "
            f"computed for {self.tokens_full:,}; seconds_total holds load, tokenization, warm-up and scoring"
        )

    @property
    def settings(self) -> dict[str, str]:
        """How the questions were scored, and how many layers took part."""
        return (self.result.settings if self.result else {}) | {"layers": str(self.layers)}

    @property
    def memory_bytes(self) -> int | None:
        """What scoring held; None means the weights alone."""
        return self.result.memory_bytes if self.result else None

    def metrics(self) -> dict[str, Metric]:
        """The measurements with their units; accuracies with intervals, none for random weights."""
        scores = self.result.metrics() if self.result else {}
        accuracies = {name: metric for name, metric in scores.items() if name.startswith("acc")}
        return accuracies | {
            "seconds_inference": Metric(self.seconds_inference, "s"),
            "seconds_total": Metric(self.seconds_total, "s"),
            "seconds_load": Metric(self.seconds_load, "s"),
            "questions_per_second": Metric(self.n / self.seconds_inference, "1/s"),
            "flops": Metric(self.flops / self.seconds_inference, "FLOP/s"),
        }

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        scores = self.result.as_dict() if self.result else {}
        own = {name: value for name, value in vars(self).items() if name != "result"}
        values = {name: metric.value for name, metric in self.metrics().items()}
        return scores | own | {"synthetic": self.synthetic, "protocol": self.protocol} | values


def challenge(
    model: str,
    questions: list[Question] | None,
    *,
    limit: int = FULL_SET,
    dtype: str | None = None,
    device: str | None = None,
    layers: int | None = None,
    seed: int = 0,
    devices: int = 1,
) -> tuple[LM, Submission]:
    """Load a model and score the set.

    Args:
        model: as in `load`; "random:llama-30b" gives the speed part without weights, on synthetic tokens.
        questions: the set; ignored for random weights.
        limit: synthetic questions.
        dtype, device, layers: as in `load`.
        seed: of random weights and synthetic tokens.
        devices: score over so many ranks, in the layout with the least communication that fits them.

    Raises:
        InputError: real weights without questions, or what `load` and `score` refuse.
    """
    random_weights = model.startswith("random:")
    if not random_weights and not questions:
        raise InputError(f"there are no questions for {model}: give a data set, or random:SHAPE for speed alone.")
    if devices > 1 and random_weights:
        raise InputError("random weights run on one device: give a real model for --devices.")
    begin = time.perf_counter()
    if random_weights or not questions:
        lm = load(model, dtype=dtype, device=device, layers=layers, seed=seed)
        loaded = time.perf_counter()
        sequences = synthetic_sequences(limit, lm.card.vocab_size, seed=seed)
        inference = seconds_of(lambda: shared.log_probs(lm, sequences))
        total = time.perf_counter() - begin
        return lm, _submission(lm, sequences, None, (loaded - begin, inference, total), seed)
    if devices > 1:
        lm, result, loaded = _over_ranks(model, questions, devices, dtype, device)
    else:
        lm = load(model, dtype=dtype, device=device, layers=layers)
        loaded = time.perf_counter()
        result = score(lm, questions)
    result = replace(result, seconds_total=time.perf_counter() - begin)
    seconds = (loaded - begin, result.seconds_inference, result.seconds_total)
    return lm, _submission(lm, encode(lm, questions), result, seconds, None)


def _over_ranks(
    model: str, questions: list[Question], devices: int, dtype: str | None, device: str | None
) -> tuple[LM, ScoreResult, float]:
    """Everything but the layers of the model, the scores, and when the shards were loaded."""
    lm, _ = stream(model, dtype=dtype or default_dtype(check_device(device)))
    with ranks(devices, device=device) as group:
        on_gpu = group.group.device == "cuda"
        memory = torch.cuda.mem_get_info()[1] if on_gpu else psutil.virtual_memory().total // devices
        # On CPU the card counts 4 bytes a weight as two of 16 bits: half the memory stands for it.
        chosen = plan(lm.card, devices=devices, memory=memory // (2 if lm.dtype == "fp32" else 1)).best
        group.score(model, questions[:1], plan=chosen, dtype=lm.dtype)  # loads the shards
        loaded = time.perf_counter()
        return lm, group.score(model, questions, plan=chosen, dtype=lm.dtype), loaded


def _submission(
    lm: LM,
    sequences: list[Sequence],
    result: ScoreResult | None,
    seconds: tuple[float, float, float],
    seed: int | None,
) -> Submission:
    tries = question_tries(sequences)
    return Submission(
        model=lm.name,
        layers=lm.card.layers,
        n=len(tries),
        tokens_full=sum(len(sequence.ids) for sequence in sequences),
        tokens=sum(map(len, tries)),
        flops=scoring_flops(lm, tries, sum(trie.asked for trie in tries)),
        seconds_load=seconds[0],
        seconds_inference=seconds[1],
        seconds_total=seconds[2],
        result=result,
        seed=seed,
    )


def synthetic_sequences(n: int, vocab_size: int, *, seed: int = 0) -> list[Sequence]:
    """`n` questions with four endings whose lengths follow the published table; tokens are random.

    Lengths are normal with the table's mean and standard deviation, cut to its range. Endings of a question share no
    first token, so a trie saves nothing below the question: slightly pessimistic.
    """
    if n < 1:
        raise InputError(f"{n} synthetic questions: give a positive number.")
    rng = np.random.default_rng(seed)

    def lengths(table: Spread, size: tuple[int, ...]) -> npt.NDArray[np.int64]:
        low, high, mean, deviation = table
        return np.clip(np.rint(rng.normal(mean, deviation, size)), low, high).astype(int)

    contexts, endings = lengths(QUESTION_TOKENS, (n,)), lengths(ENDING_TOKENS, (n, 4))
    sequences = []
    for question in range(n):
        context = rng.integers(3, vocab_size, contexts[question]).tolist()
        for ending in range(4):
            ids = context + rng.integers(3, vocab_size, endings[question, ending]).tolist()
            sequences.append(Sequence(question, ending, ids, len(context)))
    return sequences
