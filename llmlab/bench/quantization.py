"""`llmlab bench quantization`: bits x group x method -> quality, size and speed, beside fp32 and the peers."""

from __future__ import annotations

import math
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
from llmlab.kernels.packed_linear import QuantLinear
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


def variants() -> list[tuple[str, str, bool, Scheme]]:
    """(name, method, rotated, scheme) of everything that is quantized here."""
    found = []
    for bits in (4, 3):
        plain = Scheme(bits, 64)
        found += [
            (f"RTN {bits} bits", "rtn", False, replace(plain, search=False)),
            (f"RTN {bits} bits, searched grid", "rtn", False, plain),
            (f"GPTQ {bits} bits, no act-order", "gptq", False, replace(plain, act_order=False)),
            (f"GPTQ {bits} bits", "gptq", False, plain),
            (f"rotated RTN {bits} bits", "rtn", True, replace(plain, search=False)),
            (f"rotated GPTQ {bits} bits", "gptq", True, plain),
        ]
    return found + [("GPTQ 8 bits", "gptq", False, Scheme(8, -1, symmetric=True))]


def bench_quantization(
    lm: LM,
    calibration: torch.Tensor,
    text: str,
    questions: list[Question],
    *,
    peers: bool = True,
    repeats: int = 5,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
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
    exact = _Exact(lm, text, questions)
    rows: list[dict[str, Any]] = []

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        on_row(row)

    add({"variant": "fp32", "method": "none", "bits": 32, "group_size": None} | exact.quality(lm) | _size(lm))
    bases = {False: lm, True: rotated(lm)}
    add({"variant": "rotated fp32", "method": "rotation", "bits": 32, "group_size": None} | exact.quality(bases[True]))
    kept: dict[str, LM] = {}
    for name, method, turned, scheme in variants():
        report = Report()
        made: list[LM] = []

        def make(
            method: str = method, scheme: Scheme = scheme, base: LM = bases[turned], report: Report = report,
            made: list[LM] = made,
        ) -> None:  # fmt: skip
            given = calibration if method == "gptq" else None
            made.append(quantize(base, method=method, scheme=scheme, calibration=given, report=report))

        peak = peak_bytes(make, lm.device)
        quantized = made.pop()
        cost = {"seconds_to_quantize": report.seconds, "peak_bytes_to_quantize": peak}
        about = {"variant": name, "method": method, "bits": scheme.bits, "group_size": scheme.group_size}
        about |= {"rotated": turned, "act_order": scheme.act_order, "search": scheme.search}
        add(about | exact.quality(dequantized(quantized)) | _size(quantized) | cost)
        if name in ("rotated GPTQ 4 bits", "GPTQ 4 bits", "GPTQ 8 bits"):
            kept[name] = with_dtype(quantized)
            if name == "GPTQ 4 bits":
                own = quantized
    if peers:
        for method in ("int8", "nf4", "fp4"):
            peer = load(lm.name, dtype=packed_dtype(lm.device), device=lm.device, bitsandbytes=method)
            about = {"variant": f"bitsandbytes {method}", "method": f"bitsandbytes-{method}", "group_size": None}
            bits = 8 if method == "int8" else 4
            # Saving and loading do not apply: bitsandbytes quantizes while it loads.
            add(about | {"bits": bits} | exact.quality(peer) | _size(peer))
            kept[f"bitsandbytes {method}"] = peer
    interchange: dict[str, Any] = {"perplexity_vs_gptqmodel": None, "gptqmodel": "not asked for"}
    if peers:
        interchange = _gptqmodel(lm, own, calibration, exact, add)
    speeds, ratios = _speeds(lm, kept, repeats)
    for row in rows:
        row |= speeds.get(row["variant"], {})
    by_name = {row["variant"]: row for row in rows}
    return {
        "n": len(questions),
        "calibration_tokens": calibration.numel(),
        "perplexity_protocol": exact.protocol,
        "rows": rows,
        **ratios,
        **interchange,
        **summary(by_name),
    }


def _gptqmodel(
    lm: LM, own: LM, calibration: torch.Tensor, exact: _Exact, add: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """GPTQModel's GPTQ on the same rows, and checkpoints exchanged both ways; says why where it is missing."""
    found: dict[str, Any] = {"perplexity_vs_gptqmodel": None}
    if reason := missing("gptqmodel"):
        return found | {"gptqmodel": reason}
    scheme = Scheme(4, 64, act_order=True)
    ids = exact.windows[:1]
    with tempfile.TemporaryDirectory() as temporary:
        theirs, ours = Path(temporary) / "theirs", Path(temporary) / "ours"
        answer = peer_quantize("gptqmodel", lm, calibration, scheme, theirs)
        loaded = load(str(theirs), dtype="fp32", device=lm.device)
        about = {"variant": "GPTQModel 4 bits", "method": "gptqmodel", "bits": 4, "group_size": 64, "act_order": True}
        cost = {"seconds_to_quantize": answer["seconds"]}
        add(about | exact.quality(dequantized(loaded)) | _size(loaded) | cost)
        own.save(ours)
        for name, folder, model in (("theirs_here", theirs, loaded), ("ours_there", ours, own)):
            with torch.inference_mode():
                here = dequantized(model).model(input_ids=ids).logits.float().cpu()
            for loader in ("gptqmodel", "transformers"):
                there = peer_logits("gptqmodel", folder, ids, loader=loader)
                difference = float((here - there).abs().max())
                found[f"max_abs_delta_logit_{name}_{loader}"] = difference
                found[f"relative_delta_logit_{name}_{loader}"] = difference / float(here.abs().max())
    return found | {"gptqmodel": answer["versions"]}


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The ratios that sum it up: the best 4- and 3-bit perplexity over fp32's, and GPTQ's increase over RTN's."""
    exact = rows["fp32"]["perplexity"]
    found = {}
    for bits in (4, 3):
        own = [r["perplexity"] for r in rows.values() if r["bits"] == bits and r["method"] in ("gptq", "rtn")]
        found[f"best_{bits}bit_over_fp32"] = min(own) / exact
        gained = rows[f"GPTQ {bits} bits"]["perplexity"] - exact
        found[f"gptq_over_rtn_{bits}bit"] = gained / (rows[f"RTN {bits} bits"]["perplexity"] - exact)
    if peer := rows.get("GPTQModel 4 bits"):
        found["perplexity_vs_gptqmodel"] = rows["GPTQ 4 bits"]["perplexity"] / peer["perplexity"]
    return found


class _Exact:
    """The fp32 model's answers, against which every variant is held."""

    def __init__(self, lm: LM, text: str, questions: list[Question]) -> None:
        self.text, self.questions = text, questions
        ids = torch.tensor(lm.encode(text)[: DIVERGENCE_WINDOWS * CONTEXT])
        self.windows = ids.view(-1, min(CONTEXT, len(ids))).to(lm.device)
        self.log_probs = [self._log_probs(lm, window) for window in self.windows]
        self.predictions = score(lm, questions).predictions_norm
        self.protocol = ""

    def quality(self, lm: LM) -> dict[str, Any]:
        result = perplexity(lm, self.text, context=CONTEXT, max_windows=WINDOWS)
        self.protocol = result.protocol
        scores = score(lm, self.questions)
        accuracy = scores.acc_norm
        changed = sum(a != b for a, b in zip(self.predictions, scores.predictions_norm, strict=True))
        return {
            "perplexity": result.perplexity.value,
            "perplexity_interval": [result.perplexity.low, result.perplexity.high],
            "acc_norm": accuracy.value,
            "acc_norm_interval": [accuracy.low, accuracy.high],
            "answers_changed": changed,
            "kl_divergence": self._divergence(lm),
        }

    def _divergence(self, lm: LM) -> float:
        """Mean over positions of KL(exact || this) of the next token, in nats."""
        total = [
            float((exact.exp() * (exact - self._log_probs(lm, window))).sum(-1).mean())
            for exact, window in zip(self.log_probs, self.windows, strict=True)
        ]
        return sum(total) / len(total)

    @torch.inference_mode()
    def _log_probs(self, lm: LM, window: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = lm.model(input_ids=window[None], use_cache=False).logits[0]
        return logits.float().log_softmax(-1)


def _size(lm: LM) -> dict[str, Any]:
    """Bytes of the model, and bits a weight of the decoder layers' Linears as saved."""
    found: dict[str, Any] = {"bytes": lm.weight_bytes}
    if any(isinstance(m, QuantLinear) for m in lm.model.modules()):
        found["bits_per_weight"] = bits_per_weight(lm.model)
    return found


def _speeds(lm: LM, kept: dict[str, LM], repeats: int) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Decode and prefill tokens/s of everything in `kept` beside fp32 and half precision, if fast here, interleaved."""
    half = half_dtype(lm.device)
    plain = {"fp32": lm} | ({half: with_dtype(lm, half)} if half else {})
    models = plain | kept
    decoding = {name: [0.0] for name in models}

    def decode(name: str) -> Callable[[], None]:
        def run() -> None:
            made = generate(models[name], ["The capital of France is"], max_new_tokens=NEW_TOKENS)
            decoding[name].append(made.seconds_decode / max(1, made.decoded_tokens))

        return run

    compare({name: decode(name) for name in models}, warmup=1, min_runs=repeats)
    seconds = {name: Timing(name, values[2:], 1) for name, values in decoding.items()}
    phases = {name: prefill(model, CONTEXT) for name, model in models.items()}
    prefills = compare({name: phase.run for name, phase in phases.items()}, warmup=1, min_runs=repeats)
    found = {
        name: {
            "decode_tokens_per_s": 1 / seconds[name].median.value,
            "prefill_tokens_per_s": CONTEXT / prefills[name].median.value,
        }
        for name in models
    }
    ratios: dict[str, Any] = {}
    for name in plain:
        ratio = speedup(seconds[name], seconds["rotated GPTQ 4 bits"])
        ratios[f"decode_speedup_vs_{name}"] = ratio.value
        ratios[f"decode_speedup_vs_{name}_interval"] = [ratio.low, ratio.high]
    return found, ratios


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    return (
        f"{row['variant']:<30} perplexity {row['perplexity']:8.2f}   acc_norm {row['acc_norm']:.3f}   "
        f"KL {row['kl_divergence']:.4f} nat"
    )


def quantizing(lm: LM, report: Report) -> Measurement:
    """What quantizing a model cost and lost, for a record."""
    worst: dict[str, Any] = max(report.linears, key=lambda linear: float(linear["error"]))
    values = {
        "seconds": Metric(report.seconds, "s"),
        "bits_per_weight": Metric(_size(lm)["bits_per_weight"], "bit"),
        "bytes": Metric(lm.weight_bytes, "B"),
        "worst_error": Metric(worst["error"]),
    }
    protocol = f"{report.tokens} calibration tokens; relative squared error of outputs, worst in {worst['name']}"
    return Measurement("quantize", values, len(report.linears), protocol)


def measurement(result: dict[str, Any]) -> Measurement:
    """The benchmark's main numbers for a record."""
    names = ("best_4bit_over_fp32", "best_3bit_over_fp32", "gptq_over_rtn_4bit", "gptq_over_rtn_3bit")
    values = {name: Metric(result[name], "x") for name in names}
    for name in [n for n in result if n.startswith("decode_speedup_vs_") and not n.endswith("_interval")]:
        values[name] = Metric(result[name], "x", *result[f"{name}_interval"])
    protocol = f"{result['perplexity_protocol']}; {result['calibration_tokens']} calibration tokens"
    assert all(math.isfinite(v.value) for v in values.values())
    return Measurement("bench quantization", values, result["n"], protocol)
