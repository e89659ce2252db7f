"""Who decodes in `llmlab bench decoding`: our engine, transformers and llama.cpp behind one call each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from llmlab.bench import peers
from llmlab.decoding.cost import Tally
from llmlab.decoding.drafts import Draft, PromptLookup, Sampling, SelfDraft
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import end_tokens, ending, warm_up
from llmlab.decoding.speculative import decode, room_for
from llmlab.model.lm import LM

LOOKUP_TOKENS = 10  # that transformers' and llama.cpp's prompt lookup draft, the default of their documentation


@dataclass(frozen=True)
class Run:
    """One run over a batch of prompts.

    Attributes:
        ids: new tokens of each prompt, up to and with its end token.
        decoded: tokens behind the first pass, all prompts together.
        seconds_first: from the prompts to the first token.
        seconds_decode: the rest, recording of passes left out.
        speculation: what our engine's drafts did.
    """

    ids: list[list[int]]
    decoded: int
    seconds_first: float
    seconds_decode: float
    speculation: Tally | None = None


@dataclass(frozen=True)
class Decoder:
    """An engine with its draft. `lm` and `bytes_per_pass` (weights that a pass reads) where it is a torch model."""

    engine: str
    draft: str
    dtype: str
    run: Callable[[list[list[int]]], Run]
    lm: LM | None = None
    bytes_per_pass: int | None = None

    @property
    def name(self) -> str:
        """Unique in a benchmark."""
        return f"{self.engine}, {self.draft or 'plain'}, {self.dtype}"

    @property
    def plain(self) -> bool:
        """Whether it is our engine without a draft: the baseline of speculation."""
        return self.engine == "llmlab" and not self.draft


def own(engine: Engine, new_tokens: int, draft: str = "", packed: LM | None = None, *, name: str = "") -> Decoder:
    """Our engine, plain or with drafts by name: "lookup", "self-4bit" (`packed`), or both as a cascade."""
    lm = engine.lm
    drafts: list[Draft] = [
        PromptLookup() if part == "lookup" else SelfDraft(_given(packed)) for part in draft.split(", ") if part
    ]

    def run(prompts: list[list[int]]) -> Run:
        sampling = Sampling(0.0, 1.0, torch.Generator(device=lm.device))
        tally = Tally() if drafts else None
        warm_up(engine, drafts, len(prompts), room_for(prompts, new_tokens, None))
        engines = [engine, *(d.engine for d in drafts if d.engine)]
        ids: list[list[int]] = [[] for _ in prompts]
        first = recording = 0.0
        begin = time.perf_counter()
        passes = decode(
            engine, prompts, max_new_tokens=new_tokens, sampling=sampling, finished=ending(lm, end_tokens(lm), []),
            drafts=drafts, tally=tally,
        )  # fmt: skip
        for found in passes:
            for row, step in found.items():
                ids[row] += step.tokens
            if not first:
                first, recording = time.perf_counter() - begin, sum(e.seconds_recording for e in engines)
        recording = sum(e.seconds_recording for e in engines) - recording
        rest = time.perf_counter() - begin - first - recording
        return Run(ids, sum(map(len, ids)) - len(ids), first, rest, tally)

    dtype = "4-bit" if "bits" in lm.transformation else lm.dtype
    return Decoder(f"llmlab {name}".strip(), draft, dtype, run, lm, bytes_per_pass(lm))


def transformers_generate(lm: LM, new_tokens: int, *, lookup: bool = False, assistant: LM | None = None) -> Decoder:
    """transformers' own `generate`: plain, with prompt lookup, or assisted by another model."""
    extra: dict[str, Any] = {}
    if lookup:
        extra["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
    if assistant is not None:
        extra["assistant_model"] = assistant.model

    def run(prompts: list[list[int]]) -> Run:
        (prompt,) = prompts  # its assisted decoding knows no batches
        ids = torch.tensor([prompt], device=lm.device)
        clock = _FirstToken()
        begin = time.perf_counter()
        output = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=min(end_tokens(lm), default=0), stopping_criteria=StoppingCriteriaList([clock]), **extra,
        )  # fmt: skip
        made = output[0, len(prompt) :].tolist()
        end = time.perf_counter()
        decoded = len(prompt) + len(made) - clock.tokens
        return Run([made], decoded, clock.time - begin, end - clock.time)

    draft = "lookup" if lookup else "self-4bit" if assistant is not None else ""
    return Decoder("transformers", draft, lm.dtype, run, lm)


class _FirstToken(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Stops nothing: notes when the first pass was done and how many tokens there were then."""

    def __init__(self) -> None:
        self.time, self.tokens = 0.0, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if not self.tokens:
            self.time, self.tokens = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def llamacpp(gguf: str | None, new_tokens: int, ends: set[int]) -> tuple[list[Decoder], str]:
    """llama.cpp on a 4-bit file, plain and with its lookup; and its version, or why it is not measured."""
    reason = "the model is no .gguf file" if gguf is None else peers.missing("llamacpp")
    if reason:
        return [], reason

    def decoder(lookup: bool) -> Decoder:
        def run(prompts: list[list[int]]) -> Run:
            request = {
                "job": "generate", "model": gguf, "prompts": prompts, "max_new_tokens": new_tokens,
                "ends": sorted(ends), "threads": torch.get_num_threads(), "lookup": lookup,
            }  # fmt: skip
            done = peers.call("llamacpp", request)["completions"]
            ids = [one["ids"] for one in done]
            decoded = sum(map(len, ids)) - len(ids)
            return Run(ids, decoded, sum(o["seconds_first"] for o in done), sum(o["seconds_decode"] for o in done))

        return Decoder("llama.cpp", "lookup" if lookup else "", "4-bit", run)

    return [decoder(False), decoder(True)], "measured"


def bytes_per_pass(lm: LM) -> int:
    """Bytes of weights that a forward pass reads: all but an embedding table that is not the output head, too."""
    table = lm.model.get_input_embeddings().weight
    head = lm.model.get_output_embeddings()
    tied = getattr(head, "weight", None) is table
    return lm.weight_bytes - (0 if tied else table.nbytes)


def _given(packed: LM | None) -> LM:
    assert packed is not None
    return packed
