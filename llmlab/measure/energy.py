"""Energy of a piece of work, read from the hardware's own counters: NVML on GPUs, RAPL on CPUs.

Where no counter can be read the answer is "not measured here" with the reason, never an estimate. The counters see the
whole device: other processes' work is in the number, so measure on a quiet machine.
"""

import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from llmlab.base.clock import synchronize
from llmlab.base.stats import Metric

POWERCAP = Path("/sys/class/powercap")
INTERVAL = 0.1  # seconds between readings: a counter must not start over twice within it


@dataclass(frozen=True)
class Energy:
    """What some counters measured while a piece of work ran."""

    joules: float | None  # None where it was not measured
    seconds: float  # between the first and the last reading
    source: str  # the counters that were read, or why there is no number

    def __str__(self) -> str:
        return f"not measured here: {self.source}" if self.joules is None else f"{self.joules:.4g} J ({self.source})"


class _Unavailable(Exception):
    """Why there is no counter, as it is shown to people."""


def measure_energy(
    run: Callable[[], object], device: torch.device, *, ranks: int = 1, powercap: Path = POWERCAP
) -> Energy:
    """Run a piece of work and say how many joules the device took meanwhile.

    On CUDA: every GPU that torch sees in this process for plain "cuda", else the one GPU named, or the first ones where
    `ranks` work on a GPU each; the CPU's share is not in it. On CPU: every package, cores and caches included, memory
    modules not. `run` runs once; what it returns is dropped, what it raises passes through. `powercap`: the kernel's
    powercap tree.
    """
    try:
        counters = _counters(device, powercap, ranks)
    except _Unavailable as why:
        run()
        return Energy(None, 0.0, str(why))
    failures: list[str] = []
    stop = threading.Event()

    def read() -> float:
        total = 0.0
        for counter in counters:
            try:
                total += counter.read()
            except Exception as error:  # OSError, ValueError and NVML's own: none may end the work that is measured
                reason = " ".join(str(error).split()) or type(error).__name__
                failures.append(f"{counter.name} stopped answering ({reason})")
        return total

    def watch() -> None:
        while not failures and not stop.wait(INTERVAL):
            read()

    synchronize()
    begin, before = time.perf_counter(), read()
    thread = threading.Thread(target=watch, name="llmlab-energy", daemon=True)
    thread.start()
    try:
        run()
        synchronize()
    finally:
        stop.set()
        thread.join()
    joules, seconds = read() - before, time.perf_counter() - begin
    source = ", ".join(counter.name for counter in counters)
    return Energy(None, seconds, failures[0]) if failures else Energy(joules, seconds, source)


def joules_per_1000_tokens(energy: Energy, tokens: int) -> Metric | None:
    """The metric of that name for a record, in J; None where energy was not measured or no token came out."""
    return None if energy.joules is None or tokens < 1 else Metric(energy.joules / tokens * 1000, "J")


def availability(device: torch.device, *, powercap: Path = POWERCAP) -> tuple[bool, str]:
    """Whether energy can be measured for a device here, and by which counters or why not."""
    try:
        return True, ", ".join(counter.name for counter in _counters(device, powercap))
    except _Unavailable as why:
        return False, str(why)


class _Counter:
    """A counter of one device's energy in joules, which starts over at `maximum`."""

    def __init__(self, name: str, now: Callable[[], float], maximum: float = 0.0) -> None:
        self.name, self._now, self._maximum = name, now, maximum
        self._last, self._joules = now(), 0.0

    def read(self) -> float:
        """Joules since the counter was made."""
        now = self._now()
        self._joules += now - self._last + (self._maximum if now < self._last else 0.0)
        self._last = now
        return self._joules


def _counters(device: torch.device, powercap: Path, ranks: int = 1) -> list[_Counter]:
    return _gpu_counters(device, ranks) if device.type == "cuda" else _package_counters(powercap)


def _package_counters(powercap: Path) -> list[_Counter]:
    counters = []
    for domain in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (domain / "name").read_text().strip()
            if name.startswith("package"):  # its parts (core, dram) have domains of their own
                maximum = int((domain / "max_energy_range_uj").read_text()) / 1e6
                now = partial(lambda file: int(file.read_text()) / 1e6, domain / "energy_uj")
                counters.append(_Counter(f"RAPL {name}", now, maximum))
        except PermissionError:
            raise _Unavailable(f"RAPL is there but readable by root alone (chmod a+r {domain}/energy_uj)") from None
        except (OSError, ValueError) as error:
            raise _Unavailable(f"RAPL cannot be read: {error}") from None
    if not counters:
        raise _Unavailable(f"no RAPL package domain in {powercap} (virtual machines seldom have one)")
    return counters


def _gpu_counters(device: torch.device, ranks: int) -> list[_Counter]:
    if not torch.cuda.is_available():
        raise _Unavailable("no CUDA device")
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        raise _Unavailable("pynvml is not installed: pip install nvidia-ml-py") from None
    indices = list(range(torch.cuda.device_count())) if device.index is None else [device.index]
    if ranks > 1:
        indices = list(range(ranks))
    try:
        nvml.nvmlInit()
        counters = []
        for index in indices:  # by UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
            now = partial(lambda handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000, handle)
            counters.append(_Counter(f"NVML energy counter of GPU {index}", now))  # of millijoules: Volta and later
        return counters
    except nvml.NVMLError as error:
        raise _Unavailable(f"NVML cannot read energy: {error}") from None
