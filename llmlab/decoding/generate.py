"""generate() and stream(): prompts in, completions out, with or without speculation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

from llmlab.base.errors import InputError
from llmlab.base.progress import progress
from llmlab.data import ids_fingerprint
from llmlab.decoding.draft import Draft
from llmlab.decoding.engine import Engine
from llmlab.decoding.generation_config import end_tokens, unapplied
from llmlab.decoding.loop import Settings
from llmlab.decoding.model_draft import MOST_K, ModelDraft, as_draft
from llmlab.decoding.plain_engine import Decoder, engine_for
from llmlab.decoding.result import Completion, GenerateResult
from llmlab.decoding.sampling import Sampling, seeded
from llmlab.decoding.text import text_until
from llmlab.decoding.writer import Run, Writer
from llmlab.model.lm import LM

Drafts = Draft | LM | list[Draft | LM] | None


def generate(
    lm: LM,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: dict[int, float] | None = None,
    seed: int = 0,
    batch_size: int = 1,
    chat: bool = False,
    stop: list[str] | None = None,
    draft: Drafts = None,
    k: int | None = None,
    engine: Decoder | None = None,
) -> GenerateResult:
    """Continue prompts. Greedy decoding at temperature 0, else sampling; a row ends at the model's end token.

    Args:
        lm: the model.
        prompts: texts; with `chat` each becomes one user turn of the model's chat template.
        max_new_tokens: at most this many tokens a prompt.
        temperature: 0 for greedy.
        top_k, top_p, min_p: sample from the most probable tokens alone; by default from all.
        repetition_penalty, presence_penalty, frequency_penalty, logit_bias: change the logits, also of greedy decoding.
            For all of these see `llmlab.decoding.sampling.Sampling`.
        seed: of the samples.
        batch_size: prompts decoded together; each row has its own length and ends by itself.
        chat: use the chat template.
        stop: texts at which a completion ends; they are left out, wherever tokens begin and end.
        draft: speculate with it, or with several together (see `Pace`); a model of the same shape, such as its own
            quantized copy, or a smaller one with the same tokenizer. Exact: greedy ids stay the same in fp32, samples
            keep their distribution.
        k: tokens drafted for each pass; None adapts it to what is accepted and what it costs.
        engine: `Engine(lm)` of an earlier call, to save the time of making one.

    A model for which `Engine` is not exact decodes through transformers' own passes, row by row and without drafts; a
    warning and the result's `cache` say so.

    Raises:
        InputError: no or empty prompts, a setting out of range, a prompt that leaves no room in the context, or a draft
            that does not fit the model.
        NumericalError: the logits are not finite.
    """
    sampling = Sampling(
        temperature, top_p, seeded(seed), top_k, min_p, repetition_penalty, presence_penalty,
        frequency_penalty, logit_bias or {},
    )  # fmt: skip
    check_settings(prompts, max_new_tokens, batch_size, stop, k)
    begin = time.perf_counter()
    encoded = encode_prompts(lm, prompts, max_new_tokens=max_new_tokens, chat=chat)
    settings = decode_settings(lm, max_new_tokens, sampling, stop, k)
    writer = writer_for(lm, engine, settings, draft, settings.length(encoded))
    seconds_warmup = writer.warm_up(encoded, batch_size) if writer.drafts else 0.0
    runs: list[Run] = []
    with progress(len(prompts), "generating", "prompt") as bar:
        for first in range(0, len(prompts), batch_size):
            runs.append(writer.run(encoded[first : first + batch_size]))
            bar.update(len(runs[-1].steps))
    result = _result(prompts, encoded, writer, runs, stop)
    seconds_warmup += sum(run.seconds_recording for run in runs)
    seconds_total = time.perf_counter() - begin
    return replace(result, batch_size=batch_size, seconds_warmup=seconds_warmup, seconds_total=seconds_total)


def _result(
    prompts: list[str], encoded: list[list[int]], writer: Writer, runs: list[Run], stop: Sequence[str] | None
) -> GenerateResult:
    """What the runs brought, batch by batch."""
    lm, sampling = writer.engine.lm, writer.settings.sampling
    ids = [of_prompt for run in runs for of_prompt in run.ids]
    steps = [of_prompt for run in runs for of_prompt in run.steps]
    rows = zip(prompts, encoded, ids, strict=True)
    completions = [complete(lm, prompt, before, new, stop) for prompt, before, new in rows]
    return GenerateResult(
        completions=[replace(c, steps=of_prompt) for c, of_prompt in zip(completions, steps, strict=True)],
        prompt_tokens=sum(map(len, encoded)),
        new_tokens=sum(map(len, ids)),
        decoded_tokens=sum(run.decoded for run in runs),
        seconds_prefill=sum(run.seconds_first for run in runs),
        seconds_decode=sum(run.seconds_decode for run in runs),
        seconds_first_token=sorted(run.seconds_first for run in runs)[len(runs) // 2],
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.generator.initial_seed(),
        sampling=sampling.non_default,
        draft=", then ".join(draft.name for draft in writer.drafts),
        speculation=runs[-1].speculation,
        cache=writer.engine.kind,
        memory_bytes=writer.memory_bytes,
        max_new_tokens=writer.settings.max_new_tokens,
        k=writer.settings.k,
        token_ids=ids_fingerprint(encoded),
    )


def stream(
    lm: LM,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: dict[int, float] | None = None,
    seed: int = 0,
    chat: bool = False,
    stop: list[str] | None = None,
    draft: Drafts = None,
    k: int | None = None,
    engine: Decoder | None = None,
) -> Iterator[str]:
    """The completion of one prompt, piece by piece as it comes; arguments as for `generate`.

    Raises what `generate` raises, before the first piece.
    """
    sampling = Sampling(
        temperature, top_p, seeded(seed), top_k, min_p, repetition_penalty, presence_penalty,
        frequency_penalty, logit_bias or {},
    )  # fmt: skip
    check_settings([prompt], max_new_tokens, 1, stop, k)
    encoded = encode_prompts(lm, [prompt], max_new_tokens=max_new_tokens, chat=chat)
    settings = decode_settings(lm, max_new_tokens, sampling, stop, k)
    passes = writer_for(lm, engine, settings, draft, settings.length(encoded)).passes(encoded)

    def pieces() -> Iterator[str]:
        ids: list[int] = []
        said = ""
        hold = max(map(len, stop or []), default=0)  # the end of the text may become a stop string
        for after_pass in passes:
            ids += after_pass[0].tokens
            text = complete(lm, prompt, encoded[0], ids, stop).text
            # An unfinished character decodes to U+FFFD until its last byte is there.
            ready = text[: max(0, len(text) - hold)] if not text.endswith("\ufffd") else said
            if len(ready) > len(said):
                yield ready[len(said) :]
                said = ready
        text = complete(lm, prompt, encoded[0], ids, stop).text
        if len(text) > len(said):
            yield text[len(said) :]

    return pieces()


def writer_for(lm: LM, engine: Decoder | None, settings: Settings, draft: Drafts, length: int) -> Writer:
    """A writer of rows of up to `length` tokens; arguments as for `generate`.

    Warns of what is asked for and left out: drafts, and settings of the model's generation_config.
    """
    engine = engine or engine_for(lm)
    if ignored := unapplied(lm, settings.sampling):
        warnings.warn(f"{lm.name}'s generation_config asks for {ignored}: not applied.", stacklevel=3)
    drafts = as_drafts(lm, draft) if isinstance(engine, Engine) else []
    for model in drafts:
        if isinstance(model, ModelDraft):
            model.check(lm, length)
    return Writer(engine, settings, drafts)


def as_drafts(lm: LM, draft: Drafts) -> list[Draft]:
    """What `generate` takes as a draft, as a list."""
    several = draft if isinstance(draft, list) else [] if draft is None else [draft]
    return [as_draft(lm, model_or_draft) for model_or_draft in several]


def decode_settings(
    lm: LM,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop: Sequence[str] | None = None,
    k: int | None = None,
) -> Settings:
    """What the loop is told; by default greedy. A row ends at an end token or when a stop string is there.

    The generator of `sampling` starts anew, on the model's device.

    Raises InputError for the bias of a token that the model does not have.
    """
    ends, sampling = end_tokens(lm), sampling or Sampling()
    sampling.check_vocabulary(lm.card.vocab_size)
    sampling = replace(sampling, generator=seeded(sampling.generator.initial_seed(), lm.device))

    def finished(prompt: list[int], new: list[int]) -> bool:
        return new[-1] in ends or bool(stop and text_until(lm, prompt, new, stop)[1])

    return Settings(max_new_tokens, sampling, finished, k)


def complete(lm: LM, prompt: str, before: list[int], new: list[int], stop: Sequence[str] | None) -> Completion:
    """A completion of new tokens: without the end token, its text without the stop string and what follows."""
    ended = bool(new) and new[-1] in end_tokens(lm)
    kept = new[:-1] if ended else list(new)
    text, stopped = text_until(lm, before, kept, stop or [])
    return Completion(prompt, text, kept, ended or stopped)


def encode_prompts(lm: LM, prompts: list[str], *, max_new_tokens: int, chat: bool) -> list[list[int]]:
    """Token ids of each prompt. Raises InputError for one that is empty or leaves no room in the model's context."""
    # A chat template already writes the special tokens.
    encoded = [lm.input_ids(lm.chat(p) if chat else p, special_tokens=not chat) for p in prompts]
    for index, ids in enumerate(encoded):
        if not ids or len(ids) + max_new_tokens > lm.card.context_length:
            raise InputError(
                f"prompt {index} has {len(ids)} tokens: with {max_new_tokens} new ones it must hold 1 to "
                f"{lm.card.context_length} tokens, the context of {lm.name}."
            )
    return encoded


def check_settings(
    prompts: Sequence[str],
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] | None = None,
    k: int | None = None,
) -> None:
    """Raise InputError for settings that make no sense; needs no model, so it can come before loading one."""
    if isinstance(prompts, str) or isinstance(stop, str):
        raise InputError("prompts and stop strings come as lists of texts: put the one text in brackets.")
    counts = {"new tokens": max_new_tokens, "batch size": batch_size, "k": k or 0}
    if wrong := [f"{name} {value!r}" for name, value in counts.items() if not isinstance(value, int)]:
        raise InputError(f"{wrong[0]}: give a whole number.")
    empty = next((index for index, prompt in enumerate(prompts) if not prompt.strip()), None)
    complaints = {
        "there are no prompts: give at least one.": not prompts,
        f"prompt {empty} is empty.": empty is not None,
        f"{max_new_tokens} new tokens: give a positive number.": max_new_tokens < 1,
        f"batch size {batch_size}: give a positive number.": batch_size < 1,
        "an empty stop string would end everything at once: leave it out.": "" in (stop or []),
        f"k = {k} drafted tokens: give 0 to {MOST_K}, or none to adapt it.": k is not None and not 0 <= k <= MOST_K,
    }
    for complaint, holds in complaints.items():
        if holds:
            raise InputError(complaint)
