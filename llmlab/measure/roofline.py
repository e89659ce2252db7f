"""The two limits of a device, measured: arithmetic (FLOP/s) and memory traffic (bytes/s).

A kernel that does F FLOPs on B bytes cannot run faster than max(F / peak FLOP/s, B / peak bytes/s) (Williams,
Waterman and Patterson 2009). MFU is the share of the first limit that is reached, MBU that of the second.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from llmlab.measure.clock import compare
from llmlab.model import DTYPES
from llmlab.stats import Metric

CPU_BYTES = 256 * 2**20  # larger than any cache of a CPU
GPU_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Peaks:
    """Measured limits of one device at one dtype."""

    device: str
    dtype: str
    flops: Metric  # FLOP/s of the best matmul tried
    bandwidth: Metric  # bytes/s read from memory
    matmul: tuple[int, int, int]  # (rows, inner, columns) of that matmul

    @property
    def ridge(self) -> float:
        """FLOPs a byte at which the two limits meet: below it memory binds, above it arithmetic does."""
        return self.flops.value / self.bandwidth.value

    def attainable(self, intensity: float) -> float:
        """FLOP/s that the roofline allows at an arithmetic intensity in FLOP/byte."""
        return min(self.flops.value, intensity * self.bandwidth.value)


def measure_peaks(
    dtype: str, device: torch.device, *, shapes: list[tuple[int, int, int]] | None = None, min_seconds: float = 0.5
) -> Peaks:
    """Measure both limits.

    Arithmetic: the fastest of a few matmuls [rows, inner] x [inner, columns]; give `shapes` to use a model's own.
    Memory: a matrix-vector product over a matrix much larger than the caches, which reads every weight once, as
    decoding does.

    Args:
        dtype: "fp32", "bf16" or "fp16".
        device: where.
        shapes: matmuls to try; by default square ones that suit the device.
        min_seconds: measured time for each candidate.
    """
    kind = DTYPES[dtype]
    sizes = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    shapes = shapes or [(size, size, size) for size in sizes]
    with torch.inference_mode():
        products = {str(shape): _matmul(shape, kind, device) for shape in shapes}
        matmuls = compare(products, warmup=2, min_runs=3, min_seconds=min_seconds)
        best = min(shapes, key=lambda s: matmuls[str(s)].median.value / (s[0] * s[1] * s[2]))
        flops = 2.0 * best[0] * best[1] * best[2]
        seconds = matmuls[str(best)].median
        columns = 4096
        rows = (CPU_BYTES if device.type == "cpu" else GPU_BYTES) // (columns * kind.itemsize)
        read = compare(
            {"read": _matmul((1, columns, rows), kind, device)}, warmup=2, min_runs=3, min_seconds=min_seconds
        )
    return Peaks(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=dtype,
        flops=_rate(flops, seconds, "FLOP/s"),
        bandwidth=_rate(float(rows * columns * kind.itemsize), read["read"].median, "B/s"),
        matmul=best,
    )


def _matmul(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    rows, inner, columns = shape
    x = torch.ones(rows, inner, dtype=dtype, device=device)
    weight = torch.ones(columns, inner, dtype=dtype, device=device)  # as nn.Linear stores it
    return lambda: torch.nn.functional.linear(x, weight)


def _rate(amount: float, seconds: Metric, unit: str) -> Metric:
    assert seconds.low is not None and seconds.high is not None
    return Metric(amount / seconds.value, unit, amount / seconds.high, amount / seconds.low)
