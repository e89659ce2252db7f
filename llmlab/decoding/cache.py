"""A static KV cache, and the attention that writes into it and reads from it.

Buffers of a fixed size, so that every decode step runs the same operations on the same memory and can be recorded or
compiled. Nothing that a pass writes is kept until the engine says so: a rejected draft costs no copying.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from transformers import AttentionInterface

from llmlab.decoding.attend import attend
from llmlab.kernels.plain import slow_on_cpu

NAME = "llmlab_cache"


class Cache:
    """Static buffers for keys and values: [rows, kv_heads, capacity, d] a layer, made when a layer first writes.

    In fp32 where the processor is slow at half precision: attention then works in fp32, too (see `attend`).
    `batch` rows are in use, the first ones; `lengths`: tokens held by each.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.buffers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.clear(rows)

    def clear(self, batch: int) -> None:
        """Begin anew with `batch` empty rows."""
        self.batch, self.lengths = batch, [0] * batch

    def layer(self, index: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer in the rows in use; `like` is what comes in, [batch, kv_heads, width, d]."""
        if index not in self.buffers:
            shape = (self.rows, like.shape[1], self.capacity, like.shape[3])
            wide = like.device.type == "cpu" and slow_on_cpu(like.dtype)
            dtype = torch.float32 if wide else like.dtype
            self.buffers[index] = (like.new_zeros(shape, dtype=dtype), like.new_zeros(shape, dtype=dtype))
        keys, values = self.buffers[index]
        return keys[: self.batch], values[: self.batch]

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
        slots: [batch, width], the slot of each token, for several rows; else None.
        mask: [batch, 1, groups * width, seen], True where a token (below one another: the query heads of a KV head)
            sees a slot; None if every token sees all slots up to its own.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    start: torch.Tensor | None
    slots: torch.Tensor | None
    mask: torch.Tensor | None


class Layer(Protocol):
    """What transformers' attention modules have."""

    layer_idx: int


def cached_attention(
    module: Layer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    static_cache: Cache,
    inputs: PassInputs,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [batch, heads, width, d] queries to [batch, width, heads, d]."""
    buffers = static_cache.layer(module.layer_idx, key)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, buffers, inputs.start, inputs.slots, inputs.mask, scale), None


AttentionInterface.register(NAME, cached_attention)
