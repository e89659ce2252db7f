"""One point of the trade-off grid: precision x method x sharding x draft, measured as one record of task "trade-off".

Quality is paired with the fp32 model on the same questions and windows of text, and so is speed: runs of the point and
of plain fp32 take turns, behind a warm-up, since a machine's pace may change by a third between one point and the next.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from llmlab.base.clock import paired_speedup
from llmlab.base.errors import InputError
from llmlab.base.stats import Z95, Metric, median_interval, proportion
from llmlab.bench.combination import BASELINE, Combination
from llmlab.bench.quantization import BEST
from llmlab.data import Question, everyday, prompts
from llmlab.decoding.draft import Draft
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import check_settings, encode_prompts, generate
from llmlab.decoding.plain_engine import engine_for
from llmlab.decoding.result import GenerateResult
from llmlab.decoding.self_draft import SelfDraft
from llmlab.jobs.over_ranks import ranks
from llmlab.jobs.own_draft import free_drafts, self_4bit
from llmlab.jobs.rank_parts import Options, generate_part
from llmlab.kernels.fast import half_dtype, packed_dtype
from llmlab.measure.energy import availability, joules_per_1000_tokens, measure_energy
from llmlab.measure.memory import peak_bytes
from llmlab.measure.record import Measurement
from llmlab.model.convert import with_dtype
from llmlab.model.lm import LM, check_device
from llmlab.model.load import load
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.grid import Scheme
from llmlab.quantization.rotate import rotated
from llmlab.quantization.walk import quantize
from llmlab.scoring.encode import encode
from llmlab.scoring.perplexity import PerplexityResult, perplexity
from llmlab.scoring.score import ScoreResult, score
from llmlab.sharding.load import check_layout

CONTEXT = 512  # tokens of a perplexity window and of a calibration row, or what the model has


# Scores questions; continues the prompts, one result a replica; and bytes of the weights.
_Jobs = tuple[Callable[[list[Question]], ScoreResult], Callable[[], list[GenerateResult]], int]


class _Run(NamedTuple):
    scoring: float  # seconds
    decoding: float  # seconds a token
    tokens: int
    written: list[GenerateResult]


class Material(NamedTuple):
    """What a point is measured on."""

    questions: list[Question]  # scored; the contexts with their right endings are the perplexity's text
    prompts: list[str]  # continued greedily, one at a time, in the model's chat template where there is one
    calibration: str  # text for GPTQ; keep the questions out of it


@dataclass(frozen=True)
class Effort:
    """How much of the material a point takes."""

    rows: int = 12  # of 512 tokens, at most, of the calibration text
    windows: int = 8  # of 512 tokens, at most, for the perplexity
    new_tokens: int = 48  # at most so many a prompt
    timed: int = 12  # the first so many questions are scored again for the speed
    repeats: int = 3  # counted runs of scoring and of decoding


def material(limit: int) -> Material:
    """The first built-in questions, the first prompt of each kind; and as calibration text all other built-in items and
    prompts, so that nothing scored is calibrated on."""
    questions, writing = everyday(), prompts()
    first = [p for k, p in enumerate(writing) if p.kind not in {other.kind for other in writing[:k]}]
    rest = [p.text for p in writing if p not in first] + [_text(q) for q in questions[limit:]]
    return Material(questions[:limit], [p.text for p in first], "\n\n".join(rest))


def measure_point(
    name: str, combination: Combination, given: Material, effort: Effort | None = None, *, device: str | None = None
) -> tuple[LM, Measurement]:
    """Measure one combination on a model in floating point, `name` and `device` as for `llmlab.load`.

    Returns:
        The model that was measured, whole on one device, and the measurement: `acc_norm`, `answers_kept` (share of the
        fp32 model's choices), `perplexity`, `perplexity_ratio` (to fp32, paired by window), `questions_per_second`,
        `decode_tokens_per_second`, `scoring_speedup`, `decode_speedup` (over plain fp32, paired by run), `bytes` (of
        the weights, drafts and replicas included), `peak_bytes` (of working memory above them, on one device and where
        the system tells) and `joules_per_1000_tokens` (decoding, where it can be measured).

    Raises InputError for a combination that makes no sense or does not fit, before anything is measured.
    """
    effort = effort or Effort()
    combination.check()
    check_precision(combination, check_device(device))
    check_settings(given.prompts, effort.new_tokens, 1)
    if min(effort.timed, effort.repeats, effort.rows, effort.windows, len(given.questions)) < 1:
        raise InputError("a point needs at least one question, one timed question, one repeat, window and row.")
    if combination.cuts.ranks > 1:
        check_layout(name, combination.cuts, combination.cuts.ranks)

    def check(lm: LM) -> None:
        encode_prompts(lm, given.prompts, max_new_tokens=effort.new_tokens, chat=lm.has_chat_template)
        encode(lm, given.questions)
        calibration_rows(lm, given.calibration, rows=effort.rows, context=CONTEXT)

    exact = load(name, dtype="fp32", device=device, check=check)
    lm = transformed(exact, combination, given.calibration, effort.rows)
    timed, measurable = given.questions[: effort.timed], availability(lm.device)[0]
    with (
        _running(exact, BASELINE, given.prompts, effort.new_tokens) as (ask_plain, write_plain, _),
        _running(lm, combination, given.prompts, effort.new_tokens) as (ask, write, weights),
    ):
        peak = peak_bytes(lambda: (ask(timed), write()), lm.device)  # the warm-up, too
        scored = ask(given.questions)
        runs, beside = list[_Run](), list[_Run]()
        if combination != BASELINE:
            _run(ask_plain, write_plain, timed)
        for _ in range(effort.repeats):
            beside += [_run(ask_plain, write_plain, timed)] if combination != BASELINE else []
            runs.append(_run(ask, write, timed))
        energy = measure_energy(write, lm.device, ranks=combination.cuts.ranks) if measurable else None
        joules = joules_per_1000_tokens(energy, runs[-1].tokens) if energy else None
    values, perplexities = _quality(exact, lm, scored, given.questions, effort.windows)
    values["questions_per_second"] = _rate([run.scoring for run in runs], len(timed), "1/s")
    values["decode_tokens_per_second"] = _rate([run.decoding for run in runs], 1, "token/s")
    plain = beside or runs
    values["scoring_speedup"] = paired_speedup([run.scoring for run in plain], [run.scoring for run in runs])
    values["decode_speedup"] = paired_speedup([run.decoding for run in plain], [run.decoding for run in runs])
    values["bytes"] = Metric(scored.memory_bytes or weights, "B")
    values |= {"joules_per_1000_tokens": joules} if joules else {}
    if peak is not None and combination.cuts.ranks == 1:  # ranks have memory of their own
        values["peak_bytes"] = Metric(peak, "B")
    protocol = (
        f"{combination.name}; {scored.protocol}; speed: {effort.repeats} runs behind a warm-up, {effort.timed} "
        f"questions, {len(given.prompts)} prompts x {effort.new_tokens} tokens, greedy, batch size 1, in turn with "
        f"plain fp32; perplexity: {perplexities}, on one device; calibration: {effort.rows} rows of other text"
    )
    settings = asdict(combination) | {"calibration_rows": str(effort.rows)}
    settings |= {"windows": str(effort.windows), "max_new_tokens": str(effort.new_tokens)}
    memory = [part.memory_bytes for part in runs[-1].written if part.memory_bytes is not None]
    memory_bytes = sum(memory) if len(memory) == len(runs[-1].written) else None
    return lm, Measurement("trade-off", values, scored.n, protocol, scored.data, settings, memory_bytes=memory_bytes)


def check_precision(combination: Combination, device: torch.device) -> None:
    """Raise InputError for bf16 on a GPU that emulates it, several times slower than fp16."""
    if combination.precision == "bf16" and device.type == "cuda" and half_dtype(device) != "bf16":
        raise InputError(f"this GPU computes bf16 by emulation: measure precision {half_dtype(device)} here.")


def transformed(exact: LM, combination: Combination, calibration: str, rows: int) -> LM:
    """The fp32 model as the combination wants it: the same, halved, or quantized with the activations fast here."""
    method = combination.method
    if method in ("int8", "nf4"):
        return load(exact.name, dtype=packed_dtype(exact.device), device=exact.device, bitsandbytes=method)
    if method == "none":
        return exact if combination.precision == "fp32" else with_dtype(exact, combination.precision)
    bits = int(combination.precision.split()[0])
    # As notebook 03 and the benchmark do it: whole rows are fine enough for 8 bits, and plain rounding means no search.
    scheme = Scheme(8, -1, symmetric=True) if bits == 8 else Scheme(bits, 64, search=method != "rtn")
    scheme = replace(BEST, bits=bits) if method == "rotated qronos" else scheme
    text = None if method == "rtn" else calibration_rows(exact, calibration, rows=rows, context=CONTEXT)
    base = rotated(exact) if method.startswith("rotated") else exact
    return with_dtype(quantize(base, method="rtn" if method == "rtn" else "gptq", scheme=scheme, calibration=text))


def _quality(
    exact: LM, lm: LM, scored: ScoreResult, questions: list[Question], windows: int
) -> tuple[dict[str, Metric], str]:
    """What is compared with the fp32 model, and the protocol of the perplexities.

    A model in fp32 is that model: drafts and sharding are exact, so there is nothing to compare.
    """
    text, context = "\n\n".join(map(_text, questions)), min(CONTEXT, exact.card.context_length)
    result = perplexity(lm, text, context=context, max_windows=windows)
    values = {"acc_norm": scored.acc_norm, "answers_kept": Metric(1.0)}
    values |= {"perplexity": result.perplexity, "perplexity_ratio": Metric(1.0, "x")}
    if lm is not exact:
        pairs = zip(score(exact, questions).predictions_norm, scored.predictions_norm, strict=True)
        values["answers_kept"] = proportion([a == b for a, b in pairs])
        plain = perplexity(exact, text, context=context, max_windows=windows)
        values["perplexity_ratio"] = perplexity_ratio(result, plain)
    return values, result.protocol


def perplexity_ratio(result: PerplexityResult, exact: PerplexityResult) -> Metric:
    """Perplexity over another model's on the same windows, with a 95 % interval from their paired differences."""
    lost, ratio = np.subtract(result.window_nll, exact.window_nll), math.exp(result.nll - exact.nll)  # nats a token
    half = Z95 * float(np.std(lost, ddof=1)) / math.sqrt(len(lost)) if len(lost) > 1 else None
    return Metric(ratio, "x", *(() if half is None else (ratio * math.exp(-half), ratio * math.exp(half))))


@contextmanager
def _running(lm: LM, combination: Combination, prompts: list[str], new_tokens: int) -> Iterator[_Jobs]:
    cuts = combination.cuts
    options: Options = {"max_new_tokens": new_tokens, "chat": lm.has_chat_template}
    if cuts.ranks == 1:
        names = [name for name in combination.draft.split(", ") if name]
        copies = [SelfDraft(self_4bit(lm))] if "self-4bit" in names else []
        options["engine"] = Engine(lm) if names else engine_for(lm)

        def write_alone() -> list[GenerateResult]:
            drafts: list[Draft | LM] = [*free_drafts(names), *copies]
            return [generate(lm, prompts, draft=drafts or None, **options)]

        yield partial(score, lm), write_alone, sum(model.weight_bytes for model in [lm, *(d.lm for d in copies)])
        return
    with tempfile.TemporaryDirectory() as folder, ranks(cuts.ranks, device=lm.device.type) as group:
        name = lm.name if combination.method == "none" else str(lm.save(Path(folder) / "quantized"))
        job = group.job(name, cuts, lm.dtype)

        def write() -> list[GenerateResult]:
            return [part[1] for part in group.run(generate_part, job, prompts, options) if part]

        yield partial(group.score, name, plan=cuts, dtype=lm.dtype), write, lm.weight_bytes


def _run(
    ask: Callable[[list[Question]], ScoreResult], write: Callable[[], list[GenerateResult]], questions: list[Question]
) -> _Run:
    scoring, written = ask(questions).seconds_inference, write()
    tokens = sum(part.decoded_tokens for part in written)
    return _Run(scoring, max(part.seconds_decode for part in written) / max(1, tokens), tokens, written)


def _rate(seconds: list[float], units: int, unit: str) -> Metric:
    """Units over the median of the seconds, with the interval of that median."""
    middle, low, high = median_interval(seconds)
    return Metric(units / middle, unit, units / high, units / low)


def _text(question: Question) -> str:
    return f"{question.context} {question.endings[question.label]}"
