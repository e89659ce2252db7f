"""`llmlab bench quantization`: bits x group x method -> quality, size and speed, beside fp32 and the peers."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llmlab.base.clock import Timing, compare, speedup
from llmlab.base.stats import Metric
from llmlab.bench.peers import missing, peer_logits, peer_quantize
from llmlab.data import Question
from llmlab.decoding.generate import generate
from llmlab.kernels.fast import half_dtype, packed_dtype
from llmlab.kernels.packed_linear import quant_linears
from llmlab.measure.memory import peak_bytes
from llmlab.measure.phases import prefill
from llmlab.measure.record import Measurement
from llmlab.model.convert import bits_per_weight, dequantized, with_dtype
from llmlab.model.lm import LM
from llmlab.model.load import load
from llmlab.quantization.grid import Scheme
from llmlab.quantization.rotate import rotated
from llmlab.quantization.walk import Report, quantize
from llmlab.scoring.perplexity import perplexity
from llmlab.scoring.score import score

WINDOWS, CONTEXT = 24, 512  # perplexity: the first non-overlapping windows of the test text
DIVERGENCE_WINDOWS = 4
NEW_TOKENS = 32
OWN, FASTEST = "GPTQ 4 bits", "rotated GPTQ 4 bits"  # exchanged with GPTQModel; over which speeds are told
TIMED = (FASTEST, OWN, "GPTQ 8 bits")

Row = dict[str, Any]  # of the table of variants, ready for JSON


def variants() -> list[tuple[str, str, bool, Scheme]]:
    """(name, method, rotated, scheme) of everything that is quantized here."""
    table = []
    for bits in (4, 3):
        plain = Scheme(bits, 64)
        table += [
            (f"RTN {bits} bits", "rtn", False, replace(plain, search=False)),
            (f"RTN {bits} bits, searched grid", "rtn", False, plain),
            (f"GPTQ {bits} bits, no act-order", "gptq", False, replace(plain, act_order=False)),
            (f"GPTQ {bits} bits", "gptq", False, plain),
            (f"rotated RTN {bits} bits", "rtn", True, replace(plain, search=False)),
            (f"rotated GPTQ {bits} bits", "gptq", True, plain),
        ]
    return table + [("GPTQ 8 bits", "gptq", False, Scheme(8, -1, symmetric=True))]


def bench_quantization(
    lm: LM,
    calibration: torch.Tensor,
    text: str,
    questions: list[Question],
    *,
    peers: bool = True,
    repeats: int = 5,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Everything that the benchmark reports.

    Quality is measured in fp32 on the dequantized weights, so that it is the grid's alone; speed with the kernels and
    the activations that are fast on this device.

    Args:
        lm: the model in fp32.
        calibration: token ids [rows, tokens].
        text: test text of the perplexity.
        questions: scored by every variant, paired with fp32.
        peers: measure bitsandbytes too, where it is installed.
        repeats: counted rounds of the speeds.
        on_row: called with each finished row.

    Returns:
        A dictionary ready for JSON.
    """
    table = _Table(lm, text, questions, on_row)
    bases = {False: lm, True: rotated(lm)}
    table.add(lm, "fp32", "none", 32)
    table.add(bases[True], "rotated fp32", "rotation", 32)
    timed, own = dict[str, LM](), lm
    for name, method, is_rotated, scheme in variants():
        quantized, cost = _quantized(bases[is_rotated], method, scheme, calibration)
        cost |= {"rotated": is_rotated, "act_order": scheme.act_order, "search": scheme.search}
        table.add(quantized, name, method, scheme.bits, scheme.group_size, **cost)
        own = quantized if name == OWN else own
        if name in TIMED:
            timed[name] = with_dtype(quantized)
    interchange: Row = {"perplexity_vs_gptqmodel": None, "gptqmodel": "not asked for"}
    if peers:
        for method, bits in (("int8", 8), ("nf4", 4), ("fp4", 4)):
            peer = load(lm.name, dtype=packed_dtype(lm.device), device=lm.device, bitsandbytes=method)
            # Saving and loading do not apply: bitsandbytes quantizes while it loads.
            table.add(peer, f"bitsandbytes {method}", f"bitsandbytes-{method}", bits)
            timed[f"bitsandbytes {method}"] = peer
        interchange = _gptqmodel(lm, own, calibration, table)
    speeds, ratios = _speeds(lm, timed, repeats)
    for row in table.rows:
        row.update(speeds.get(row["variant"], {}))
    by_name = {row["variant"]: row for row in table.rows}
    return {
        "n": len(questions),
        "calibration_tokens": calibration.numel(),
        "perplexity_protocol": table.protocol,
        "rows": table.rows,
        **ratios,
        **interchange,
        **summary(by_name),
    }


def _quantized(base: LM, method: str, scheme: Scheme, calibration: torch.Tensor) -> tuple[LM, Row]:
    """A variant and what it cost to make."""
    report = Report()
    results: list[LM] = []

    def run() -> None:
        rows = calibration if method == "gptq" else None
        results.append(quantize(base, method=method, scheme=scheme, calibration=rows, report=report))

    peak = peak_bytes(run, base.device)
    return results[0], {"seconds_to_quantize": report.seconds, "peak_bytes_to_quantize": peak}


class _Table:
    """Rows of variants, held against the answers of the fp32 model."""

    def __init__(self, lm: LM, text: str, questions: list[Question], on_row: Callable[[Row], None]) -> None:
        self.text, self.questions, self.on_row = text, questions, on_row
        ids = torch.tensor(lm.encode(text)[: DIVERGENCE_WINDOWS * CONTEXT])
        self.windows = ids.view(-1, min(CONTEXT, len(ids))).to(lm.device)
        self.log_probs = [_log_probs(lm, window) for window in self.windows]
        self.predictions = score(lm, questions).predictions_norm
        self.rows: list[Row] = []
        self.protocol = ""

    def add(self, lm: LM, variant: str, method: str, bits: int, group_size: int | None = None, **more: object) -> None:
        about: Row = {"variant": variant, "method": method, "bits": bits, "group_size": group_size, **more}
        exact = dequantized(lm) if quant_linears(lm.model) else lm
        self.rows.append(about | self._quality(exact) | _size(lm))
        self.on_row(self.rows[-1])

    def _quality(self, lm: LM) -> Row:
        result = perplexity(lm, self.text, context=CONTEXT, max_windows=WINDOWS)
        self.protocol = result.protocol
        scores = score(lm, self.questions)
        changed = sum(a != b for a, b in zip(self.predictions, scores.predictions_norm, strict=True))
        return {
            "perplexity": result.perplexity.value,
            "perplexity_interval": [result.perplexity.low, result.perplexity.high],
            "acc_norm": scores.acc_norm.value,
            "acc_norm_interval": [scores.acc_norm.low, scores.acc_norm.high],
            "answers_changed": changed,
            "kl_divergence": self._divergence(lm),
        }

    def _divergence(self, lm: LM) -> float:
        """Mean over positions of KL(exact || this) of the next token, in nats."""
        return statistics.fmean(
            float((exact.exp() * (exact - _log_probs(lm, window))).sum(-1).mean())
            for exact, window in zip(self.log_probs, self.windows, strict=True)
        )


@torch.inference_mode()
def _log_probs(lm: LM, window: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = lm.model(input_ids=window[None], use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def _size(lm: LM) -> Row:
    """Bytes of the model, and bits a weight of the decoder layers' Linears as saved."""
    packed = {"bits_per_weight": bits_per_weight(lm.model)} if quant_linears(lm.model) else {}
    return {"bytes": lm.weight_bytes} | packed


def _gptqmodel(lm: LM, own: LM, calibration: torch.Tensor, table: _Table) -> Row:
    """GPTQModel's GPTQ on the same rows, and checkpoints exchanged both ways; says why where it is missing."""
    if reason := missing("gptqmodel"):
        return {"perplexity_vs_gptqmodel": None, "gptqmodel": reason}
    scheme = Scheme(4, 64, act_order=True)
    ids = table.windows[:1]
    result: Row = {"perplexity_vs_gptqmodel": None}
    with tempfile.TemporaryDirectory() as temporary:
        theirs, ours = Path(temporary) / "theirs", own.save(Path(temporary) / "ours")
        answer = peer_quantize("gptqmodel", lm, calibration, scheme, theirs)
        loaded = load(str(theirs), dtype="fp32", device=lm.device)
        seconds = answer["seconds"]
        table.add(loaded, "GPTQModel 4 bits", "gptqmodel", 4, 64, act_order=True, seconds_to_quantize=seconds)
        for name, folder, model in (("theirs_here", theirs, loaded), ("ours_there", ours, own)):
            with torch.inference_mode():
                here = dequantized(model).model(input_ids=ids).logits.float().cpu()
            for loader in ("gptqmodel", "transformers"):
                there = peer_logits("gptqmodel", folder, ids, loader=loader)
                difference = float((here - there).abs().max())
                result[f"max_abs_delta_logit_{name}_{loader}"] = difference
                result[f"relative_delta_logit_{name}_{loader}"] = difference / float(here.abs().max())
    return result | {"gptqmodel": answer["versions"]}


def summary(rows: dict[str, Row]) -> dict[str, float]:
    """The ratios that sum it up: the best 4- and 3-bit perplexity over fp32's, and GPTQ's increase over RTN's."""
    perplexities = {name: row["perplexity"] for name, row in rows.items()}
    exact = perplexities["fp32"]
    ratios = {}
    for bits in (4, 3):
        own = [perplexities[name] for name, r in rows.items() if r["bits"] == bits and r["method"] in ("gptq", "rtn")]
        ratios[f"best_{bits}bit_over_fp32"] = min(own) / exact
        gptq, rtn = (perplexities[f"{method} {bits} bits"] - exact for method in ("GPTQ", "RTN"))
        ratios[f"gptq_over_rtn_{bits}bit"] = gptq / rtn
    if peer := perplexities.get("GPTQModel 4 bits"):
        ratios["perplexity_vs_gptqmodel"] = perplexities["GPTQ 4 bits"] / peer
    return ratios


def _speeds(lm: LM, quantized: dict[str, LM], repeats: int) -> tuple[dict[str, Row], Row]:
    """Decode and prefill tokens/s of everything quantized beside fp32 and half precision, if fast here, interleaved."""
    half = half_dtype(lm.device)
    plain = {"fp32": lm} | ({half: with_dtype(lm, half)} if half else {})
    models = plain | quantized
    decoding: dict[str, list[float]] = {name: [] for name in models}

    def decode(name: str) -> Callable[[], None]:
        def run() -> None:
            result = generate(models[name], ["The capital of France is"], max_new_tokens=NEW_TOKENS)
            decoding[name].append(result.seconds_decode / max(1, result.decoded_tokens))

        return run

    compare({name: decode(name) for name in models}, warmup=1, min_runs=repeats)
    decodes = {name: Timing(name, seconds[1:], 1) for name, seconds in decoding.items()}
    phases = {name: prefill(model, CONTEXT).run for name, model in models.items()}
    prefills = compare(phases, warmup=1, min_runs=repeats)
    speeds: dict[str, Row] = {name: {"decode_tokens_per_s": 1 / decodes[name].median.value} for name in models}
    for name, row in speeds.items():
        row["prefill_tokens_per_s"] = CONTEXT / prefills[name].median.value
    ratios: Row = {}
    for name in plain:
        ratio = speedup(decodes[name], decodes[FASTEST])
        ratios[f"decode_speedup_vs_{name}"] = ratio.value
        ratios[f"decode_speedup_vs_{name}_interval"] = [ratio.low, ratio.high]
    return speeds, ratios


def line(row: Row) -> str:
    """One row for people."""
    return (
        f"{row['variant']:<30} perplexity {row['perplexity']:8.2f}   acc_norm {row['acc_norm']:.3f}   "
        f"KL {row['kl_divergence']:.4f} nat"
    )


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
    protocol = f"{report.tokens} calibration tokens; relative squared error of outputs, worst in {where}"
    return Measurement("quantize", values, len(report.linears), protocol)


def measurement(result: Row) -> Measurement:
    """The benchmark's main numbers for a record."""
    names = ("best_4bit_over_fp32", "best_3bit_over_fp32", "gptq_over_rtn_4bit", "gptq_over_rtn_3bit")
    values = {name: Metric(result[name], "x") for name in names}
    for name in [n for n in result if n.startswith("decode_speedup_vs_") and not n.endswith("_interval")]:
        values[name] = Metric(result[name], "x", *result[f"{name}_interval"])
    protocol = f"{result['perplexity_protocol']}; {result['calibration_tokens']} calibration tokens"
    assert all(math.isfinite(metric.value) for metric in values.values())
    return Measurement("bench quantization", values, result["n"], protocol)
