"""What decoding learns of its passes, and when it asks drafts that bring nothing."""

import time

import pytest

from llmlab.decoding.draft import Free, Proposal
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import decode_settings
from llmlab.decoding.loop import decode
from llmlab.decoding.model_draft import ModelDraft
from llmlab.decoding.pace import PROBE
from llmlab.decoding.timing import PassTimes
from llmlab.decoding.writer import Writer

TRUE = {1: 30.0, 2: 35.0, 3: 40.0, 5: 50.0}


def times(**wrong: float) -> PassTimes:
    known = PassTimes(tuple(TRUE))
    known.measured = {(1, width): seconds * wrong.get(f"w{width}", 1.0) for width, seconds in TRUE.items()}
    return known


def relative(known: PassTimes) -> list[float]:
    return [known.seconds(1, width) / known.seconds(1, 1) for width in TRUE]


@pytest.mark.parametrize("wrong", [{"w1": 2.0}, {"w5": 0.5}, {"w2": 1.6, "w3": 1.6}])
def test_a_point_measured_in_a_bad_moment_is_corrected_by_the_passes_themselves(wrong):
    known, right = times(**wrong), relative(times())
    assert relative(known) != pytest.approx(right, rel=0.1)
    for _ in range(25):
        for width, seconds in TRUE.items():
            known.observe(1, width, seconds)
    assert relative(known) == pytest.approx(right, rel=0.05)


def test_a_slower_machine_changes_no_decision_and_a_disturbed_pass_hardly_any():
    known, right = times(), relative(times())
    for _ in range(40):
        known.observe(1, 1, 1.4 * TRUE[1])
    known.observe(1, 4, 1.4 * TRUE[5])  # it is padded to five
    assert relative(known) == pytest.approx(right, rel=0.05)
    known.observe(1, 2, 1000 * TRUE[2])
    assert relative(known) == pytest.approx(right, rel=0.25)


def test_ranks_do_not_learn_for_they_must_decide_alike():
    known = times()
    known.agree = lambda seconds: [*seconds]
    known.observe(1, 1, 100.0)
    assert relative(known) == relative(times())


def test_more_tokens_than_were_measured_cost_more():
    assert times().seconds(8, 5) == pytest.approx(30.0 + 5.0 * (8 * 5 - 1))


def test_a_larger_batch_is_measured_for_itself(tiny):
    """Also where the engine, or that of a draft, has decoded rows alone before: those passes tell too little."""
    draft = ModelDraft(tiny)
    writer = Writer(Engine(tiny), decode_settings(tiny, 4), [draft])
    for rows in (1, 4):
        writer.warm_up([[5, 6, 7]] * rows, rows)
        for engine in (writer.engine, draft.engine):
            assert {number for number, _ in engine.times.measured} == {1, rows}
        assert (rows, 5) in writer.engine.times.measured
    late = Engine(tiny)  # without a warm-up
    for rows in (1, 4):
        late.start(rows, 64)
        late.seconds(5)
    assert (4, 5) in late.times.measured


class Wrong(Free):
    """Guesses what never comes, and takes its time."""

    name = "wrong"

    def __init__(self) -> None:
        self.asked = 0

    def propose(self, contexts, k, sampling):
        self.asked += 1
        time.sleep(0.01)
        return [Proposal.chain([1] * k, self.name) for _ in contexts]


@pytest.mark.parametrize(("k", "asked"), [(None, 1 + 70 // PROBE), (2, 70)])
def test_drafts_of_which_nothing_comes_are_asked_from_time_to_time(tiny, k, asked):
    engine, draft = Engine(tiny), Wrong()
    settings = decode_settings(tiny, 72, k=k)
    engine.start(1, settings.room([[5, 6, 7]]))
    engine.times.measured = {(1, width): 1e-3 * width for width in engine.times.widths}  # wider passes never pay
    steps = list(decode(engine, [[5, 6, 7]], settings, [draft]))
    assert sum(len(step[0].tokens) for step in steps) == 72
    assert draft.asked == asked
    plain = Writer(Engine(tiny), decode_settings(tiny, 72)).run([[5, 6, 7]])
    assert [token for step in steps for token in step[0].tokens] == plain.ids[0]
