"""`llmlab bench scoring`: shared-prefix scoring against lm-evaluation-harness and against the reference path."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from llmlab.base.clock import Timing, compare, speedup
from llmlab.base.errors import InputError
from llmlab.base.stats import Metric
from llmlab.bench.ablation import ablation, branch_and_bound, scoring_flops
from llmlab.data import Question
from llmlab.kernels.plain import onednn_helps, onednn_linear
from llmlab.measure.memory import peak_bytes
from llmlab.measure.record import Measurement
from llmlab.model.lm import LM
from llmlab.scoring import reference, shared
from llmlab.scoring.encode import encode
from llmlab.scoring.trie import question_tries

LM_EVAL_BATCH_SIZES = (1, 4, 8, 16, 32)
TUNING_QUESTIONS = 16
MATMUL_ROWS = 1024


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


def bench_scoring(lm: LM, half: LM | None, questions: list[Question], *, repeats: int = 5) -> dict[str, Any]:
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
    batch_size, tuning = best_batch_size(lm, questions)
    found: dict[str, list[float]] = {}

    def keep(name: str, run: Callable[[], list[float]]) -> Callable[[], None]:
        def keeping() -> None:
            found[name] = run()

        return keeping

    candidates = {
        "lm_eval": keep("lm_eval", harness_scorer(lm, questions, batch_size)),
        "reference": keep("reference", lambda: reference.log_probs(lm, encode(lm, questions))[0]),
        "shared": keep("shared", lambda: shared.log_probs(lm, encode(lm, questions)).log_probs),
    }
    models = {"shared": lm}
    if half:
        batch_size_half, tuning_half = best_batch_size(half, questions)
        candidates["lm_eval_half"] = keep("lm_eval_half", harness_scorer(half, questions, batch_size_half))
        candidates["shared_half"] = keep(
            "shared_half", lambda: shared.log_probs(half, encode(half, questions)).log_probs
        )
        models["shared_half"] = half
    for model in models.values():  # the profile is measured before the clock runs: three jobs for 40 questions
        for _ in range(3):
            shared.log_probs(model, encode(model, questions))
    peak_memory = peak_bytes(candidates["shared"], lm.device)
    for model in models.values():
        candidates[f"matmul {model.dtype}"] = own_matmuls(model, torch.nn.functional.linear)
    if onednn := onednn_helps(lm.model):
        candidates[f"matmul {lm.dtype} oneDNN"] = own_matmuls(lm, onednn_linear)
    timings = compare(dict(candidates), warmup=0, min_runs=repeats)
    work = own_matmul_flops(lm)
    rates = {name[7:]: work / t.median.value for name, t in timings.items() if name.startswith("matmul ")}
    sequences = encode(lm, questions)
    tries = question_tries(sequences)
    asked = sum(trie.asked for trie in tries)
    flops = scoring_flops(lm, tries, asked)
    mfu = {model.dtype: flops / timings[name].median.value / rates[model.dtype] for name, model in models.items()}
    steps = ablation(lm, half, questions, rates, min_runs=3)
    in_half: dict[str, Any] = {}
    if half:
        in_half = {
            "half": half.dtype,
            **_ratio("speedup_bf16", timings["lm_eval_half"], timings["shared_half"]),
            **_ratio("speedup_bf16_vs_lm_eval_fp32", timings["lm_eval"], timings["shared_half"]),
            "bf16": _agreement(questions, found["lm_eval"], found["shared_half"]),
            "mfu_bf16": mfu[half.dtype],
            "lm_eval_batch_size_bf16": batch_size_half,
            "lm_eval_tuning_seconds_bf16": tuning_half,
        }
    return in_half | {
        "n": len(questions),
        "dtype": lm.dtype,
        "repeats": repeats,
        **_ratio("speedup_vs_lm_eval", timings["lm_eval"], timings["shared"]),
        **_ratio("speedup_vs_reference", timings["reference"], timings["shared"]),
        **_agreement(questions, found["lm_eval"], found["shared"]),
        "mfu": mfu[lm.dtype],
        "mfu_of_onednn": mfu[lm.dtype] * rates[lm.dtype] / rates[f"{lm.dtype} oneDNN"] if onednn else None,
        "matmul_flops": rates,
        "tokens_full": sum(len(s.ids) for s in sequences),
        "tokens_shared": sum(map(len, tries)),
        "peak_bytes_above_weights": peak_memory,
        "seconds": {name: timing.median.value for name, timing in timings.items()},
        "seconds_all": {name: timing.seconds for name, timing in timings.items()},
        "lm_eval_batch_size": batch_size,
        "lm_eval_tuning_seconds": tuning,
        "ablation": steps.to_dict("records"),
        "branch_and_bound_saved_at_most": branch_and_bound(lm, questions),
    }


def own_matmul_flops(lm: LM, rows: int = MATMUL_ROWS) -> int:
    """FLOPs of `own_matmuls`."""
    return 2 * rows * sum(m.weight.numel() for m in lm.model.base_model.modules() if isinstance(m, torch.nn.Linear))


def own_matmuls(lm: LM, matmul: Callable[..., torch.Tensor], rows: int = MATMUL_ROWS) -> Callable[[], None]:
    """Nothing but the matmuls of the decoder layers, with the model's own weights.

    The rate that torch's own `linear` reaches is the limit which MFU refers to. They run in the same rounds as the
    candidates, because the clock of a shared machine drifts by more than the differences of interest.
    """
    linears = [m for m in lm.model.base_model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {m.in_features: torch.randn(rows, m.in_features).to(lm.device, m.weight.dtype) for m in linears}

    @torch.inference_mode()
    def run() -> None:
        for linear in linears:
            matmul(inputs[linear.in_features], linear.weight)

    return run


def measurement(result: dict[str, Any]) -> Measurement:
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
    return Measurement("bench scoring", values, result["n"], protocol)


def _ratio(name: str, baseline: Timing, candidate: Timing) -> dict[str, Any]:
    ratio = speedup(baseline, candidate)
    return {name: ratio.value, f"{name}_interval": [ratio.low, ratio.high]}


def _agreement(questions: list[Question], expected: list[float], found: list[float]) -> dict[str, Any]:
    """How the answers agree by acc and by acc_norm: share of equal predictions, the flips, the largest difference."""
    flips = set()
    start = 0
    for index, question in enumerate(questions):
        stop = start + len(question.endings)
        lengths = np.array([len(e) for e in question.endings])
        a, b = np.array(expected[start:stop]), np.array(found[start:stop])
        if a.argmax() != b.argmax() or (a / lengths).argmax() != (b / lengths).argmax():
            flips.add(index)
        start = stop
    return {
        "prediction_agreement": 1 - len(flips) / len(questions),
        "flips": sorted(flips),
        "max_abs_delta_log_prob": float(np.abs(np.subtract(expected, found)).max()),
    }
