"""A Triton kernel for packed weights: 2, 3, 4 or 8 bits, groups, act-order, any CUDA GPU from Volta on.

Each program computes a tile of y = x W^T. It reads the packed words of its columns, turns them into weights in
registers, and multiplies; nothing unpacked is ever written to memory. With TRITON_INTERPRET=1 it runs on CPU, slowly.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def _field(pointers: Any, next_pointers: Any, shift: Any, mask: Any, BITS: tl.constexpr) -> Any:
    """BITS bits from bit `shift` of a word on; at 3 bits they may go on in the next word."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    word = tl.load(pointers, mask=mask, other=0)
    if 32 % BITS == 0:
        return (word >> shift) & LEVELS
    inside = tl.minimum(32 - shift, BITS)  # bits of the field in this word; >> carries the sign, so mask them
    low = (word >> shift) & ((1 << inside) - 1)
    beyond = tl.load(next_pointers, mask=mask & (inside < BITS), other=0)
    return low | ((beyond << inside) & LEVELS)


@triton.jit  # type: ignore[untyped-decorator]
def _matmul_kernel(  # type: ignore[no-untyped-def]
    x, qweight, qzeros, scales, g_idx, y,  # noqa: ANN001
    M, N, K,  # noqa: ANN001
    BITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows, in_columns = rows < M, columns < N
    LEVELS: tl.constexpr = (1 << BITS) - 1
    zero_words = N * BITS // 32  # words in a row of qzeros
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        in_k = k < K
        inputs = tl.load(x + rows[:, None] * K + k[None, :], mask=in_rows[:, None] & in_k[None, :], other=0.0)
        inside = in_k[:, None] & in_columns[None, :]
        bit = k[:, None] * BITS
        at = qweight + (bit // 32) * N + columns[None, :]
        codes = _field(at, at + N, bit % 32, inside, BITS)
        group = tl.load(g_idx + k, mask=in_k, other=0)[:, None]
        bit = columns[None, :] * BITS
        at = qzeros + group * zero_words + bit // 32
        zeros = (_field(at, at + 1, bit % 32, inside, BITS) + 1) & LEVELS  # stored minus one
        scale = tl.load(scales + group * N + columns[None, :], mask=inside, other=0.0)
        weights = (codes - zeros).to(tl.float32) * scale.to(tl.float32)
        total += tl.dot(inputs, weights.to(inputs.dtype))
    tl.store(
        y + rows[:, None] * N + columns[None, :],
        total.to(y.dtype.element_ty),
        mask=in_rows[:, None] & in_columns[None, :],
    )


def triton_matmul(
    x: torch.Tensor,
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """x [rows, in_features] in fp16, bf16 or fp32 times a packed matrix: [rows, out_features]; sums in fp32.

    The tensors of the matrix are those of `packed_linear.QuantLinear`.
    """
    rows, columns = x.shape[0], qweight.shape[1]
    y = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    block_m = 16 if rows <= 16 else 64
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, 64))
    _matmul_kernel[grid](
        x.contiguous(), qweight, qzeros, scales, g_idx, y, rows, columns, x.shape[1],
        BITS=bits, BLOCK_M=block_m, BLOCK_N=64, BLOCK_K=64,
    )  # fmt: skip
    return y
