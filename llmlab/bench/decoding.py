"""`llmlab bench decoding`: engines and drafts against transformers and llama.cpp, same prompts, interleaved.

Every engine decodes greedily from the same token ids. A unit is a group of prompts of one kind; all engines run it in
turn, in an order that turns with the unit and the repeat. Speed counts the tokens after the first one, from ids, over
the time after the first one; the time to first token stands beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmlab.base.stats import Metric
from llmlab.bench.decoders import Decoder, Run, llamacpp, own, transformers_generate
from llmlab.data import Prompt
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import encode_prompts, end_tokens
from llmlab.measure.record import Measurement
from llmlab.measure.roofline import measure_bandwidth
from llmlab.model.lm import LM

COPYING = ("summarize", "edit")  # kinds whose output repeats the prompt: where lookup should pay
BATCHES = (4, 8)


@dataclass
class Unit:
    """Prompts of one kind that are decoded together, and what every engine made of them, run by run."""

    kind: str
    prompts: list[list[int]]
    runs: dict[str, list[Run]] = field(default_factory=dict)

    def seconds(self, engine: str) -> float:
        """Median seconds of decoding behind the first token."""
        return statistics.median(run.seconds_decode for run in self.runs[engine])

    def tokens(self, engine: str) -> int:
        """Tokens behind the first pass."""
        return self.runs[engine][0].decoded


def units(lm: LM, prompts: Sequence[Prompt], batch: int, most: int, new_tokens: int) -> list[Unit]:
    """Up to `most` units of `batch` prompts for each kind, as chat turns where the model has a template."""
    chat = bool(getattr(lm.tokenizer, "chat_template", None))
    by_kind: dict[str, list[str]] = {}
    for prompt in prompts:
        by_kind.setdefault(prompt.kind, []).append(prompt.text)
    found = []
    for kind, texts in by_kind.items():
        for first in range(0, len(texts) - batch + 1, batch)[:most]:
            encoded = encode_prompts(lm, texts[first : first + batch], max_new_tokens=new_tokens, chat=chat)
            found.append(Unit(kind, encoded))
    return found


def run_all(
    decoders: Sequence[Decoder], work: Sequence[Unit], repeats: int, on_unit: Callable[[], None] = lambda: None
) -> None:
    """Every decoder on every unit, `repeats` times, after each decoder has run the first unit once uncounted."""
    for decoder in decoders:
        decoder.run(work[0].prompts)
    for repeat in range(repeats):
        for number, unit in enumerate(work):
            shift = (repeat + number) % len(decoders)
            for decoder in [*decoders[shift:], *decoders[:shift]]:
                unit.runs.setdefault(decoder.name, []).append(decoder.run(unit.prompts))
            on_unit()


def bench_decoding(
    lm: LM,
    half: LM | None,
    packed: LM,
    prompts: Sequence[Prompt],
    *,
    gguf: str | None,
    new_tokens: int = 128,
    units_per_kind: int = 2,
    repeats: int = 3,
    compile: bool = True,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Everything that the benchmark reports.

    Args:
        lm: the model in fp32.
        half: in bf16 or fp16; None where neither is fast.
        packed: its own 4-bit copy, as `drafting.self_4bit` makes it.
        prompts: with their kinds.
        gguf: path of the same model's 4-bit file for llama.cpp; None if there is none.
        new_tokens: at most so many a prompt.
        units_per_kind: prompts of each kind at batch 1; larger batches take one unit of each kind.
        repeats: counted runs of each engine on each unit.
        compile: measure torch.compile, too; it compiles for a minute or two first.
        on_row: called with each finished row.

    Returns:
        A dictionary ready for JSON.
    """
    exact, small = Engine(lm), Engine(packed)
    ends = end_tokens(lm)
    single: dict[str, list[Decoder]] = {
        lm.dtype: [
            transformers_generate(lm, new_tokens),
            transformers_generate(lm, new_tokens, lookup=True),
            transformers_generate(lm, new_tokens, assistant=packed),
            own(exact, new_tokens),
            *([own(Engine(lm, compile=True), new_tokens, name="compiled")] if compile else []),
            own(exact, new_tokens, "lookup"),
            own(exact, new_tokens, "self-4bit", packed),
            own(exact, new_tokens, "lookup, self-4bit", packed),
        ],
        "4-bit": [own(small, new_tokens)],
    }
    if half:
        quick = Engine(half)
        single[half.dtype] = [
            transformers_generate(half, new_tokens),
            own(quick, new_tokens),
            own(quick, new_tokens, "lookup"),
            own(quick, new_tokens, "self-4bit", packed),
        ]
    peer, reason = llamacpp(gguf, new_tokens, ends)
    single["4-bit"] += peer
    rows: list[dict[str, Any]] = []
    bandwidth = measure_bandwidth(lm.device).value
    one = units(lm, prompts, 1, units_per_kind, new_tokens)
    everything = [decoder for decoders in single.values() for decoder in decoders]
    run_all(everything, one, repeats)
    for decoders in single.values():
        # The first: transformers' plain greedy decoding, or where it has none ours.
        for decoder in decoders:
            rows += compare_rows(decoder, one, 1, decoders[0], bandwidth, next(d for d in decoders if d.plain))
    for batch in BATCHES:
        work = units(lm, prompts, batch, 1, new_tokens)
        if not work:
            continue
        several = [own(exact, new_tokens), own(exact, new_tokens, "lookup")]
        run_all(several, work, repeats)
        for decoder in several:
            rows += compare_rows(decoder, work, batch, several[0], bandwidth, several[0])
    for row in rows:
        on_row(row)
    found = {
        "prompts": len(prompts),
        "new_tokens": new_tokens,
        "repeats": repeats,
        "bandwidth_bytes_per_s": bandwidth,
        "llamacpp": reason,
        "rows": rows,
    }
    return found | summary(rows, lm.dtype, half.dtype if half else None)


def compare_rows(
    decoder: Decoder, work: Sequence[Unit], batch: int, reference: Decoder, bandwidth: float, plain: Decoder
) -> list[dict[str, Any]]:
    """What a decoder did, a row for each kind and one for all of them.

    Args:
        decoder: it has run `work`, as have the two others.
        work: the units.
        batch: prompts in each.
        reference: whose ids count as right.
        bandwidth: bytes/s of this device, for MBU.
        plain: the baseline of speed-ups.
    """
    kinds = list(dict.fromkeys(unit.kind for unit in work))
    return [
        _row(decoder, [u for u in work if kind in ("all", u.kind)], kind, batch, reference, bandwidth, plain)
        for kind in [*kinds, "all"]
    ]


def _row(
    decoder: Decoder, work: list[Unit], kind: str, batch: int, reference: Decoder, bandwidth: float, plain: Decoder
) -> dict[str, Any]:
    name = decoder.name
    seconds = sum(unit.seconds(name) for unit in work)
    speed = sum(unit.tokens(name) for unit in work) / seconds
    base = sum(unit.tokens(plain.name) for unit in work) / sum(unit.seconds(plain.name) for unit in work)
    # The spread: the same sums with every unit's first, second, ... run.
    repeats = len(work[0].runs[name])
    speeds = [
        sum(u.tokens(name) for u in work) / sum(u.runs[name][r].seconds_decode for u in work) for r in range(repeats)
    ]
    row: dict[str, Any] = {
        "engine": decoder.engine,
        "draft": decoder.draft,
        "dtype": decoder.dtype,
        "kind": kind,
        "batch": batch,
        "tokens_per_s": speed,
        "tokens_per_s_low": min(speeds),
        "tokens_per_s_high": max(speeds),
        "seconds_first_token": statistics.median(r.seconds_first for u in work for r in u.runs[name]),
        "speedup_vs_plain": speed / base,
        "speedup_low": min(speeds) / base,
        "speedup_high": max(speeds) / base,
    }
    if decoder.plain and decoder.bytes_per_pass:
        row["mbu"] = decoder.bytes_per_pass * speed / batch / bandwidth
    tallies = [run.speculation for unit in work for run in unit.runs[name] if run.speculation]
    if tallies:
        predicted = sum(t.expected for t in tallies) / sum(t.seconds for t in tallies)
        without = sum(t.tokens for t in tallies) / sum(t.plain_seconds for t in tallies)
        row |= {
            "acceptance_rate": sum(t.accepted for t in tallies) / max(1, sum(t.trials for t in tallies)),
            "mean_accepted": sum(t.accepted for t in tallies) / max(1, sum(t.rows for t in tallies)),
            "predicted_speedup": predicted / without,
        }
        row["cost_model_error"] = row["predicted_speedup"] / row["speedup_vs_plain"] - 1
    differences = [d for unit in work if (d := _difference(unit, name, reference))]
    row["equal_to_reference"] = not differences
    row["reference"] = reference.name
    row["prompts_that_differ"] = sum(d["prompts"] for d in differences)
    row["first_difference"] = differences[0] if differences else None
    return row


def _difference(unit: Unit, name: str, reference: Decoder) -> dict[str, Any] | None:
    """The first place where the ids of two engines part, with the gap between the two logits there (in nats)."""
    pairs = zip(unit.prompts, unit.runs[reference.name][0].ids, unit.runs[name][0].ids, strict=True)
    parted = [
        (prompt, one, other, next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None))
        for prompt, one, other in pairs
        if one != other
    ]
    if not parted:
        return None
    prompt, one, other, place = parted[0]
    if place is None:  # one is the beginning of the other
        return {"kind": unit.kind, "prompts": len(parted), "position": min(len(one), len(other)), "logit_gap": None}
    gap = None
    if reference.lm is not None:
        with torch.inference_mode():
            ids = torch.tensor([prompt + one[:place]], device=reference.lm.device)
            logits = reference.lm.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        gap = float(logits[one[place]] - logits[other[place]])
    return {
        "kind": unit.kind, "prompts": len(parted), "position": place, "expected": one[place], "found": other[place],
        "logit_gap": gap,
    }  # fmt: skip


def summary(rows: Sequence[dict[str, Any]], exact: str, half: str | None) -> dict[str, Any]:
    """The ratios that sum it up; all kinds together unless the name says otherwise. None for what was not run."""

    def speed(
        engine: str, draft: str, dtype: str | None, batch: int = 1, kinds: Sequence[str] = ("all",)
    ) -> float | None:
        found = [
            r["tokens_per_s"]
            for r in rows
            if (r["engine"], r["draft"], r["dtype"], r["batch"]) == (engine, draft, dtype, batch) and r["kind"] in kinds
        ]
        return statistics.harmonic_mean(found) if found else None

    def ratio(one: float | None, other: float | None) -> float | None:
        return one / other if one and other else None

    copying = [r["kind"] for r in rows if r["kind"] in COPYING] or ["all"]
    lookup = speed("llmlab", "lookup", exact, kinds=copying)
    most = [batch for batch in BATCHES if speed("llmlab", "", exact, batch)][-1:]
    at_most = [r for r in rows if most and r["batch"] == most[0] and r["draft"] == "lookup"]
    errors = [r["cost_model_error"] for r in rows if r["kind"] == "all" and "cost_model_error" in r]
    speculating = [r for r in rows if r["engine"] == "llmlab" and r["dtype"] == exact]
    return {
        "greedy_equal": all(r["equal_to_reference"] for r in speculating),
        "plain_speedup_vs_transformers": ratio(speed("llmlab", "", exact), speed("transformers", "", exact)),
        "plain_speedup_vs_transformers_bf16": ratio(speed("llmlab", "", half), speed("transformers", "", half)),
        "int4_vs_llamacpp": ratio(speed("llmlab", "", "4-bit"), speed("llama.cpp", "", "4-bit")),
        "lookup_speedup_vs_plain": ratio(lookup, speed("llmlab", "", exact, kinds=copying)),
        "lookup_speedup_vs_transformers": ratio(lookup, speed("transformers", "lookup", exact, kinds=copying)),
        "self_draft_speedup": ratio(speed("llmlab", "self-4bit", exact), speed("llmlab", "", exact)),
        "self_draft_speedup_bf16": ratio(speed("llmlab", "self-4bit", half), speed("llmlab", "", half)),
        "batch8_worst_ratio": min((r["speedup_vs_plain"] for r in at_most), default=None),
        "batch8_copying_ratio": min((r["speedup_vs_plain"] for r in at_most if r["kind"] in COPYING), default=None),
        "cost_model_error": max(map(abs, errors), default=None),
    }


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    name = f"{row['engine']}{' + ' + row['draft'] if row['draft'] else ''}, {row['dtype']}"
    said = f"{name:<40} {row['kind']:<10} batch {row['batch']}  {row['tokens_per_s']:7.1f} token/s"
    if "acceptance_rate" in row:
        said += f"  accepted {row['acceptance_rate']:.0%}, {row['mean_accepted']:.2f} a pass"
        said += f", {row['speedup_vs_plain']:.2f}x (predicted {row['predicted_speedup']:.2f}x)"
    return said if row["equal_to_reference"] else f"{said}  differs in {row['prompts_that_differ']}"


def measurement(result: dict[str, Any]) -> Measurement:
    """The benchmark's main numbers for a record."""
    names = [name for name, value in result.items() if isinstance(value, float) and name != "bandwidth_bytes_per_s"]
    values = {name: Metric(result[name], "" if name == "cost_model_error" else "x") for name in names}
    values["greedy_equal"] = Metric(float(result["greedy_equal"]))
    assert all(math.isfinite(metric.value) for metric in values.values())
    protocol = (
        f"greedy, up to {result['new_tokens']} new tokens, same ids for every engine, interleaved, median of "
        f"{result['repeats']}; decode speed behind the first token; baselines: transformers generate and plain decoding"
    )
    return Measurement("bench decoding", values, result["prompts"], protocol)
