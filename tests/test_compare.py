import copy
import json
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import CHECKOUT
from test_record import make
from tokenizers.processors import TemplateProcessing

import llmlab
from llmlab import InputError, Metric
from llmlab.cli.main import main
from llmlab.lab.figures.tradeoffs import pareto
from llmlab.measure.compare import ENOUGH, compare, direction, holm, pooled
from llmlab.measure.record import append, describe


def store(path, *records):
    for record in records:
        append(record, path)
    return path


def one(path, name="seconds", unit="s", value=1.0, half=0.02, **fields):
    bounds = () if half is None else (value - half, value + half)
    return store(path, make(metrics={name: Metric(value, unit, *bounds)}, **fields))


def verdict(tmp_path, *sides, **fields):
    paths = [
        one(tmp_path / f"{label}.jsonl", value=v, half=h, **fields) for label, (v, h) in zip("ab", sides, strict=True)
    ]
    (row,) = compare(*paths).to_dict("records")
    return row


@pytest.mark.parametrize(
    ("name", "unit", "after", "expected"),
    [
        ("seconds", "s", 1.2, "worse"),
        ("seconds", "s", 0.8, "better"),
        ("seconds", "s", 1.02, "within noise"),
        ("tokens_per_second", "token/s", 1.2, "better"),
        ("acc_norm", "", 0.8, "worse"),
        ("joules_per_1000_tokens", "J", 1.2, "worse"),
        ("best_4bit_over_fp32", "x", 1.2, "worse"),
        ("speedup_vs_lm_eval", "x", 1.2, "better"),
        ("my_number", "", 1.2, "changed"),
    ],
)
def test_what_changed_beyond_noise_and_which_way(tmp_path, name, unit, after, expected):
    row = verdict(tmp_path, (1.0, 0.02), (after, 0.02), name=name, unit=unit)
    assert row["verdict"] == expected
    assert row["change"] == pytest.approx(after - 1)
    assert row["change_low"] < row["change"] < row["change_high"]


def test_values_around_zero_are_compared_by_their_difference(tmp_path):
    row = verdict(tmp_path, (0.01, 0.02), (0.2, 0.02), name="max_abs_delta", unit="nat")
    assert (row["scale"], row["verdict"]) == ("difference", "worse")
    assert row["change"] == pytest.approx(0.19)
    assert row["change_high"] - row["change"] == pytest.approx(0.02 * 2**0.5)


def test_a_value_without_an_interval_is_not_judged(tmp_path):
    assert verdict(tmp_path, (1.0, None), (9.0, 0.1))["verdict"] == "not judged: no interval in A"


def test_equal_counts_need_no_interval(tmp_path):
    assert verdict(tmp_path, (7.0, None), (7.0, None), name="tokens", unit="token")["verdict"] == "equal"


def test_several_runs_are_judged_by_their_spread(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.02, size=(2, ENOUGH + 1))
    for label, centre, spread in (("a", 1.0, noise[0]), ("b", 1.3, noise[1])):
        for extra in spread:
            one(tmp_path / f"{label}.jsonl", value=centre + extra, half=None)
    (row,) = compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl").to_dict("records")
    assert row["verdict"] == "worse"
    assert row["a"] == pytest.approx(1.0 + np.median(noise[0]))
    assert row["a_low"] < row["a"] < row["a_high"]


def test_pooling_keeps_the_wider_interval():
    runs = [Metric(value, "s", value - 0.1, value + 0.1) for value in (1.0, 2.0, 3.0)]
    assert (pooled(runs).value, pooled(runs).low, pooled(runs).high) == (2.0, 1.0, 3.0)
    alike = pooled([Metric(0.5, "", 0.4, 0.6)] * 6)
    assert (alike.low, alike.high) == (0.4, 0.6)
    assert pooled([Metric(1.0), Metric(2.0)]).low is None


def test_false_alarms_stay_at_their_level():
    """200 comparisons of nothing with nothing: the intervals' z-test errs about as often as it says."""
    rng = np.random.default_rng(1)
    from llmlab.measure.compare import _change

    a, b = rng.normal(10, 0.1, size=(2, 2000))
    half = 1.96 * 0.1
    p = np.array(
        [
            _change(Metric(x, "s", x - half, x + half), Metric(y, "s", y - half, y + half))["p"]
            for x, y in zip(a, b, strict=True)
        ]
    )
    assert 0.035 < (p < 0.05).mean() < 0.065


def test_holm_corrects_over_all_metrics():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_names_and_units_say_which_way_is_good():
    assert direction("seconds_total", "s") == direction("perplexity", "") == direction("bytes", "B") == -1
    assert direction("questions_per_second", "1/s") == direction("mfu", "") == direction("flops", "FLOP/s") == 1
    assert direction("decode_speedup_vs_fp32", "x") == direction("bytes_per_second", "B/s") == 1
    assert direction("intensity", "FLOP/byte") == direction("tokens", "token") == 0
    gains = [("acc", ""), ("rate", "token/s"), ("bandwidth", "B/s"), ("answers_kept", ""), ("greedy_equal", "")]
    assert all(direction(*metric) == 1 for metric in gains)
    costs = [("memory", "B"), ("energy", "J"), ("loss", "nat/token"), ("latency", "s/token"), ("word_perplexity", "")]
    assert all(direction(*metric) == -1 for metric in costs)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("bits_per_weight", "bit"), ("worst_error", ""), ("cost_model_error", ""), ("simulator_error_max", ""),
        ("best_4bit_over_fp32", "x"),
    ],
)  # fmt: skip
def test_comparisons_and_figures_agree_which_way_is_good(name, unit):
    """The Pareto front had a rule of its own, by which more error was better."""
    assert direction(name, unit) == -1
    frame = pd.DataFrame({name: [1.0, 2.0], "acc": [0.5, 0.5]})
    frame.attrs["units"] = {name: unit}
    assert list(pareto(frame, name, "acc")) == [True, False]


def test_other_hardware_versions_and_threads_are_noted(tmp_path):
    machine = {"cpu": "one", "cpu_capability": "AVX2", "cores": 2, "gpus": [], "system": "Linux"}
    a = one(tmp_path / "a.jsonl", hardware=machine, libraries={"torch": "2.13.0"}, threads=2)
    b = one(
        tmp_path / "b.jsonl",
        hardware=machine | {"cpu": "two", "gpus": [{"name": "H100"}]},
        libraries={"torch": "2.14.0"},
        threads=4,
    )
    assert compare(a, a).attrs["notes"] == []
    assert compare(a, b).attrs["notes"] == [
        "processor differs: one in A, two in B",
        "GPUs differs: none in A, H100 in B",
        "threads differs: 2 in A, 4 in B",
        "torch differs: 2.13.0 in A, 2.14.0 in B",
    ]
    other = one(tmp_path / "c.jsonl", hardware=machine, libraries={"torch": "2.13.0"}, threads=2, revision="main")
    assert compare(a, other).attrs["notes"] == ["revision of m differs: none in A, main in B"]


def test_runs_are_matched_by_their_settings(tmp_path):
    a = one(tmp_path / "a.jsonl", protocol="shared path, 10 passes", settings={"method": "shared"})
    one(a, value=5.0, protocol="reference path", settings={"method": "reference", "batch_size": "8"})
    b = one(tmp_path / "b.jsonl", protocol="shared path, 12 passes", settings={"method": "shared", "draft": ""})
    same = compare(a, b)
    assert list(same["verdict"]) == ["within noise"]
    assert list(same["settings"]) == ["method shared"]
    assert same.attrs["notes"] == ["only in A: test, m fp32 on cpu, data none, n 3, batch_size 8, method reference"]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("batch_size", "1", "8"), ("ranks", "2", "4"), ("temperature", "0", "0.7"), ("draft", "", "lookup")],
)
def test_runs_with_other_settings_are_told_apart_and_the_difference_is_said(tmp_path, name, before, after):
    common = {"task": "common"}
    sides = [
        one(one(tmp_path / f"{label}.jsonl", value=value, settings={name: setting}), **common)
        for label, value, setting in (("a", 1.0, before), ("b", 5.0, after))
    ]
    found = compare(*sides)
    assert list(found["task"]) == ["common"]
    said = f"{name} differs: {before or 'none'} in A, {after} in B"
    assert f"test, m fp32 on cpu, data none, n 3: not compared, {said}" in found.attrs["notes"]
    assert f"only in B: test, m fp32 on cpu, data none, n 3, {name} {after}" in found.attrs["notes"]
    both = one(sides[0], value=9.0, settings={name: after})
    assert set(compare(both, sides[1])["settings"]) == {"", f"{name} {after}"}
    with pytest.raises(InputError, match=f"no record in common .*{name} {after}"):
        compare(one(tmp_path / "c.jsonl", settings={name: before}), one(tmp_path / "d.jsonl", settings={name: after}))


def old(path, protocol, **fields):
    """A record of schema 1: without settings."""
    one(path, protocol=protocol, **fields)
    *before, last = [json.loads(line) for line in path.read_text().splitlines()]
    del last["settings"], last["memory_bytes"], last["weight_bytes"]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*before, last | {"schema": 1}]))
    return path


def test_old_records_are_matched_by_what_is_known_of_their_settings(tmp_path):
    protocol = "greedy, batch size 8, KV cache, tokens counted from ids"
    a = old(tmp_path / "a.jsonl", protocol, task="generate")
    same = {"task": "generate", "protocol": protocol}
    b = one(tmp_path / "b.jsonl", settings={"batch_size": "8", "temperature": "0", "engine": "fast"}, **same)
    other = one(tmp_path / "c.jsonl", settings={"batch_size": "1", "temperature": "0"}, **same)
    found = compare(a, b)
    assert list(found["settings"]) == ["batch_size 8, engine fast, temperature 0"]
    assert found.attrs["notes"] == [
        "generate, m fp32 on cpu, data none, n 3, batch_size 8, engine fast, temperature 0: "
        "an old record in A does not tell all these settings"
    ]
    with pytest.raises(InputError, match="no record in common"):
        compare(a, other)
    assert list(compare(a, a)["verdict"]) == ["within noise"]
    (tmp_path / "old.json").write_text(json.dumps({"record": json.loads(a.read_text())}))
    assert list(compare(tmp_path / "old.json", b)["verdict"]) == ["within noise"]


def test_records_without_a_fingerprint_are_matched_with_a_note(tmp_path):
    a = one(tmp_path / "a.jsonl", schema=2, settings={"context": "512"})
    b = one(tmp_path / "b.jsonl", settings={"context": "512", "token_ids": "sha256:1"})
    found = compare(a, b)
    assert list(found["verdict"]) == ["within noise"]
    assert found.attrs["notes"][0].endswith("an old record in A does not tell all these settings")


def test_numbers_of_other_protocols_are_not_judged(tmp_path):
    b = one(tmp_path / "b.jsonl", protocol="shared path, 12 passes")
    same = compare(one(tmp_path / "a.jsonl", protocol="shared path, 1,110.5 passes"), b)
    assert (list(same["verdict"]), same.attrs["notes"]) == (["within noise"], [])
    found = compare(b, one(tmp_path / "c.jsonl", value=9.0, protocol="a third way"))
    assert list(found["verdict"]) == ["not judged: the protocols differ"]
    assert (found["a"][0], found["b"][0]) == (1.0, 9.0) and found[["change", "p"]].isna().all(axis=None)
    (note,) = found.attrs["notes"]
    assert note.endswith("n 3: protocol differs: 'shared path, 12 passes' in A, 'a third way' in B")
    assert list(compare(one(b, protocol="a third way"), tmp_path / "c.jsonl")["verdict"]) != list(found["verdict"])


def test_a_cold_run_is_not_judged_against_a_warm_one(tmp_path):
    found = compare(one(tmp_path / "a.jsonl"), one(tmp_path / "b.jsonl", warmup=1))
    assert list(found["verdict"]) == ["not judged: the protocols differ"]
    assert found.attrs["notes"] == ["test, m fp32 on cpu, data none, n 3: warm-up differs: 0 runs in A, 1 runs in B"]


def test_old_records_of_other_protocols_are_judged_with_a_note(tmp_path):
    """Their wording was another one: that alone is no other protocol."""
    found = compare(old(tmp_path / "a.jsonl", "in other words"), one(tmp_path / "b.jsonl"))
    assert list(found["verdict"]) == ["within noise"]
    assert "protocol differs: 'in other words' in A, 'by hand' in B" in found.attrs["notes"][0]


def with_bos(lm):
    """The same model and a tokenizer that puts a special token before each text."""
    changed = copy.deepcopy(lm.tokenizer)
    backend, (token, number) = changed.backend_tokenizer, (changed.eos_token, changed.eos_token_id)
    backend.post_processor = TemplateProcessing(f"{token} $A", f"{token} $A $B", [(token, number)])
    return replace(lm, tokenizer=changed)


TEXT = "The kettle sings, and the tea is hot. She reads the paper by the window. " * 8


@pytest.mark.parametrize("tiny", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("run", "other", "said"),
    [
        (llmlab.perplexity, {"context": 24}, "context differs: 12 in A, 24 in B"),
        (llmlab.perplexity, {"stride": 6}, "stride differs: 12 in A, 6 in B"),
        (llmlab.perplexity, {"text": TEXT.replace("tea", "cup")}, "token_ids differs"),
        (llmlab.perplexity, {"lm": with_bos}, "token_ids differs"),
        (llmlab.generate, {"prompts": ["The cat"]}, "token_ids differs"),
        (llmlab.generate, {"max_new_tokens": 3}, "max_new_tokens differs: 4 in A, 3 in B"),
        (llmlab.generate, {"k": 2}, "k differs: adaptive in A, 2 in B"),
        (llmlab.generate, {"draft": None}, "draft differs: lookup in A, none in B"),
        (llmlab.generate, {"batch_size": 2}, "batch_size differs: 1 in A, 2 in B"),
        (llmlab.score, {"lm": with_bos}, "token_ids differs"),
        (llmlab.score, {"method": "reference"}, "method differs: shared in A, reference in B"),
    ],
)
def test_what_changes_a_number_keeps_two_records_apart(run, other, said, tiny, rows, tmp_path):
    if run is llmlab.perplexity:
        given = {"text": TEXT, "context": 12, "max_windows": 3}
    elif run is llmlab.score:
        given = {"questions": rows[:3]}
    else:
        given = {"prompts": ["A dog"], "max_new_tokens": 4, "draft": llmlab.PromptLookup()}
        given["engine"] = llmlab.Engine(tiny)
    changed = given | other
    lm = changed.pop("lm", lambda lm: lm)(tiny)
    a, b = store(tmp_path / "a.jsonl", describe(tiny, run(tiny, **given))), tmp_path / "b.jsonl"
    with pytest.raises(InputError, match=f"have no record in common .*{said}.*; task, model"):
        compare(a, store(b, describe(lm, run(lm, **changed))))
    again = compare(a, store(tmp_path / "c.jsonl", describe(tiny, run(tiny, **given))))
    assert not again["verdict"].str.contains("protocol").any() and not again.attrs["notes"]


def test_metrics_and_records_of_one_side_are_said(tmp_path):
    a = store(tmp_path / "a.jsonl", make(metrics={"acc": Metric(0.5), "old": Metric(1.0)}), make(task="gone"))
    b = store(tmp_path / "b.jsonl", make(metrics={"acc": Metric(0.5, "%"), "new": Metric(1.0)}), make(task="came"))
    found = compare(a, b)
    assert dict(zip(found["metric"], found["verdict"], strict=True)) == {
        "acc": "not judged: the unit is none in A and % in B",
        "old": "not judged: only in A",
        "new": "not judged: only in B",
    }
    assert found.attrs["notes"] == [
        "only in A: gone, m fp32 on cpu, data none, n 3", "only in B: came, m fp32 on cpu, data none, n 3"
    ]  # fmt: skip


def test_what_cannot_be_compared_is_bad_input(tmp_path):
    a = one(tmp_path / "a.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jsonl").write_text(json.dumps({"schema": 1}) + "\n")
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(InputError, match=r"no file or folder .*nothing: give a \.jsonl file"):
        compare(a, tmp_path / "nothing")
    with pytest.raises(InputError, match="empty holds no record"):
        compare(tmp_path / "empty", a)
    with pytest.raises(InputError, match="holds lines that are no records"):
        compare(a, tmp_path / "bad.jsonl")
    with pytest.raises(InputError, match=r"no file of a command's --json"):
        compare(a, tmp_path / "bad.json")
    other = one(tmp_path / "b.jsonl", dtype="bf16")
    with pytest.raises(InputError, match=r"no record in common .*A has \(test, m fp32 on cpu.*; B has \(test, m bf16"):
        compare(a, other)
    with pytest.raises(InputError, match=r"no record in common \(dtype differs: fp32 in A, bf16 in B; task, model"):
        compare(a, other)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["llmlab", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code or 0


def test_the_command_says_by_its_status_that_something_is_worse(tmp_path, monkeypatch, capsys):
    before, after = tmp_path / "before", one(tmp_path / "after.jsonl", value=1.5)
    one(before / "records.jsonl")
    assert run(monkeypatch, before, after, "--json", tmp_path / "out.json") == 1
    assert "worse" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "out.json").read_text())["changes"]
    assert (row["metric"], row["verdict"]) == ("seconds", "worse")
    assert run(monkeypatch, after, before) == 0
    assert run(monkeypatch, after, tmp_path / "none") == 2
    assert "no file or folder" in capsys.readouterr().err


def test_the_reference_is_equal_to_itself():
    found = compare(*[CHECKOUT / "data" / "reference" / "cpu-2-cores.jsonl"] * 2)
    assert set(found["verdict"]) <= {"equal", "within noise"}
