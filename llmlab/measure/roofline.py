"""The two limits of a device, measured: arithmetic (FLOP/s) and memory traffic (bytes/s).

A kernel that does F FLOPs on B bytes cannot run faster than max(F / peak FLOP/s, B / peak bytes/s) (Williams,
Waterman and Patterson 2009). MFU is the share of the first limit that is reached, MBU that of the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from llmlab.base.clock import compare
from llmlab.base.stats import Metric
from llmlab.model.lm import DTYPES

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
    dtypes: Sequence[str],
    device: torch.device,
    *,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    min_seconds: float = 0.5,
) -> dict[str, Peaks]:
    """Measure both limits of a device for some dtypes; memory's is one for all of them.

    Arithmetic: the fastest of a few matmuls [rows, inner] x [inner, columns]. Memory: the faster of a matrix-vector
    product, which reads every weight once as decoding does, and a copy (read plus write), both over far more bytes
    than the caches hold.

    Args:
        dtypes: of "fp32", "bf16" and "fp16".
        device: where.
        shapes: matmuls to try, a model's own say; by default square ones that suit the device.
        min_seconds: measured time for each candidate.
    """
    sizes = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    shapes = list(shapes or [(size, size, size) for size in sizes])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    bandwidth = measure_bandwidth(device, min_seconds=min_seconds)
    peaks = {}
    for dtype in dtypes:
        with torch.inference_mode():
            products = {str(shape): _matmul(shape, DTYPES[dtype], device) for shape in shapes}
            timings = compare(products, warmup=2, min_runs=3, min_seconds=min_seconds)
        rates = {shape: _rate(2.0 * math.prod(shape), timings[str(shape)].median, "FLOP/s") for shape in shapes}
        best = max(shapes, key=lambda shape: rates[shape].value)
        peaks[dtype] = Peaks(name, dtype, rates[best], bandwidth, best)
    return peaks


def measure_bandwidth(device: torch.device, *, min_seconds: float = 0.5) -> Metric:
    """Bytes per second that the device reads (or reads and writes) from its memory."""
    size = CPU_BYTES if device.type == "cpu" else GPU_BYTES
    columns = 4096
    rows = size // (4 * columns)
    with torch.inference_mode():
        source = torch.ones(rows, columns, device=device)
        target = torch.empty_like(source)
        candidates: dict[str, Callable[[], object]] = {
            "matrix-vector": _matmul((1, columns, rows), torch.float32, device),
            "copy": lambda: target.copy_(source),
        }
        timings = compare(candidates, warmup=2, min_runs=3, min_seconds=min_seconds)
    moved = {"matrix-vector": rows * columns * 4.0, "copy": rows * columns * 8.0}
    return max((_rate(moved[n], timings[n].median, "B/s") for n in candidates), key=lambda rate: rate.value)


def _matmul(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    rows, inner, columns = shape
    x = torch.ones(rows, inner, dtype=dtype, device=device)
    weight = torch.ones(columns, inner, dtype=dtype, device=device)  # as nn.Linear stores it
    return lambda: torch.nn.functional.linear(x, weight)


def _rate(amount: float, seconds: Metric, unit: str) -> Metric:
    assert seconds.low is not None and seconds.high is not None
    return Metric(amount / seconds.value, unit, amount / seconds.high, amount / seconds.low)
