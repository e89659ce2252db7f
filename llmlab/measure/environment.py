"""What a number was measured on: hardware, libraries, code version. Also what `llmlab doctor` prints."""

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch

from llmlab.base.errors import InputError
from llmlab.base.paths import PACKAGE
from llmlab.base.version import __version__
from llmlab.kernels import fast
from llmlab.kernels.cuda import advice, dotted, nvidia, usable
from llmlab.kernels.native import native
from llmlab.kernels.plain import fastest_library, onednn_takes, slow_on_cpu
from llmlab.measure.energy import availability
from llmlab.model.selfcheck import known
from llmlab.model.sources import BUILTIN, resolve

LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "numpy", "pandas")
OPTIONAL = (
    "gguf", "datasets", "bitsandbytes", "triton", "gptqmodel", "lm_eval", "ray", "papermill", "nbconvert", "matplotlib"
)  # fmt: skip
Facts = dict[str, Any]  # ready for JSON
NO_GPU, MISSING = "no CUDA device", "not installed: pip install 'llmlab[{}]'"


def versions(names: tuple[str, ...] = LIBRARIES) -> dict[str, str]:
    """Installed versions by package name; packages that are not installed are left out."""
    installed = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            # torch's own word, "2.13.0+cu130": its metadata in the ordinary index leave out which build it is.
            installed[name] = torch.__version__ if name == "torch" else importlib.metadata.version(name)
    return installed


@functools.cache
def git_commit() -> str | None:
    """The checkout's commit, with "+changes" when code or notebooks differ from it; None outside a checkout."""
    if not shutil.which("git") or not (PACKAGE.parent / ".git").exists():
        return None

    def output(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    changed = output("status", "--porcelain", "--", "llmlab", "notebooks", "constraints.txt")
    return (commit := output("rev-parse", "--short=12", "HEAD")) and commit + ("+changes" if changed else "")


@functools.cache
def cpu_name() -> str:
    """The processor's marketing name."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.+?)\s*$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use: its affinity, not the machine's size."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def hardware() -> Facts:
    """The machine, as it goes into every record; memory in bytes; of GPUs whether torch can use them, too."""
    good = usable(nvidia())
    gpus = [asdict(card) | {"capability": dotted(card.capability)} for card in nvidia().cards]
    return {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "memory": psutil.virtual_memory().total,
        "gpus": [gpu | {"usable": index in good} for index, gpu in enumerate(gpus)],
        "cuda": {"build": nvidia().cuda, "driver": nvidia().driver, "problem": advice()},
        "system": f"{platform.system()} {platform.machine()}",
    }


def kernels() -> list[tuple[str, bool, str]]:
    """Every kernel llmlab can use: (what, usable here, why or why not)."""
    cards = [nvidia().cards[index] for index in usable(nvidia())]
    capability = min((card.capability for card in cards if card.capability), default=None)
    bf16_gpu = capability is not None and capability >= (8, 0)
    bf16_why = f"compute capability {dotted(capability)}{'' if bf16_gpu else ', needs 8.0'}"
    have, faster = versions(OPTIONAL), fastest_library(torch.float32) == "oneDNN"
    return [
        ("fp32 matmul, CPU", True, f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"),
        ("fp32 matmul, CPU, oneDNN", faster, "faster than torch's default here" if faster else "not faster here"),
        *((f"{name} matmul, CPU", True, _half_on_cpu(fast.DTYPES[name])) for name in ("bf16", "fp16")),
        ("few rows of 2 to 8 bits, CPU, C++", not native().problem, native().problem or native().level),
        *((f"int{bits} packed matmul, CPU", True, "torch, activations rounded to bf16") for bits in (4, 8)),
        (
            "fp32, fp16 matmul, Apple's GPU",
            (apple := torch.backends.mps.is_available()),
            "--device mps; not verified" if apple else "no Metal device",
        ),
        ("bf16 matmul, GPU", bf16_gpu, bf16_why if capability else NO_GPU),
        ("int4 packed matmul, GPU", False, "torch has one, llmlab uses Triton's"),
        ("2, 3, 4, 8-bit matmul, GPU, Triton", bool(cards) and "triton" in have, "package triton" if cards else NO_GPU),
        ("bitsandbytes int8, nf4, fp4", "bitsandbytes" in have, have.get("bitsandbytes", MISSING.format("gpu"))),
        ("GGUF files", "gguf" in have, have.get("gguf", MISSING.format("demo"))),
    ]


def energy() -> list[tuple[str, bool, str]]:
    """Every device whose energy a record can hold: (which, measurable here, by what or why not)."""
    return [(f"energy, {name}", *availability(torch.device(kind))) for name, kind in (("CPU", "cpu"), ("GPU", "cuda"))]


def inventory() -> Facts:
    """Everything a bug report needs, ready for JSON.

    Keys: `llmlab`, `commit`, `hardware`, `libraries`, `builtin_model`, `kernels`, `fast` (measured on this CPU:
    {operation: {rate, unit}}), `default_dtype`, `advice` (a sentence), `energy` and `checks` (fast paths that were held
    against the plain forward pass here, see `model.selfcheck.known`).
    """
    try:
        model = {"found": True, "where": Path(resolve(BUILTIN).location).name}
    except InputError as error:
        model = {"found": False, "where": str(error)}
    device = torch.device("cuda" if usable(nvidia()) else "cpu")
    return {
        "llmlab": __version__,
        "commit": git_commit(),
        "hardware": hardware(),
        "libraries": dict.fromkeys(LIBRARIES + OPTIONAL) | versions(LIBRARIES + OPTIONAL),
        "builtin_model": model,
        "kernels": [{"kernel": what, "usable": usable, "reason": why} for what, usable, why in kernels()],
        "fast": {str(p): {"rate": fast.rate(p, value), "unit": fast.unit(p)} for p, value in fast.table().items()},
        "default_dtype": fast.default_dtype(device),
        "advice": fast.advice(device),
        "energy": [{"device": what, "usable": usable, "reason": why} for what, usable, why in energy()],
        "checks": known(),
    }


def _half_on_cpu(dtype: torch.dtype) -> str:
    if onednn_takes(dtype):
        return "native, oneDNN"
    return "by way of fp32: faster than this processor's own" if slow_on_cpu(dtype) else "torch, without oneDNN"
