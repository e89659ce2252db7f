"""Drafts by name, for the command line and the public face: the free ones, "self-4bit", or another model."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from llmlab.base.errors import InputError
from llmlab.decoding.cost import best_k, speedup
from llmlab.decoding.draft import Draft
from llmlab.decoding.engine import Engine
from llmlab.decoding.lookup import PromptLookup
from llmlab.decoding.model_draft import as_draft
from llmlab.decoding.recycling import Recycling
from llmlab.decoding.self_draft import SelfDraft
from llmlab.decoding.suffix import Suffix
from llmlab.kernels.fast import packed_dtype
from llmlab.kernels.native import native
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.model.convert import with_dtype
from llmlab.model.lm import LM
from llmlab.model.load import load
from llmlab.quantization.grid import Scheme
from llmlab.quantization.head import quantize_head
from llmlab.quantization.walk import quantize

FREE: dict[str, Callable[[], Draft]] = {"lookup": PromptLookup, "suffix": Suffix, "recycling": Recycling}
GROUP = 32  # the smallest group that the kernels take: a draft's quality is worth its half bit a weight


def named_drafts(lm: LM, names: str) -> list[Draft]:
    """Drafts for a model.

    Args:
        lm: the model that will verify.
        names: separated by commas: "lookup", "suffix", "recycling"; "self-4bit"; else what `llmlab.load` takes.

    Raises InputError for a name that means nothing or does not fit the model.
    """
    drafts: list[Draft] = []
    for name in (part.strip() for part in names.split(",")):
        if not name:
            raise InputError("--draft takes lookup, suffix, recycling, self-4bit or a model; several with commas.")
        if name in FREE:
            drafts.append(FREE[name]())
        elif name == "self-4bit":
            drafts.append(SelfDraft(self_4bit(lm)))
        else:
            drafts.append(as_draft(lm, load(name, dtype=lm.dtype, device=lm.device)))
    return drafts


def free_drafts(names: Iterable[str]) -> list[Draft]:
    """The free ones among the names, with nothing learned: what one saw written would be another run's answers."""
    return [FREE[name]() for name in names if name in FREE]


def self_4bit(lm: LM, quantized: LM | None = None) -> LM:
    """A model's own 4-bit copy, its output head in 8 bits, with the activations that are fast on this device.

    Rounded to nearest in groups of 32 within seconds; or `quantized`, such as `llmlab.quantize(lm)` makes with GPTQ in
    minutes. What a draft loses costs speed, never exactness. On a CPU zero points are real numbers, so that a model
    which came from a 4-bit GGUF file (Q4_0, Q4_1; the built-in one does) is copied without loss: what its copy guesses
    otherwise, the rounding of activations does. One trained in bf16 loses more, and its copy's guesses fail more often.
    """
    if any(isinstance(m, QuantLinear) for m in lm.model.modules()):
        raise InputError(f"{lm.name} is quantized: its own 4-bit copy is itself. Draft with lookup or a smaller model.")
    on_cpu = lm.device.type == "cpu"
    scheme = Scheme(4, GROUP, search=False, zero_points="real" if on_cpu else "integer")
    packed = quantized or quantize(lm, method="rtn", scheme=scheme)
    torchs = on_cpu and bool(native().problem)  # whose kernels want activations of their own
    packed = with_dtype(packed, packed_dtype(lm.device) if torchs else lm.dtype)
    head = packed.model.get_output_embeddings()
    fits = type(head) is torch.nn.Linear and head.in_features % GROUP == 0 and head.out_features % 8 == 0
    return quantize_head(packed, 8, GROUP) if fits else packed


def forecast(engine: Engine, drafts: list[Draft], batch: int) -> str:
    """What speculation should bring here, before it runs: measured passes, and the best k by acceptance rate."""
    engine.start(batch, 512)
    widths = ", ".join(f"{width}: {seconds * 1e3:.1f}" for width, seconds in engine.profile().items())
    lines = [f"cost model, batch {batch}: milliseconds of a pass by tokens a row: {widths}"]
    for draft in drafts:
        draft.begin(engine, [[0]] * batch, 512)
        seconds = draft.seconds()
        cases = []
        for acceptance in (0.5, 0.7, 0.9):
            k = best_k(acceptance, engine.seconds, seconds, 8)
            speed = speedup(acceptance, k, engine.seconds, seconds)
            cases.append(f"{acceptance:.0%} accepted: k = {k}, {speed:.2f}x")
        lines.append(f"{draft.name}: {seconds * 1e3:.1f} ms a token; {'; '.join(cases)}")
    return "\n".join(lines)
