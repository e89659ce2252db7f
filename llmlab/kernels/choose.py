"""Which kernel multiplies by a packed matrix on its device."""

from __future__ import annotations

import functools
from typing import Protocol

import torch

from llmlab.kernels import native_packed
from llmlab.kernels.native import native
from llmlab.kernels.native_packed import NativeProduct
from llmlab.kernels.packing import Packed, Quantized
from llmlab.kernels.torch_packed import GROUP_SIZES, Multiply, int4_product, int8_product

REFERENCE = "dequantize, then matmul"
NATIVE = "C++ (CPU)"
INT4_CPU = "torch int4 (CPU)"
INT8_CPU = "torch int8 (CPU)"
TRITON = "Triton (GPU)"


class PackedMatrix(Protocol):
    """What is asked of a `packed_linear.QuantLinear`."""

    in_features: int
    bits: int
    groups: int
    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor

    @property
    def codes(self) -> torch.Tensor: ...
    @property
    def zeros(self) -> torch.Tensor: ...
    @property
    def sequential(self) -> bool: ...
    def unpacked(self) -> Quantized: ...


def choose_kernel(linear: PackedMatrix) -> tuple[str, Multiply | None]:
    """The packed kernel that can multiply by this matrix: (name, function of rows), or REFERENCE and None.

    On CPU activations of any dtype go in; see `kernels.torch_packed` for what is rounded.
    """
    cpu = linear.qweight.device.type == "cpu"
    size = linear.in_features // linear.groups
    if native_takes(linear) and linear.sequential:
        return NATIVE, NativeProduct.pack(linear.codes.T, linear.scales.T, linear.zeros, linear.bits)
    if cpu and linear.bits <= 4 and size in GROUP_SIZES:
        return INT4_CPU, int4_product(linear.unpacked(), linear.bits)
    if cpu and linear.bits == 8 and linear.groups == 1 and bool((linear.zeros == 128).all()):
        return INT8_CPU, int8_product(linear.unpacked())
    real = linear.qzeros.is_floating_point()
    if linear.qweight.device.type == "cuda" and linear.sequential and size % 32 == 0 and not real:
        from llmlab.kernels import triton_packed

        return TRITON, functools.partial(triton_packed.multiply, packed(linear))
    return REFERENCE, None


def native_takes(linear: PackedMatrix) -> bool:
    """Whether the C++ kernel is here and serves groups of this size."""
    size = linear.in_features // linear.groups
    on_cpu = linear.qweight.device.type == "cpu"
    return on_cpu and native_packed.takes(linear.in_features, size) and not native().problem


def packed(linear: PackedMatrix) -> Packed:
    """Its tensors, for the kernels of `triton_packed`; whoever holds them does not hold the module."""
    return Packed(linear.qweight, linear.qzeros, linear.scales, linear.bits)
