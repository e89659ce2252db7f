"""What is fast on this machine: one table, measured once, and what follows from it."""

import json

import pytest
import torch

from llmlab.base import clock
from llmlab.kernels import fast
from llmlab.kernels.fast import MANY, Product

CPU = torch.device("cpu")


@pytest.fixture
def own_table(monkeypatch):
    """A function that makes the rest of llmlab believe in these rates, in weights a second by (weights, rows)."""

    def believe(rates):
        table = {Product(weights, rows, "torch"): value for (weights, rows), value in rates.items()}
        monkeypatch.setattr(fast, "table", lambda: table)

    return believe


def rates(bf16=(1.0, 1.0), fp16=(1.0, 1.0), four=1.0):
    return {
        ("fp32", 1): 1e9, ("fp32", MANY): 1e9, ("bf16", 1): bf16[0] * 1e9, ("bf16", MANY): bf16[1] * 1e9,
        ("fp16", 1): fp16[0] * 1e9, ("fp16", MANY): fp16[1] * 1e9, ("4 bits", 1): four * 1e9,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("speeds", "half", "packed", "says"),
    [
        ({"bf16": (1.3, 6.0), "four": 3.2}, "bf16", "bf16", "Bf16 multiplies 6.0 times as fast"),  # AMX
        ({"bf16": (0.6, 0.9), "fp16": (0.6, 0.9), "four": 2.4}, None, "fp32", "Stay in fp32"),  # AVX2
        ({"bf16": (0.5, 2.0), "fp16": (0.5, 0.9)}, None, "fp32", "save memory but no time"),
        ({"bf16": (1.0, 0.5), "fp16": (1.2, 1.8)}, "fp16", "fp32", "Fp16 multiplies 1.8"),  # some ARM
    ],
)
def test_choices_follow_from_the_table(own_table, speeds, half, packed, says):
    own_table(rates(**speeds))
    assert fast.half_dtype(CPU) == half
    assert fast.packed_dtype(CPU) == packed
    assert fast.default_dtype(CPU) == "fp32"  # exact, whatever is faster
    assert says in fast.advice(CPU)


def test_the_table_is_measured_once_and_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    monkeypatch.setattr(fast, "WIDTH", 128)
    monkeypatch.setattr(fast, "COPIES", 2)
    fast.table.cache_clear()
    try:
        table = fast.table()
        assert {p.weights for p in table} == {"fp32", "bf16", "fp16", "8 bits", "4 bits"}
        assert all(value > 0 for value in table.values())
        (kept,) = (tmp_path / "machines").iterdir()
        content = json.loads(kept.read_text())
        content["weights_per_second"][0][1] = 42.0
        kept.write_text(json.dumps(content))
        fast.table.cache_clear()
        assert next(iter(fast.table().values())) == 42.0  # read, not measured
        kept.write_text("broken")
        fast.table.cache_clear()
        assert next(iter(fast.table().values())) != 42.0
    finally:
        fast.table.cache_clear()


def test_a_process_limited_to_fewer_instructions_is_another_machine(monkeypatch):
    before = fast.machine()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    assert fast.machine() != before


def test_rates_carry_their_units():
    one, many = Product("4 bits", 1, "torch packed"), Product("fp32", MANY, "oneDNN")
    assert (str(one), fast.unit(one), fast.rate(one, 5.0)) == ("4 bits, 1 row, torch packed", "weight/s", 5.0)
    assert (str(many), fast.unit(many), fast.rate(many, 5.0)) == ("fp32, 256 rows, oneDNN", "FLOP/s", 2560.0)


def test_rounds_interleave_and_do_not_wait_for_the_hopeless(monkeypatch):
    now, order = [0.0], []

    def taking(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    runs = {"quick": taking("quick", 1.0), "slow": taking("slow", 2.0), "hopeless": taking("hopeless", 9.0)}
    times = clock.rounds(runs, counted=2)
    assert order == ["quick", "slow", "hopeless", "quick", "slow", "quick", "slow"]
    assert times == {"quick": [1.0, 1.0], "slow": [2.0, 2.0], "hopeless": [9.0]}
    assert clock.faster(runs["quick"], runs["slow"]) == pytest.approx(2.0)
