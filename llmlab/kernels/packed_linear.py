"""QuantLinear: a Linear over packed weights, and the kernel that multiplies by them.

Decoding reads every weight for one token: there the kernel must read 4 bits and nothing else. Prefill reads a weight
once for hundreds of tokens: there unpacking to a plain matmul is faster. Where the two meet is measured.
"""

from __future__ import annotations

import functools
import warnings
from typing import Protocol

import torch

from llmlab.kernels.choose import INT4_CPU, INT8_CPU, NATIVE, REFERENCE, TRITON, choose_kernel, native_takes, packed
from llmlab.kernels.graphs import copies, rows_up_to
from llmlab.kernels.native_packed import NativeProduct
from llmlab.kernels.packing import Quantized, pack, unpack
from llmlab.kernels.plain import slow_on_cpu
from llmlab.kernels.torch_packed import GROUP_SIZES, Multiply

ROUNDED_ROWS = 32  # rows whose activations are rounded to less than their dtype: decoding; scoring stays exact
CROSSINGS = (4, 16, 64, 256)  # rows at which the two are compared
DECODE_ROWS = 8  # up to here a step is bound by reading the weights
TOLERANCE = 0.02  # relative error of a packed product: bf16 has 8 bits


class HasBits(Protocol):
    """A quantization scheme, as far as packing needs it."""

    @property
    def bits(self) -> int: ...


class QuantLinear(torch.nn.Module):
    """y = x W^T + b with W packed as in AutoGPTQ's checkpoints.

    Buffers (n input, m output features, G groups):
        qweight: int32 [n * bits / 32, m], the codes, packed along the inputs; [0, m] where the C++ kernel holds them.
        qzeros: int32 [G, m * bits / 32], zero points minus one, packed along the outputs; or fp16 [G, m], real zero
            points, which no checkpoint holds.
        scales: fp16 [G, m].
        g_idx: int32 [n], the group of each input feature.
        bias: [m] or None.
        order: int64 [n], the input feature at each place of qweight and g_idx; None as checkpoints have it, in order.
            Not saved.
    """

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    bias: torch.Tensor | None
    order: torch.Tensor | None

    def __init__(self, in_features: int, out_features: int, bits: int, groups: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.groups = in_features, out_features, bits, groups
        self.register_buffer("qweight", torch.zeros(in_features * bits // 32, out_features, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(groups, out_features * bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(groups, out_features, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(in_features, dtype=torch.int32))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)
        self.register_buffer("order", None, persistent=False)
        self.kernel = REFERENCE
        self.fast: Multiply | None = None
        self.limit = 0  # rows up to which `fast` serves

    @classmethod
    def pack(cls, quantized: Quantized, bits: int | HasBits, bias: torch.Tensor | None = None) -> QuantLinear:
        """From a quantized matrix; `bits` or the scheme that has them."""
        bits = bits if isinstance(bits, int) else bits.bits
        rows, columns = quantized.codes.shape
        self = cls(columns, rows, bits, quantized.scales.shape[1], bias is not None)
        self.qweight = pack(quantized.codes.T, bits)
        real = quantized.zeros.is_floating_point()
        self.qzeros = (quantized.zeros if real else pack(quantized.zeros - 1, bits)).T.contiguous()
        self.scales = quantized.scales.T.contiguous()
        self.g_idx = quantized.g_idx
        self.bias = bias
        return self

    def unpacked(self) -> Quantized:
        """The matrix that the buffers hold, its inputs in order."""
        codes, g_idx = self.codes.T, self.g_idx
        if self.order is not None:
            place = torch.argsort(self.order)
            codes, g_idx = codes[:, place], g_idx[place]
        return Quantized(codes, self.scales.T, self.zeros, g_idx)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """W [out_features, in_features], computed in fp32 and rounded to `dtype`."""
        weight = self._as_stored(dtype)
        return weight if self.order is None else weight[:, torch.argsort(self.order)]

    def _as_stored(self, dtype: torch.dtype) -> torch.Tensor:
        """The same with the inputs as they are stored."""
        if self.kernel == TRITON:
            from llmlab.kernels import triton_packed

            return triton_packed.dequantize(packed(self), dtype)
        codes = self.codes
        zeros = self.zeros.T.float()  # [G, m]
        scales = self.scales.float()
        if self.sequential:
            codes = codes.view(self.groups, -1, self.out_features)  # [G, n/G, m]
            weight = (codes - zeros[:, None]).mul_(scales[:, None]).view(self.in_features, -1)
        else:
            groups = self.g_idx.long()
            weight = (codes - zeros[groups]).mul_(scales[groups])
        plain: torch.Tensor = weight.to(dtype).T
        return plain

    @property
    def codes(self) -> torch.Tensor:
        """uint8 [n, m], the inputs as they are stored."""
        if isinstance(self.fast, NativeProduct):
            return self.fast.unpacked()
        return unpack(self.qweight, self.bits)

    @property
    def zeros(self) -> torch.Tensor:
        """Zero points, uint8 [m, G], stored minus one, modulo 2^bits; or fp16, real ones."""
        if self.qzeros.is_floating_point():
            return self.qzeros.T
        return (unpack(self.qzeros.T.contiguous(), self.bits) + 1) & ((1 << self.bits) - 1)

    @functools.cached_property
    def sequential(self) -> bool:
        """Whether groups are runs of neighbouring columns, so that no gather is needed."""
        expected = torch.arange(self.in_features, device=self.g_idx.device) // (self.in_features // self.groups)
        return bool(torch.equal(self.g_idx.long(), expected))

    def sort_groups(self) -> None:
        """Store the inputs by group, `order` says which: act-order scatters groups, kernels want their inputs together.

        Groups of different sizes stay as they are.
        """
        sizes = torch.bincount(self.g_idx, minlength=self.groups)
        if not self.sequential and bool((sizes == self.in_features // self.groups).all()):
            self.order = torch.argsort(self.g_idx, stable=True)
            self.qweight = pack(self.codes[self.order], self.bits)
            self.g_idx = self.g_idx[self.order]
            del self.sequential  # which is known anew

    def _save_to_state_dict(self, destination: dict[str, torch.Tensor], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.order is not None or not self.qweight.numel():
            whole = self.unpacked()
            destination[f"{prefix}qweight"], destination[f"{prefix}g_idx"] = pack(whole.codes.T, self.bits), whole.g_idx

    def prepare(self, dtype: torch.dtype) -> None:
        """Choose the kernel for this device, pack for it, and measure up to how many rows of `dtype` it is faster.

        A kernel that does not give the plain product's numbers here is not used, with one warning.
        """
        self.choose()
        size, odd, device = self.in_features // self.groups, self.out_features % 64, self.qweight.device
        kind = (self.bits, size, self.groups > 1, self.order is None and self.sequential, odd)
        if self.fast and not agrees(self.kernel, kind, dtype, device):
            self.qweight = pack(self.codes, self.bits)
            self.kernel, self.fast = REFERENCE, None
        shape = (self.in_features, self.out_features)
        self.limit = crossover(*shape, self.bits, dtype, self.kernel, device) if self.fast else 0
        if self.kernel == NATIVE or (dtype != torch.bfloat16 and self.kernel in (INT4_CPU, INT8_CPU)):
            self.limit = min(self.limit, ROUNDED_ROWS)

    def choose(self) -> None:
        """Choose the kernel for this device and pack for it."""
        if self.kernel == NATIVE:
            return
        if self.qweight.device.type == "cuda" or native_takes(self):
            self.sort_groups()
        self.kernel, self.fast = choose_kernel(self)
        if self.kernel == NATIVE:  # which holds the codes itself
            self.qweight = self.qweight.new_empty(0, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in_features] in any float dtype to [..., out_features] in the same."""
        if self.fast is not None and x.numel() <= self.limit * self.in_features:
            x = self._ordered(x)
            if self.kernel == NATIVE:
                out = self.fast(x)
            else:
                out = self.fast(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias.to(x.dtype)
        if self.fast is None and x.numel() <= DECODE_ROWS * self.in_features:
            sizes = ", ".join(map(str, GROUP_SIZES))
            warnings.warn(
                f"{self.bits}-bit weights in groups of {self.in_features // self.groups} have no packed kernel: each "
                f"step unpacks all of them, which is slow. Choose 2 to 4 bits in groups of {sizes}, or 8 bits with one "
                "symmetric scale a row.",
                stacklevel=2,
            )
        return self.multiply_dequantized(x)

    def multiply_dequantized(self, x: torch.Tensor) -> torch.Tensor:
        """The same by a plain matmul: the reference, and the faster way for many rows."""
        wide = x.device.type == "cpu" and slow_on_cpu(x.dtype)
        dtype = torch.float32 if wide else x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return torch.nn.functional.linear(self._ordered(x).to(dtype), self._as_stored(dtype), bias).to(x.dtype)

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features], the inputs as they are stored."""
        return x if self.order is None else x.index_select(-1, self.order)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.in_features} -> {self.out_features}, {self.bits} bits, {self.groups} groups, {self.kernel}"


@functools.cache
def crossover(
    in_features: int, out_features: int, bits: int, dtype: torch.dtype, kernel: str, device: torch.device
) -> int:
    """Rows of `dtype` up to which the kernel beats dequantizing to a matmul, measured on matrices of this shape."""
    size = in_features if kernel == INT8_CPU else 32
    with device:
        count = copies(in_features * out_features * bits // 8) if device.type == "cuda" else 1
        linears = [_random(in_features, out_features, bits, size) for _ in range(count)]
        for linear in linears:
            linear.choose()

        def packed_product(rows: int) -> torch.Tensor:
            x = inputs[rows]
            return [linear.fast(x) for linear in linears if linear.fast][-1]

        def plain_product(rows: int) -> torch.Tensor:
            return [linear.multiply_dequantized(inputs[rows]) for linear in linears][-1]

        inputs = {rows: torch.randn(rows, in_features).to(dtype) for rows in CROSSINGS}
        return max(1, rows_up_to(CROSSINGS, packed_product, plain_product, device))


Kind = tuple[int, int, bool, bool, int]  # bits, group size, several groups, groups in a row, outputs beyond 64s


@functools.cache
def agrees(kernel: str, kind: Kind, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel multiplies rows of `dtype` as the plain product does, tried on a small random matrix.

    Once a process for each kind of matrix; warns where it does not.
    """
    bits, size, several, sequential, odd = kind
    with torch.random.fork_rng(devices=[]):  # a caller's seeds stay what they were
        linear = _random(size * (4 if several else 1), 64 + odd, bits, size, sequential)
        if kernel != INT8_CPU:  # which takes no other zero point than the middle
            linear.qzeros = pack(torch.randint(0, (1 << bits) - 1, linear.scales.T.shape), bits).T.contiguous()
        x = torch.randn(20, linear.in_features).to(dtype)
    exact = (x.double() @ linear.dequantize(torch.float32).double().T).to(device)
    linear, x = linear.to(device), x.to(device)
    try:
        linear.choose()
        products = [linear.fast(linear._ordered(x[:rows])) for rows in (3, 20) if linear.fast]  # few and more rows
        products += [linear.multiply_dequantized(x)] if linear.kernel == TRITON else []
        errors = [
            (product.double() - exact[: len(product)]).norm() / exact[: len(product)].norm() for product in products
        ]
        error = max(map(float, errors), default=float("inf"))
    except Exception as problem:  # a kernel's compiler or library may raise anything
        error, reason = float("inf"), f"fails ({type(problem).__name__}: {' '.join(str(problem).split())[:120]})"
    else:
        reason = f"gives other numbers than the plain product (relative error {error:.2g})"
    if error <= TOLERANCE:
        return True
    warnings.warn(
        f"{kernel} {reason} for {bits}-bit weights in groups of {size} and {str(dtype).removeprefix('torch.')} on this "
        f"{device.type}: such weights are unpacked for every product, which is exact but slow.",
        stacklevel=2,
    )
    return False


def _random(in_features: int, out_features: int, bits: int, size: int, sequential: bool = True) -> QuantLinear:
    groups = in_features // size
    codes = torch.randint(0, 1 << bits, (out_features, in_features), dtype=torch.uint8)
    zeros = torch.full((out_features, groups), 1 << (bits - 1), dtype=torch.uint8)
    columns = torch.arange(in_features) if sequential else torch.randperm(in_features)
    return QuantLinear.pack(
        Quantized(codes, torch.rand(out_features, groups).half(), zeros, (columns // size).int()), bits
    )


def quant_linears(model: torch.nn.Module) -> list[QuantLinear]:
    """The packed Linears of a model."""
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


def prepare(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Choose a kernel for every QuantLinear of a model that is not empty (see `QuantLinear.prepare`)."""
    for linear in quant_linears(model):
        if linear.qweight.numel():
            linear.prepare(dtype)
