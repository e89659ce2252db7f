"""The C++ kernel over packed weights (rows.cpp): 2 to 8 bits in groups, a few rows of activations.

Activations are rounded to int8 by 32s, each product by about 0.5 %, where 4-bit weights themselves are off by 3 %. Sums
are exact integers in a block of 32 and fp32 above it. The layout keeps the codes, scales and zero points as they are:
what was packed can be unpacked.
"""

from __future__ import annotations

import torch

from llmlab.kernels.packing import Quantized

TILE, BLOCK = 16, 32  # as in rows.cpp: outputs side by side, columns that are summed as integers


def takes(in_features: int, group_size: int) -> bool:
    """Whether the kernel serves a matrix of this width and group size."""
    return in_features % BLOCK == 0 and group_size % BLOCK == 0


class NativeProduct(torch.nn.Module):
    """x [..., n] -> x W^T [..., m] in the dtype of x, for W[:, j] = (codes[:, j] - zeros) scales.

    Buffers (T tiles of 16 outputs, G groups):
        codes: uint8 [T, n / 32, 256 or 512], see `tiles`.
        scales: fp16 [T, G, 16].
        zeros: uint8 [T, G, 16].
        order: int64 [n], the column of x that stands at each column of the codes; None if in order.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    order: torch.Tensor | None

    def __init__(self, matrix: Quantized, bits: int) -> None:
        super().__init__()
        self.outputs, columns = matrix.codes.shape
        in_order = torch.equal(matrix.g_idx.long(), torch.arange(columns) // (columns // matrix.scales.shape[1]))
        order = None if in_order else torch.argsort(matrix.g_idx, stable=True)  # groups side by side again
        codes = matrix.codes if order is None else matrix.codes[:, order]
        padding = (0, 0, 0, -self.outputs % TILE)
        pad = torch.nn.functional.pad
        self.register_buffer("codes", tiles(pad(codes, padding), bits), persistent=False)
        self.register_buffer("scales", _by_tile(pad(matrix.scales, padding)), persistent=False)
        self.register_buffer("zeros", _by_tile(pad(matrix.zeros, padding)), persistent=False)
        self.register_buffer("order", order, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        product: torch.Tensor = torch.ops.llmlab.packed_rows(
            x, self.codes, self.scales, self.zeros, self.order, self.outputs
        )
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


def _by_tile(grid: torch.Tensor) -> torch.Tensor:
    """[m, G] to [m / 16, G, 16]."""
    return grid.view(-1, TILE, grid.shape[1]).transpose(1, 2).contiguous()
