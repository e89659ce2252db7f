"""Integers of 2, 3, 4 or 8 bits in int32 words, as AutoGPTQ's checkpoints store them.

The words of a column are one stream of bits, least significant first: value k takes bits k*b .. (k+1)*b - 1 of the
stream, and at 3 bits may straddle two words (32 values fill 3 words).
"""

from __future__ import annotations

import torch


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the first dimension: integers [n, m] below 2^bits, n a multiple of 32, to int32 [n * bits / 32, m]."""
    if 32 % bits:
        return _pack_stream(values, bits)
    shifts = torch.arange(0, 32, bits, device=values.device, dtype=torch.int32)[:, None]
    words = values.int().reshape(-1, 32 // bits, values.shape[1]) << shifts
    packed: torch.Tensor = words.sum(dim=1, dtype=torch.int32)  # no two share a bit, so the sum is their union
    return packed


def _pack_stream(values: torch.Tensor, bits: int) -> torch.Tensor:
    n, m = values.shape
    places = torch.arange(32, device=values.device, dtype=torch.int32)[:, None]
    stream = (values.int()[:, None] >> places[:bits]) & 1  # [n, bits, m]
    packed: torch.Tensor = (stream.reshape(n * bits // 32, 32, m) << places).sum(dim=1, dtype=torch.int32)
    return packed


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack`: int32 [n * bits / 32, m] to uint8 [n, m]."""
    if 32 % bits:
        return _unpack_stream(words, bits)
    per_word = 32 // bits
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)[:, None]
    values = (words[:, None] >> shifts) & ((1 << bits) - 1)  # [words, per_word, m]
    return values.to(torch.uint8).reshape(words.shape[0] * per_word, -1)


def _unpack_stream(words: torch.Tensor, bits: int) -> torch.Tensor:
    stream = (words[:, None] >> torch.arange(32, device=words.device, dtype=torch.int32)[:, None]) & 1
    n = words.shape[0] * 32 // bits
    weights = torch.arange(bits, device=words.device, dtype=torch.int32)[:, None]
    values: torch.Tensor = (stream.reshape(n, bits, -1) << weights).sum(dim=1)
    return values.to(torch.uint8)
