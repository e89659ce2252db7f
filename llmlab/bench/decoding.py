"""`llmlab bench decoding`: engines and drafts against transformers and llama.cpp, same prompts, interleaved.

Every engine decodes greedily from the same token ids. A unit is a group of prompts of one kind; all engines run it in
turn, in an order that turns with the unit and the repeat. Speed counts the tokens after the first one, from ids, over
the time after the first one; the time to first token stands beside it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmlab.base.stats import Metric
from llmlab.bench.decoders import Decoder, llamacpp, own, transformers_generate
from llmlab.data import Prompt
from llmlab.decoding.cost import Tally
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import encode_prompts, end_tokens
from llmlab.decoding.writer import Run
from llmlab.measure.record import Measurement
from llmlab.measure.roofline import measure_bandwidth
from llmlab.model.lm import LM

COPYING = ("summarize", "edit")  # kinds whose output repeats the prompt: where lookup should pay
BATCHES = (4, 8)

Row = dict[str, Any]  # ready for JSON


@dataclass
class Unit:
    """Prompts of one kind that are decoded together, and what every engine made of them, run by run."""

    kind: str
    prompts: list[list[int]]
    runs: dict[str, list[Run]] = field(default_factory=dict)


@dataclass(frozen=True)
class Effort:
    """How much a benchmark measures.

    Attributes:
        new_tokens: at most so many a prompt.
        units_per_kind: prompts of each kind at batch 1; larger batches take one unit of each kind.
        repeats: counted runs of each engine on each unit.
        compile: measure torch.compile, too; it compiles for a minute or two first.
    """

    new_tokens: int = 128
    units_per_kind: int = 2
    repeats: int = 3
    compile: bool = True


def units(lm: LM, prompts: Sequence[Prompt], batch: int, most: int, new_tokens: int) -> list[Unit]:
    """Up to `most` units of `batch` prompts for each kind, as chat turns where the model has a template."""
    chat = lm.has_chat_template
    by_kind: dict[str, list[str]] = {}
    for prompt in prompts:
        by_kind.setdefault(prompt.kind, []).append(prompt.text)
    return [
        Unit(kind, encode_prompts(lm, texts[first : first + batch], max_new_tokens=new_tokens, chat=chat))
        for kind, texts in by_kind.items()
        for first in range(0, len(texts) - batch + 1, batch)[:most]
    ]


def run_all(decoders: Sequence[Decoder], work: Sequence[Unit], repeats: int) -> None:
    """Every decoder on every unit, `repeats` times, after each decoder has run the first unit once uncounted."""
    for decoder in decoders:
        decoder.run(work[0].prompts)
    for repeat in range(repeats):
        for number, unit in enumerate(work):
            shift = (repeat + number) % len(decoders)
            for decoder in [*decoders[shift:], *decoders[:shift]]:
                unit.runs.setdefault(decoder.name, []).append(decoder.run(unit.prompts))


def bench_decoding(
    lm: LM,
    half: LM | None,
    packed: LM,
    prompts: Sequence[Prompt],
    *,
    gguf: str | None,
    effort: Effort,
    on_row: Callable[[Row], None] = lambda row: None,
) -> Row:
    """Everything that the benchmark reports.

    Args:
        lm: the model in fp32.
        half: in bf16 or fp16; None where neither is fast.
        packed: its own 4-bit copy, as `llmlab.self_4bit` makes it.
        prompts: with their kinds.
        gguf: path of the same model's 4-bit file for llama.cpp; None if there is none.
        effort: how much of it to measure.
        on_row: called with each finished row.

    Returns:
        A dictionary ready for JSON.
    """
    exact, new_tokens, repeats = Engine(lm), effort.new_tokens, effort.repeats
    peer, reason = llamacpp(gguf, new_tokens, end_tokens(lm))
    single = _single_decoders(exact, half, packed, new_tokens, effort.compile) + [*peer]
    bandwidth = measure_bandwidth(lm.device).value
    work = units(lm, prompts, 1, effort.units_per_kind, new_tokens)
    run_all(single, work, repeats)
    rows: list[Row] = []
    for decoder in single:
        alike = [other for other in single if other.dtype == decoder.dtype]
        # The first: transformers' plain greedy decoding, or where it has none ours.
        rows += compare_rows(decoder, work, 1, alike[0], bandwidth, next(d for d in alike if d.plain))
    for batch in BATCHES:
        if work := units(lm, prompts, batch, 1, new_tokens):
            plain, lookup = own(exact, new_tokens), own(exact, new_tokens, "lookup")
            run_all([plain, lookup], work, repeats)
            for decoder in (plain, lookup):
                rows += compare_rows(decoder, work, batch, plain, bandwidth, plain)
    for row in rows:
        on_row(row)
    told = {"prompts": len(prompts), "new_tokens": new_tokens, "repeats": repeats, "bandwidth_bytes_per_s": bandwidth}
    return told | {"llamacpp": reason, "rows": rows} | summary(rows, lm.dtype, half.dtype if half else None)


def _single_decoders(exact: Engine, half: LM | None, packed: LM, new_tokens: int, compile: bool) -> list[Decoder]:
    """All that decode one prompt at a time; of each dtype the first is what the others' ids are compared with."""
    lm = exact.lm
    decoders = [
        transformers_generate(lm, new_tokens),
        transformers_generate(lm, new_tokens, lookup=True),
        transformers_generate(lm, new_tokens, assistant=packed),
        own(exact, new_tokens),
        *([own(Engine(lm, compile=True), new_tokens, name="compiled")] if compile else []),
        *(own(exact, new_tokens, draft, packed) for draft in ("lookup", "self-4bit", "lookup, self-4bit")),
        own(Engine(packed), new_tokens),
    ]
    if half:
        engine = Engine(half)
        decoders.append(transformers_generate(half, new_tokens))
        decoders += [own(engine, new_tokens, draft, packed) for draft in ("", "lookup", "self-4bit")]
    return decoders


def compare_rows(
    decoder: Decoder, work: Sequence[Unit], batch: int, reference: Decoder, bandwidth: float, plain: Decoder
) -> list[Row]:
    """What a decoder did, a row for each kind and one for all of them.

    Args:
        decoder: it has run `work`, as have the two others.
        work: the units.
        batch: prompts in each.
        reference: whose ids count as right.
        bandwidth: bytes/s of this device, for MBU.
        plain: the baseline of speed-ups.
    """
    rows = []
    for kind in [*dict.fromkeys(unit.kind for unit in work), "all"]:
        some = [unit for unit in work if kind in ("all", unit.kind)]
        row: Row = {"engine": decoder.engine, "draft": decoder.draft, "dtype": decoder.dtype, "kind": kind}
        row |= {"batch": batch} | _speeds(some, decoder, plain)
        if decoder.plain and decoder.bytes_per_pass:
            row["mbu"] = decoder.bytes_per_pass * row["tokens_per_s"] / batch / bandwidth
        if tallies := [run.speculation for unit in some for run in unit.runs[decoder.name] if run.speculation]:
            row |= _speculation(tallies)
            row["cost_model_error"] = row["predicted_speedup"] / row["speedup_vs_plain"] - 1
        differences = [d for unit in some if (d := _difference(unit, decoder.name, reference))]
        rows.append(
            row
            | {
                "equal_to_reference": not differences,
                "reference": reference.name,
                "prompts_that_differ": sum(d["prompts"] for d in differences),
                "first_difference": differences[0] if differences else None,
            }
        )
    return rows


def _speeds(work: Sequence[Unit], decoder: Decoder, plain: Decoder) -> Row:
    """Tokens a second behind the first pass: by the median run of each unit, and by its first, second, ... run."""
    runs = [unit.runs[decoder.name] for unit in work]
    tokens = sum(of_unit[0].decoded for of_unit in runs)
    every = [tokens / sum(run.seconds_decode for run in same) for same in zip(*runs, strict=True)]
    speed, base = _speed(work, decoder), _speed(work, plain)
    return {
        "tokens_per_s": speed, "tokens_per_s_low": min(every), "tokens_per_s_high": max(every),
        "seconds_first_token": statistics.median(run.seconds_first for of_unit in runs for run in of_unit),
        "speedup_vs_plain": speed / base, "speedup_low": min(every) / base, "speedup_high": max(every) / base,
    }  # fmt: skip


def _speed(work: Sequence[Unit], decoder: Decoder) -> float:
    runs = [unit.runs[decoder.name] for unit in work]
    seconds = sum(statistics.median(run.seconds_decode for run in of_unit) for of_unit in runs)
    return sum(of_unit[0].decoded for of_unit in runs) / seconds


def _speculation(tallies: list[Tally]) -> Row:
    predicted = sum(t.expected for t in tallies) / sum(t.seconds for t in tallies)
    without = sum(t.tokens for t in tallies) / sum(t.plain_seconds for t in tallies)
    accepted = sum(t.accepted for t in tallies)
    return {
        "acceptance_rate": accepted / max(1, sum(t.trials for t in tallies)),
        "mean_accepted": accepted / max(1, sum(t.rows for t in tallies)),
        "predicted_speedup": predicted / without,
    }


def _difference(unit: Unit, name: str, reference: Decoder) -> Row | None:
    """The first place where the ids of two engines part, with the gap between the two logits there (in nats)."""
    pairs = zip(unit.prompts, unit.runs[reference.name][0].ids, unit.runs[name][0].ids, strict=True)
    parted = [(prompt, right, ids) for prompt, right, ids in pairs if right != ids]
    if not parted:
        return None
    prompt, right, ids = parted[0]
    common = min(len(right), len(ids))
    place = next((i for i in range(common) if right[i] != ids[i]), common)
    row: Row = {"kind": unit.kind, "prompts": len(parted), "position": place, "logit_gap": None}
    if place == common:  # the one is the beginning of the other
        return row
    if reference.lm is not None:
        with torch.inference_mode():
            past = torch.tensor([prompt + right[:place]], device=reference.lm.device)
            logits = reference.lm.model(input_ids=past, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        row["logit_gap"] = float(logits[right[place]] - logits[ids[place]])
    return row | {"expected": right[place], "found": ids[place]}


def summary(rows: Sequence[Row], exact: str, half: str | None) -> Row:
    """The ratios that sum it up; all kinds together unless the name says otherwise. None for what was not run."""
    copying = tuple(r["kind"] for r in rows if r["kind"] in COPYING) or ("all",)

    def speed(engine: str, draft: str, dtype: str | None, kinds: tuple[str, ...]) -> float | None:
        wanted = (engine, draft, dtype, 1)
        alike = [r for r in rows if (r["engine"], r["draft"], r["dtype"], r["batch"]) == wanted and r["kind"] in kinds]
        return statistics.harmonic_mean(r["tokens_per_s"] for r in alike) if alike else None

    def ratio(
        draft: str, dtype: str | None, over: str, over_draft: str = "", kinds: tuple[str, ...] = ("all",)
    ) -> float | None:
        ours, theirs = speed("llmlab", draft, dtype, kinds), speed(over, over_draft, dtype, kinds)
        return ours / theirs if ours and theirs else None

    largest = max((r["batch"] for r in rows if r["batch"] in BATCHES), default=None)
    batched = [r for r in rows if r["batch"] == largest and r["draft"] == "lookup"]
    errors = [abs(r["cost_model_error"]) for r in rows if r["kind"] == "all" and "cost_model_error" in r]
    return {
        "greedy_equal": all(r["equal_to_reference"] for r in rows if (r["engine"], r["dtype"]) == ("llmlab", exact)),
        "plain_speedup_vs_transformers": ratio("", exact, "transformers"),
        "plain_speedup_vs_transformers_bf16": ratio("", half, "transformers"),
        "int4_vs_llamacpp": ratio("", "4-bit", "llama.cpp"),
        "lookup_speedup_vs_plain": ratio("lookup", exact, "llmlab", kinds=copying),
        "lookup_speedup_vs_transformers": ratio("lookup", exact, "transformers", "lookup", copying),
        "self_draft_speedup": ratio("self-4bit", exact, "llmlab"),
        "self_draft_speedup_bf16": ratio("self-4bit", half, "llmlab"),
        "batch8_worst_ratio": min((r["speedup_vs_plain"] for r in batched), default=None),
        "batch8_copying_ratio": min((r["speedup_vs_plain"] for r in batched if r["kind"] in COPYING), default=None),
        "cost_model_error": max(errors, default=None),
    }


def line(row: Row) -> str:
    """One row for people."""
    name = f"{row['engine']}{' + ' + row['draft'] if row['draft'] else ''}, {row['dtype']}"
    said = f"{name:<40} {row['kind']:<10} batch {row['batch']}  {row['tokens_per_s']:7.1f} token/s"
    if "acceptance_rate" in row:
        said += f"  accepted {row['acceptance_rate']:.0%}, {row['mean_accepted']:.2f} a pass"
        said += f", {row['speedup_vs_plain']:.2f}x (predicted {row['predicted_speedup']:.2f}x)"
    return said if row["equal_to_reference"] else f"{said}  differs in {row['prompts_that_differ']}"


def measurement(result: Row) -> Measurement:
    """The benchmark's main numbers for a record."""
    names = [name for name, value in result.items() if isinstance(value, float) and name != "bandwidth_bytes_per_s"]
    values = {name: Metric(result[name], "" if name == "cost_model_error" else "x") for name in names}
    values["greedy_equal"] = Metric(float(result["greedy_equal"]))
    protocol = (
        f"greedy, up to {result['new_tokens']} new tokens, same ids for every engine, interleaved, median of "
        f"{result['repeats']}; decode speed behind the first token; baselines: transformers generate and plain decoding"
    )
    return Measurement("bench decoding", values, result["prompts"], protocol)
