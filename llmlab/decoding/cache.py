"""A static KV cache, and the attention that writes into it and reads from it.

Buffers of a fixed size, so that every decode step runs the same operations on the same memory and can be recorded or
compiled. Nothing that a pass writes is kept until the engine says so: a rejected draft costs no copying.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, TypedDict, Unpack

import torch
from transformers import AttentionInterface

from llmlab.base.errors import InputError
from llmlab.decoding.attend import attend
from llmlab.kernels.native import native
from llmlab.kernels.plain import slow_on_cpu

NAME = "llmlab_cache"
FEW = 17  # tokens of a row in one pass: above it torch's attention, which works in blocks, is faster
# What transformers hands to attention that says nothing new: the mask, the queries and the keys hold it already.
IMPLIED = {"dropout", "is_causal", "position_ids", "position_embeddings", "cache_position"}


class Cache:
    """Static buffers for keys and values: [rows, kv_heads, capacity, d] a layer, made when a layer first writes.

    In fp32 where the processor is slow at half precision: attention then works in fp32, too (see `attend`).
    `batch` rows are in use, the first ones; `lengths`: tokens held by each. `window`: how many tokens, itself included,
    a token sees in layers with a sliding window; None without such layers. `native`: whether the C++ kernels attend to
    these buffers (a GPU's never ask for them to be compiled).
    """

    def __init__(self, rows: int, capacity: int, window: int | None = None) -> None:
        self.rows, self.capacity, self.window = rows, capacity, window
        self.native = False
        self.buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.clear(rows)

    def clear(self, batch: int) -> None:
        """Begin anew with `batch` empty rows."""
        self.batch, self.lengths = batch, [0] * batch

    def layer(self, index: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer in the rows in use; `key`, `value`: what comes in, [batch, kv_heads, width, d]."""
        if index not in self.buffers:
            self.native = key.device.type == "cpu" and not native().problem
            self.buffers[index] = (self._buffer(key), self._buffer(value))
        keys, values = self.buffers[index]
        return keys[: self.batch], values[: self.batch]

    def _buffer(self, like: torch.Tensor) -> torch.Tensor:
        wide = like.device.type == "cpu" and slow_on_cpu(like.dtype)
        shape = (self.rows, like.shape[1], self.capacity, like.shape[3])
        return like.new_zeros(shape, dtype=torch.float32 if wide else like.dtype)

    @torch.inference_mode()
    def move(self, row: int, sources: list[int], to: int) -> None:
        """Put the tokens in slots `sources` of a row into the slots from `to` on."""
        index = torch.tensor(sources)
        for keys, values in self.buffers.values():
            keys[row, :, to : to + len(sources)] = keys[row, :, index]
            values[row, :, to : to + len(sources)] = values[row, :, index]

    @torch.inference_mode()
    def select(self, rows: list[int]) -> None:
        """Keep these rows alone."""
        for keys, values in self.buffers.values():
            keys[: len(rows)], values[: len(rows)] = keys[rows], values[rows]
        self.lengths = [self.lengths[row] for row in rows]
        self.batch = len(rows)


class PassInputs(NamedTuple):
    """Tensors of one forward pass.

    Attributes:
        input_ids, positions: [batch, width].
        start: first slot written, [] on CPU, for a row alone; else None.
        slots: [batch, width], the slot of each token; None at first where `start` says it.
        mask: [batch, 1, groups * width, seen], True where a token (below one another: the query heads of a KV head)
            sees a slot; None if every token sees all slots up to its own.
        near: the same for layers with a sliding window; None if all that `mask` shows is near enough.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    start: torch.Tensor | None
    slots: torch.Tensor | None
    mask: torch.Tensor | None
    near: torch.Tensor | None


class Layer(Protocol):
    """What transformers' attention modules have."""

    layer_idx: int


class Asked(TypedDict, total=False):
    """What models ask of attention beside queries, keys and values, and this does."""

    scaling: float | None
    sliding_window: int | None  # a token sees so many, itself included
    softcap: float | None  # see `attend`
    s_aux: torch.Tensor | None  # sinks


def cached_attention(
    module: Layer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    static_cache: Cache,
    inputs: PassInputs,
    **asked: Unpack[Asked],
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [batch, heads, width, d] queries to [batch, width, heads, d].

    Raises InputError for what a model asks of attention and this does not do.
    """
    window = asked.get("sliding_window")
    _refuse(asked, attention_mask, window not in (None, static_cache.window))
    buffers = static_cache.layer(module.layer_idx, key, value)
    scale = asked.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = inputs.mask if window is None or inputs.near is None else inputs.near
    rows = query.shape[1] // key.shape[1] * query.shape[2]
    if mask is not None and mask.shape[2] != rows:  # the config tells another number of KV heads
        mask = mask[:, :, : query.shape[2]].repeat(1, 1, rows // query.shape[2], 1)
    cap, sinks = asked.get("softcap") or 0.0, asked.get("s_aux")
    few = query.shape[2] <= FEW and (mask is not None or query.shape[2] == 1)
    if few and cap == 0 and sinks is None and static_cache.native:
        return torch.ops.llmlab.attend_few(query, key, value, *buffers, inputs.slots, mask, scale), None
    return attend(query, key, value, buffers, inputs.start, inputs.slots, mask, scale, cap, sinks), None


def _refuse(asked: Mapping[str, object], attention_mask: torch.Tensor | None, other_window: bool) -> None:
    """Raise InputError for what is asked and not done."""
    unknown = asked.keys() - Asked.__annotations__.keys() - IMPLIED
    names = sorted(name for name in unknown if asked[name] is not None and asked[name] is not False)
    if attention_mask is not None or other_window or asked.get("dropout") or asked.get("is_causal") is False:
        names.append("a mask, window or dropout of its own")
    if names:
        raise InputError(f"its attention takes {', '.join(names)}: the static KV cache does not.")


AttentionInterface.register(NAME, cached_attention)
