"""Packed weights on an NVIDIA GPU from Volta on: 2, 3, 4 or 8 bits, in groups that are runs of 32 inputs or more.

Up to how many rows `gemv`, and above them `tile`, beat each other and a plain product of unpacked weights is measured
on the card (`packed_linear.crossover`). With TRITON_INTERPRET=1 all of this runs on CPU, slowly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton

from llmlab.kernels.graphs import copies, rows_up_to
from llmlab.kernels.packing import Packed
from llmlab.kernels.triton_kernels import dequantize_kernel, gemv_kernel, sum_kernel, tile_kernel

ROWS = (1, 2, 4, 8, 16, 32)  # at which the two are compared
CHUNK = 32  # inputs that fill whole words at any number of bits
LANES, COLUMNS = 4, 128  # of a program of `gemv_kernel`: a warp a lane, four columns (16 bytes) a thread
TILE_COLUMNS = 64
WAVES = 4  # programs for each multiprocessor, so that memory is never waited for by all of them
UNPACKED = 256  # columns of a program of `dequantize_kernel`


def multiply(matrix: Packed, x: torch.Tensor) -> torch.Tensor:
    """x [rows, in_features] in fp16, bf16 or fp32 times a packed matrix, [rows, out_features]; sums in fp32."""
    few = few_rows(matrix.shape, matrix.bits, matrix.group_size, x.dtype, x.device) if x.is_cuda else ROWS[2]
    return gemv(x, matrix) if len(x) <= few else tile(x, matrix)


@functools.cache
def few_rows(shape: tuple[int, int], bits: int, group_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows up to which `gemv` beats `tile` on such matrices, measured on the card they are on."""
    inputs, outputs = shape
    with device:
        grid = (inputs // group_size, outputs)
        matrices = [
            Packed(
                torch.randint(-(2**31), 2**31, (inputs * bits // 32, outputs), dtype=torch.int32),
                torch.randint(-(2**31), 2**31, (grid[0], outputs * bits // 32), dtype=torch.int32),
                torch.rand(grid, dtype=torch.float16),
                bits,
            )
            for _ in range(copies(inputs * outputs * bits // 8))
        ]
        x = {rows: torch.randn(rows, inputs, dtype=dtype) for rows in ROWS}

    def run(kernel: Callable[[torch.Tensor, Packed], torch.Tensor], rows: int) -> torch.Tensor:
        return [kernel(x[rows], matrix) for matrix in matrices][-1]

    return rows_up_to(ROWS, functools.partial(run, gemv), functools.partial(run, tile), device)


def gemv(x: torch.Tensor, matrix: Packed) -> torch.Tensor:
    """The product for few rows, in fp32: every word is read once for four of them."""
    inputs, outputs = matrix.shape
    rows = min(4, triton.next_power_of_2(len(x)))
    blocks, tall = triton.cdiv(outputs, COLUMNS), triton.cdiv(len(x), rows)
    lanes = LANES * _splits(x.device, blocks * tall, triton.cdiv(inputs // CHUNK, LANES))
    chunks = triton.cdiv(inputs // CHUNK, lanes)
    splits = triton.cdiv(inputs // CHUNK, chunks * LANES)
    with _on(x):
        parts = _parts(x, splits, outputs)
        gemv_kernel[blocks, splits, tall](
            x.contiguous(), matrix.qweight, matrix.qzeros, matrix.scales, parts, len(x), outputs, inputs, chunks,
            *matrix.strides, BITS=matrix.bits, GROUP=matrix.group_size, ROWS=rows, LANES=LANES, BLOCK_N=COLUMNS,
            num_warps=LANES,
        )  # fmt: skip
        return _total(parts, x.dtype)


def tile(x: torch.Tensor, matrix: Packed) -> torch.Tensor:
    """The same by tl.dot, for more rows: weights are rounded to the dtype of x, sums are in fp32."""
    inputs, outputs = matrix.shape
    height, depth = 16 if len(x) <= 16 else 64, 32 if x.dtype == torch.float32 else 64
    blocks, tall, steps = triton.cdiv(outputs, TILE_COLUMNS), triton.cdiv(len(x), height), triton.cdiv(inputs, depth)
    steps_a_split = triton.cdiv(steps, _splits(x.device, blocks * tall, steps))
    splits = triton.cdiv(steps, steps_a_split)
    with _on(x):
        parts = _parts(x, splits, outputs)
        tile_kernel[blocks, splits, tall](
            x.contiguous(), matrix.qweight, matrix.qzeros, matrix.scales, parts, len(x), outputs, inputs,
            steps_a_split, *matrix.strides,
            BITS=matrix.bits, GROUP=matrix.group_size, BLOCK_M=height, BLOCK_N=TILE_COLUMNS, BLOCK_K=depth,
        )  # fmt: skip
        return _total(parts, x.dtype)


def dequantize(matrix: Packed, dtype: torch.dtype) -> torch.Tensor:
    """W [out_features, in_features], computed in fp32 and rounded to `dtype`: a view of its transpose."""
    inputs, outputs = matrix.shape
    weight = torch.empty(inputs, outputs, dtype=dtype, device=matrix.qweight.device)
    with _on(weight):
        dequantize_kernel[triton.cdiv(outputs, UNPACKED), inputs // CHUNK](
            matrix.qweight, matrix.qzeros, matrix.scales, weight, outputs, *matrix.strides,
            BITS=matrix.bits, GROUP=matrix.group_size, BLOCK_N=UNPACKED,
        )  # fmt: skip
    return weight.T


def _on(tensor: torch.Tensor) -> torch.cuda.device:
    """The device of a tensor as the current one, where Triton launches."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


@functools.cache
def _processors(device: torch.device) -> int:
    cuda = device.type == "cuda"
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if cuda else 1


def _splits(device: torch.device, programs: int, most: int) -> int:
    """Into how many parts K is split, so that the programs of one part fill the card together."""
    waves: int = triton.cdiv(WAVES * _processors(device), programs)
    return max(1, min(most, waves))


def _parts(x: torch.Tensor, splits: int, outputs: int) -> torch.Tensor:
    """Room for the parts of a product [splits, rows, outputs], in the dtype of x if there is one part alone."""
    return torch.empty(splits, len(x), outputs, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)


def _total(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of parts; in a fixed order, where atomic additions would give other bits from run to run."""
    if len(parts) == 1:
        return parts[0]
    y = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    sum_kernel[(triton.cdiv(y.numel(), 1024),)](parts, y, y.numel(), len(parts), BLOCK=1024)
    return y
