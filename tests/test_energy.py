import sys
import types

import pytest
import torch

from llmlab.cli.terminal import console, doctor_table
from llmlab.measure import energy as module
from llmlab.measure.energy import Energy, availability, joules_per_1000_tokens, measure_energy
from llmlab.measure.environment import inventory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def domain(powercap, number, name, microjoules, maximum=1_000_000):
    folder = powercap / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{maximum}\n")
    return folder / "energy_uj"


def test_packages_are_added_and_their_parts_are_not(tmp_path):
    first, second = domain(tmp_path, "0", "package-0", 100_000), domain(tmp_path, "1", "package-1", 0)
    core = domain(tmp_path, "0:0", "core", 0)

    def run():
        first.write_text("350000")
        second.write_text("500000")
        core.write_text("900000")

    found = measure_energy(run, CPU, powercap=tmp_path)
    assert found.joules == pytest.approx(0.75)
    assert found.source == "RAPL package-0, RAPL package-1"
    assert found.seconds > 0
    assert availability(CPU, powercap=tmp_path) == (True, "RAPL package-0, RAPL package-1")


def test_a_counter_that_starts_over_is_followed_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 0.005)
    counter = domain(tmp_path, "0", "package-0", 900_000)
    reads = []
    read = module._Counter.read
    monkeypatch.setattr(module._Counter, "read", lambda self: reads.append(read(self)) or reads[-1])

    def run():
        for value in (100_000, 800_000, 50_000):  # two wraps: 0.2 J, 0.7 J, 0.25 J
            seen = len(reads)
            temporary = tmp_path / "next"  # replaced as a whole: the sampler must not read a half-written file
            temporary.write_text(str(value))
            temporary.replace(counter)
            while len(reads) < seen + 2:
                pass

    assert measure_energy(run, CPU, powercap=tmp_path).joules == pytest.approx(1.15)


def test_a_counter_that_disappears_gives_no_number_but_the_work_is_done(tmp_path):
    counter = domain(tmp_path, "0", "package-0", 0)
    done = []

    def run():
        counter.unlink()
        done.append(True)

    found = measure_energy(run, CPU, powercap=tmp_path)
    assert done == [True]
    assert found.joules is None
    assert found.source.startswith("RAPL package-0 stopped answering ([Errno 2]")
    assert str(found).startswith("not measured here: ")


def test_what_the_work_raises_passes_through_and_the_sampler_ends(tmp_path):
    domain(tmp_path, "0", "package-0", 0)
    with pytest.raises(ZeroDivisionError):
        measure_energy(lambda: 1 / 0, CPU, powercap=tmp_path)
    assert not [thread for thread in module.threading.enumerate() if thread.name == "llmlab-energy"]


def test_without_a_counter_there_is_a_reason_and_never_a_guess(tmp_path):
    done = []
    found = measure_energy(lambda: done.append(True), CPU, powercap=tmp_path / "none")
    assert done == [True]
    assert found.joules is None
    assert "no RAPL package domain" in found.source
    domain(tmp_path, "0", "package-0", 0).write_text("garbage")
    assert availability(CPU, powercap=tmp_path) == (
        False, "RAPL cannot be read: invalid literal for int() with base 10: 'garbage'"
    )  # fmt: skip
    assert measure_energy(lambda: None, CPU, powercap=tmp_path).joules is None


def test_joules_per_1000_tokens():
    metric = joules_per_1000_tokens(Energy(3.0, 1.0, "RAPL package-0"), 250)
    assert (metric.value, metric.unit, metric.low) == (12.0, "J", None)
    assert joules_per_1000_tokens(Energy(None, 0.0, "no counter"), 250) is None
    assert joules_per_1000_tokens(Energy(3.0, 1.0, "RAPL package-0"), 0) is None
    assert str(Energy(3.0, 1.0, "RAPL package-0")) == "3 J (RAPL package-0)"


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch):
    """A stand-in for two GPUs and their driver, where there is none: 250 mJ a reading."""
    fake = types.ModuleType("pynvml")
    fake.NVMLError, fake.nvmlInit = NVMLError, lambda: None
    fake.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    fake.counters = {"GPU-a": 1000, "GPU-b": 5000}

    def count(handle):
        fake.counters[handle] += 250
        return fake.counters[handle]

    fake.nvmlDeviceGetTotalEnergyConsumption = count
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="ab"[index]))
    return fake


def test_gpus_by_their_energy_counter(nvml):
    found = measure_energy(lambda: None, CUDA)
    assert found.source == "NVML energy counter of GPU 0, NVML energy counter of GPU 1"
    assert found.joules == pytest.approx(0.5)  # one reading each between the first and the last
    assert measure_energy(lambda: None, torch.device("cuda:1")).source == "NVML energy counter of GPU 1"
    assert measure_energy(lambda: None, torch.device("cuda:0"), ranks=2).source == found.source


def test_a_gpu_without_an_energy_counter_is_not_measured(nvml):
    def unsupported(handle):
        raise NVMLError("Not Supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = unsupported
    assert availability(CUDA) == (False, "NVML cannot read energy: Not Supported")
    assert measure_energy(lambda: None, torch.device("cuda:0")).joules is None


def test_doctor_says_whether_energy_is_measured():
    found = inventory()["energy"]
    assert [row["device"] for row in found] == ["energy, CPU", "energy, GPU"]
    with console.capture() as text:
        console.print(doctor_table(inventory()))
    assert "energy, CPU" in text.get()
    assert all(row["usable"] or row["reason"] for row in found)
