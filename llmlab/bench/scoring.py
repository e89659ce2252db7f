"""`llmlab bench scoring`: shared-prefix scoring against lm-evaluation-harness and against the reference path."""

import logging
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from llmlab.base.clock import compare, speedup
from llmlab.base.errors import InputError
from llmlab.base.stats import Metric
from llmlab.bench.ablation import ablation, keeping, max_delta, scoring_flops
from llmlab.data import Question, ids_fingerprint
from llmlab.kernels.plain import onednn_helps, onednn_linear
from llmlab.measure.memory import peak_bytes
from llmlab.measure.record import Measurement, Row
from llmlab.model.lm import LM
from llmlab.scoring import reference, shared
from llmlab.scoring.encode import Sequence, encode
from llmlab.scoring.scores import Scores
from llmlab.scoring.trie import question_tries

LM_EVAL_BATCH_SIZES = {"cpu": (1, 4, 8, 16, 32), "cuda": (1, 4, 8, 16, 32, 64, 128, 256)}
TUNING_QUESTIONS = {"cpu": 16, "cuda": 64}  # with four endings each as many rows as the largest batch
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
    on, runs = lm.device.type, dict[str, Callable[[], object]]()
    for size in LM_EVAL_BATCH_SIZES[on]:
        run = harness_scorer(lm, questions[: TUNING_QUESTIONS[on]], size)
        if on == "cuda" and not fits_memory(run):  # nor will larger ones
            break
        runs[str(size)] = run
    timings = compare(runs, warmup=0, min_runs=min_runs)
    seconds = {int(size): timings[size].median.value for size in runs}
    return min(seconds, key=lambda size: seconds[size]), seconds


def fits_memory(run: Callable[[], object]) -> bool:
    """Run it; whether the device's memory was enough."""
    try:
        run()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return False
    return True


def bench_scoring(lm: LM, half: LM | None, questions: list[Question], *, repeats: int = 5) -> Measurement:
    """Everything that the benchmark reports, ready for JSON in `details`; `..._interval` holds a ratio's 95 % interval.

    The candidates score the same questions from text, tokenization included, interleaved in this process: the harness
    at its best batch size, the reference path and shared-prefix scoring; harness and shared in half precision, too,
    unless `half` (the same model in bf16 or fp16) is None. `repeats`: counted rounds, at least 5 for a report.

    Raises InputError if prefixes cannot be shared on this model.
    """
    models = {"": lm} | ({f"_{half.dtype}": half} if half else {})
    for model in models.values():
        if reason := shared.trie_check(model).reason:
            raise InputError(f"there is no shared-prefix scoring of {lm.name} in {model.dtype} to measure: {reason}.")
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
    timings = compare(runs | matmuls, warmup=0, min_runs=repeats)
    seconds = {name: timing.median.value for name, timing in timings.items()}
    rates = {name.removeprefix("matmul "): own_matmul_flops(lm) / seconds[name] for name in matmuls}
    sequences = encode(lm, questions)
    tries = question_tries(sequences)
    flops = scoring_flops(lm, tries, sum(trie.asked for trie in tries))
    pairs = [("speedup_vs_lm_eval", "lm_eval", "shared"), ("speedup_vs_reference", "reference", "shared")]
    if half:
        pairs += [(f"speedup_{half.dtype}", f"lm_eval_{half.dtype}", f"shared_{half.dtype}")]
        pairs += [(f"speedup_{half.dtype}_vs_lm_eval_fp32", "lm_eval", f"shared_{half.dtype}")]
    values = {name: speedup(timings[slow], timings[fast]) for name, slow, fast in pairs}
    agreements = {s: _agreement(questions, log_probs["lm_eval"], log_probs[f"shared{s}"]) for s in models}
    values["prediction_agreement"] = Metric(agreements[""]["prediction_agreement"])
    values["max_abs_delta_log_prob"] = Metric(agreements[""]["max_abs_delta_log_prob"], "nat")
    for suffix, model in models.items():
        values[f"mfu{suffix}"] = Metric(flops / seconds[f"shared{suffix}"] / rates[model.dtype])
    details: Row = {"n": len(questions), "dtype": lm.dtype, "repeats": repeats}
    details |= {name: metric.value for name, metric in values.items()} | agreements[""]
    details |= {f"{name}_interval": [values[name].low, values[name].high] for name, *_ in pairs}
    details |= {"matmul_flops": rates, "peak_bytes_above_weights": peak}
    details |= {"tokens_full": sum(len(s.ids) for s in sequences), "tokens_shared": sum(map(len, tries))}
    details |= {"seconds": seconds, "seconds_all": {name: timing.seconds for name, timing in timings.items()}}
    for suffix, (size, tried) in tuning.items():
        details |= {f"lm_eval_batch_size{suffix}": size, f"lm_eval_tuning_seconds{suffix}": tried}
    details |= {"half": half.dtype, half.dtype: agreements[f"_{half.dtype}"]} if half else {}
    details["ablation"] = ablation(lm, half, questions, rates).to_dict("records")
    sizes = ", ".join(map(str, tuning[""][1]))
    protocol = (
        f"from text, interleaved, median of {repeats}; baseline lm-evaluation-harness HFLM at its best of "
        f"batch sizes {sizes}, same weights, dtype and threads"
    )
    settings = {"method": "shared", "half": half.dtype if half else "none", "baseline_batch_sizes": sizes}
    settings["token_ids"] = ids_fingerprint([s.n_context, *s.ids] for s in sequences)
    values["seconds"] = Metric(seconds["shared"], "s")
    return Measurement("bench scoring", values, len(questions), protocol, settings=settings, details=details)


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


def _agreement(questions: list[Question], expected: list[float], scored: list[float]) -> Row:
    """How the answers agree by acc and by acc_norm: share of equal predictions, the flips, the largest difference."""
    flips, start = [], 0
    for index, question in enumerate(questions):
        lengths = [len(ending) for ending in question.endings]
        a, b = (np.array(values[start : start + len(lengths)]) for values in (expected, scored))
        if a.argmax() != b.argmax() or (a / lengths).argmax() != (b / lengths).argmax():
            flips.append(index)
        start += len(lengths)
    agreement = 1 - len(flips) / len(questions)
    delta = max_delta(expected, scored)
    return {"prediction_agreement": agreement, "flips": flips, "max_abs_delta_log_prob": delta}
