"""torch's CPU kernels over packed weights: codes of up to 4 bits in groups, and 8 bits with one scale a row.

Both are fast for bf16 activations alone: with fp32 or fp16 ones they take a scalar path, ten times slower than a plain
matmul. So other activations are rounded to bf16 on the way in. Sums are in fp32, the result is rounded to bf16: a
relative error of about 2^-9, where 4-bit weights themselves are off by 2^-5.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from llmlab.kernels.packing import Quantized

GROUP_SIZES = (32, 64, 128, 256)  # that the 4-bit kernel takes

Multiply = Callable[[torch.Tensor], torch.Tensor]


class Int4Product(torch.nn.Module):
    """x [rows, n] -> x W^T [rows, m] in the dtype of x, for W[:, j] = (codes[:, j] - zeros) scales.

    Args:
        codes: int32 [m, n] in 0 .. 15; the columns of a group stand side by side.
        scales: float [m, G].
        zeros: [m, G], zero points: the kernel's own is 8, the rest becomes an offset in bf16.
        group_size: n / G, one of GROUP_SIZES.
        order: int64 [n], the column of x that stands at each column of the codes; None if in order.
    """

    packed: torch.Tensor
    grid: torch.Tensor
    order: torch.Tensor | None

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor,
        group_size: int,
        order: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.group_size = group_size
        offsets = (8 - zeros.float()) * scales.float()  # w = (code - 8) scale + offset
        grid = torch.stack([scales.float(), offsets], dim=-1).transpose(0, 1).contiguous().bfloat16()  # [G, m, 2]
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1)
        for name, tensor in (("packed", packed), ("grid", grid), ("order", order)):
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        narrow = (x if self.order is None else x[:, self.order]).to(torch.bfloat16).contiguous()
        product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            narrow, self.packed, self.group_size, self.grid
        )
        return product.to(x.dtype)


class Int8Product(torch.nn.Module):
    """x [rows, n] -> x W^T [rows, m] in the dtype of x, for W = codes scales.

    Args:
        codes: int8 [m, n].
        scales: float [m].
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes.contiguous(), persistent=False)
        self.register_buffer("scales", scales.bfloat16(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product."""
        narrow = x.to(torch.bfloat16).contiguous()
        product: torch.Tensor = torch.ops.aten._weight_int8pack_mm(narrow, self.codes, self.scales)
        return product.to(x.dtype)


def int4_product(matrix: Quantized, bits: int) -> Int4Product:
    """By a matrix of up to 4 bits, groups of one of GROUP_SIZES; 2 and 3 bits take a nibble each, too."""
    size = len(matrix.g_idx) // matrix.scales.shape[1]
    in_order = torch.equal(matrix.g_idx.long(), torch.arange(len(matrix.g_idx)) // size)
    order = None if in_order else torch.argsort(matrix.g_idx, stable=True)  # groups side by side again
    codes = (matrix.codes if order is None else matrix.codes[:, order]).int()
    zeros = matrix.zeros  # [m, G]
    # Below 4 bits there is room to move the zero point to 8, the kernel's own, where nothing is rounded.
    if bits < 4 and not zeros.is_floating_point():
        codes += (8 - zeros.int()).repeat_interleave(size, dim=1)
        zeros = torch.full_like(zeros, 8)
    return Int4Product(codes, matrix.scales, zeros, size, order)


def int8_product(matrix: Quantized) -> Int8Product:
    """By a matrix of 8 bits with one group, zero points in the middle."""
    return Int8Product((matrix.codes.short() - 128).to(torch.int8), matrix.scales[:, 0])
