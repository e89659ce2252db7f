"""One point of the trade-off grid: precision x method x sharding x draft, measured as one record of task "trade-off".

Quality is paired with the fp32 model on the same questions and windows of text; speed is the median of a few runs
behind a warm-up. Whoever reads the records divides by the row of `BASELINE` from the same machine.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llmlab.base.errors import InputError
from llmlab.base.stats import Z95, Metric, median_interval, proportion
from llmlab.bench.combination import Combination
from llmlab.data import Question, everyday, prompts
from llmlab.decoding.draft import Draft
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import check_settings, encode_prompts, generate
from llmlab.decoding.self_draft import SelfDraft
from llmlab.jobs.over_ranks import generate_part, ranks, score_part
from llmlab.jobs.own_draft import named_drafts
from llmlab.kernels.fast import packed_dtype
from llmlab.measure.energy import availability, joules_per_1000_tokens, measure_energy
from llmlab.measure.memory import peak_bytes
from llmlab.measure.record import Measurement
from llmlab.model.convert import with_dtype
from llmlab.model.lm import LM
from llmlab.model.load import load
from llmlab.quantization.grid import Scheme
from llmlab.quantization.rotate import rotated
from llmlab.quantization.walk import calibration_rows, quantize
from llmlab.scoring.encode import encode
from llmlab.scoring.perplexity import PerplexityResult, perplexity
from llmlab.scoring.score import ScoreResult, score
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.load import check_layout, load_shard
from llmlab.sharding.rank import Rank

CONTEXT = 512  # tokens of a perplexity window and of a calibration row, or what the model has


def material(limit: int) -> tuple[list[Question], list[str], str]:
    """What a point is measured on: the first built-in questions, the first prompt of each kind; and the calibration
    text, made of all other built-in items and prompts, so that nothing scored is calibrated on."""
    questions, writing = everyday(), prompts()
    kinds = {p.kind: p for p in reversed(writing)}  # the first of each kind
    first = [p for p in writing if kinds[p.kind] is p]
    rest = [p.text for p in writing if kinds[p.kind] is not p] + [_text(q) for q in questions[limit:]]
    return questions[:limit], [p.text for p in first], "\n\n".join(rest)


def measure_point(
    name: str,
    combination: Combination,
    questions: list[Question],
    prompts: list[str],
    *,
    calibration: str,
    rows: int = 12,
    windows: int = 8,
    new_tokens: int = 48,
    timed: int = 12,
    repeats: int = 3,
    device: str | None = None,
) -> tuple[LM, Measurement]:
    """Measure one combination.

    Args:
        name: of a model in floating point, as for `llmlab.load`.
        combination: what is measured.
        questions: are scored for the accuracy; the contexts with their right endings are the perplexity's text.
        prompts: are continued greedily, one at a time, in the model's chat template where there is one.
        calibration: text for GPTQ; keep the questions out of it.
        rows: of 512 tokens, at most, taken from it.
        windows: of 512 tokens, at most, for the perplexity.
        new_tokens: at most so many a prompt.
        timed: the first so many questions are scored again for the speed.
        repeats: counted runs of scoring and of decoding.
        device: as for `llmlab.load`.

    Returns:
        The model that was measured, whole on one device, and the measurement: `acc_norm`, `answers_kept` (share of the
        fp32 model's choices), `perplexity`, `perplexity_ratio` (to fp32, paired by window), `questions_per_second`,
        `decode_tokens_per_second`, `bytes` (of the weights, drafts and replicas included), `peak_bytes` (of working
        memory above them, where the system tells) and `joules_per_1000_tokens` (decoding, where it can be measured).

    Raises:
        InputError: a combination that makes no sense or does not fit, before anything is measured.
    """
    combination.check()
    check_settings(prompts, new_tokens, 0.0, 1.0, 1)
    if min(timed, repeats, rows, windows) < 1 or not questions:
        raise InputError("a point needs at least one question, one timed question, one repeat, one window and one row.")
    cuts = combination.cuts
    if cuts.ranks > 1:
        check_layout(name, cuts, cuts.ranks)

    def check(lm: LM) -> None:
        encode_prompts(lm, prompts, max_new_tokens=new_tokens, chat=_chat(lm))
        encode(lm, questions)
        calibration_rows(lm, calibration, rows=rows, context=CONTEXT)

    exact = load(name, dtype="fp32", device=device, check=check)
    lm = transformed(exact, combination, calibration, rows)
    quality = _Quality(exact, lm, combination, questions, windows)
    with _running(lm, combination, prompts, new_tokens) as run:
        peak = run.peak(questions[:timed])  # the warm-up, too
        scored = run.score(questions)
        scoring, decoding = [], []
        for _ in range(repeats):
            scoring.append(run.score(questions[:timed]).seconds_inference)
            tokens, seconds = run.decode()
            decoding.append(seconds / max(1, tokens))
        measurable, counters = availability(lm.device)
        joules = joules_per_1000_tokens(measure_energy(run.decode, lm.device), tokens) if measurable else None
    values = {
        "acc_norm": scored.acc_norm,
        "answers_kept": quality.kept(scored),
        **quality.perplexities,
        "questions_per_second": _rate(scoring, min(timed, len(questions)), "1/s"),
        "decode_tokens_per_second": _rate(decoding, 1, "token/s"),
        "bytes": Metric(run.bytes, "B"),
    }
    if peak is not None:
        values["peak_bytes"] = Metric(peak, "B")
    if joules:
        values["joules_per_1000_tokens"] = joules
    protocol = (
        f"{combination.encoded}; {scored.protocol}; speed: {repeats} runs behind a warm-up, {timed} questions, "
        f"{len(prompts)} prompts x {new_tokens} tokens, greedy, batch size 1; perplexity: {quality.protocol}, on one "
        f"device; calibration: {rows} rows of other text; "
        f"energy: {'decoding, ' + counters if joules else 'not measured here, ' + counters}"
    )
    return lm, Measurement("trade-off", values, len(questions), protocol, scored.data)


def transformed(exact: LM, combination: Combination, calibration: str, rows: int) -> LM:
    """The fp32 model as the combination wants it: the same, bf16, or quantized with the activations fast here."""
    method = combination.method
    if method in ("int8", "nf4"):
        return load(exact.name, dtype=packed_dtype(exact.device), device=exact.device, bitsandbytes=method)
    if method == "none":
        return exact if combination.precision == "fp32" else with_dtype(exact, "bf16")
    bits = combination.bits
    # As notebook 03 and the benchmark do it: whole rows are fine enough for 8 bits, and plain rounding means no search.
    scheme = Scheme(8, -1, symmetric=True) if bits == 8 else Scheme(bits, 64, search=method != "rtn")
    text = None if method == "rtn" else calibration_rows(exact, calibration, rows=rows, context=CONTEXT)
    base = rotated(exact) if method == "rotated gptq" else exact
    return with_dtype(quantize(base, method=method.split()[-1], scheme=scheme, calibration=text))


class _Quality:
    """What is compared with the fp32 model. In fp32 there is nothing to compare: drafts and sharding are exact."""

    def __init__(self, exact: LM, lm: LM, combination: Combination, questions: list[Question], windows: int) -> None:
        text = "\n\n".join(map(_text, questions))
        context = min(CONTEXT, exact.card.context_length)
        mine = perplexity(lm, text, context=context, max_windows=windows)
        self.protocol = mine.protocol
        self.choices: list[int] | None = None
        ratio = Metric(1.0, "x")
        if combination.precision != "fp32":
            self.choices = score(exact, questions).predictions_norm
            ratio = perplexity_ratio(mine, perplexity(exact, text, context=context, max_windows=windows))
        self.perplexities = {"perplexity": mine.perplexity, "perplexity_ratio": ratio}

    def kept(self, scored: ScoreResult) -> Metric:
        """Share of questions answered (by acc_norm) as the fp32 model answers them."""
        if self.choices is None:
            return Metric(1.0)
        return proportion([a == b for a, b in zip(self.choices, scored.predictions_norm, strict=True)])


def perplexity_ratio(mine: PerplexityResult, exact: PerplexityResult) -> Metric:
    """Perplexity over another model's on the same windows, with a 95 % interval from their paired differences."""
    lost = np.subtract(mine.window_nll, exact.window_nll)  # nats a token
    ratio = math.exp(mine.nll - exact.nll)
    if len(lost) < 2:
        return Metric(ratio, "x")
    half = Z95 * float(np.std(lost, ddof=1)) / math.sqrt(len(lost))
    return Metric(ratio, "x", ratio * math.exp(-half), ratio * math.exp(half))


@dataclass(frozen=True)
class _Runs:
    """The same jobs on one device or over ranks: scores; (decoded tokens, seconds); peak of both; bytes of weights."""

    score: Callable[[list[Question]], ScoreResult]
    decode: Callable[[], tuple[int, float]]
    peak: Callable[[list[Question]], int | None]
    bytes: int


@contextmanager
def _running(lm: LM, combination: Combination, prompts: list[str], new_tokens: int) -> Iterator[_Runs]:
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "chat": _chat(lm)}
    cuts = combination.cuts
    if cuts.ranks == 1:
        drafts: list[Draft | LM] = [*named_drafts(lm, combination.draft)] if combination.draft else []
        engine = Engine(lm)

        def decode() -> tuple[int, float]:
            made = generate(lm, prompts, draft=drafts or None, engine=engine, **options)
            return made.decoded_tokens, made.seconds_decode

        def peak(some: list[Question]) -> int | None:
            return _fresh_peak(lambda: (score(lm, some), decode()), lm.device)

        copies = [draft.lm for draft in drafts if isinstance(draft, SelfDraft)]
        yield _Runs(lambda some: score(lm, some), decode, peak, sum(one.weight_bytes for one in [lm, *copies]))
        return
    with tempfile.TemporaryDirectory() as folder, ranks(cuts.ranks, device=lm.device.type) as group:
        name = lm.name
        if combination.method != "none":
            name = str(lm.save(Path(folder) / "quantized"))

        def decode_over_ranks() -> tuple[int, float]:
            parts = [part[1] for part in group.run(generate_part, name, prompts, cuts, lm.dtype, options) if part]
            return sum(p.decoded_tokens for p in parts), max(p.seconds_decode for p in parts)

        def peak_over_ranks(some: list[Question]) -> int | None:
            peaks = group.run(_part_peak, name, some, prompts, cuts, lm.dtype, options)
            return None if None in peaks else sum(peaks)

        def score_over_ranks(some: list[Question]) -> ScoreResult:
            return group.score(name, some, plan=cuts, dtype=lm.dtype)

        held = sum(group.run(_part_bytes, name, cuts, lm.dtype))
        yield _Runs(score_over_ranks, decode_over_ranks, peak_over_ranks, held)


def _part_bytes(rank: Rank, name: str, cuts: Cuts, dtype: str) -> int:
    return load_shard(rank, name, cuts, dtype).weight_bytes


def _part_peak(
    rank: Rank, name: str, some: list[Question], prompts: list[str], cuts: Cuts, dtype: str, options: dict[str, Any]
) -> int | None:
    def run() -> None:
        score_part(rank, name, some, cuts, dtype, "micro-batches", None)
        generate_part(rank, name, prompts, cuts, dtype, options)

    return _fresh_peak(run, rank.device)


def _fresh_peak(run: Callable[[], object], device: torch.device) -> int | None:
    """`peak_bytes` once glibc has given back what earlier work freed: reused, it would not count."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        gc.collect()
        libc.malloc_trim(0)
    return peak_bytes(run, device)


def _rate(seconds: list[float], units: int, unit: str) -> Metric:
    """Units over the median of the seconds, with the interval of that median."""
    middle, low, high = median_interval(seconds)
    return Metric(units / middle, unit, units / high, units / low)


def _text(question: Question) -> str:
    return f"{question.context} {question.endings[question.label]}"


def _chat(lm: LM) -> bool:
    return bool(getattr(lm.tokenizer, "chat_template", None))
