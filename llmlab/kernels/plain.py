"""Plain matmuls on CPU the fastest way: torch's default, oneDNN, or half precision by an fp32 product.

torch multiplies fp32 matrices with MKL, whose AVX-512 kernels do not run on every CPU that has the instructions; oneDNN
generates its kernels for the CPU at hand. On an AMD EPYC it is 1.1 to 1.5 times as fast. And a processor without bf16
or fp16 instructions, as most laptops are, multiplies half precision at a few percent of its fp32 rate: there the
weights are widened to fp32 on the way into the product. Sums are in fp32 everywhere: results differ by rounding alone.
Which way is the fastest is measured (see `fast`); what a processor cannot do is never tried.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch

from llmlab.base.clock import rounds

HALF = (torch.bfloat16, torch.float16)
WIDENED_AT_ONCE = 2**22  # weights: 16 MiB in fp32, so that a product finds them in a cache and large heads fit memory


def onednn_takes(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies by weights of `dtype` on this processor: asked, for torch raises where it cannot.

    With LLMLAB_WITHOUT_BF16=1 in the environment bf16 is reported absent, as on most laptops: to see what they see.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # untyped in torch
        return False
    if dtype == torch.bfloat16:
        return os.environ.get("LLMLAB_WITHOUT_BF16") != "1" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` on CPU by oneDNN; for inference alone."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def widened_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` of half-precision tensors by fp32 products, rounded once at the end.

    x [..., in], weight [out, in], bias [out]: [..., out] in the dtype of x.
    """
    wide = x.float()
    rows = max(1, WIDENED_AT_ONCE // weight.shape[1])
    parts = [torch.nn.functional.linear(wide, part.float()) for part in torch.split(weight, rows)]
    product = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return (product if bias is None else product + bias).to(x.dtype)


class OneDNNLinear(torch.nn.Linear):
    """A Linear of which only the forward pass differs: by oneDNN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return onednn_linear(x, self.weight, self.bias)


class WidenedLinear(torch.nn.Linear):
    """A Linear of which only the forward pass differs: half precision by fp32 products."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return widened_linear(x, self.weight, self.bias)


LIBRARIES = {"torch": torch.nn.Linear, "oneDNN": OneDNNLinear, "widened": WidenedLinear}


def libraries(dtype: torch.dtype) -> list[str]:
    """The ways in which this processor can multiply by plain weights of `dtype`, keys of LIBRARIES."""
    if dtype in HALF:
        return ["torch", "widened"]  # where oneDNN takes them, torch's default is oneDNN already
    return ["torch", "oneDNN"] if onednn_takes(dtype) else ["torch"]


def random_linear(width: int, dtype: torch.dtype) -> torch.nn.Linear:
    """A square Linear of random weights to measure with, without a bias and without torch's slow initialization."""
    linear = torch.nn.Linear(width, width, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(torch.randn(width, width).to(dtype), requires_grad=False)
    return linear


@cache
def fastest_library(dtype: torch.dtype, rows: int = 512, width: int = 1024) -> str:
    """The fastest way of a matmul [rows, width] x [width, width] of `dtype` on CPU, measured once a process.

    torch's default unless another one is 2 % faster.
    """
    names, x, linear = libraries(dtype), torch.randn(rows, width).to(dtype), random_linear(width, dtype)
    with torch.inference_mode():
        times = rounds({name: partial(LIBRARIES[name].forward, linear, x) for name in names}, counted=7)
    best = {name: statistics.median(seconds) for name, seconds in times.items()}
    winner = min(best, key=lambda name: best[name])
    return winner if best[winner] < 0.98 * best["torch"] else "torch"


def slow_on_cpu(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies `dtype` faster by way of fp32: a half precision without instructions for it."""
    return dtype in HALF and fastest_library(dtype) == "widened"


def onednn_helps(model: torch.nn.Module) -> bool:
    """Whether `fastest_matmuls` would run fp32 matmuls of this model through oneDNN."""
    linears = _plain_on_cpu(model)
    return any(m.weight.dtype == torch.float32 for m in linears) and fastest_library(torch.float32) == "oneDNN"


@contextmanager
def fastest_matmuls(model: torch.nn.Module) -> Iterator[None]:
    """Within the block the Linears of a model on CPU multiply in the fastest way for their dtype and many rows."""
    swapped = []
    for linear in _plain_on_cpu(model):
        kind = LIBRARIES[fastest_library(linear.weight.dtype)]
        # oneDNN's way with views is a hundred times slower.
        if kind is not torch.nn.Linear and linear.weight.is_contiguous():
            swapped.append(linear)
            linear.__class__ = kind
    try:
        yield
    finally:
        for linear in swapped:
            linear.__class__ = torch.nn.Linear


def _plain_on_cpu(model: torch.nn.Module) -> list[torch.nn.Linear]:
    linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
    return [m for m in linears if m.weight.device.type == "cpu" and m.weight.dtype in (torch.float32, *HALF)]
