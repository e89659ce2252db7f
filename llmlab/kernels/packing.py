"""A quantized matrix, and integers of 2, 3, 4 or 8 bits in int32 words, as AutoGPTQ's checkpoints store them.

The words of a column are one stream of bits, least significant first: value k takes bits k*b .. (k+1)*b - 1 of the
stream, and at 3 bits may straddle two words (32 values fill 3 words).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BITS = (2, 3, 4, 8)


@dataclass
class Quantized:
    """A quantized weight matrix, not packed.

    Attributes:
        codes: uint8 [rows, columns], the integers q.
        scales: fp16 [rows, groups].
        zeros: uint8 [rows, groups], 1 .. 2^bits - 1 (checkpoints store z - 1); or fp16, real ones.
        g_idx: int32 [columns], the group of each input column.
        error: tr((W-Q) H (W-Q)^T) / tr(W H W^T), the relative squared error of the layer's outputs on the calibration
            text; NaN where no Hessian was given.
        bound: what that is at most, by Babai's bound, if no weight is clipped; NaN likewise.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    g_idx: torch.Tensor
    error: float = float("nan")
    bound: float = float("nan")

    def dequantize(self) -> torch.Tensor:
        """fp32 [rows, columns]: s (q - z)."""
        groups = self.g_idx.long()
        return (self.codes.float() - self.zeros.float()[:, groups]) * self.scales.float()[:, groups]


@dataclass(frozen=True, eq=False)
class Packed:
    """The tensors of a `packed_linear.QuantLinear` whose groups are runs of inputs; they may be views of wider ones."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features)."""
        return self.qweight.shape[0] * 32 // self.bits, self.qweight.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.shape[0] // self.scales.shape[0]

    @property
    def strides(self) -> tuple[int, int, int]:
        """Numbers from one row of each to the next."""
        return self.qweight.stride(0), self.qzeros.stride(0), self.scales.stride(0)


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
