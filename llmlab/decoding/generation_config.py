"""What a model's generation_config says: where texts end, and what it asks for that is not done here."""

from __future__ import annotations

from llmlab.decoding.sampling import Sampling
from llmlab.model.lm import LM

# Settings of a generation_config that change which token follows, or where the text ends.
ALWAYS = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "suppress_tokens",
    "begin_suppress_tokens", "bad_words_ids", "sequence_bias", "forced_bos_token_id", "forced_eos_token_id",
    "exponential_decay_length_penalty", "min_length", "min_new_tokens", "guidance_scale", "watermarking_config",
    "token_healing", "num_beams", "stop_strings", "max_time",
)  # fmt: skip
WHEN_SAMPLING = ("top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
ONE = ("repetition_penalty", "encoder_repetition_penalty", "guidance_scale", "num_beams", "typical_p")
NEUTRAL = dict.fromkeys(ONE, 1)  # the value that changes nothing; 0 for the others


def end_tokens(lm: LM) -> set[int]:
    """Ids that end a completion; a model may have several (end of text, end of turn)."""
    configured = lm.model.generation_config.eos_token_id
    if configured is None:
        configured = lm.model.config.eos_token_id
    if configured is None:
        return set()
    return set(configured) if isinstance(configured, (list, tuple)) else {configured}


def unapplied(lm: LM, sampling: Sampling) -> str:
    """What the model's generation_config asks for that is not done here, as "name = value, ...".

    What `sampling` sets itself is left out: who asks for it knows of it.
    """
    config = lm.model.generation_config
    names = [*ALWAYS, *(WHEN_SAMPLING if sampling.temperature > 0 else ())]
    values = {name: getattr(config, name, None) for name in names if name not in sampling.non_default}
    return ", ".join(f"{n} = {v}" for n, v in values.items() if v not in (None, False, [], {}, NEUTRAL.get(n, 0)))
