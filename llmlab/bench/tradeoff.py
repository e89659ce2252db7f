"""One point of the trade-off grid: precision x method x sharding x draft, measured as one record of task "trade-off".

Quality is paired with the fp32 model on the same questions and windows of text; speed is the median of a few runs
behind a warm-up. Whoever reads the records divides by the row of `BASELINE` from the same machine.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llmlab.base.errors import InputError
from llmlab.base.stats import Z95, Metric, median_interval, proportion
from llmlab.bench.combination import Combination
from llmlab.data import Question, everyday, prompts
from llmlab.decoding.draft import Draft
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import check_settings, encode_prompts, generate
from llmlab.decoding.result import GenerateResult
from llmlab.decoding.self_draft import SelfDraft
from llmlab.jobs.over_ranks import ranks
from llmlab.jobs.own_draft import named_drafts
from llmlab.jobs.rank_parts import Job, Options, generate_part, score_part
from llmlab.kernels.fast import packed_dtype
from llmlab.measure.energy import availability, joules_per_1000_tokens, measure_energy
from llmlab.measure.memory import peak_bytes
from llmlab.measure.record import Measurement
from llmlab.model.convert import with_dtype
from llmlab.model.lm import LM
from llmlab.model.load import load
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.grid import Scheme
from llmlab.quantization.rotate import rotated
from llmlab.quantization.walk import quantize
from llmlab.scoring.encode import encode
from llmlab.scoring.perplexity import PerplexityResult, perplexity
from llmlab.scoring.score import ScoreResult, score
from llmlab.sharding.load import check_layout
from llmlab.sharding.rank import Rank

CONTEXT = 512  # tokens of a perplexity window and of a calibration row, or what the model has


class Material(NamedTuple):
    """What a point is measured on.

    Attributes:
        questions: are scored for the accuracy; the contexts with their right endings are the perplexity's text.
        prompts: are continued greedily, one at a time, in the model's chat template where there is one.
        calibration: text for GPTQ; keep the questions out of it.
    """

    questions: list[Question]
    prompts: list[str]
    calibration: str


@dataclass(frozen=True)
class Effort:
    """How much of the material a point takes.

    Attributes:
        rows: of 512 tokens, at most, of the calibration text.
        windows: of 512 tokens, at most, for the perplexity.
        new_tokens: at most so many a prompt.
        timed: the first so many questions are scored again for the speed.
        repeats: counted runs of scoring and of decoding.
    """

    rows: int = 12
    windows: int = 8
    new_tokens: int = 48
    timed: int = 12
    repeats: int = 3

    def check(self, given: Material) -> None:
        """Raise InputError if there is nothing to measure."""
        check_settings(given.prompts, self.new_tokens, 0.0, 1.0, 1)
        if min(self.timed, self.repeats, self.rows, self.windows, len(given.questions)) < 1:
            raise InputError("a point needs at least one question, one timed question, one repeat, window and row.")


def material(limit: int) -> Material:
    """The first built-in questions, the first prompt of each kind; and as calibration text all other built-in items and
    prompts, so that nothing scored is calibrated on."""
    questions, writing = everyday(), prompts()
    kinds = {p.kind: p for p in reversed(writing)}  # the first of each kind
    first = [p.text for p in writing if kinds[p.kind] is p]
    rest = [p.text for p in writing if kinds[p.kind] is not p] + [_text(q) for q in questions[limit:]]
    return Material(questions[:limit], first, "\n\n".join(rest))


def measure_point(
    name: str, combination: Combination, given: Material, effort: Effort | None = None, *, device: str | None = None
) -> tuple[LM, Measurement]:
    """Measure one combination.

    Args:
        name: of a model in floating point, as for `llmlab.load`.
        combination: what is measured.
        given: the questions, the prompts and the calibration text.
        effort: how much of them; by default what the grid takes.
        device: as for `llmlab.load`.

    Returns:
        The model that was measured, whole on one device, and the measurement: `acc_norm`, `answers_kept` (share of the
        fp32 model's choices), `perplexity`, `perplexity_ratio` (to fp32, paired by window), `questions_per_second`,
        `decode_tokens_per_second`, `bytes` (of the weights, drafts and replicas included), `peak_bytes` (of working
        memory above them, where the system tells) and `joules_per_1000_tokens` (decoding, where it can be measured).

    Raises:
        InputError: a combination that makes no sense or does not fit, before anything is measured.
    """
    effort = effort or Effort()
    combination.check()
    effort.check(given)
    if combination.cuts.ranks > 1:
        check_layout(name, combination.cuts, combination.cuts.ranks)

    def check(lm: LM) -> None:
        encode_prompts(lm, given.prompts, max_new_tokens=effort.new_tokens, chat=lm.has_chat_template)
        encode(lm, given.questions)
        calibration_rows(lm, given.calibration, rows=effort.rows, context=CONTEXT)

    exact = load(name, dtype="fp32", device=device, check=check)
    lm = transformed(exact, combination, given.calibration, effort.rows)
    timed = given.questions[: effort.timed]
    with _running(lm, combination, given.prompts, effort.new_tokens) as jobs:
        peak = jobs.peak(timed)  # the warm-up, too
        scored = jobs.score(given.questions)
        speeds, written = _speeds(jobs, timed, effort.repeats)
        joules, energy = _energy(jobs, _tokens(written), lm.device)
    quality, perplexities = _quality(exact, lm, scored, given.questions, effort.windows)
    values = quality | speeds | {"bytes": Metric(jobs.bytes, "B")}
    values |= {"peak_bytes": Metric(peak, "B")} if peak is not None else {}
    values |= {"joules_per_1000_tokens": joules} if joules else {}
    protocol = (
        f"{combination.name}; {scored.protocol}; speed: {effort.repeats} runs behind a warm-up, {effort.timed} "
        f"questions, {len(given.prompts)} prompts x {effort.new_tokens} tokens, greedy, batch size 1; perplexity: "
        f"{perplexities}, on one device; calibration: {effort.rows} rows of other text; energy: {energy}"
    )
    counts = {"calibration_rows": effort.rows, "windows": effort.windows, "max_new_tokens": effort.new_tokens}
    settings = combination.settings | {name: str(count) for name, count in counts.items()}
    memory = [part.memory_bytes for part in written if part.memory_bytes is not None]
    memory_bytes = sum(memory) if len(memory) == len(written) else None
    return lm, Measurement("trade-off", values, scored.n, protocol, scored.data, settings, memory_bytes=memory_bytes)


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


def _quality(
    exact: LM, lm: LM, scored: ScoreResult, questions: list[Question], windows: int
) -> tuple[dict[str, Metric], str]:
    """What is compared with the fp32 model, and the protocol of the perplexities.

    A model in fp32 is that model: drafts and sharding are exact, so there is nothing to compare.
    """
    text = "\n\n".join(map(_text, questions))
    context = min(CONTEXT, exact.card.context_length)
    result = perplexity(lm, text, context=context, max_windows=windows)
    kept, ratio = Metric(1.0), Metric(1.0, "x")
    if lm is not exact:
        choices = score(exact, questions).predictions_norm
        kept = proportion([a == b for a, b in zip(choices, scored.predictions_norm, strict=True)])
        ratio = perplexity_ratio(result, perplexity(exact, text, context=context, max_windows=windows))
    quality = {"acc_norm": scored.acc_norm, "answers_kept": kept}
    return quality | {"perplexity": result.perplexity, "perplexity_ratio": ratio}, result.protocol


def perplexity_ratio(result: PerplexityResult, exact: PerplexityResult) -> Metric:
    """Perplexity over another model's on the same windows, with a 95 % interval from their paired differences."""
    lost = np.subtract(result.window_nll, exact.window_nll)  # nats a token
    ratio = math.exp(result.nll - exact.nll)
    if len(lost) < 2:
        return Metric(ratio, "x")
    half = Z95 * float(np.std(lost, ddof=1)) / math.sqrt(len(lost))
    return Metric(ratio, "x", ratio * math.exp(-half), ratio * math.exp(half))


@dataclass(frozen=True)
class _Jobs:
    """The same jobs on one device or over ranks."""

    score: Callable[[list[Question]], ScoreResult]
    decode: Callable[[], list[GenerateResult]]  # one result a replica
    peak: Callable[[list[Question]], int | None]  # bytes that both need beyond what was there before
    bytes: int  # of the weights


@contextmanager
def _running(lm: LM, combination: Combination, prompts: list[str], new_tokens: int) -> Iterator[_Jobs]:
    cuts, chat = combination.cuts, lm.has_chat_template
    if cuts.ranks == 1:
        drafts: list[Draft | LM] = [*named_drafts(lm, combination.draft)] if combination.draft else []
        engine = Engine(lm)

        def decode() -> list[GenerateResult]:
            return [generate(lm, prompts, max_new_tokens=new_tokens, chat=chat, draft=drafts or None, engine=engine)]

        def peak(some: list[Question]) -> int | None:
            return peak_bytes(lambda: (score(lm, some), decode()), lm.device)

        copies = [draft.lm for draft in drafts if isinstance(draft, SelfDraft)]
        yield _Jobs(lambda some: score(lm, some), decode, peak, sum(model.weight_bytes for model in [lm, *copies]))
        return
    with tempfile.TemporaryDirectory() as folder, ranks(cuts.ranks, device=lm.device.type) as group:
        name = lm.name if combination.method == "none" else str(lm.save(Path(folder) / "quantized"))
        job = Job(name, cuts, lm.dtype)
        options: Options = {"max_new_tokens": new_tokens, "chat": chat}

        def decode_over_ranks() -> list[GenerateResult]:
            return [part[1] for part in group.run(generate_part, job, prompts, options) if part]

        def peak_over_ranks(some: list[Question]) -> int | None:
            peaks = [peak for peak in group.run(_part_peak, job, some, prompts, options) if peak is not None]
            return sum(peaks) if len(peaks) == group.size else None

        def score_over_ranks(some: list[Question]) -> ScoreResult:
            return group.score(name, some, plan=cuts, dtype=lm.dtype)

        weights = sum(group.run(_part_bytes, job))
        yield _Jobs(score_over_ranks, decode_over_ranks, peak_over_ranks, weights)


def _speeds(jobs: _Jobs, questions: list[Question], repeats: int) -> tuple[dict[str, Metric], list[GenerateResult]]:
    """Medians of both speeds over the repeats, and what the last one wrote."""
    scoring, decoding, written = [], [], []
    for _ in range(repeats):
        scoring.append(jobs.score(questions).seconds_inference)
        written = jobs.decode()
        decoding.append(max(part.seconds_decode for part in written) / max(1, _tokens(written)))
    scored, wrote = _rate(scoring, len(questions), "1/s"), _rate(decoding, 1, "token/s")
    return {"questions_per_second": scored, "decode_tokens_per_second": wrote}, written


def _energy(jobs: _Jobs, tokens: int, device: torch.device) -> tuple[Metric | None, str]:
    """Joules of decoding 1,000 tokens and the counters that told them; or None and why they are not known."""
    measurable, counters = availability(device)
    joules = joules_per_1000_tokens(measure_energy(jobs.decode, device), tokens) if measurable else None
    return joules, f"{'decoding' if joules else 'not measured here'}, {counters}"


def _tokens(parts: list[GenerateResult]) -> int:
    return sum(part.decoded_tokens for part in parts)


def _part_bytes(rank: Rank, job: Job) -> int:
    return job.load(rank).weight_bytes


def _part_peak(rank: Rank, job: Job, some: list[Question], prompts: list[str], options: Options) -> int | None:
    def run() -> None:
        score_part(rank, job, some)
        generate_part(rank, job, prompts, options)

    return peak_bytes(run, rank.device)


def _rate(seconds: list[float], units: int, unit: str) -> Metric:
    """Units over the median of the seconds, with the interval of that median."""
    middle, low, high = median_interval(seconds)
    return Metric(units / middle, unit, units / high, units / low)


def _text(question: Question) -> str:
    return f"{question.context} {question.endings[question.label]}"
