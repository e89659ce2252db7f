"""The 2023 challenge's job as its rules define it: score the whole set, report accuracy and both timings.

Latency was the time to process the whole set. `challenge.md` left data pre-processing out; the round-two FAQ counted
everything: model load, tokenization, warm-up, scoring. Both are reported: seconds_inference and seconds_total.
"""

import time

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
from llmlab.measure.record import Measurement
from llmlab.model.layerwise import stream
from llmlab.model.lm import LM, check_device
from llmlab.model.load import load
from llmlab.scoring import shared
from llmlab.scoring.encode import Sequence, encode
from llmlab.scoring.score import ScoreResult, score
from llmlab.scoring.trie import question_tries
from llmlab.sharding.plan import plan


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
) -> tuple[LM, Measurement]:
    """Load a model and score the set; accuracies and both timings, or the timings alone for random weights.

    Args:
        model, dtype, device, layers: as in `load`; "random:llama-30b" is scored on `limit` synthetic questions.
        questions: the set; not needed for random weights.
        seed: of random weights and synthetic tokens.
        devices: score over so many ranks, in the layout with the least communication that fits them.

    Raises InputError for real weights without questions, and what `load` and `score` refuse.
    """
    random_weights = model.startswith("random:")
    if not random_weights and not questions:
        raise InputError(f"there are no questions for {model}: give a data set, or random:SHAPE for speed alone.")
    if devices > 1 and random_weights:
        raise InputError("random weights run on one device: give a real model for --devices.")
    begin, result = time.perf_counter(), None
    if random_weights or not questions:
        lm = load(model, dtype=dtype, device=device, layers=layers, seed=seed)
        loaded = time.perf_counter()
        sequences = synthetic_sequences(limit, lm.card.vocab_size, seed=seed)
        inference = seconds_of(lambda: shared.log_probs(lm, sequences))
    elif devices > 1:
        lm, result, loaded = _over_ranks(model, questions, devices, dtype, device)
    else:
        lm = load(model, dtype=dtype, device=device, layers=layers)
        loaded = time.perf_counter()
        result = score(lm, questions)
    total = time.perf_counter() - begin
    if result and questions:
        inference, sequences = result.seconds_inference, encode(lm, questions)
    return lm, _measurement(lm, sequences, result, (loaded - begin, inference, total), seed)


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


def _measurement(
    lm: LM, sequences: list[Sequence], result: ScoreResult | None, seconds: tuple[float, float, float], seed: int
) -> Measurement:
    """`seconds` of the load, of the inference, of everything; no `result` for random weights."""
    tries = question_tries(sequences)
    n, tokens, full = len(tries), sum(map(len, tries)), sum(len(sequence.ids) for sequence in sequences)
    flops = scoring_flops(lm, tries, sum(trie.asked for trie in tries))
    names = ("seconds_load", "seconds_inference", "seconds_total")
    values = (result.accuracies if result else {}) | {
        **{name: Metric(value, "s") for name, value in zip(names, seconds, strict=True)},
        "questions_per_second": Metric(n / seconds[1], "1/s"),
        "flops": Metric(flops / seconds[1], "FLOP/s"),
    }
    what = "every question, every ending" if result else "random weights and synthetic tokens: speed only"
    protocol = (
        f"{n:,} of {FULL_SET:,} questions, {what}; exact shared-prefix scoring, {tokens:,} tokens "
        f"computed for {full:,}; seconds_total holds load, tokenization, warm-up and scoring"
    )
    work = {"n": n, "tokens": tokens, "tokens_full": full, "layers": lm.card.layers, "synthetic": result is None}
    told = (result.as_dict() if result else {}) | {name: metric.value for name, metric in values.items()}
    told |= work | {"task": "challenge", "model": lm.name, "protocol": protocol}
    return Measurement(
        "challenge", values, n, protocol, result.data if result else "synthetic: published token statistics",
        (result.settings if result else {}) | {"layers": str(lm.card.layers)}, None if result else seed,
        result.memory_bytes if result else None, told,
    )  # fmt: skip


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
