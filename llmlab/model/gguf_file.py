"""A GGUF file's metadata parsed once and fast, and the parts of a split one as one, for transformers to read.

The package gguf makes an array of every string of a vocabulary, and transformers parses them anew for config,
tokenizer and weights: 108 s for 262,144 tokens. Here an array of the metadata becomes a list at once, and transformers
is handed the same parsed file each time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGUFReader, GGUFValueType
from transformers import PreTrainedConfig
from transformers.modeling_gguf_pytorch_utils import GGUF_CONFIG_MAPPING

from llmlab.base.errors import InputError

PARSED = 99  # a type that GGUF does not have: transformers takes such a value as it is
Part = tuple[int, list[Any], list[int], list[int]]  # bytes, pieces, which of them are values, types


class ParsedFile(GGUFReader):  # type: ignore[misc]  # gguf is untyped
    """As its base class, but arrays of more than one element are Python lists from the start."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Part:
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]
        kind, count = struct.unpack_from("=IQ", self.data, orig_offs)
        begin = orig_offs + 12
        if count > 1 and kind == GGUFValueType.STRING:
            texts, end = _strings(memoryview(self.data), begin, count)
            return end - orig_offs, [texts], [0], [PARSED]
        if count > 1 and kind in self.gguf_scalar_to_np:
            values = self._get(begin, self.gguf_scalar_to_np[GGUFValueType(kind)], count)
            return 12 + values.nbytes, [values.tolist()], [0], [PARSED]
        return super()._get_field_parts(orig_offs, raw_type)  # type: ignore[no-any-return]

    def value(self, key: str) -> Any:
        """A value of the metadata; None if it is not there."""
        field = self.fields.get(key)
        if field is None:
            return None
        return field.parts[field.data[0]] if field.types == [PARSED] else field.contents()


def _strings(data: memoryview, begin: int, count: int) -> tuple[list[str], int]:
    texts, place = [], begin
    length = struct.Struct("=Q")
    for _ in range(count):
        (size,) = length.unpack_from(data, place)
        place += 8
        texts.append(bytes(data[place : place + size]).decode())
        place += size
    return texts, place


@contextmanager
def parsed_once(parts: list[Path]) -> Iterator[ParsedFile]:
    """Within the block, transformers' GGUF reader gets this file, with the tensors of all parts.

    Raises InputError if a file cannot be read, or the parts do not make the whole.
    """
    try:
        files = [ParsedFile(part) for part in parts]
    except Exception as error:  # gguf raises whatever it stumbles over
        reason = " ".join(str(error).split())[:160].rstrip(".")
        raise InputError(f"cannot read the GGUF file {parts[0]}, it may be truncated: {reason}.") from error
    whole = files[0]
    if (count := whole.value("split.count") or 1) != len(parts):
        first = f"-00001-of-{count:05}.gguf"
        raise InputError(
            f"{parts[0]} is one of {count} parts of one model: give them names that end in {first} and so on."
        )
    for file in files[1:]:
        whole.tensors += file.tensors
    expected = whole.value("split.tensors.count") or len(whole.tensors)
    if len({tensor.name for tensor in whole.tensors}) != expected:
        raise InputError(f"{parts[0]}: its parts hold {len(whole.tensors)} tensors, expected {expected}.")
    original = gguf.GGUFReader
    gguf.GGUFReader = lambda *_: whole
    try:
        yield whole
    finally:
        gguf.GGUFReader = original


# Settings that transformers does not read, and what says the same in its config. A file that says something else than
# the config is refused; so is one with a setting that is neither here, nor read, nor INERT.
SAME = {
    "attention.key_length": ("global_head_dim", "head_dim"),
    "attention.value_length": ("v_head_dim", "global_head_dim", "head_dim"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_dim"),
    "context_length": ("max_position_embeddings", "n_positions", "seq_length"),
    "vocab_size": ("vocab_size",),
    "use_parallel_residual": ("use_parallel_residual",),
    "logit_scale": ("logit_scale",),
}
INERT = ("attention.causal", "tensor_data_layout", "attention.key_length_swa", "attention.value_length_swa")


def check_settings(file: ParsedFile, config: PreTrainedConfig) -> None:
    """Raise InputError, which names it, for a setting of the file that the config made of it does not honour."""
    architecture = file.value("general.architecture")
    read = GGUF_CONFIG_MAPPING.get(config.model_type.removesuffix("_text")) or {}
    for key in file.fields:
        setting = key.removeprefix(f"{architecture}.")
        if setting == key or setting in INERT or setting.startswith("rope.scaling.") or read.get(setting):
            continue
        told = file.value(key)
        ours = _rotary(config, setting) if setting.startswith("rope.") else _first(config, SAME.get(setting, ()))
        if not (told == ours or (not told and not ours) or _close(told, ours)):
            raise InputError(
                f"the setting {key} of the GGUF file is {told}, but transformers would run it with {ours}."
            )


def set_rotary_scaling(file: ParsedFile, config: PreTrainedConfig) -> set[str]:
    """Put the file's scaling of rotary frequencies, which transformers does not read, into the config.

    Returns the names of the tensors that this makes use of. Raises InputError for a scaling that llmlab cannot put.
    """
    prefix = f"{file.value('general.architecture')}.rope.scaling."
    kind, factor = file.value(f"{prefix}type") or "none", file.value(f"{prefix}factor") or 1.0
    rope = config.rope_parameters if isinstance(getattr(config, "rope_parameters", None), dict) else {}
    factors = [tensor for tensor in file.tensors if tensor.name == "rope_freqs.weight"]
    if factors:
        stretch = torch.from_numpy(np.array(factors[0].data, dtype=np.float32))
        llama3 = {
            "rope_type": "llama3",
            "factor": float(stretch.max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
        llama3["original_max_position_embeddings"] = 8192
        if "rope_theta" not in rope or not torch.allclose(
            stretch, _llama3(rope["rope_theta"], llama3, len(stretch)), rtol=1e-4
        ):
            raise InputError(
                "the GGUF file's rope_freqs.weight is no scaling of Llama 3's kind, the one that llmlab reads."
            )
        rope |= llama3
    elif kind != "none" and factor != 1:
        if kind not in ("linear", "yarn") or "rope_theta" not in rope:
            raise InputError(
                f"the GGUF file scales rotary frequencies ({kind}, factor {factor}): llmlab cannot put that."
            )
        rope |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = file.value(f"{prefix}original_context_length")
    return {tensor.name for tensor in factors}


def _llama3(theta: float, settings: dict[str, Any], half: int) -> torch.Tensor:
    """By how much Llama 3.1 slows each rotary frequency down: fast ones not at all, slow ones by the whole factor."""
    turns = 8192 * theta ** -(torch.arange(half) / half) / (2 * torch.pi)  # in the original context
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: torch.Tensor = 1 / ((1 - smooth) / settings["factor"] + smooth)
    return factors


def _rotary(config: PreTrainedConfig, setting: str) -> float | None:
    rope = getattr(config, "rope_parameters", None) or {}
    local, rope = (rope.get("sliding_attention", rope), rope.get("full_attention", rope))
    if setting == "rope.dimension_count":
        width = _first(config, ("head_dim",)) or config.hidden_size // config.num_attention_heads
        return int(width * rope.get("partial_rotary_factor", 1.0))
    bases = {"rope.freq_base": rope.get("rope_theta"), "rope.freq_base_swa": local.get("rope_theta")}
    return bases.get(setting)


def _first(config: PreTrainedConfig, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _close(a: object, b: object) -> bool:
    return isinstance(a, int | float) and isinstance(b, int | float) and abs(a - b) <= 1e-5 * abs(b)
