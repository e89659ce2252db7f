"""The two phases of generation as functions to time: prefill (many tokens at once) and one decode step."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache

from llmlab.base.clock import Timing
from llmlab.base.stats import Metric
from llmlab.measure.record import Measurement
from llmlab.measure.roofline import Peaks
from llmlab.model.lm import LM


@dataclass(frozen=True)
class Phase:
    """A piece of work with its cost: FLOPs done and bytes of weights and KV cache read, from the model's card."""

    name: str
    run: Callable[[], object]
    tokens: int
    flops: int
    bytes_read: int
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def intensity(self) -> float:
        """Arithmetic intensity in FLOP per byte."""
        return self.flops / self.bytes_read


def prefill(lm: LM, tokens: int, *, seed: int = 0) -> Phase:
    """One forward pass over `tokens` random tokens that fills the KV cache and predicts the next one."""
    ids = _random_ids(lm, tokens, seed)

    @torch.inference_mode()
    def run() -> None:
        lm.model(input_ids=ids, past_key_values=DynamicCache(config=lm.model.config), logits_to_keep=1)

    flops = lm.card.sequence_flops(tokens, head_positions=1)
    return Phase(f"prefill of {tokens} tokens", run, tokens, flops, lm.card.bytes_read_per_pass)


def decode_step(lm: LM, context: int, *, seed: int = 0) -> Phase:
    """One token through the model after `context` tokens in the KV cache; each call starts from the same cache."""
    ids, cache = _random_ids(lm, context, seed), DynamicCache(config=lm.model.config)
    with torch.inference_mode():
        lm.model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    @torch.inference_mode()
    def run() -> None:
        lm.model(input_ids=ids[:, -1:], past_key_values=cache, logits_to_keep=1)
        cache.crop(-1)  # forget the token again

    read = lm.card.bytes_read_per_pass + context * lm.card.kv_bytes_per_token
    return Phase("one decode step", run, 1, lm.card.flops_per_token(context), read, {"context": str(context)})


def utilization(phase: Phase, timing: Timing, peaks: Peaks) -> Measurement:
    """What a timed phase reached: seconds, tokens/s, and the shares of both limits.

    MFU = FLOPs / seconds / peak FLOP/s; MBU = bytes read / seconds / peak bytes/s.
    """
    seconds = timing.median
    flops, read = phase.flops / seconds.value, phase.bytes_read / seconds.value
    values = {"seconds": seconds, "tokens_per_second": Metric(phase.tokens / seconds.value, "token/s")}
    values |= {"flops": Metric(flops, "FLOP/s"), "intensity": Metric(phase.intensity, "FLOP/byte")}
    values |= {"mfu": Metric(flops / peaks.flops.value), "mbu": Metric(read / peaks.bandwidth.value)}
    protocol = f"{phase.name}, batch 1, transformers' eager forward; median of interleaved repeats"
    return Measurement(phase.name, values, phase.tokens, protocol, settings=phase.settings)


def _random_ids(lm: LM, tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lm.card.vocab_size, (1, tokens), generator=generator).to(lm.device)  # [1, tokens]
