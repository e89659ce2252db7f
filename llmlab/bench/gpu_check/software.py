"""Driver, build of torch, Triton, memory: what must be right before anything else is tried."""

import importlib.metadata
import re
import shutil
from collections.abc import Sequence

import torch

from llmlab.bench.gpu_check.given import Finding, Given
from llmlab.kernels.cuda import advice, nvidia, usable
from llmlab.measure.energy import availability
from llmlab.measure.environment import versions

SHARED_MEMORY = 2**28  # bytes of /dev/shm that NCCL may want; a container has 64 MiB unless told otherwise
FREE = 0.5  # less than this share of a GPU free: another process works there


def software(given: Given) -> Finding:
    """Driver, CUDA, code for each card, Triton against torch's pin, free memory and /dev/shm."""
    if why := advice():
        return Finding(False, why)
    good = usable(nvidia())
    if good[: given.devices] != list(range(given.devices)):
        return Finding(False, f"{given.devices} GPUs were asked for, torch can use {len(good)}: give --devices.")
    memory = [torch.cuda.mem_get_info(index) for index in range(given.devices)]
    shared = shutil.disk_usage("/dev/shm").free if given.devices > 1 else None
    needed, installed = triton_of_torch(), versions(("triton",)).get("triton")
    if why := trouble((needed, installed), memory, shared):
        return Finding(False, why)
    names = ", ".join(sorted({card.name for card in nvidia().cards}))
    energy = availability(given.device)
    return Finding(
        True,
        f"{names}; driver {nvidia().driver}, CUDA {nvidia().cuda}, code for {' '.join(nvidia().archs)}; Triton "
        f"{installed}; {given.dtype} by default; energy: {energy[1] if energy[0] else f'not measured ({energy[1]})'}",
    )


def triton_of_torch() -> str | None:
    """The version of Triton that this build of torch asks for; None for a build without CUDA."""
    asked = [re.match(r"triton\s*\(?==\s*([\w.]+)", text) for text in importlib.metadata.requires("torch") or []]
    return next((match[1] for match in asked if match), None)


def trouble(triton: tuple[str | None, str | None], memory: Sequence[tuple[int, int]], shared: int | None) -> str | None:
    """What would spoil the check and the command that helps, in a sentence; None if nothing would.

    Args:
        triton: version that torch asks for, and the installed one.
        memory: free and all bytes of each GPU.
        shared: free bytes of /dev/shm; None where one device is checked.
    """
    needed, installed = triton
    if installed is None or (needed is not None and needed != installed):
        here = "is not installed" if installed is None else f"is {installed} here"
        wanted = "triton" if needed is None else f"triton=={needed}"
        return f"this torch works with {wanted}, which {here}: run `pip install '{wanted}'`."
    for index, (free, total) in enumerate(memory):
        if free < FREE * total:
            gib = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB"
            return f"GPU {index} has {gib} free: end the process that holds the rest (nvidia-smi names it)."
    if shared is not None and shared < SHARED_MEMORY:
        return f"/dev/shm has {shared / 2**20:.0f} MiB, too little for NCCL: start the container with --shm-size=1g."
    return None
