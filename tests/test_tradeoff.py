"""Trade-offs: which combinations make sense, a point of the grid measured for real, and what the records tell."""

from contextlib import nullcontext
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CHECKOUT

import llmlab
from llmlab.base.errors import InputError
from llmlab.base.stats import Metric
from llmlab.bench import tradeoff
from llmlab.bench.combination import BASELINE, Combination, combinations, comparable, recommended, speedups
from llmlab.bench.tradeoff import Effort, Material, check_precision, material, measure_point, perplexity_ratio
from llmlab.data import fingerprint
from llmlab.lab import figures, leaderboard
from llmlab.lab.redraw import trade_offs
from llmlab.lab.sweep.grid import read_grid
from llmlab.measure.energy import availability
from llmlab.measure.record import Record, append, current

pytestmark = pytest.mark.slow

GRID = CHECKOUT / "notebooks/points/trade_offs.yaml"
PROMPTS = ["The cat sat on the mat. The cat sat on", "One, two, three, four, one, two,"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (("fp32", "gptq"), "does not give fp32"),
        (("16 bits", "none"), "unknown precision"),
        (("4 bits", "int8"), "does not give 4 bits"),
        (("4 bits", "gptq", "1", "self-4bit"), "own 4-bit copy"),
        (("fp32", "none", "1", "medusa"), "unknown draft"),
        (("fp32", "none", "data 2", "lookup"), "one device"),
        (("8 bits", "int8", "data 2"), "bitsandbytes"),
        (("fp32", "none", "rows 2"), "unknown sharding"),
        (("fp32", "none", "data 0"), "unknown sharding"),
    ],
)
def test_senseless_combinations_are_refused_in_one_sentence(fields, reason):
    with pytest.raises(InputError, match=reason) as error:
        Combination(*fields).check()
    assert "\n" not in str(error.value)


def test_layouts_and_names():
    assert Combination().cuts.ranks == 1
    both = Combination("4 bits", "gptq", "data 2 x pipeline 3")
    assert (both.cuts.data, both.cuts.pipeline, both.cuts.ranks) == (2, 3, 6)
    assert Combination("bf16", draft="lookup, self-4bit").name == "bf16, draft lookup + self-4bit"


def test_the_grid_fits_its_notebook_and_holds_sensible_points_and_their_baseline():
    grid = read_grid(GRID)
    assert grid.notebook.name == "trade_off.ipynb"
    points = [Combination(**point) for point in grid.combinations]
    for point in points:
        point.check()
    assert len(set(points)) == len(points) >= 14
    assert BASELINE in points


def test_bf16_is_refused_where_a_gpu_emulates_it(monkeypatch):
    for capability, refused in (((7, 0), True), ((7, 5), True), ((8, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        with pytest.raises(InputError, match="measure precision fp16") if refused else nullcontext():
            check_precision(Combination("bf16"), torch.device("cuda"))
        check_precision(Combination("fp16"), torch.device("cuda"))
    check_precision(Combination("bf16"), torch.device("cpu"))  # slow there, too, on some: a point of the grid


def test_nothing_measured_is_calibrated_on():
    questions, prompts, calibration = material(100)
    assert len(questions) == 100
    assert len(prompts) == 5
    assert not [q for q in questions if q.context in calibration]
    assert not [p for p in prompts if p in calibration]


@pytest.mark.parametrize(
    "combination",
    [
        Combination(),
        Combination(draft="lookup, self-4bit"),
        Combination("bf16"),
        Combination("4 bits", "rtn", draft="lookup"),
        Combination("4 bits", "nf4"),
        Combination("3 bits", "rotated gptq"),
        Combination("3 bits", "rotated qronos", draft="suffix, recycling"),
        Combination("4 bits", "rtn", "pipeline 2"),
    ],
    ids=lambda combination: combination.name,
)
def test_a_point_of_a_tiny_model(combination, tiny_folders, tmp_path):
    questions = llmlab.data.everyday(3)
    given = Material(questions, PROMPTS, material(3).calibration)
    effort = Effort(rows=2, new_tokens=5, timed=2, repeats=2)
    lm, found = measure_point(str(tiny_folders["llama"]), combination, given, effort, device="cpu")
    metrics = found.metrics()
    for name in ("acc_norm", "answers_kept", "perplexity", "perplexity_ratio", "bytes"):
        assert metrics[name].value >= 0
    for name in ("questions_per_second", "decode_tokens_per_second", "scoring_speedup", "decode_speedup"):
        assert 0 < metrics[name].low <= metrics[name].value <= metrics[name].high
    assert (metrics["decode_speedup"].value == metrics["scoring_speedup"].value == 1) == (combination == BASELINE)
    if combination.precision == "fp32":
        assert metrics["answers_kept"].value == metrics["perplexity_ratio"].value == 1
    else:
        assert metrics["perplexity_ratio"].value != 1
    assert found.data == fingerprint(questions)
    assert ("joules_per_1000_tokens" in metrics) == availability(lm.device)[0]
    llmlab.record(lm, found)
    table = combinations(llmlab.records())
    assert tuple(table.iloc[-1][["precision", "method", "sharding", "draft"]]) == (
        combination.precision, combination.method, combination.sharding, combination.draft,
    )  # fmt: skip
    assert table.iloc[-1]["name"] == combination.name
    assert table.iloc[-1]["track"] == ("exact" if combination.method == "none" else "open")


def test_two_replicas_hold_two_models_and_a_draft_adds_to_the_bytes(tiny_folders):
    def held(combination):
        given = Material(llmlab.data.everyday(1), PROMPTS[:1], "word " * 600)
        effort = Effort(rows=1, new_tokens=2, timed=1, repeats=1)
        _, found = measure_point(str(tiny_folders["llama"]), combination, given, effort, device="cpu")
        return found.metrics()["bytes"].value

    plain = held(Combination())
    assert held(Combination(sharding="data 2")) == 2 * plain
    assert plain < held(Combination(draft="self-4bit")) < 2 * plain


def test_free_drafts_begin_anew_with_each_run(tiny_folders, monkeypatch):
    """Or they would draft what they have seen written in the run before, and the speed would be a wonder."""
    seen = []

    def generating(lm, prompts, *, draft, **options):
        seen.append(draft)
        return llmlab.generate(lm, prompts, draft=draft, **options)

    monkeypatch.setattr(tradeoff, "generate", generating)  # plain fp32 beside it, too, without drafts
    given = Material(llmlab.data.everyday(1), PROMPTS, "word " * 600)
    effort = Effort(rows=1, new_tokens=4, timed=1, repeats=2)
    combination = Combination(draft="suffix, recycling, self-4bit")
    measure_point(str(tiny_folders["llama"]), combination, given, effort, device="cpu")
    seen = [drafts for drafts in seen if drafts]
    suffixes, recyclings, copies = ([id(drafts[k]) for drafts in seen] for k in range(3))
    assert len(seen) == 3  # the warm-up, too
    assert len(set(suffixes)) == len(set(recyclings)) == len(seen) and len(set(copies)) == 1


def test_prompts_that_do_not_fit_are_refused_before_weights_are_read(tiny_folders):
    with pytest.raises(InputError, match="prompt 0"):
        given = Material(llmlab.data.everyday(1), ["word " * 400], "x")
        measure_point(str(tiny_folders["llama"]), Combination(), given)


def test_the_ratio_of_perplexities_is_paired(smollm2):
    text = " ".join(q.context for q in llmlab.data.everyday(8))
    one = llmlab.perplexity(smollm2, text, context=64)
    ratio = perplexity_ratio(one, one)
    assert (ratio.low, ratio.value, ratio.high) == (1, 1, 1)


def table(rows, **common):
    about = {"task": "trade-off", "model": "m", "data": "d", "n": 100, "device": "cpu", "cpu": "c", "threads": 2}
    about |= {"cpu_capability": "AVX2"}
    frame = pd.DataFrame(
        about | common | asdict(combination) | {"protocol": "p", "time": pd.Timestamp(2026, 1, day + 1)} | values
        for day, (combination, values) in enumerate(rows)
    )
    frame.attrs["units"] = {"bytes": "B"}
    return frame


def point(scoring, decode, kept, ratio):
    return {
        "questions_per_second": scoring, "decode_tokens_per_second": decode, "answers_kept": kept,
        "perplexity_ratio": ratio, "bytes": 1.0,
    }  # fmt: skip


ROWS = [
    (BASELINE, point(4.0, 20.0, 1.0, 1.0)),
    (Combination(draft="lookup"), point(4.1, 30.0, 1.0, 1.0)),  # scoring knows no draft: 4.1 is noise
    (Combination("bf16"), point(8.0, 40.0, 0.99, 1.002)),
    (Combination("4 bits", "gptq"), point(6.0, 80.0, 0.9, 1.02)),
]


def test_what_to_use_follows_the_allowed_loss():
    found = speedups(comparable(combinations(table(ROWS))))
    use = {(row["job"], row["allowed_loss"]): row["use"] for _, row in recommended(found).iterrows()}
    assert use["scoring", 0.0] == "fp32"
    assert use["scoring", 0.01] == use["scoring", 0.03] == "bf16"
    assert use["writing", 0.0] == "fp32, draft lookup"
    assert use["writing", 0.01] == "bf16"
    assert use["writing", 0.03] == "4 bits gptq"
    assert found.set_index("name")["decode_speedup"]["4 bits gptq"] == 4


def test_what_was_measured_in_pairs_stands_and_one_old_record_among_them_makes_all_ratios_of_rates():
    paired = [(c, v | {"scoring_speedup": 9.0, "decode_speedup": 9.0}) for c, v in ROWS]
    found = speedups(comparable(combinations(table(paired))))
    assert set(found["decode_speedup"]) == set(found["scoring_speedup"]) == {9.0}
    mixed = speedups(comparable(combinations(table([*paired[:2], *ROWS[2:]]))))
    assert mixed["decode_speedup"].tolist() == [1.0, 1.5, 2.0, 4.0]


def test_speeds_are_compared_on_one_machine_and_the_newest_record_stands(tmp_path):
    here, there = table([*ROWS, (BASELINE, point(5.0, 25.0, 1.0, 1.0))]), table(ROWS[1:2], cpu="another")
    limited = table(ROWS[:3], cpu_capability="DEFAULT")  # the same processor, but not its instructions
    found = comparable(combinations(pd.concat([there, limited, here], ignore_index=True)))
    assert (set(found["cpu"]), set(found["cpu_capability"])) == ({"c"}, {"AVX2"})
    assert len(found) == len(ROWS)
    assert found.set_index("name")["questions_per_second"]["fp32"] == 5
    with pytest.raises(InputError, match="plain fp32"):
        speedups(combinations(there))
    with pytest.raises(InputError, match="llmlab sweep"):
        comparable(combinations(llmlab.records(tmp_path / "none.jsonl")))


def test_every_point_is_named_the_front_first():
    worse = (Combination("4 bits", "nf4"), point(5.0, 70.0, 0.8, 1.2))
    points = combinations(table([*ROWS, worse]))
    figure = figures.tradeoffs.pareto_front(points, "decode_tokens_per_second", "answers_kept", "t")
    drawn = [text.get_text() for text in figure.axes[0].texts]
    names = ["fp32, draft lookup", "bf16", "4 bits gptq", "fp32", "4 bits nf4"]
    assert [text for text in drawn if ":" in text] == [f"{k}: {name}" for k, name in enumerate(names, start=1)]
    many = pd.concat([points, *[points[points["name"] == "4 bits nf4"]] * 30], ignore_index=True)
    figure = figures.tradeoffs.pareto_front(many, "decode_tokens_per_second", "answers_kept", "t")
    assert len([text for text in figure.axes[0].texts if ":" in text.get_text()]) == 3  # the front alone


def test_no_number_covers_another():
    dots = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0], [3.0, 11.0], [40.0, 0.0]])
    numbers = dots + [[0.0, up] for up in figures.tradeoffs.heights(dots)]
    gaps = np.abs(numbers[:, None] - numbers).max(-1) + 99 * np.eye(len(dots))
    assert gaps.min() > 0.9 * figures.tradeoffs.ROOM
    assert numbers[[0, 4]].tolist() == dots[[0, 4]].tolist()  # where there is room they stand in their dots


def test_the_readmes_front_is_drawn_from_records(tmp_path):
    store = tmp_path / "trade-offs-here.jsonl"
    for combination, values in ROWS:
        metrics = {name: Metric(value, "B" if name == "bytes" else "") for name, value in values.items()}
        about = {"model": "m", "revision": None, "transformation": "none", "dtype": "fp32", "device": "cpu"}
        about |= {"threads": 2, "track": "exact", "protocol": "p", "data": "d", "settings": asdict(combination)}
        append(Record("trade-off", metrics, 9, **about), store)
    figure = trade_offs(llmlab.records(store))
    assert "4 bits gptq" in " ".join(text.get_text() for text in figure.axes[0].texts)
    with pytest.raises(InputError, match="llmlab sweep"):
        trade_offs(llmlab.records(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(("machine", "capability"), [("amx", "AVX512"), ("avx2", "AVX2")])
def test_the_recorded_grid_holds_points_of_one_machine_in_pairs(machine, capability):
    frame = combinations(llmlab.records(CHECKOUT / f"data/reference/trade-offs-{machine}-2-cores.jsonl"))
    recorded = {
        Combination(*row) for row in frame[["precision", "method", "sharding", "draft"]].itertuples(index=False)
    }
    points = {Combination(**point) for point in read_grid(GRID).combinations}
    # Limited to AVX2, what is about ranks, bf16 with drafts, nf4, plain GPTQ in 4 bits and three bits was left out.
    assert recorded == points if machine == "amx" else recorded < points and len(recorded) == 10
    assert set(frame["cpu_capability"]) == {capability}
    assert frame.attrs["units"]["bytes"] == "B"
    kept = comparable(frame)
    assert len(kept) == len(recorded) and speedups(kept) is kept
    assert kept.attrs["units"] == frame.attrs["units"]


def test_a_point_of_the_first_schema_is_read_with_its_combination():
    told = "precision 4 bits; method rotated gptq; sharding 1; draft none; log p(ending | context)"
    row = current({"schema": 1, "task": "trade-off", "protocol": told})
    assert Combination(**row["settings"]) == Combination("4 bits", "rotated gptq")


def test_the_leaderboard_names_its_baseline_and_marks_projections():
    board = leaderboard.results()
    assert board.loc[board["kind"] == "baseline", "seconds"].item() == 3763.66
    projected = leaderboard.projections()
    assert set(projected["kind"]) == {"exact track", "open track"}
    figure = figures.challenge.beside_leaderboard(pd.concat([board, projected]), "t")
    bars = figure.axes[0].patches
    assert len(bars) == len(board) + len(projected)
    assert sum(bar.get_hatch() is not None for bar in bars) == len(projected)
    assert "projection, not a measurement" in " ".join(t.get_text() for t in figure.legends[0].get_texts())
