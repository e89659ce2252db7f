"""The two limits of a device, measured: arithmetic (FLOP/s) and memory traffic (bytes/s).

A kernel that does F FLOPs on B bytes cannot run faster than max(F / peak FLOP/s, B / peak bytes/s) (Williams,
Waterman and Patterson 2009). MFU is the share of the first limit that is reached, MBU that of the second.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from llmlab.base.clock import compare
from llmlab.base.stats import Metric, median_interval
from llmlab.model.lm import DTYPES

CPU_BYTES = 256 * 2**20  # larger than any cache of a CPU
GPU_BYTES = 2 * 2**30
Shape = tuple[int, int, int]  # rows, inner, columns
T = TypeVar("T")


@dataclass(frozen=True)
class Peaks:
    """Measured limits of one device at one dtype."""

    device: str
    dtype: str
    flops: Metric  # FLOP/s of the best matmul tried
    bandwidth: Metric  # bytes/s read from memory
    matmul: Shape  # (rows, inner, columns) of that matmul

    @property
    def ridge(self) -> float:
        """FLOPs a byte at which the two limits meet: below it memory binds, above it arithmetic does."""
        return self.flops.value / self.bandwidth.value

    def attainable(self, intensity: float) -> float:
        """FLOP/s that the roofline allows at an arithmetic intensity in FLOP/byte."""
        return min(self.flops.value, intensity * self.bandwidth.value)


def measure_peaks(
    dtypes: Sequence[str], device: torch.device, *, shapes: Sequence[Shape] | None = None, min_seconds: float = 0.5
) -> dict[str, Peaks]:
    """Measure both limits of a device for some dtypes; memory's is one for all of them.

    Args:
        dtypes: of "fp32", "bf16" and "fp16".
        device: where.
        shapes: matmuls [rows, inner] x [inner, columns] to try, a model's own say; by default square ones that suit
            the device. The fastest is the limit.
        min_seconds: measured time for each candidate.
    """
    sizes = (1024, 2048) if device.type == "cpu" else (4096, 8192)
    shapes = list(shapes or [(size, size, size) for size in sizes])
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    bandwidth = measure_bandwidth(device, min_seconds=min_seconds)
    peaks = {}
    for dtype in dtypes:
        work = {shape: (_matmul(shape, DTYPES[dtype], device), 2.0 * math.prod(shape)) for shape in shapes}
        best, rate = _fastest(work, "FLOP/s", min_seconds)
        peaks[dtype] = Peaks(name, dtype, rate, bandwidth, best)
    return peaks


def measure_bandwidth(device: torch.device, *, min_seconds: float = 0.5) -> Metric:
    """Bytes per second that the device reads, or reads and writes, from memory, over far more than the caches hold.

    The faster of a matrix-vector product, which reads every weight once as decoding does, and a copy.
    """
    columns, size = 4096, CPU_BYTES if device.type == "cpu" else GPU_BYTES
    rows = size // (4 * columns)
    source = torch.randn(rows, columns, device=device)
    target = torch.empty_like(source)
    product = _matmul((1, columns, rows), torch.float32, device)
    copy = partial(target.copy_, source)
    return _fastest({"matrix-vector": (product, float(size)), "copy": (copy, 2.0 * size)}, "B/s", min_seconds)[1]


def _matmul(shape: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    rows, inner, columns = shape
    # Random: a GPU multiplies equal numbers up to 15 % faster, as fewer bits flip and its clock stays higher.
    x = torch.randn(rows, inner, dtype=dtype, device=device)
    weight = torch.randn(columns, inner, dtype=dtype, device=device)  # as nn.Linear stores it
    return partial(torch.nn.functional.linear, x, weight)


@torch.inference_mode()
def _fastest(work: dict[T, tuple[Callable[[], object], float]], unit: str, min_seconds: float) -> tuple[T, Metric]:
    """Which of some functions does the most in a second, and how much; each with the amount that a call does."""
    runs = {str(name): run for name, (run, _) in work.items()}
    timings = compare(runs, warmup=2, min_runs=3, min_seconds=min_seconds)
    rates = {}
    for name, (_, amount) in work.items():
        seconds, low, high = median_interval(timings[str(name)].seconds)
        rates[name] = Metric(amount / seconds, unit, amount / high, amount / low)
    return max(rates.items(), key=lambda rate: rate[1].value)
