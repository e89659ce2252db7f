"""Energy of a piece of work, read from the hardware's own counters: NVML on GPUs, RAPL on CPUs.

Where no counter can be read the answer is "not measured here" with the reason, never an estimate. The counters see the
whole device: other processes' work is in the number, so measure on a quiet machine.
"""

from __future__ import annotations

import importlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from llmlab.base.clock import synchronize
from llmlab.base.stats import Metric

POWERCAP = Path("/sys/class/powercap")
INTERVAL = 0.1  # seconds between readings: power is integrated over it, and a counter must not wrap twice within it


@dataclass(frozen=True)
class Energy:
    """What some counters measured while a piece of work ran.

    Attributes:
        joules: None where it was not measured.
        seconds: between the first and the last reading.
        source: the counters that were read, or why there is no number.
    """

    joules: float | None
    seconds: float
    source: str

    def __str__(self) -> str:
        return f"not measured here: {self.source}" if self.joules is None else f"{self.joules:.4g} J ({self.source})"


class _Unavailable(Exception):
    """Why there is no counter, as it is shown to people."""


def measure_energy(run: Callable[[], object], device: torch.device, *, powercap: Path = POWERCAP) -> Energy:
    """Run a piece of work and say how many joules the device took meanwhile.

    On CUDA: every GPU that torch sees in this process for plain "cuda", else the one GPU named; the CPU's share is not
    in it. On CPU: every package, cores and caches included, memory modules not.

    Args:
        run: the work; it runs once and what it returns is dropped. What it raises passes through.
        device: where it runs.
        powercap: the kernel's powercap tree.
    """
    try:
        counters = _counters(device, powercap)
    except _Unavailable as why:
        run()
        return Energy(None, 0.0, str(why))
    synchronize()
    sampler = _Sampler(counters)
    try:
        run()
        synchronize()
    finally:
        sampler.stop()
    return sampler.energy()


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
    """A counter of one device's energy (J), or of its power (W), which is integrated by the trapezoidal rule."""

    def __init__(self, name: str, now: Callable[[], float], *, maximum: float = 0.0, power: bool = False) -> None:
        self.name = name
        self._now, self._power = now, power
        self._maximum = maximum  # where it starts over
        self._last, self._moment, self._joules = now(), time.perf_counter(), 0.0

    def read(self) -> float:
        """Joules since the counter was made."""
        now, moment = self._now(), time.perf_counter()
        if self._power:
            self._joules += (moment - self._moment) * (now + self._last) / 2
        else:
            self._joules += now - self._last + (self._maximum if now < self._last else 0.0)
        self._last, self._moment = now, moment
        return self._joules


class _Sampler:
    """A thread that reads counters until it is stopped; a counter that fails ends it, and the reason is kept."""

    def __init__(self, counters: list[_Counter]) -> None:
        self._counters = counters
        self._failure: str | None = None
        self._begin = self._end = time.perf_counter()
        self._before = self._joules = self._read()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="llmlab-energy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self._joules, self._end = self._read(), time.perf_counter()

    def energy(self) -> Energy:
        if self._failure:
            return Energy(None, self._end - self._begin, self._failure)
        source = ", ".join(counter.name for counter in self._counters)
        return Energy(self._joules - self._before, self._end - self._begin, source)

    def _watch(self) -> None:
        while not self._failure and not self._stop.wait(INTERVAL):
            self._read()

    def _read(self) -> float:
        total = 0.0
        for counter in self._counters:
            try:
                total += counter.read()
            except Exception as error:  # OSError, ValueError and NVML's own: none may end the work that is measured
                reason = " ".join(str(error).split()) or type(error).__name__
                self._failure = self._failure or f"{counter.name} stopped answering ({reason})"
        return total


def _counters(device: torch.device, powercap: Path) -> list[_Counter]:
    return _gpu_counters(device) if device.type == "cuda" else _package_counters(powercap)


def _package_counters(powercap: Path) -> list[_Counter]:
    counters = []
    for domain in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (domain / "name").read_text().strip()
            if name.startswith("package"):  # its parts (core, dram) have domains of their own
                maximum = _joules(domain / "max_energy_range_uj")
                counters.append(_Counter(f"RAPL {name}", partial(_joules, domain / "energy_uj"), maximum=maximum))
        except PermissionError:
            raise _Unavailable(f"RAPL is there but readable by root alone (chmod a+r {domain}/energy_uj)") from None
        except (OSError, ValueError) as error:
            raise _Unavailable(f"RAPL cannot be read: {error}") from None
    if not counters:
        raise _Unavailable(f"no RAPL package domain in {powercap} (virtual machines seldom have one)")
    return counters


def _joules(file: Path) -> float:
    """A number of the powercap tree, which counts microjoules."""
    return int(file.read_text()) / 1e6


def _gpu_counters(device: torch.device) -> list[_Counter]:
    if not torch.cuda.is_available():
        raise _Unavailable("no CUDA device")
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        raise _Unavailable("pynvml is not installed: pip install nvidia-ml-py") from None
    indices = range(torch.cuda.device_count()) if device.index is None else [device.index]
    try:
        nvml.nvmlInit()
        return [_gpu_counter(nvml, index) for index in indices]
    except nvml.NVMLError as error:
        raise _Unavailable(f"NVML cannot read energy or power: {error}") from None


def _gpu_counter(nvml: ModuleType, index: int) -> _Counter:
    # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices, not NVML's.
    handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(index).uuid}")
    try:  # a counter of millijoules: Volta and later
        name = f"NVML energy counter of GPU {index}"
        return _Counter(name, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000)
    except nvml.NVMLError:
        name = f"NVML power of GPU {index}, sampled every {INTERVAL:g} s"
        return _Counter(name, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000, power=True)
