"""generate() and stream(): prompts in, completions out, with or without speculation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from llmlab.base.errors import InputError
from llmlab.base.progress import progress
from llmlab.decoding.cost import Tally
from llmlab.decoding.drafts import Draft, Sampling, as_draft
from llmlab.decoding.engine import Engine
from llmlab.decoding.result import Completion, GenerateResult
from llmlab.decoding.speculative import Step, decode, room_for
from llmlab.model.lm import LM


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
    stop: list[str] | None = None,
    draft: Draft | LM | list[Draft | LM] | None = None,
    k: int | None = None,
    engine: Engine | None = None,
) -> GenerateResult:
    """Continue prompts. Greedy decoding at temperature 0, else sampling; a row ends at the model's end token.

    Args:
        lm: the model.
        prompts: texts; with `chat` each becomes one user turn of the model's chat template.
        max_new_tokens: at most this many tokens a prompt.
        temperature: 0 for greedy.
        top_p: nucleus of the samples, in (0, 1].
        seed: of the samples.
        batch_size: prompts decoded together; each row has its own length and ends by itself.
        chat: use the chat template.
        stop: texts at which a completion ends; they are left out, wherever tokens begin and end.
        draft: speculate with it, or with several, asked in turn (see `drafts`); a model of the same shape, such as its
            own quantized copy, or a smaller one with the same tokenizer. Exact: greedy ids stay the same in
            fp32, samples keep their distribution.
        k: tokens drafted for each pass; None adapts it to what is accepted and what it costs.
        engine: `Engine(lm)` of an earlier call, to save the time of making one.

    Raises:
        InputError: no or empty prompts, a setting out of range, a prompt that leaves no room in the context, or a draft
            that does not fit the model.
        NumericalError: the logits are not finite.
    """
    check_settings(prompts, max_new_tokens, temperature, top_p, batch_size, stop, k)
    begin = time.perf_counter()
    encoded = encode_prompts(lm, prompts, max_new_tokens=max_new_tokens, chat=chat)
    drafts = _drafts(lm, draft)
    engine = engine or Engine(lm)
    sampling = Sampling(temperature, top_p, torch.Generator(device=lm.device).manual_seed(seed))
    ends, tally = end_tokens(lm), Tally()
    now = time.perf_counter()
    if drafts:
        warm_up(engine, drafts, min(batch_size, len(prompts)), room_for(encoded, max_new_tokens, k))
    seconds_warmup = time.perf_counter() - now
    produced: list[list[int]] = []
    steps: list[list[Step]] = []
    prefills, decodes = [], []
    with progress(len(prompts), "generating", "prompt") as bar:
        for first in range(0, len(prompts), batch_size):
            batch = encoded[first : first + batch_size]
            rows: list[list[int]] = [[] for _ in batch]
            history: list[list[Step]] = [[] for _ in batch]
            now, recording = time.perf_counter(), _recording(engine, drafts)
            passes = decode(
                engine, batch, max_new_tokens=max_new_tokens, sampling=sampling,
                finished=ending(lm, ends, stop or []), drafts=drafts, k=k, tally=tally,
            )  # fmt: skip
            for index, found in enumerate(passes):
                if index == 0:
                    prefills.append(time.perf_counter() - now)
                    now = time.perf_counter()
                for row, step in found.items():
                    rows[row] += step.tokens
                    history[row].append(step)
            recording = _recording(engine, drafts) - recording
            seconds_warmup += recording
            decodes.append(time.perf_counter() - now - recording)
            produced += rows
            steps += history
            bar.update(len(rows))
    completions = [
        complete(lm, prompt, ids, ends, stop or [], history)
        for prompt, ids, history in zip(prompts, produced, steps, strict=True)
    ]
    new_tokens = sum(map(len, produced))
    return GenerateResult(
        completions=completions,
        prompt_tokens=sum(map(len, encoded)),
        new_tokens=new_tokens,
        decoded_tokens=new_tokens - len(prompts),
        seconds_prefill=sum(prefills),
        seconds_decode=sum(decodes),
        seconds_first_token=sorted(prefills)[len(prefills) // 2],
        seconds_warmup=seconds_warmup,
        seconds_total=time.perf_counter() - begin,
        temperature=temperature,
        top_p=top_p,
        batch_size=batch_size,
        seed=seed,
        draft=", then ".join(one.name for one in drafts),
        speculation=tally if drafts else None,
    )


def warm_up(engine: Engine, drafts: list[Draft], batch: int, room: int) -> None:
    """Measure (and so record) the passes of a model and its drafts, before a clock runs; the cost model needs them."""
    engine.start(batch, room)
    engine.profile()
    for draft in drafts:
        draft.begin(engine, [[0]] * batch, room)
        draft.seconds()


def _recording(engine: Engine, drafts: list[Draft]) -> float:
    return engine.seconds_recording + sum(d.engine.seconds_recording for d in drafts if d.engine)


def stream(lm: LM, prompt: str, **options: Any) -> Iterator[str]:
    """The completion of one prompt, piece by piece as it comes; options as for `generate` (no batch size).

    Raises what `generate` raises, before the first piece.
    """
    settings = {"max_new_tokens": 64, "temperature": 0.0, "top_p": 1.0, "seed": 0, "chat": False} | options
    unknown = settings.keys() - {
        "max_new_tokens",
        "temperature",
        "top_p",
        "seed",
        "chat",
        "stop",
        "draft",
        "k",
        "engine",
    }
    if unknown:
        raise InputError(f"unknown option {sorted(unknown)[0]!r} of stream.")
    stop, draft, k = settings.get("stop") or [], settings.get("draft"), settings.get("k")
    most = settings["max_new_tokens"]
    check_settings([prompt], most, settings["temperature"], settings["top_p"], 1, stop, k)
    encoded = encode_prompts(lm, [prompt], max_new_tokens=most, chat=settings["chat"])
    generator = torch.Generator(device=lm.device).manual_seed(settings["seed"])
    passes = decode(
        settings.get("engine") or Engine(lm), encoded, max_new_tokens=most,
        sampling=Sampling(settings["temperature"], settings["top_p"], generator),
        finished=ending(lm, end_tokens(lm), stop), drafts=_drafts(lm, draft), k=k,
    )  # fmt: skip

    def pieces() -> Iterator[str]:
        ids: list[int] = []
        said = ""
        hold = max(map(len, stop), default=0)  # the end of the text may become a stop string
        for found in passes:
            ids += found[0].tokens
            text = complete(lm, prompt, ids, end_tokens(lm), stop, []).text
            # An unfinished character decodes to U+FFFD until its last byte is there.
            ready = text[: max(0, len(text) - hold)] if not text.endswith("\ufffd") else said
            if len(ready) > len(said):
                yield ready[len(said) :]
                said = ready
        text = complete(lm, prompt, ids, end_tokens(lm), stop, []).text
        if len(text) > len(said):
            yield text[len(said) :]

    return pieces()


def _drafts(lm: LM, draft: Any) -> list[Draft]:
    asked = draft if isinstance(draft, list) else [] if draft is None else [draft]
    return [as_draft(lm, one) for one in asked]


def ending(lm: LM, ends: set[int], stop: list[str]) -> Callable[[int, list[int]], int | None]:
    """Whether a row with these new tokens has ended: at an end token, or when its text holds a stop string."""

    def finished(row: int, ids: list[int]) -> int | None:
        del row
        if ids[-1] in ends:
            return len(ids)
        if stop and any(text in lm.decode(ids) for text in stop):
            return len(ids)
        return None

    return finished


def complete(
    lm: LM, prompt: str, ids: list[int], ends: set[int], stop: list[str], steps: list[Step]
) -> Completion:  # fmt: skip
    """A completion of new tokens: without the end token, its text without the stop string and what follows."""
    stopped = bool(ids) and ids[-1] in ends
    kept = ids[:-1] if stopped else list(ids)
    text = lm.decode(kept)
    places = [text.find(s) for s in stop if s in text]
    return Completion(prompt, text[: min(places)] if places else text, kept, stopped or bool(places), steps)


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


def end_tokens(lm: LM) -> set[int]:
    """Ids that end a completion; a model may have several (end of text, end of turn)."""
    configured = lm.model.generation_config.eos_token_id
    if configured is None:
        configured = lm.model.config.eos_token_id
    if configured is None:
        return set()
    return set(configured) if isinstance(configured, (list, tuple)) else {configured}


def check_settings(
    prompts: list[str],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    batch_size: int,
    stop: list[str] | None = None,
    k: int | None = None,
) -> None:
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
    if any(not text for text in stop or []):
        raise InputError("an empty stop string would end everything at once: leave it out.")
    if k is not None and not 0 <= k <= 64:
        raise InputError(f"k = {k} drafted tokens: give 0 to 64, or none to adapt it.")
