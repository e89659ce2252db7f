"""Who decodes in `llmlab bench decoding`: our engine, transformers and llama.cpp behind one call each."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from llmlab.bench import peers
from llmlab.decoding.draft import Draft
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import decode_settings
from llmlab.decoding.generation_config import end_tokens
from llmlab.decoding.model_draft import as_draft
from llmlab.decoding.writer import Run, Writer
from llmlab.jobs.own_draft import free_drafts
from llmlab.kernels.packed_linear import quant_linears
from llmlab.model.lm import LM

LOOKUP_TOKENS = 10  # that transformers' and llama.cpp's prompt lookup draft, the default of their documentation


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

    @property
    def speculates(self) -> bool:
        """Whether it is our engine with a draft."""
        return self.engine == "llmlab" and bool(self.draft)


def own(
    engine: Engine, new_tokens: int, draft: str = "", packed: LM | None = None, *,
    models: Mapping[str, LM] | None = None, name: str = "",
) -> Decoder:  # fmt: skip
    """Our engine, plain or with drafts by name, separated by commas: free ones, "self-4bit" (`packed`), of `models`.

    Free drafts learn from prompt to prompt. When prompts come again they begin anew, or they would know the answers.
    """
    lm, names = engine.lm, [part for part in draft.split(", ") if part]
    drafting = {"self-4bit": packed, **(models or {})}
    costly = [as_draft(lm, model) for part, model in drafting.items() if part in names and model is not None]
    free: list[Draft] = []
    done: list[list[list[int]]] = []

    def run(prompts: list[list[int]]) -> Run:
        if not done or prompts in done:
            free[:] = free_drafts(names)
            done.clear()
        done.append(prompts)
        writer = Writer(engine, decode_settings(lm, new_tokens), [*free, *costly])
        writer.warm_up(prompts, len(prompts))
        return writer.run(prompts)

    dtype = "4-bit" if "bits" in lm.transformation else lm.dtype
    return Decoder(f"llmlab {name}".strip(), draft, dtype, run, lm, bytes_per_pass(lm))


def transformers_generate(lm: LM, new_tokens: int, *, lookup: bool = False, assistant: LM | None = None) -> Decoder:
    """transformers' own `generate`: plain, with prompt lookup, or assisted by another model."""
    extra: dict[str, object] = {"prompt_lookup_num_tokens": LOOKUP_TOKENS} if lookup else {}
    extra |= {"assistant_model": assistant.model} if assistant else {}

    def run(prompts: list[list[int]]) -> Run:
        (prompt,) = prompts  # its assisted decoding knows no batches
        ids = torch.tensor([prompt], device=lm.device)
        clock = _FirstToken()
        begin = time.perf_counter()
        output = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
            pad_token_id=min(end_tokens(lm), default=0), stopping_criteria=StoppingCriteriaList([clock]), **extra,
        )  # fmt: skip
        new = output[0, len(prompt) :].tolist()
        end = time.perf_counter()
        return Run([new], output.shape[1] - clock.tokens, clock.time - begin, end - clock.time)

    return Decoder("transformers", "lookup" if lookup else "self-4bit" if assistant else "", lm.dtype, run, lm)


class _FirstToken(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Stops nothing: notes when the first pass was done and how many tokens there were then."""

    def __init__(self) -> None:
        self.time, self.tokens = 0.0, 0

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        if not self.tokens:
            self.time, self.tokens = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def llamacpp(gguf: str | None, new_tokens: int, lm: LM) -> tuple[list[Decoder], str]:
    """llama.cpp on a 4-bit file, plain and with its lookup; and that it is measured, or why not.

    It runs where `lm` does, the same model by torch: on a GPU with all of its layers, or not at all.
    """
    reason = "the model is no .gguf file" if gguf is None else peers.missing("llamacpp")
    on_gpu = lm.device.type == "cuda"
    if not reason and on_gpu and not peers.call("llamacpp", {"job": "about"})["gpu"]:
        reason = "it is built for CPUs: remove .peers/llamacpp and run CMAKE_ARGS=-DGGML_CUDA=on make peers"
    if reason:
        return [], reason

    def run(lookup: bool, prompts: list[list[int]]) -> Run:
        ours = {"prompts": prompts, "ends": sorted(end_tokens(lm)), "max_new_tokens": new_tokens, "lookup": lookup}
        request = {"job": "generate", "model": gguf, "threads": torch.get_num_threads(), "gpu": on_gpu, **ours}
        done = peers.call("llamacpp", request)["completions"]
        ids = [completion["ids"] for completion in done]
        first, decode = (sum(completion[name] for completion in done) for name in ("seconds_first", "seconds_decode"))
        return Run(ids, sum(map(len, ids)) - len(ids), first, decode)

    both = ("", "lookup")
    return [Decoder("llama.cpp", draft, "4-bit", partial(run, bool(draft))) for draft in both], "measured"


def bytes_per_pass(lm: LM) -> int:
    """Bytes of weights that a forward pass reads: all but an embedding table that is not the output head, too, and what
    stands beside the copy of a packed matrix that its kernel reads."""
    table = lm.model.get_input_embeddings().weight
    head = lm.model.get_output_embeddings()
    tied = getattr(head, "weight", None) is table
    beside = [linear for linear in quant_linears(lm.model) if isinstance(linear.fast, torch.nn.Module)]
    unread = sum(tensor.nbytes for linear in beside for tensor in linear.buffers(recurse=False))
    return lm.weight_bytes - unread - (0 if tied else table.nbytes)
