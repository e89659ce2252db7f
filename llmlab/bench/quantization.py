"""`llmlab bench quantization`: bits x group x method -> quality, size and speed, beside fp32 and the peers."""

import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch

from llmlab.base.clock import Timing, compare, speedup
from llmlab.base.stats import Metric
from llmlab.bench.ablation import keeping
from llmlab.bench.peers import missing, peer_quantize
from llmlab.data import Question, ids_fingerprint
from llmlab.decoding.generate import generate
from llmlab.kernels.fast import half_dtype, packed_dtype
from llmlab.kernels.packed_linear import quant_linears
from llmlab.measure.memory import peak_bytes
from llmlab.measure.phases import prefill
from llmlab.measure.record import Measurement, Row
from llmlab.model.convert import bits_per_weight, dequantized, with_dtype
from llmlab.model.lm import LM
from llmlab.model.load import load
from llmlab.quantization.fit import in_short
from llmlab.quantization.grid import Scheme
from llmlab.quantization.mixed import mixed
from llmlab.quantization.report import Report
from llmlab.quantization.rotate import rotated
from llmlab.quantization.walk import quantize
from llmlab.scoring.divergence import Exact
from llmlab.scoring.perplexity import perplexity
from llmlab.scoring.score import score

WINDOWS, CONTEXT = 24, 512  # perplexity: the first non-overlapping windows of the test text
DIVERGENCE_WINDOWS = 4
NEW_TOKENS = 32
OWN, FASTEST = "GPTQ 4 bits", "rotated GPTQ 4 bits"  # held against GPTQModel's; over which speeds are told
BEST = Scheme(4, 64, grid="neuqi", target="qronos", sweeps=1)  # of all methods here, on a rotated model
MEAN = 2.27  # bits a weight, dealt out: with groups of 64 as large as 2 bits with groups of 32
TIMED = (FASTEST, OWN, "GPTQ 8 bits")
# What GPTQModel 7 offers, at 4 bits with groups of 64: whether in act-order, and more arguments of its QuantizeConfig.
GPTQMODEL: dict[str, tuple[bool, dict[str, object]]] = {
    "GPTQModel, act-order": (True, {}),
    "GPTQModel": (False, {}),  # its default: act_group_aware
    "GPTQModel, GPTAQ": (False, {"gptaq": {"alpha": 0.25}}),
    "GPTQModel, FOEM": (False, {"foem": {"alpha": 0.25, "beta": 0.2}}),
}


def variants() -> list[tuple[str, str, bool, Scheme]]:
    """(name, method, rotated, scheme) of everything that is quantized here."""
    table = []
    for bits in (4, 3):
        plain = Scheme(bits, 64, grid="shrink")
        table += [
            (f"RTN {bits} bits", "rtn", False, replace(plain, search=False)),
            (f"RTN {bits} bits, searched grid", "rtn", False, plain),
            (f"GPTQ {bits} bits, no act-order", "gptq", False, replace(plain, act_order=False)),
            (f"GPTQ {bits} bits", "gptq", False, plain),
            (f"rotated RTN {bits} bits", "rtn", True, replace(plain, search=False)),
            (f"rotated GPTQ {bits} bits", "gptq", True, plain),
        ]
    two, three = Scheme(2, 64, grid="shrink"), Scheme(3, 64, grid="shrink")
    table += [
        ("rotated GPTQ 2 bits", "gptq", True, two),
        ("rotated GPTAQ 3 bits", "gptq", True, replace(three, target="gptaq")),
        ("rotated Qronos 3 bits", "gptq", True, replace(three, target="qronos")),
        *((f"best {bits} bits", "gptq", True, replace(BEST, bits=bits)) for bits in (4, 3, 2)),
        ("best 2 bits, groups of 32", "gptq", True, replace(BEST, bits=2, group_size=32)),
    ]
    return table + [("GPTQ 8 bits", "gptq", False, Scheme(8, -1, symmetric=True))]


def _settings(method: str, scheme: Scheme) -> Row:
    grid = scheme.grid if scheme.search else None
    own = {"target": scheme.target, "sweeps": scheme.sweeps} if method == "gptq" else {"target": None, "sweeps": None}
    return {"act_order": scheme.act_order, "search": scheme.search, "grid": grid} | own


def bench_quantization(
    lm: LM,
    calibration: torch.Tensor,
    text: str,
    questions: list[Question],
    *,
    peers: bool = True,
    repeats: int = 5,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Measurement:
    """Everything that the benchmark reports, ready for JSON in `details`.

    Quality is measured in fp32 on the dequantized weights, so that it is the grid's alone; speed with the kernels and
    the activations that are fast on this device.

    Args:
        lm: the model in fp32.
        calibration: token ids [rows, tokens]; text, questions: what perplexity and accuracy are measured on.
        peers: measure bitsandbytes and GPTQModel, too, where they are installed.
        repeats: counted rounds of the speeds.
        on_row: called with each variant's row, before its speeds are known.
    """
    rows, quality = dict[str, Row](), _quality_against(lm, text, questions)

    def add(model: LM, variant: str, method: str, bits: float, group_size: int | None = None, **more: object) -> None:
        about: Row = {"variant": variant, "method": method, "bits": bits, "group_size": group_size}
        about |= {"seconds": 0.0, "peak_bytes": 0} | more  # of quantizing; None: in a process of its own
        packed = quant_linears(model.model)
        size: Row = {"bytes": model.weight_bytes}
        size |= {"bits_per_weight": bits_per_weight(model.model)} if packed else {}
        rows[variant] = about | quality(dequantized(model) if packed else model) | size
        on_row(rows[variant])

    bases, timed = {False: lm, True: rotated(lm)}, dict[str, LM]()
    add(lm, "fp32", "none", 32)
    add(bases[True], "rotated fp32", "rotation", 32)
    for name, method, is_rotated, scheme in variants():
        ids = calibration if method == "gptq" else None
        job = partial(quantize, bases[is_rotated], method=method, scheme=scheme, calibration=ids)
        result, cost = _costs(job, lm.device)
        how: Row = {"rotated": is_rotated} | _settings(method, scheme)
        add(result, name, method, scheme.bits, scheme.group_size, **how, **cost)
        timed |= {name: with_dtype(result)} if name in TIMED else {}
    result, cost = _costs(partial(_dealt_out, bases[True], calibration), lm.device)
    add(result, f"best {MEAN} bits, mixed", "gptq", MEAN, 64, rotated=True, **_settings("gptq", BEST), **cost)
    reason = missing("gptqmodel") if peers else "not asked for"
    if peers:
        for method, bits in (("int8", 8), ("nf4", 4), ("fp4", 4)):
            name = f"bitsandbytes {method}"  # which quantizes while it loads
            job = partial(load, lm.name, dtype=packed_dtype(lm.device), device=lm.device, bitsandbytes=method)
            timed[name], cost = _costs(job, lm.device)
            add(timed[name], name, f"bitsandbytes-{method}", bits, **cost)
    for name, (act_order, options) in () if reason else GPTQMODEL.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "theirs"
            answer = peer_quantize("gptqmodel", lm, calibration, Scheme(4, 64, act_order=act_order), folder, options)
            theirs = load(str(folder), dtype="fp32", device=lm.device)
        seconds, reason = answer["seconds"], answer["versions"]
        add(theirs, name, "gptqmodel", 4, 64, act_order=act_order, seconds=seconds, peak_bytes=None)
    speeds, speedups = _speeds(lm, timed, repeats)
    table = [row | speeds.get(name, {}) for name, row in rows.items()]
    ratios = summary(rows)
    values = {name: Metric(ratio, "x") for name, ratio in ratios.items() if ratio is not None} | speedups
    told: Row = {"n": len(questions), "calibration_tokens": calibration.numel(), "rows": table, "gptqmodel": reason}
    told |= ratios
    for name, ratio in speedups.items():
        told |= {name: ratio.value, f"{name}_interval": [ratio.low, ratio.high]}
    protocol = f"{rows['fp32']['perplexity_protocol']}; {calibration.numel()} calibration tokens"
    settings = {"token_ids": ids_fingerprint([*calibration.tolist(), lm.input_ids(text)])}
    return Measurement("bench quantization", values, len(questions), protocol, settings=settings, details=told)


def _dealt_out(lm: LM, calibration: torch.Tensor) -> LM:
    """Quantized to `MEAN` bits in the mean; what dealing them out takes is part of it."""
    return quantize(lm, scheme=mixed(lm, MEAN, BEST, calibration), calibration=calibration)


def _costs(job: Callable[[], LM], device: torch.device) -> tuple[LM, Row]:
    """What a job returns, its `seconds`, and the `peak_bytes` that it needed above what was in use before."""
    runs, results = keeping({"": job})
    begin = time.perf_counter()
    peak = peak_bytes(runs[""], device)
    return results[""], {"seconds": time.perf_counter() - begin, "peak_bytes": peak}


def _quality_against(exact: LM, text: str, questions: list[Question]) -> Callable[[LM], Row]:
    """A function that holds a variant's answers and distributions against those of the fp32 model."""
    ids = torch.tensor(exact.input_ids(text)[: DIVERGENCE_WINDOWS * CONTEXT])
    size = min(CONTEXT, len(ids))
    distributions = Exact(exact, ids[: len(ids) // size * size].view(-1, size))
    predictions = score(exact, questions).predictions_norm

    def quality(lm: LM) -> Row:
        result, scores = perplexity(lm, text, context=CONTEXT, max_windows=WINDOWS), score(lm, questions)
        metrics = {"perplexity": result.perplexity, "word_perplexity": result.word_perplexity}
        metrics |= {"byte_perplexity": result.byte_perplexity, "acc_norm": scores.acc_norm}
        row: Row = {"perplexity_protocol": result.protocol}
        for name, metric in metrics.items():
            row |= {name: metric.value, f"{name}_interval": [metric.low, metric.high]}
        changed = sum(a != b for a, b in zip(predictions, scores.predictions_norm, strict=True))
        return row | {"answers_changed": changed} | asdict(distributions.against(lm))

    return quality


def summary(rows: dict[str, Row]) -> dict[str, float | None]:
    """The ratios that sum it up: the best 4- and 3-bit perplexity over fp32's, GPTQ's increase over RTN's, and the best
    2-bit log-perplexity above fp32's over rotated GPTQ's; `OWN` over GPTQModel's best."""
    perplexities = {name: row["perplexity"] for name, row in rows.items()}
    exact, ratios = perplexities["fp32"], dict[str, float | None]()
    peer = min(
        (row for row in rows.values() if row["method"] == "gptqmodel"), key=itemgetter("perplexity"), default=None
    )
    for bits in (4, 3):
        own = [perplexities[name] for name, r in rows.items() if r["bits"] == bits and r["method"] in ("gptq", "rtn")]
        gptq, rtn = (perplexities[f"{method} {bits} bits"] - exact for method in ("GPTQ", "RTN"))
        ratios |= {f"best_{bits}bit_over_fp32": min(own) / exact, f"gptq_over_rtn_{bits}bit": gptq / rtn}
    two = [row["perplexity"] for row in rows.values() if (row["bits"], row["group_size"]) == (2, 64)]
    ratios["excess_2bit_over_gptq"] = math.log(min(two) / exact) / math.log(perplexities["rotated GPTQ 2 bits"] / exact)
    versus = ("perplexity", "seconds")
    return ratios | {f"{what}_vs_gptqmodel": rows[OWN][what] / peer[what] if peer else None for what in versus}


def _speeds(lm: LM, quantized: dict[str, LM], repeats: int) -> tuple[dict[str, Row], dict[str, Metric]]:
    """Decode and prefill tokens/s of everything quantized beside fp32 and half precision, if fast here, interleaved."""
    half = half_dtype(lm.device)
    plain = {"fp32": lm} | ({half: with_dtype(lm, half)} if half else {})
    models = plain | quantized
    seconds: dict[str, list[float]] = {name: [] for name in models}

    def decode(name: str) -> None:
        result = generate(models[name], ["The capital of France is"], max_new_tokens=NEW_TOKENS)
        seconds[name].append(result.seconds_decode / max(1, result.decoded_tokens))

    compare({name: partial(decode, name) for name in models}, warmup=1, min_runs=repeats)
    decodes = {name: Timing(name, of_model[1:], 1) for name, of_model in seconds.items()}
    phases = {name: prefill(model, CONTEXT).run for name, model in models.items()}
    prefills = compare(phases, warmup=1, min_runs=repeats)
    rates = {name: (1 / decodes[name].median.value, CONTEXT / prefills[name].median.value) for name in models}
    speeds = {n: {"decode_tokens_per_s": d, "prefill_tokens_per_s": p} for n, (d, p) in rates.items()}
    return speeds, {f"decode_speedup_vs_{name}": speedup(decodes[name], decodes[FASTEST]) for name in plain}


def quantizing(lm: LM, report: Report) -> Measurement:
    """What quantizing a model cost and lost, for a record."""
    worst = max(report.linears, key=lambda linear: linear["error"], default=None)  # a resumed job may have none
    values = {
        "seconds": Metric(report.seconds, "s"),
        "bits_per_weight": Metric(bits_per_weight(lm.model), "bit"),
        "bytes": Metric(lm.weight_bytes, "B"),
        "worst_error": Metric(worst["error"] if worst else float("nan")),
    }
    where = worst["name"] if worst else "no layer: all were finished before"
    protocol = f"{report.tokens} calibration tokens; relative squared error of outputs"
    settings = {"calibration_tokens": str(report.tokens)}
    settings |= {"kept": f"{len(report.kept)} matrices: {in_short(report.kept)}"} if report.kept else {}
    details: Row = {"worst_in": where}
    return Measurement("quantize", values, len(report.linears), protocol, settings=settings, details=details)
