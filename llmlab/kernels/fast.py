"""What this machine multiplies fast: measured once, kept, and asked by everything that must choose.

A table of products of a weight matrix with one row (decoding: bound by memory) and with many rows (prefill, scoring:
bound by arithmetic), in every precision and with every library that is here. From it follow the dtype of `load`, the
activations of packed weights, whether half precision is worth trying, and the advice of `llmlab doctor`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from llmlab.base.clock import rounds
from llmlab.base.paths import cache_folder, remember
from llmlab.kernels.native import absent, level, native
from llmlab.kernels.native_packed import NativeProduct
from llmlab.kernels.plain import HALF, LIBRARIES, libraries, onednn_linear, onednn_takes, random_linear
from llmlab.kernels.torch_packed import Int4Product, Int8Product, Multiply

WIDTH = 2048  # of the square matrices
COPIES = 8  # of each, read one after the other: 128 MiB in fp32, more than the caches of most CPUs hold
MANY = 256  # rows
GROUP_SIZE = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WORTH = 1.1  # a precision with less than this gain over fp32 is not called faster: it costs accuracy


@dataclass(frozen=True)
class Product:
    """One line of the table: weights of a precision times `rows` rows, by a library."""

    weights: str  # "fp32", "bf16", "fp16", "8 bits", "4 bits"
    rows: int
    library: str  # "torch", "oneDNN", "widened" (half precision by way of fp32)

    def __str__(self) -> str:
        return f"{self.weights}, {self.rows} row{'s' if self.rows > 1 else ''}, {self.library}"


Table = dict[Product, float]  # weights a second: a weight is one multiplication and one addition for each row


def unit(product: Product) -> str:
    """Of a rate as people read it: weights a second for one row, FLOP/s for many."""
    return "weight/s" if product.rows == 1 else "FLOP/s"


def rate(product: Product, weights_per_second: float) -> float:
    """In `unit`."""
    return weights_per_second if product.rows == 1 else 2.0 * product.rows * weights_per_second


@cache
def table() -> Table:
    """The table of this machine's CPU; measured in a few seconds if it was never, and kept in the cache folder."""
    path = cache_folder() / "machines" / f"{machine()}.json"
    try:
        return {Product(*key): float(value) for key, value in json.loads(path.read_text())["weights_per_second"]}
    except (OSError, ValueError, TypeError, KeyError):  # never measured, or not ours
        measured = measure()
    pairs = [[[p.weights, p.rows, p.library], value] for p, value in measured.items()]
    remember(path, json.dumps({"machine": _description(), "weights_per_second": pairs}))
    return measured


@torch.inference_mode()
def measure() -> Table:
    """Measure the table anew."""
    measured: Table = {}
    for rows in (1, MANY):
        copies = COPIES if rows == 1 else 1
        candidates = {}
        for name, dtype in DTYPES.items():
            x = torch.randn(rows, WIDTH).to(dtype)
            linears = [random_linear(WIDTH, dtype) for _ in range(copies)]
            for library in libraries(dtype):
                run = partial(_multiply_all, [partial(LIBRARIES[library].forward, linear) for linear in linears], x)
                candidates[Product(name, rows, library)] = run
            if rows == 1 and onednn_takes(dtype):  # in oneDNN's own blocks, as the engine lays weights out
                blocks = [torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 8) for linear in linears]
                run = partial(_multiply_all, [partial(onednn_linear, weight=block) for block in blocks], x)
                candidates[Product(name, rows, "oneDNN blocks")] = run
        if rows == 1:
            x = torch.randn(1, WIDTH)
            makers: list[tuple[str, str, Callable[[], Multiply]]] = [
                ("8 bits", "torch packed", _int8), ("4 bits", "torch packed", _int4),
            ]  # fmt: skip
            if not native().problem:
                makers += [(f"{bits} bits", "C++", partial(_native, bits)) for bits in (8, 4)]
            for name, library, make in makers:
                candidates[Product(name, 1, library)] = partial(_multiply_all, [make() for _ in range(copies)], x)
        times = rounds({str(product): run for product, run in candidates.items()}, warmup=2)
        for product in candidates:
            measured[product] = copies * WIDTH**2 / statistics.median(times[str(product)])
    return measured


def best(weights: str, rows: int) -> float:
    """Weights a second of the fastest way for a precision, 1 or MANY rows; 0 where nothing multiplies it here."""
    return max((value for p, value in table().items() if (p.weights, p.rows) == (weights, rows)), default=0.0)


def gain(weights: str, rows: int) -> float:
    """How many times as fast as fp32 a precision is, 1 or MANY rows."""
    return best(weights, rows) / best("fp32", rows)


def half_dtype(device: torch.device) -> str | None:
    """The half precision that is faster than fp32 on this device; None where none is.

    On a GPU bf16 from compute capability 8.0, fp16 below, where bf16 is emulated; fp16 on Apple's.
    """
    if device.type == "mps":
        return "fp16"
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    faster = [name for name in ("bf16", "fp16") if gain(name, MANY) >= WORTH and gain(name, 1) >= 1]
    return max(faster, key=lambda name: gain(name, MANY), default=None)


def default_dtype(device: torch.device) -> str:
    """Of `load` where none is asked for: what a GPU is built for; on CPU fp32, which is exact."""
    half = half_dtype(device) if device.type == "cuda" else None
    return half or "fp32"


def packed_dtype(device: torch.device) -> str:
    """Of the activations around packed weights: bf16, which torch's CPU kernels want, unless it is slow elsewhere."""
    if device.type != "cpu":
        return half_dtype(device) or "fp32"
    return "bf16" if half_dtype(device) == "bf16" else "fp32"


def advice(device: torch.device) -> str:
    """One sentence: what this machine is good for."""
    if device.type == "cuda":
        return f"This GPU works in {default_dtype(device)}; 4-bit weights save memory and time when writing."
    if device.type == "mps":
        return "This GPU works in fp32, exactly, and in fp16; nothing of this was verified on one."
    half, four = half_dtype(device), gain("4 bits", 1)
    if half:
        first = (
            f"{half} multiplies {gain(half, MANY):.1f} times as fast as fp32 here: score in it where exactness may go"
        )
    else:
        first = (
            f"stay in fp32: half precision brings {gain('bf16', MANY):.1f} times its speed here (bf16) "
            f"and {gain('fp16', MANY):.1f} (fp16)"
        )
    second = (
        f"4-bit weights are read {four:.1f} times as fast as fp32 ones, which is what writing waits for"
        if four > WORTH
        else f"4-bit weights save memory but no time ({four:.1f} times fp32's speed)"
    )
    return f"{first[0].upper()}{first[1:]}; {second}."


def _int4() -> Multiply:
    groups = WIDTH // GROUP_SIZE
    codes = torch.randint(0, 16, (WIDTH, WIDTH), dtype=torch.int32)
    return Int4Product(codes, torch.rand(WIDTH, groups), torch.full((WIDTH, groups), 8), GROUP_SIZE)


def _int8() -> Multiply:
    return Int8Product(torch.randint(-127, 128, (WIDTH, WIDTH), dtype=torch.int8), torch.rand(WIDTH))


def _native(bits: int) -> Multiply:
    codes = torch.randint(0, 1 << bits, (WIDTH, WIDTH), dtype=torch.uint8)
    grid = WIDTH, WIDTH // GROUP_SIZE
    return NativeProduct.pack(codes, torch.rand(grid).half(), torch.full(grid, 8, dtype=torch.uint8), bits)


def _multiply_all(products: Sequence[Multiply], x: torch.Tensor) -> None:
    for product in products:
        product(x)


def _description() -> dict[str, str]:
    """What the table depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = [line for line in lines if line.startswith(("model name", "flags"))][:2]
    limits = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    return {
        "processor": " ".join([platform.machine(), platform.processor(), *model]),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "bf16, fp16 in oneDNN": str([onednn_takes(dtype) for dtype in HALF]),
        "table": f"{WIDTH} {COPIES} {MANY}",
        "C++ kernels": absent() or level(),
    } | {name: os.environ.get(name, "") for name in limits}


def machine() -> str:
    """A short name of this processor as this process may use it: what is measured here holds for it alone."""
    return hashlib.sha256(json.dumps(_description(), sort_keys=True).encode()).hexdigest()[:16]
