"""Peak memory of a piece of work."""

import ctypes
import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import torch


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `run` needed at its peak above what was in use before; None where the system cannot tell.

    On CUDA what torch's allocator handed out; on Linux the process's resident memory, whose high-water mark the kernel
    resets on request. What earlier work freed is given back first: reused, it would not count.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc has it, musl does not
        gc.collect()
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = psutil.Process().memory_info().rss
    run()
    peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    return max(0, int(peak[1]) * 1024 - before) if peak else None
