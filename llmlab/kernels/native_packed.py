"""The C++ kernel over packed weights (rows.cpp): 2 to 8 bits in groups, a few rows of activations.

Activations are rounded to int8 by 32s, each product by about 0.5 %, where 4-bit weights themselves are off by 3 %. Sums
are exact integers in a block of 32 and fp32 above it. The layout keeps the codes, scales and zero points as they are:
what was packed can be unpacked.
"""

from __future__ import annotations

import torch

from llmlab.kernels.stacking import stacked

TILE, BLOCK = 16, 32  # as in rows.cpp: outputs side by side, columns that are summed as integers


def takes(in_features: int, group_size: int) -> bool:
    """Whether the kernel serves a matrix of this width and group size."""
    return in_features % BLOCK == 0 and group_size % BLOCK == 0


class NativeProduct(torch.nn.Module):
    """x [..., n] -> x W^T [..., m] in the dtype of x, for W[:, j] = (codes[:, j] - zeros) scales.

    Buffers (T tiles of 16 outputs, G groups):
        codes: uint8 [T, n / 32, 256 or 512], see `tiles`.
        scales, zeros: fp16 [T, G, 16].
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        for name, tensor in (("codes", codes), ("scales", scales), ("zeros", zeros)):
            self.register_buffer(name, tensor, persistent=False)

    @classmethod
    def pack(cls, codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> NativeProduct:
        """From codes uint8 [m, n], the columns of a group side by side, scales and zeros [m, G]."""
        outputs, padding = len(codes), (0, 0, 0, -len(codes) % TILE)
        codes, scales, zeros = (torch.nn.functional.pad(tensor, padding) for tensor in (codes, scales, zeros))
        return cls(tiles(codes, bits), _by_tile(scales.half()), _by_tile(zeros.half()), outputs)

    @classmethod
    def joined(cls, parts: list[NativeProduct]) -> NativeProduct | None:
        """Several with the same input as one, without a second copy; None where a part is no whole number of tiles."""
        if any(part.outputs % TILE for part in parts):
            return None
        codes, scales, zeros = (
            stacked([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros")
        )
        return cls(codes, scales, zeros, sum(part.outputs for part in parts))

    def unpacked(self) -> torch.Tensor:
        """Codes uint8 [n, m], in the order in which they were packed."""
        return untiled(self.codes)[: self.outputs].T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        product: torch.Tensor = torch.ops.llmlab.packed_rows(x, self.codes, self.scales, self.zeros, self.outputs)
        return product


def tiles(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes uint8 [m, n], m a multiple of 16, n of 32, as the kernel reads them: [m / 16, n / 32, bytes].

    A register holds 4 neighbouring columns of 16 outputs, output by output. At 8 bits a byte is a code; below, its low
    half is a code and its high half that of 4 columns further.
    """
    m, n = codes.shape
    if bits == 8:
        by_vector = codes.view(m // TILE, TILE, n // BLOCK, BLOCK // 4, 4)
    else:
        halves = codes.view(m // TILE, TILE, n // BLOCK, BLOCK // 8, 2, 4)
        by_vector = halves[..., 0, :] | (halves[..., 1, :] << 4)
    return by_vector.permute(0, 2, 3, 1, 4).reshape(m // TILE, n // BLOCK, -1)  # tile, block, vector, output, byte


def untiled(tiles: torch.Tensor) -> torch.Tensor:
    """The inverse of `tiles`: codes uint8 [m, n]."""
    count, blocks, nbytes = tiles.shape
    by_vector = tiles.view(count, blocks, nbytes // (4 * TILE), TILE, 4).permute(0, 3, 1, 2, 4)
    if nbytes == 8 * 4 * TILE:
        return by_vector.reshape(count * TILE, blocks * BLOCK)
    return torch.stack([by_vector & 15, by_vector >> 4], dim=-2).reshape(count * TILE, blocks * BLOCK)


def _by_tile(grid: torch.Tensor) -> torch.Tensor:
    """[m, G] to [m / 16, G, 16]."""
    return grid.view(-1, TILE, grid.shape[1]).transpose(1, 2).contiguous()
