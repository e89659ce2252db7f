import time

import pytest
import torch

from llmlab import Metric
from llmlab.base import clock
from llmlab.measure import environment, phases, profile, roofline


def test_compare_interleaves_and_drops_the_warm_up():
    calls = []
    timings = clock.compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, warmup=2, min_runs=3)
    assert "".join(calls) == "abbaabbaab"
    assert [len(t.seconds) for t in timings.values()] == [3, 3]


def test_compare_reaches_the_minimum_duration_but_not_more_than_max_runs():
    nap = {"nap": lambda: time.sleep(0.01)}
    assert len(clock.compare(nap, warmup=0, min_runs=2, min_seconds=0.2)["nap"].seconds) >= 10
    assert len(clock.compare(nap, warmup=0, min_runs=2, min_seconds=60, max_runs=4)["nap"].seconds) == 4
    with pytest.raises(ValueError, match="min_runs"):
        clock.compare(nap, min_runs=0)


def test_speedup_is_the_median_of_paired_ratios():
    noise = [1.0, 5.0, 2.0, 9.0, 3.0, 4.0, 1.5]
    slow = clock.Timing("slow", [2 * x for x in noise], 1)
    fast = clock.Timing("fast", noise, 1)
    ratio = clock.speedup(slow, fast)
    # Both saw the same noise round by round: the ratio is exactly 2 however wide the noise is.
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    assert fast.median.low < fast.median.value < fast.median.high
    with pytest.raises(ValueError, match="same rounds"):
        clock.speedup(slow, clock.Timing("short", noise[:-1], 1))


def test_only_gpus_that_were_asked_something_are_waited_for(monkeypatch):
    """To wait for another one would open a context there: half a GB beside a rank's part of a model."""
    waited = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 2**21 * (index in (0, 2)))
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock.synchronize()
    assert waited == [0, 2]


def test_peaks_are_measured_for_each_dtype_with_one_memory_rate():
    peaks = roofline.measure_peaks(["fp32", "bf16"], torch.device("cpu"), shapes=[(64, 64, 64)], min_seconds=0.0)
    assert set(peaks) == {"fp32", "bf16"}
    assert peaks["fp32"].bandwidth == peaks["bf16"].bandwidth
    assert peaks["fp32"].matmul == (64, 64, 64)
    assert peaks["fp32"].flops.low <= peaks["fp32"].flops.value <= peaks["fp32"].flops.high


def test_the_roofline_is_the_lower_of_two_limits():
    peaks = roofline.Peaks("cpu", "fp32", Metric(100.0, "FLOP/s"), Metric(10.0, "B/s"), (1, 1, 1))
    assert peaks.ridge == 10
    assert [peaks.attainable(i) for i in (1, 10, 50)] == [10, 100, 100]


def test_a_decode_step_leaves_its_cache_as_it_was(tiny):
    step = phases.decode_step(tiny, context=12)
    for _ in range(3):
        step.run()
    assert step.tokens == 1
    assert step.flops == tiny.card.flops_per_token(12)
    assert step.bytes_read > tiny.card.bytes_read_per_pass
    assert step.settings == {"context": "12"}  # a step after more tokens is another run
    prefill = phases.prefill(tiny, 12)
    prefill.run()
    assert prefill.intensity > step.intensity


def test_utilization_is_what_was_done_over_what_is_possible(tiny):
    phase = phases.Phase("work", lambda: None, tokens=4, flops=200, bytes_read=30)
    peaks = roofline.Peaks("cpu", "fp32", Metric(400.0, "FLOP/s"), Metric(60.0, "B/s"), (1, 1, 1))
    reached = phases.utilization(phase, clock.Timing("work", [2.0, 2.0, 2.0], 1), peaks).metrics()
    assert reached["mfu"].value == pytest.approx(200 / 2 / 400)
    assert reached["mbu"].value == pytest.approx(30 / 2 / 60)
    assert reached["tokens_per_second"].value == 2


def test_module_times_cover_the_whole_pass_and_leave_no_hook(tiny):
    phase = phases.prefill(tiny, 32)
    table = profile.module_times(tiny, phase.run)
    assert set(table["group"]) >= {"MLP", "attention projections", "attention core", "output head", "embedding"}
    assert table["share"].sum() == pytest.approx(1.0)
    assert (table["seconds"] >= 0).all()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.model.modules())


def test_inventory_names_everything_a_bug_report_needs():
    found = environment.inventory()
    assert found["builtin_model"] == {"found": True, "where": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    assert found["libraries"]["torch"] == torch.__version__
    assert found["hardware"]["memory"] > 2**28
    assert all(kernel["reason"] for kernel in found["kernels"])
    usable = {k["kernel"]: k["usable"] for k in found["kernels"]}
    assert usable["fp32 matmul, CPU"]
    assert usable["bf16 matmul, GPU"] == (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))
