"""generate(): prefill once, then one token a step from the KV cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from llmlab.decoding.sampling import pick
from llmlab.errors import InputError, NumericalError
from llmlab.model import LM
from llmlab.progress import progress
from llmlab.stats import Metric


@dataclass(frozen=True)
class Completion:
    """What followed one prompt: `ids` without the end token; `stopped` tells whether the model ended by itself."""

    prompt: str
    text: str
    ids: list[int]
    stopped: bool


@dataclass(frozen=True)
class GenerateResult:
    """Completions of N prompts and where the time went.

    Attributes:
        completions: in the order of the prompts.
        prompt_tokens: tokens of all prompts.
        new_tokens: tokens produced, counted from ids; end tokens count, tokens after them do not.
        decoded_tokens: those of them that decode steps produced; prefill produced the first one of each prompt.
        seconds_prefill: all prefills; each also yields the first token.
        seconds_decode: all decode steps.
        seconds_first_token: median over batches of the time from prompt to first token.
    """

    completions: list[Completion]
    prompt_tokens: int
    new_tokens: int
    decoded_tokens: int
    seconds_prefill: float
    seconds_decode: float
    seconds_first_token: float
    seconds_total: float
    temperature: float
    top_p: float
    batch_size: int
    seed: int
    task: str = "generate"
    data: str = "prompts"

    @property
    def n(self) -> int:
        """Number of prompts."""
        return len(self.completions)

    @property
    def texts(self) -> list[str]:
        """The completions' texts."""
        return [c.text for c in self.completions]

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens from decode steps over their time, all rows of a batch together (0 if there was no step)."""
        return self.decoded_tokens / self.seconds_decode if self.decoded_tokens else 0.0

    @property
    def protocol(self) -> str:
        """How the numbers came about, in one line."""
        how = "greedy" if self.temperature == 0 else f"temperature {self.temperature}, top-p {self.top_p}"
        return f"{how}, batch size {self.batch_size}, KV cache, tokens counted from ids"

    def metrics(self) -> dict[str, Metric]:
        """The measurements with their units, for a Record."""
        return {
            "decode_tokens_per_second": Metric(self.decode_tokens_per_second, "token/s"),
            "prefill_tokens_per_second": Metric(self.prompt_tokens / self.seconds_prefill, "token/s"),
            "seconds_first_token": Metric(self.seconds_first_token, "s"),
            "seconds_total": Metric(self.seconds_total, "s"),
            "new_tokens": Metric(self.new_tokens, "token"),
        }

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        completions = [
            {"prompt": c.prompt, "text": c.text, "ids": c.ids, "stopped": c.stopped} for c in self.completions
        ]
        return {
            "task": self.task,
            "n": self.n,
            "prompt_tokens": self.prompt_tokens,
            **{name: metric.value for name, metric in self.metrics().items()},
            "seconds_prefill": self.seconds_prefill,
            "seconds_decode": self.seconds_decode,
            "protocol": self.protocol,
            "completions": completions,
        }


def generate(
    lm: LM,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 1,
    chat: bool = False,
) -> GenerateResult:
    """Continue prompts. Greedy decoding at temperature 0, else sampling; a row ends at the model's end token.

    Args:
        lm: the model.
        prompts: texts; with `chat` each becomes one user turn of the model's chat template.
        max_new_tokens: at most this many tokens a prompt.
        temperature: 0 for greedy.
        top_p: nucleus of the samples, in (0, 1].
        seed: of the samples.
        batch_size: prompts decoded together (left-padded, padding masked).
        chat: use the chat template.

    Raises:
        InputError: no or empty prompts, a setting out of range, or a prompt that leaves no room in the context.
        NumericalError: the logits are not finite.
    """
    check_settings(prompts, max_new_tokens, temperature, top_p, batch_size)
    begin = time.perf_counter()
    encoded = encode_prompts(lm, prompts, max_new_tokens=max_new_tokens, chat=chat)
    generator = torch.Generator(device=lm.device).manual_seed(seed)
    produced: list[list[int]] = []
    prefills, decodes = [], []
    with progress(len(prompts), "generating", "prompt") as bar:
        for first in range(0, len(prompts), batch_size):
            rows, prefill, decode = _generate_batch(
                lm, encoded[first : first + batch_size], max_new_tokens, temperature, top_p, generator
            )
            produced += rows
            prefills.append(prefill)
            decodes.append(decode)
            bar.update(len(rows))
    ends = _end_tokens(lm)
    completions = []
    for prompt, ids in zip(prompts, produced, strict=True):
        stopped = bool(ids) and ids[-1] in ends
        kept = ids[:-1] if stopped else ids
        completions.append(Completion(prompt, lm.decode(kept), kept, stopped))
    new_tokens = sum(map(len, produced))
    return GenerateResult(
        completions=completions,
        prompt_tokens=sum(map(len, encoded)),
        new_tokens=new_tokens,
        decoded_tokens=new_tokens - len(prompts),
        seconds_prefill=sum(prefills),
        seconds_decode=sum(decodes),
        seconds_first_token=sorted(prefills)[len(prefills) // 2],
        seconds_total=time.perf_counter() - begin,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        seed=seed,
    )


def encode_prompts(lm: LM, prompts: list[str], *, max_new_tokens: int, chat: bool) -> list[list[int]]:
    """Token ids of each prompt. Raises InputError for one that is empty or leaves no room in the model's context."""
    # A chat template already writes the special tokens.
    encoded = [lm.tokenizer.encode(lm.chat(p), add_special_tokens=False) if chat else lm.encode(p) for p in prompts]
    for index, ids in enumerate(encoded):
        if not ids or len(ids) + max_new_tokens > lm.card.context_length:
            raise InputError(
                f"prompt {index} has {len(ids)} tokens: with {max_new_tokens} new ones it must hold 1 to "
                f"{lm.card.context_length} tokens, the context of {lm.name}."
            )
    return encoded


@torch.inference_mode()
def _generate_batch(
    lm: LM,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    generator: torch.Generator,
) -> tuple[list[list[int]], float, float]:
    """New ids of each row (its end token included), seconds of the prefill, seconds of the decode steps."""
    begin = time.perf_counter()
    ends = _end_tokens(lm)
    longest = max(map(len, prompts))
    # Left padding: every row's next token stands in the same column.
    input_ids = torch.zeros(len(prompts), longest, dtype=torch.long)  # [batch, longest]
    mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(prompts):
        input_ids[row, longest - len(ids) :] = torch.tensor(ids)
        mask[row, longest - len(ids) :] = 1
    input_ids, mask = input_ids.to(lm.device), mask.to(lm.device)
    positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
    cache = DynamicCache(config=lm.model.config)
    rows: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    after_prefill = begin
    for step in range(max_new_tokens):
        output = lm.model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = output.logits[:, -1]  # [batch, vocabulary]
        if not torch.isfinite(logits).all():
            raise NumericalError(f"the logits of step {step} are not finite in {lm.dtype}: try fp32.")
        tokens = pick(logits, temperature, top_p, generator)  # [batch]
        picked = tokens.tolist()  # waits for the device
        for row in list(open_rows):
            rows[row].append(picked[row])
            if picked[row] in ends:
                open_rows.discard(row)
        if step == 0:
            after_prefill = time.perf_counter()
        if not open_rows:
            break
        input_ids, positions = tokens[:, None], positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=-1)
    return rows, after_prefill - begin, time.perf_counter() - after_prefill


def _end_tokens(lm: LM) -> set[int]:
    """Ids that end a completion; a model may have several (end of text, end of turn)."""
    configured = lm.model.generation_config.eos_token_id
    if configured is None:
        configured = lm.model.config.eos_token_id
    if configured is None:
        return set()
    return set(configured) if isinstance(configured, (list, tuple)) else {configured}


def check_settings(prompts: list[str], max_new_tokens: int, temperature: float, top_p: float, batch_size: int) -> None:
    """Raise InputError for settings that make no sense; needs no model, so it can come before loading one."""
    if not prompts:
        raise InputError("there are no prompts: give at least one.")
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise InputError(f"prompt {index} is empty.")
    if max_new_tokens < 1:
        raise InputError(f"{max_new_tokens} new tokens: give a positive number.")
    if temperature < 0:
        raise InputError(f"temperature {temperature}: give 0 (greedy) or more.")
    if not 0 < top_p <= 1:
        raise InputError(f"top-p {top_p}: give a number above 0 and at most 1.")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: give a positive number.")
