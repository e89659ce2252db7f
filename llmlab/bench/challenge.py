"""The 2023 challenge's job as its rules define it: score the whole set, report accuracy and both timings.

Latency was the time to process the whole set. `challenge.md` left data pre-processing out; the round-two FAQ counted
everything: model load, tokenization, warm-up, scoring. Both are reported: seconds_inference and seconds_total.
"""

import time
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import torch

from llmlab.base.clock import seconds_of
from llmlab.base.errors import InputError
from llmlab.base.stats import Metric
from llmlab.bench.ablation import scoring_flops
from llmlab.data import ENDING_TOKENS, FULL_SET, QUESTION_TOKENS, Question, Spread
from llmlab.jobs.over_ranks import SCHEDULES, gather_scores, how_scored, ranks, timeline
from llmlab.jobs.rank_parts import Asked, encoded
from llmlab.kernels.cuda import nvidia
from llmlab.kernels.packed_linear import quant_linears
from llmlab.measure.record import Measurement
from llmlab.model.lm import LM, check_dtype
from llmlab.model.load import load, model_card
from llmlab.scoring import shared
from llmlab.scoring.encode import Sequence
from llmlab.scoring.score import ScoreResult, score
from llmlab.scoring.trie import question_tries
from llmlab.sharding.load import outline
from llmlab.sharding.plan import Plan, plan


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
        devices: score over so many ranks, in the layout with the least communication that fits them; random weights,
            too, which each rank makes for its part.

    Raises InputError for real weights without questions, and what `load` and `score` refuse.
    """
    if not (synthetic := model.startswith("random:")) and not questions:
        raise InputError(f"there are no questions for {model}: give a data set, or random:SHAPE for speed alone.")
    begin = time.perf_counter()
    asked: Asked = questions or []
    if synthetic:
        asked = synthetic_sequences(limit, model_card(model).vocab_size, seed=seed)
    if devices > 1:
        run = _over_ranks(model, asked, devices, dtype, device, layers)
    else:
        run = _alone(load(model, dtype=dtype, device=device, layers=layers, seed=seed), asked)
    total = time.perf_counter() - begin
    return run.lm, _measurement(run, encoded(run.lm, asked), (run.loaded - begin, run.inference, total), seed)


class _Run(NamedTuple):
    """What was run and what came of it."""

    lm: LM
    result: ScoreResult | None  # None for synthetic tokens
    settings: dict[str, str]
    loaded: float  # when the model was, by time.perf_counter()
    inference: float  # seconds
    bubble: float | None = None  # share of the ranks' time in which they waited


def _alone(lm: LM, asked: Asked) -> _Run:
    """On one device."""
    loaded = time.perf_counter()
    if questions := [item for item in asked if isinstance(item, Question)]:
        result = score(lm, questions)
        return _Run(lm, result, result.settings, loaded, result.seconds_inference)
    return _Run(lm, None, {}, loaded, seconds_of(lambda: shared.log_probs(lm, encoded(lm, asked))))


def _over_ranks(
    model: str, asked: Asked, devices: int, dtype: str | None, device: str | None, layers: int | None
) -> _Run:
    """In the layout with the least communication that fits; of the model that is returned only the ends are read."""
    model_card(model)  # refuses a name that means nothing before ranks start
    with ranks(devices, device=device) as group:
        where = torch.device(group.device)
        lm = outline(model, check_dtype(dtype, where), where, layers)
        cuts = group.cuts(plan_here(lm, devices).best, 0, 1, 1)
        parts = partial(group.score_parts, model, cuts=cuts, dtype=lm.dtype, layers=layers)
        parts(asked[: 4 * devices])  # loads the shards, and every rank meets those that it works with
        loaded = time.perf_counter()
        scored = parts(asked)
        seconds = time.perf_counter() - loaded
    questions = [item for item in asked if isinstance(item, Question)]
    result = gather_scores(questions, scored, cuts, SCHEDULES[0], seconds) if questions else None
    inference, waited = max(part.seconds for part in scored), timeline(scored).bubble
    return _Run(lm, result, how_scored(scored, cuts, SCHEDULES[0]), loaded, inference, waited)


def plan_here(lm: LM, devices: int) -> Plan:
    """What fits the memory of the smallest of these GPUs, or a share of this machine's."""
    if lm.device.type == "cuda":
        memory = min(card.memory for card in nvidia().cards[:devices])
    else:
        memory = psutil.virtual_memory().total // devices
        # The card counts 4 bytes a weight as two of 16 bits: half the memory stands for it.
        memory //= 2 if lm.dtype == "fp32" else 1
    packed = quant_linears(lm.model)
    return plan(lm.card, devices=devices, memory=memory, bits=packed[0].bits if packed else 16)


def _measurement(run: _Run, sequences: list[Sequence], seconds: tuple[float, float, float], seed: int) -> Measurement:
    """`seconds` of the load, of the inference, of everything."""
    lm, result, tries = run.lm, run.result, question_tries(sequences)
    n, tokens, full = len(tries), sum(map(len, tries)), sum(len(sequence.ids) for sequence in sequences)
    flops = scoring_flops(lm, tries, sum(trie.asked for trie in tries))
    names = ("seconds_load", "seconds_inference", "seconds_total")
    values = (result.accuracies if result else {}) | {
        **{name: Metric(value, "s") for name, value in zip(names, seconds, strict=True)},
        "questions_per_second": Metric(n / seconds[1], "1/s"),
        "flops": Metric(flops / seconds[1], "FLOP/s"),
    }
    values |= {} if run.bubble is None else {"bubble": Metric(run.bubble)}
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
        run.settings | {"layers": str(lm.card.layers)}, None if result else seed,
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
