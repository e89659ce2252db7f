"""`llmlab bench decoding`: engines and drafts against transformers and llama.cpp, same prompts, interleaved.

Every engine decodes greedily from the same token ids. A unit is a group of prompts of one kind; all engines run it in
turn, in an order that turns with the unit and the repeat. Speed counts the tokens after the first one, from ids, over
the time after the first one; the time to first token stands beside it. A machine's pace changes within seconds, so that
a speed-up over plain decoding is told in pairs: each run against the plain one nearest to it, and of these the median.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from llmlab.base.progress import progress
from llmlab.base.stats import Metric
from llmlab.bench.decoders import Decoder, llamacpp, own, transformers_generate
from llmlab.data import Prompt, ids_fingerprint
from llmlab.decoding.cost import Tally
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import encode_prompts
from llmlab.decoding.writer import Run
from llmlab.jobs.own_draft import self_4bit
from llmlab.kernels.packed_linear import QuantLinear, quant_linears
from llmlab.measure.record import Measurement, Row
from llmlab.measure.roofline import measure_bandwidth
from llmlab.model.lm import LM
from llmlab.model.sources import resolve

COPYING = ("summarize", "edit")  # kinds whose output repeats the prompt: where lookup should pay
BATCHES = (4, 8)
CASCADE = "suffix, recycling"  # the best without a model that drafts
FREE_DRAFTS = ("lookup", "suffix", "recycling", CASCADE)


@dataclass
class Unit:
    """Prompts of one kind that are decoded together, and what every engine made of them, in the order of the runs."""

    kind: str
    prompts: list[list[int]]
    log: list[tuple[str, Run]] = field(default_factory=list)

    def runs(self, name: str) -> list[Run]:
        """Those of one decoder."""
        return [run for of, run in self.log if of == name]

    def pairs(self, name: str, plain: str) -> list[tuple[Run, Run]]:
        """Each run of a decoder with the nearest one of another."""
        places = [i for i, (of, _) in enumerate(self.log) if of == plain]

        def nearest(i: int) -> Run:
            return self.log[min(places, key=lambda j: abs(j - i))][1]

        return [(run, nearest(i)) for i, (of, run) in enumerate(self.log) if of == name]


def units(lm: LM, prompts: Sequence[Prompt], batch: int, most: int, new_tokens: int) -> list[Unit]:
    """Up to `most` units of `batch` prompts for each kind, as chat turns where the model has a template."""
    by_kind = {kind: [p.text for p in prompts if p.kind == kind] for kind in dict.fromkeys(p.kind for p in prompts)}
    return [
        Unit(kind, encode_prompts(lm, texts[k : k + batch], max_new_tokens=new_tokens, chat=lm.has_chat_template))
        for kind, texts in by_kind.items()
        for k in range(0, len(texts) - batch + 1, batch)[:most]
    ]


def run_all(decoders: Sequence[Decoder], work: Sequence[Unit], repeats: int) -> None:
    """Every decoder on every unit, `repeats` times, after each decoder has run the first unit once uncounted."""
    for decoder in decoders:
        decoder.run(work[0].prompts)
    turn = beside_plain(decoders)
    with progress(repeats * len(work) * len(turn), f"batch size {len(work[0].prompts)}", "run") as bar:
        for repeat in range(repeats):
            for number, unit in enumerate(work):
                shift = (repeat + number) % len(turn)
                for decoder in [*turn[shift:], *turn[:shift]]:
                    unit.log.append((decoder.name, decoder.run(unit.prompts)))
                    bar.update()


def beside_plain(decoders: Sequence[Decoder]) -> list[Decoder]:
    """The decoders with the plain one again behind every second that drafts: plain, draft, draft, plain, draft, ..."""
    turn, plain, drafts = list[Decoder](), dict[str, Decoder](), 0
    for decoder in decoders:
        if decoder.plain:
            plain[decoder.dtype], drafts = decoder, 0
        elif decoder.speculates:
            if drafts == 2:
                turn.append(plain[decoder.dtype])
                drafts = 0
            drafts += 1
        turn.append(decoder)
    return turn


def bench_decoding(
    lm: LM, half: LM | None, prompts: Sequence[Prompt], *, new_tokens: int, per_kind: int, repeats: int, compile: bool
) -> Measurement:
    """Everything that the benchmark reports, ready for JSON in `details`.

    `lm` is in fp32, `half` the same in bf16 or fp16 or None where neither is fast. Of each kind of prompt it takes
    `per_kind` at batch 1 and one unit in larger batches; `compile` measures torch.compile, too.
    """
    exact, source = Engine(lm), resolve(lm.name)
    peer, reason = llamacpp(source.location if source.kind == "gguf" else None, new_tokens, lm)
    packed = self_4bit(lm)
    single = _single_decoders(exact, half, packed, new_tokens, compile) + [*peer]
    bandwidth = measure_bandwidth(lm.device).value
    work = units(lm, prompts, 1, per_kind, new_tokens)
    settings = {"max_new_tokens": str(new_tokens), "token_ids": ids_fingerprint(unit.prompts[0] for unit in work)}
    run_all(single, work, repeats)
    rows: list[Row] = []
    for decoder in single:
        alike = [other for other in single if other.dtype == decoder.dtype]
        # The first: transformers' plain greedy decoding, or where it has none ours.
        rows += compare_rows(decoder, work, 1, alike[0], bandwidth, next(d for d in alike if d.plain))
    for batch in BATCHES:
        if work := units(lm, prompts, batch, 1, new_tokens):
            plain, *drafting = (own(exact, new_tokens, draft) for draft in ("", *FREE_DRAFTS))
            run_all([plain, *drafting], work, repeats)
            rows += [row for d in (plain, *drafting) for row in compare_rows(d, work, batch, plain, bandwidth, plain)]
    ratios = summary(rows, lm.dtype, half.dtype if half else None)
    ours = [row for row in rows if (row["engine"], row["dtype"]) == ("llmlab", lm.dtype)]
    equal = all(row["equal_to_reference"] for row in ours)
    values = {
        name: Metric(value, "" if "error" in name else "x") for name, value in ratios.items() if value is not None
    }
    protocol = (
        f"greedy, up to {new_tokens} new tokens, same ids for every engine, interleaved, median of "
        f"{repeats}; decode speed behind the first token; baselines: transformers generate and plain decoding"
    )
    head = packed.model.get_output_embeddings()
    kernels = ", ".join(sorted({linear.kernel for linear in quant_linears(packed.model)}))
    told: Row = {"kernel": kernels, "head_bits": head.bits if isinstance(head, QuantLinear) else None}
    told |= {"prompts": len(prompts), "new_tokens": new_tokens, "repeats": repeats}
    told |= {"bandwidth_bytes_per_s": bandwidth}
    cascade = [row for row in ours if (row["draft"], row["batch"]) == (CASCADE, 1)]
    by_kind = {"cascade_speedup": {row["kind"]: row["speedup_vs_plain"] for row in cascade}}
    details = told | {"llamacpp": reason, "rows": rows, "greedy_equal": equal} | ratios | by_kind
    values["greedy_equal"] = Metric(float(equal))
    return Measurement("bench decoding", values, len(prompts), protocol, settings=settings, details=details)


def _single_decoders(exact: Engine, half: LM | None, packed: LM, new_tokens: int, compile: bool) -> list[Decoder]:
    """All that decode one prompt at a time; of each dtype the first is what the others' ids are compared with."""
    lm = exact.lm
    decoders = [transformers_generate(lm, new_tokens), transformers_generate(lm, new_tokens, lookup=True)]
    decoders += [transformers_generate(lm, new_tokens, assistant=packed), own(exact, new_tokens)]
    decoders += [own(Engine(lm, compile=True), new_tokens, name="compiled")] if compile else []
    drafts = (*FREE_DRAFTS, "self-4bit", "lookup, self-4bit", f"{CASCADE}, self-4bit")
    decoders += [own(exact, new_tokens, draft, packed) for draft in drafts]
    decoders.append(own(Engine(packed), new_tokens))
    if half:
        engine = Engine(half)
        decoders.append(transformers_generate(half, new_tokens))
        decoders += [own(engine, new_tokens, draft, packed) for draft in ("", "lookup", "self-4bit")]
    return decoders


def compare_rows(
    decoder: Decoder, work: Sequence[Unit], batch: int, reference: Decoder, bandwidth: float, plain: Decoder
) -> list[Row]:
    """What a decoder did on units of `batch` prompts that it and the two others have run, a row a kind and one for all.

    The ids of `reference` count as right, `plain` is the baseline of speed-ups, `bandwidth` (bytes/s) that of MBU.
    """
    rows = []
    for kind in [*dict.fromkeys(unit.kind for unit in work), "all"]:
        some = [unit for unit in work if kind in ("all", unit.kind)]
        row: Row = {"engine": decoder.engine, "draft": decoder.draft, "dtype": decoder.dtype, "kind": kind}
        row |= {"batch": batch} | _speeds(some, decoder, plain)
        if decoder.plain and decoder.bytes_per_pass:
            row["mbu"] = decoder.bytes_per_pass * row["tokens_per_s"] / batch / bandwidth
        row |= _speculation(some, decoder, row["speedup_vs_plain"])
        differences = [d for unit in some if (d := _difference(unit, decoder.name, reference))]
        row |= {"equal_to_reference": not differences, "reference": reference.name}
        row |= {"prompts_that_differ": sum(d["prompts"] for d in differences)}
        rows.append(row | {"first_difference": differences[0] if differences else None})
    return rows


def _speeds(work: Sequence[Unit], decoder: Decoder, plain: Decoder) -> Row:
    """Tokens a second behind the first pass: by the median run of each unit, and by its first, second, ... run."""

    pairs = [unit.pairs(decoder.name, plain.name) for unit in work]  # [units, runs]
    seconds, base = (np.array([[pair[k].seconds_decode for pair in row] for row in pairs]) for k in (0, 1))
    tokens, its = (sum(row[0][k].decoded for row in pairs) for k in (0, 1))
    every, ratios = tokens / seconds.sum(axis=0), tokens / its * base.sum(axis=0) / seconds.sum(axis=0)
    first = statistics.median(run.seconds_first for row in pairs for run, _ in row)
    row: Row = {"tokens_per_s": tokens / float(np.median(seconds, axis=1).sum())}
    row |= {"tokens_per_s_low": float(every.min()), "tokens_per_s_high": float(every.max())}
    row |= {"seconds_first_token": first, "speedup_vs_plain": float(np.median(ratios))}
    return row | {"speedup_low": float(ratios.min()), "speedup_high": float(ratios.max())}


def _speculation(work: Sequence[Unit], decoder: Decoder, speedup: float) -> Row:
    """What drafts did, and how far the cost model is from the measured speed-up; nothing without drafts."""
    tallies = [run.speculation for unit in work for run in unit.runs(decoder.name) if run.speculation]
    if not tallies:
        return {}
    total = Tally(**{count.name: sum(getattr(tally, count.name) for tally in tallies) for count in fields(Tally)})
    row = {"acceptance_rate": total.acceptance_rate, "mean_accepted": total.tokens_per_pass - 1}
    predicted = total.predicted_speedup
    return row | {"predicted_speedup": predicted, "cost_model_error": predicted / speedup - 1}


def _difference(unit: Unit, name: str, reference: Decoder) -> Row | None:
    """The first place where the ids of two engines part, with the gap between the two logits there (in nats)."""
    pairs = zip(unit.prompts, unit.runs(reference.name)[0].ids, unit.runs(name)[0].ids, strict=True)
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


def summary(rows: Sequence[Row], exact: str, half: str | None) -> dict[str, float | None]:
    """The ratios that sum it up; all kinds together unless the name says otherwise. None for what was not run."""
    kinds = {r["kind"] for r in rows} - {"all"}
    copying, other = (tuple(kinds & set(COPYING)) or ("all",), tuple(kinds - set(COPYING)) or ("all",))

    def ratio(
        draft: str, dtype: str | None, over: str, its: str = "", kinds: tuple[str, ...] = ("all",)
    ) -> float | None:
        speeds = []  # the seconds of plain decoding over those of each of the two
        for who in (("llmlab", draft, dtype, 1), (over, its, dtype, 1)):
            alike = [r for r in rows if (r["engine"], r["draft"], r["dtype"], r["batch"]) == who and r["kind"] in kinds]
            plain = sum(r["speedup_vs_plain"] / r["tokens_per_s"] for r in alike)
            speeds += [plain / sum(1 / r["tokens_per_s"] for r in alike)] if alike else []
        return speeds[0] / speeds[1] if len(speeds) == 2 else None

    largest = max((r["batch"] for r in rows if r["batch"] in BATCHES), default=None)
    batched = [r for r in rows if r["batch"] == largest and r["draft"] == "lookup"]
    errors = [abs(r["cost_model_error"]) for r in rows if r["kind"] == "all" and "cost_model_error" in r]
    return {
        "plain_speedup_vs_transformers": ratio("", exact, "transformers"),
        f"plain_speedup_vs_transformers_{half or 'half'}": ratio("", half, "transformers"),
        "int4_vs_llamacpp": ratio("", "4-bit", "llama.cpp"),
        "lookup_speedup_vs_plain": ratio("lookup", exact, "llmlab", kinds=copying),
        "lookup_speedup_vs_transformers": ratio("lookup", exact, "transformers", "lookup", copying),
        "self_draft_speedup": ratio("self-4bit", exact, "llmlab"),
        "cascade_speedup_copying": ratio(CASCADE, exact, "llmlab", kinds=copying),
        "cascade_speedup_other": ratio(CASCADE, exact, "llmlab", kinds=other),
        "worst_draft_ratio": min((r["speedup_vs_plain"] for r in rows if "cost_model_error" in r), default=None),
        f"self_draft_speedup_{half or 'half'}": ratio("self-4bit", half, "llmlab"),
        "batch8_worst_ratio": min((r["speedup_vs_plain"] for r in batched), default=None),
        "batch8_copying_ratio": min((r["speedup_vs_plain"] for r in batched if r["kind"] in COPYING), default=None),
        "cost_model_error": max(errors, default=None),
    }
