"""The simulator against schedules that can be worked out by hand."""

from itertools import pairwise

import pytest

from llmlab import InputError
from llmlab.sharding.pipeline import stage_layers
from llmlab.sharding.timeline import simulate, tasks

EVEN = [[1.0] * 4 for _ in range(8)]  # eight batches, four stages


def test_naive_is_the_sum_and_micro_batches_fill_the_pipeline():
    naive, filled = simulate(tasks(EVEN, "naive")), simulate(tasks(EVEN, "micro-batches"))
    assert naive.seconds == pytest.approx(32)
    assert naive.bubble == pytest.approx(0.75)
    assert filled.seconds == pytest.approx(8 + 3)  # batches + stages - 1
    assert filled.bubble == pytest.approx(3 / 11)


def test_interleaving_fills_sooner():
    halves = [[0.5] * 8 for _ in range(8)]
    assert simulate(tasks(halves, "interleaved", ranks=4)).seconds < simulate(tasks(EVEN, "micro-batches")).seconds


def test_the_slowest_stage_sets_the_pace():
    work = [[1.0, 2.0, 1.0] for _ in range(10)]
    assert simulate(tasks(work, "micro-batches")).seconds == pytest.approx(1 + 10 * 2 + 1)


def test_links_and_shared_cores():
    work = [[1.0, 1.0] for _ in range(5)]
    assert simulate(tasks(work, "naive"), link=0.1).seconds == pytest.approx(5 * 2 + 9 * 0.1)
    shared = simulate(tasks(work, "micro-batches"), cores=1)
    assert shared.seconds == pytest.approx(10)  # one core does it all, whatever the schedule
    two = simulate(tasks(EVEN, "micro-batches"), cores=2)
    assert 16 <= two.seconds <= 18


def test_hops_between_nodes_take_the_network():
    work = [[1.0] * 4]
    assert simulate(tasks(work, "naive"), link=0.1, per_node=2, network=0.5).seconds == pytest.approx(
        4 + 0.1 + 0.5 + 0.1
    )
    assert simulate(tasks(work, "naive"), link=0.1, per_node=4, network=0.5).seconds == pytest.approx(4 + 0.3)


def test_order_is_kept():
    timeline = simulate(tasks(EVEN, "micro-batches"))
    for rank in range(4):
        mine = [s for s in timeline.spans if s.task.rank == rank]
        assert [s.task.batch for s in mine] == list(range(8))
        assert all(a.end <= b.start + 1e-9 for a, b in pairwise(mine))
    ends = {(s.task.batch, s.task.stage): s.end for s in timeline.spans}
    assert all(s.start >= ends[s.task.batch, s.task.stage - 1] - 1e-9 for s in timeline.spans if s.task.stage)


def test_bad_schedules_are_named():
    with pytest.raises(InputError, match="unknown schedule 'zigzag'"):
        tasks(EVEN, "zigzag")


BALANCED = [(30, 4, 5.0), (2, 2, 30.0), (12, 1, 3.0), (60, 4, 0.3), (5, 3, 0.0)]


@pytest.mark.parametrize(("layers", "stages", "head"), BALANCED)
def test_stages_are_balanced(layers, stages, head):
    bounds = stage_layers(layers, stages, head)
    assert [b[0] for b in bounds] == [0, *[b[1] for b in bounds[:-1]]]
    assert bounds[-1][1] == layers and all(first < end for first, end in bounds)
    slowest = max(end - first + (head if end == layers else 0) for first, end in bounds)
    assert slowest <= max((layers + head) / stages + 1, 1 + head)
