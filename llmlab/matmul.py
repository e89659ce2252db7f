"""fp32 matmuls on CPU through oneDNN where that is faster than torch's default.

torch multiplies fp32 matrices with MKL, whose AVX-512 kernels do not run on every CPU that has the instructions;
oneDNN generates its kernels for the CPU at hand. On an AMD EPYC it is 1.1 to 1.5 times as fast. Both are fp32 with fp32
sums: results differ by rounding alone. Which one is faster is measured, once per process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear` in fp32 on CPU by oneDNN; for inference alone."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class OneDNNLinear(torch.nn.Linear):
    """A Linear of which only the forward pass differs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return onednn_linear(x, self.weight, self.bias)


@cache
def onednn_is_faster(rows: int = 512, width: int = 1024) -> bool:
    """Whether oneDNN beats torch's default at a matmul of [rows, width] x [width, width] in fp32, here and now."""
    if not (torch.backends.mkldnn.enabled and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    x, weight = torch.randn(rows, width), torch.randn(width, width)

    def seconds(linear: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        begin = time.perf_counter()
        linear(x, weight)
        return time.perf_counter() - begin

    with torch.inference_mode():
        pairs = [(seconds(torch.nn.functional.linear), seconds(onednn_linear)) for _ in range(8)]
    return statistics.median(plain / onednn for plain, onednn in pairs[1:]) > 1.02


def onednn_helps(model: torch.nn.Module) -> bool:
    """Whether `fastest_matmuls` would change anything for this model."""
    return bool(_fp32_on_cpu(model)) and onednn_is_faster()


@contextmanager
def fastest_matmuls(model: torch.nn.Module) -> Iterator[None]:
    """Within the block the Linears of an fp32 model on CPU use the faster library."""
    linears = _fp32_on_cpu(model) if onednn_helps(model) else []
    for linear in linears:
        linear.__class__ = OneDNNLinear
    try:
        yield
    finally:
        for linear in linears:
            linear.__class__ = torch.nn.Linear


def _fp32_on_cpu(model: torch.nn.Module) -> list[torch.nn.Linear]:
    linears = [m for m in model.modules() if type(m) is torch.nn.Linear]
    fp32 = [m for m in linears if m.weight.device.type == "cpu" and m.weight.dtype == torch.float32]
    return [m for m in fp32 if m.weight.is_contiguous()]  # oneDNN's way with views is a hundred times slower
