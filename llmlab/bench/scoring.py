"""`llmlab bench scoring`: shared-prefix scoring against lm-evaluation-harness and against the reference path."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from llmlab.base.clock import Timing, compare, speedup
from llmlab.base.errors import InputError
from llmlab.base.stats import Metric
from llmlab.bench.ablation import ablation, keeping, scoring_flops
from llmlab.data import Question
from llmlab.kernels.plain import onednn_helps, onednn_linear
from llmlab.measure.memory import peak_bytes
from llmlab.measure.record import Measurement
from llmlab.model.lm import LM
from llmlab.scoring import reference, shared
from llmlab.scoring.encode import Sequence, encode
from llmlab.scoring.scores import Scores
from llmlab.scoring.trie import question_tries

LM_EVAL_BATCH_SIZES = (1, 4, 8, 16, 32)
TUNING_QUESTIONS = 16
MATMUL_ROWS = 1024
Report = dict[str, Any]  # ready for JSON


def harness_scorer(lm: LM, questions: list[Question], batch_size: int) -> Callable[[], list[float]]:
    """lm-evaluation-harness's own `HFLM` over the same weights: a function that scores all endings, in order."""
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.models.huggingface import HFLM
    except ModuleNotFoundError:
        raise InputError("the benchmark needs lm-evaluation-harness: run pip install 'llmlab[dev]'.") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=batch_size)
    requests = [
        Instance("loglikelihood", {}, (q.context, " " + ending), i)
        for i, q in enumerate(questions)
        for ending in q.endings
    ]
    return lambda: [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]


def best_batch_size(lm: LM, questions: list[Question], *, min_runs: int = 2) -> tuple[int, dict[int, float]]:
    """lm-evaluation-harness's fastest batch size here, and its median seconds for each, on the first questions."""
    sample = questions[:TUNING_QUESTIONS]
    runs = {str(size): harness_scorer(lm, sample, size) for size in LM_EVAL_BATCH_SIZES}
    timings = compare(dict(runs), warmup=0, min_runs=min_runs)
    seconds = {size: timings[str(size)].median.value for size in LM_EVAL_BATCH_SIZES}
    return min(seconds, key=lambda size: seconds[size]), seconds


def bench_scoring(lm: LM, half: LM | None, questions: list[Question], *, repeats: int = 5) -> Report:
    """Everything that the benchmark reports.

    The candidates score the same questions from text, tokenization included, interleaved in this process: the harness
    at its best batch size, the reference path and shared-prefix scoring; harness and shared in half precision, too.

    Args:
        lm: the model in the exact dtype (fp32).
        half: the same model in bf16 or fp16; None where neither is fast: then what needs it is left out.
        questions: what to score.
        repeats: counted rounds, at least 5 for a report.

    Returns:
        A dictionary ready for JSON; ratios carry their 95 % interval under `..._interval`.
    """
    models = {"": lm} | ({"_half": half} if half else {})
    race = _race(models, questions, repeats)
    timings, log_probs = race.timings, race.log_probs
    sequences = encode(lm, questions)
    tries = question_tries(sequences)
    flops = scoring_flops(lm, tries, sum(trie.asked for trie in tries))
    matmuls = [name.removeprefix("matmul ") for name in timings if name.startswith("matmul ")]
    rates = {name: own_matmul_flops(lm) / timings[f"matmul {name}"].median.value for name in matmuls}
    mfu = {s: flops / timings[f"shared{s}"].median.value / rates[model.dtype] for s, model in models.items()}
    onednn = rates.get(f"{lm.dtype} oneDNN")
    result: Report = {
        "n": len(questions),
        "dtype": lm.dtype,
        "repeats": repeats,
        **_ratio("speedup_vs_lm_eval", timings["lm_eval"], timings["shared"]),
        **_ratio("speedup_vs_reference", timings["reference"], timings["shared"]),
        **_agreement(questions, log_probs["lm_eval"], log_probs["shared"]),
        "mfu": mfu[""],
        "mfu_of_onednn": mfu[""] * rates[lm.dtype] / onednn if onednn else None,
        "matmul_flops": rates,
        "tokens_full": sum(len(s.ids) for s in sequences),
        "tokens_shared": sum(map(len, tries)),
        "peak_bytes_above_weights": race.peak_bytes,
        "seconds": {name: timing.median.value for name, timing in timings.items()},
        "seconds_all": {name: timing.seconds for name, timing in timings.items()},
        "lm_eval_batch_size": race.tuning[""][0],
        "lm_eval_tuning_seconds": race.tuning[""][1],
        "ablation": ablation(lm, half, questions, rates).to_dict("records"),
    }
    if half:
        result |= {
            "half": half.dtype,
            **_ratio("speedup_bf16", timings["lm_eval_half"], timings["shared_half"]),
            **_ratio("speedup_bf16_vs_lm_eval_fp32", timings["lm_eval"], timings["shared_half"]),
            "bf16": _agreement(questions, log_probs["lm_eval"], log_probs["shared_half"]),
            "mfu_bf16": mfu["_half"],
            "lm_eval_batch_size_bf16": race.tuning["_half"][0],
            "lm_eval_tuning_seconds_bf16": race.tuning["_half"][1],
        }
    return result


@dataclass(frozen=True)
class _Race:
    """Candidates timed side by side: `lm_eval`, `shared` (`..._half`), `reference`, and the plain `matmul DTYPE`.

    `tuning` holds the harness's best batch size and its seconds for each; `peak_bytes` is of the shared path.
    """

    timings: dict[str, Timing]
    log_probs: dict[str, list[float]]
    tuning: dict[str, tuple[int, dict[int, float]]]
    peak_bytes: int | None


def _race(models: dict[str, LM], questions: list[Question], repeats: int) -> _Race:
    lm = models[""]
    tuning = {suffix: best_batch_size(model, questions) for suffix, model in models.items()}
    scorers: dict[str, Callable[[], list[float]]] = {"reference": partial(_score, reference.log_probs, lm, questions)}
    matmuls = {}
    for suffix, model in models.items():
        scorers[f"lm_eval{suffix}"] = harness_scorer(model, questions, tuning[suffix][0])
        scorers[f"shared{suffix}"] = partial(_score, shared.log_probs, model, questions)
        for _ in range(3):  # the profile is measured before the clock runs: three jobs for 40 questions
            scorers[f"shared{suffix}"]()
        matmuls[f"matmul {model.dtype}"] = own_matmuls(model, torch.nn.functional.linear)
    if onednn_helps(lm.model):
        matmuls[f"matmul {lm.dtype} oneDNN"] = own_matmuls(lm, onednn_linear)
    peak = peak_bytes(scorers["shared"], lm.device)
    runs, log_probs = keeping(scorers)
    return _Race(compare({**runs, **matmuls}, warmup=0, min_runs=repeats), log_probs, tuning, peak)


def _score(method: Callable[[LM, list[Sequence]], Scores], lm: LM, questions: list[Question]) -> list[float]:
    return method(lm, encode(lm, questions)).log_probs


def own_matmul_flops(lm: LM, rows: int = MATMUL_ROWS) -> int:
    """FLOPs of `own_matmuls`."""
    return 2 * rows * sum(m.weight.numel() for m in _linears(lm))


def own_matmuls(lm: LM, matmul: Callable[..., torch.Tensor], rows: int = MATMUL_ROWS) -> Callable[[], None]:
    """Nothing but the matmuls of the decoder layers, with the model's own weights.

    The rate that torch's own `linear` reaches is the limit which MFU refers to. They run in the same rounds as the
    candidates, because the clock of a shared machine drifts by more than the differences of interest.
    """
    linears = _linears(lm)
    inputs = {m.in_features: torch.randn(rows, m.in_features).to(lm.device, m.weight.dtype) for m in linears}

    @torch.inference_mode()
    def run() -> None:
        for linear in linears:
            matmul(inputs[linear.in_features], linear.weight)

    return run


def _linears(lm: LM) -> list[torch.nn.Linear]:
    return [m for m in lm.model.base_model.modules() if isinstance(m, torch.nn.Linear)]


def measurement(result: Report) -> Measurement:
    """The benchmark's main numbers for a record; speeds are ratios to lm-evaluation-harness in the same run.

    Without a fast half precision its numbers are not there.
    """
    ratios = ("speedup_vs_lm_eval", "speedup_bf16", "speedup_bf16_vs_lm_eval_fp32", "speedup_vs_reference")
    values = {name: Metric(result[name], "x", *result[f"{name}_interval"]) for name in ratios if name in result}
    for name in ("prediction_agreement", "mfu", "mfu_bf16"):
        if name in result:
            values[name] = Metric(result[name])
    values["max_abs_delta_log_prob"] = Metric(result["max_abs_delta_log_prob"], "nat")
    values["seconds"] = Metric(result["seconds"]["shared"], "s")
    protocol = (
        f"from text, interleaved, median of {result['repeats']}; baseline lm-evaluation-harness HFLM at its best of "
        f"batch sizes {', '.join(map(str, LM_EVAL_BATCH_SIZES))}, same weights, dtype and threads"
    )
    settings = {"method": "shared", "half": result.get("half", "none")}
    return Measurement("bench scoring", values, result["n"], protocol, settings=settings)


def _ratio(name: str, baseline: Timing, candidate: Timing) -> dict[str, object]:
    ratio = speedup(baseline, candidate)
    return {name: ratio.value, f"{name}_interval": [ratio.low, ratio.high]}


def _agreement(questions: list[Question], expected: list[float], scored: list[float]) -> dict[str, object]:
    """How the answers agree by acc and by acc_norm: share of equal predictions, the flips, the largest difference."""
    flips = set()
    start = 0
    for index, question in enumerate(questions):
        stop = start + len(question.endings)
        lengths = np.array([len(e) for e in question.endings])
        a, b = np.array(expected[start:stop]), np.array(scored[start:stop])
        if a.argmax() != b.argmax() or (a / lengths).argmax() != (b / lengths).argmax():
            flips.add(index)
        start = stop
    return {
        "prediction_agreement": 1 - len(flips) / len(questions),
        "flips": sorted(flips),
        "max_abs_delta_log_prob": float(np.abs(np.subtract(expected, scored)).max()),
    }
