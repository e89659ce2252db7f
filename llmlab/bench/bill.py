"""What a scoring job costs in electricity and money: as measured or projected, for this job and for a larger one."""

from dataclasses import dataclass

import torch

from llmlab.measure.energy import Energy
from llmlab.measure.record import Measurement
from llmlab.sharding.costs import DEVICES

MANY = 10_000_000  # questions of the larger job


@dataclass(frozen=True)
class Bill:
    """Of a job: seconds, kWh (None where nothing is known), money (None without a price), how each came about."""

    questions: int
    seconds: float
    kwh: float | None
    money: float | None
    how: str

    def __str__(self) -> str:
        hours = f"{self.seconds:,.1f} s" if self.seconds < 3600 else f"{self.seconds / 3600:,.1f} h"
        kwh = "kWh unknown" if self.kwh is None else f"{self.kwh:.3g} kWh"
        money = "" if self.money is None else f", {self.money:,.4g} to pay"
        return f"{self.questions:,} questions: {hours}, {kwh}{money} ({self.how})"


def bills(
    job: Measurement, energy: Energy, device: torch.device, devices: int = 1, price: float | None = None
) -> list[Bill]:
    """Of a job that was measured, load and all, and of MANY questions at its rate, load left out.

    Args:
        job: from `bench.challenge`: its questions, `seconds_total` and `questions_per_second`.
        energy: of the whole job. Where no counter could be read, a CPU's is projected from its threads.
        device: where it ran; devices: how many such GPUs, or ranks on this machine.
        price: of a device an hour; this machine counts as one device where it is a CPU.
    """
    seconds, rate = (job.values[name].value for name in ("seconds_total", "questions_per_second"))
    joules, source = energy.joules, f"measured: {energy.source}"
    if joules is None and device.type == "cpu":
        cores, watts = torch.get_num_threads(), float(DEVICES["cpu"]["tdp"])
        joules = cores * watts * seconds
        source = f"projected: {cores} cores at work, {watts:g} W each (assumed); no counter: {energy.source}"
    elif joules is None:
        source = energy.source
    counted = devices if device.type == "cuda" else 1
    note = "" if price is None else f"; {price:g} an hour for each of {counted}"

    def bill(n: int, took: float, how: str) -> Bill:
        kwh = None if joules is None else joules / seconds * took / 3.6e6
        return Bill(n, took, kwh, None if price is None else counted * price * took / 3600, how + note)

    scaled = f"projected from this job's {rate:.3g} questions/s and its power; {source}; loading left out"
    return [bill(job.n, seconds, f"seconds measured; energy {source}"), bill(MANY, MANY / rate, scaled)]
