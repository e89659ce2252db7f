"""`llmlab eval`: stems, tasks of lm-evaluation-harness, intervals over clusters, pairs of evals."""

import json

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from test_selfcheck import SHARED, definition, tiny_lm
from transformers import OPTConfig

import llmlab
from llmlab import InputError
from llmlab.base.stats import clustered_mean, mean_score, proportion
from llmlab.jobs.evaluate import differences, evaluate, load_tasks, read_results
from llmlab.jobs.harness import HarnessLM
from llmlab.measure.record import read_records
from llmlab.model import selfcheck
from llmlab.scoring import shared
from llmlab.scoring.attention import TrieMasks
from llmlab.scoring.encode import Sequence
from llmlab.scoring.one_call import Flex, Slots
from llmlab.scoring.paired import paired
from llmlab.scoring.stems import few_shot_tries
from llmlab.scoring.trie import question_tries

IDS = torch.randint(3, 512, (4000,), generator=torch.Generator().manual_seed(1)).tolist()


def question(number, before, context=12):
    """Three endings, two of which share tokens, behind `before` and a context of the question's own."""
    ids = IDS[1000 + 40 * number :][:40]
    context = before + ids[:context]
    endings = (ids[20:24], [*ids[20:22], *ids[30:32]], ids[33:34])
    return [Sequence(number, e, context + ending, len(context)) for e, ending in enumerate(endings)]


def cut(sequences, lengths):
    """As a context that is too long loses its beginning, each sequence at another place."""
    cuts = [len(s.ids) - length for s, length in zip(sequences, lengths, strict=True)]
    return [
        Sequence(s.question, s.ending, s.ids[c:], s.n_context - c) for s, c in zip(sequences, cuts, strict=True)
    ]  # fmt: skip


A, B, SAID = IDS[:100], IDS[200:290], IDS[400:470]
GROUPS = {  # the sequences of questions, and of how many tokens their stems are
    "nothing in common": ([question(n, IDS[100 * n : 100 * n + 9]) for n in range(4)], []),
    "one beginning": ([question(n, A) for n in range(5)], [100]),
    "two beginnings, in turn": ([question(n, (A, B)[n % 2]) for n in range(8)], [100, 90]),
    "both behind one description": ([question(n, SAID + (A, B)[n % 2][:80]) for n in range(9)], [150, 150]),
    "the same question again": ([question(0, A), question(1, A), *([question(2, A)] * 3)], [100]),
    "too few to pay": ([question(n, A) for n in range(3)], []),
    "a beginning that each request loses elsewhere": (
        [cut(question(n, A), [90 - n, 80 - n, 70 - n]) for n in range(5)], []
    ),
    "some of them cut": ([cut(question(n, A), [112] * 3) if n == 2 else question(n, A) for n in range(6)], [100]),
}  # fmt: skip
FAMILIES = SHARED | {
    "learned positions": OPTConfig(
        vocab_size=512, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
        max_position_embeddings=256, dropout=0.0,
    )
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(selfcheck, "_outcomes", {})


def renumbered(questions):
    return [Sequence(q, s.ending, s.ids, s.n_context) for q, of in enumerate(questions) for s in of]


@pytest.mark.parametrize("name", GROUPS)
def test_questions_that_begin_alike_stand_on_one_stem(name):
    questions, lengths = GROUPS[name]
    lm, rows = tiny_lm(FAMILIES["layers with and without a window"]), renumbered(questions)
    tries = few_shot_tries(lm, rows)
    stems = {trie.stem for trie in tries} - {None}
    assert sorted(len(stem.ids) for stem in stems) == sorted(lengths)
    without = question_tries(rows)
    assert len(tries) == len(without)
    on_stems = sum(len(trie.stem.ids) for trie in tries if trie.stem)
    assert sum(map(len, tries)) + on_stems == sum(map(len, without))
    for budget in (30, 10**6):
        scores = shared.log_probs(lm, rows, budget=budget)
        assert scores.log_probs == pytest.approx(definition(lm, rows), abs=1e-3)
        assert scores.work.tokens == sum(map(len, tries)) + sum(lengths)  # a stem is computed once, whatever the budget
    assert scores.work.passes == (2 * len(lengths) + any(not trie.stem for trie in tries))


FLEXED = ["layers with and without a window", "learned positions"]


@pytest.mark.parametrize(
    ("family", "sight"),
    [
        *((family, sight) for family in FAMILIES for sight in (TrieMasks, Slots)),
        *(pytest.param(family, Flex, marks=pytest.mark.slow) for family in FLEXED),
    ],
)
def test_whatever_a_layer_sees_it_sees_through_a_stem(monkeypatch, family, sight):
    monkeypatch.setattr(shared, "sight_of", lambda _: sight)
    lm, rows = tiny_lm(FAMILIES[family]), renumbered(GROUPS["two beginnings, in turn"][0])
    scores = shared.log_probs(lm, rows, budget=150)
    assert scores.settings == {"method": "shared"}
    assert scores.log_probs == pytest.approx(definition(lm, rows), abs=1e-3)
    assert scores.work.tokens < 0.5 * sum(map(len, question_tries(rows)))


def test_a_stem_that_would_be_seen_wrongly_is_found_by_the_self_check(monkeypatch):
    lm = tiny_lm(FAMILIES["a window in all layers"])
    right = TrieMasks.behind_stem
    monkeypatch.setattr(
        TrieMasks, "behind_stem", lambda self, module, k, v: right(self, module, k + bool(self.before), v)
    )
    assert "differs from the plain forward pass" in shared.trie_check(lm).reason
    rows = renumbered(GROUPS["one beginning"][0])
    with pytest.warns(UserWarning, match="scored by the reference path"):
        assert shared.log_probs(lm, rows).log_probs == pytest.approx(definition(lm, rows), abs=1e-3)


def test_half_precision_stays_close_behind_a_stem():
    rows = renumbered(GROUPS["one beginning"][0])
    lm = tiny_lm(FAMILIES["layers with and without a window"], dtype=torch.bfloat16)
    plain = tiny_lm(FAMILIES["layers with and without a window"])
    expected = np.array(definition(plain, rows))
    assert np.abs(np.array(shared.log_probs(lm, rows).log_probs) - expected).max() < 0.05 * np.abs(expected).max()


# Tasks

WORDS = ["the", "cat", "dog", "sees", "eats", "red", "green", "small", "house", "river", "and", "with", "mill", "bread"]


def text(seed, words):
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def write_task(folder, name, kind="multiple_choice", **options):
    """A task with data of its own: eight questions of three sources, and examples of 20 tokens."""
    rows = [
        {
            "query": text(n, 8),
            "choices": [text(100 * n + c, 3) for c in range(1, 4)],
            "gold": n % 3,
            "source_id": n // 3,
        }
        | {"passage": "one for all"}
        for n in range(8)
    ]
    shots = [row | {"query": text(1000 + n, 16)} for n, row in enumerate(rows)]
    for split, data in (("validation", rows), ("train", shots)):
        (folder / f"{name}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    files = {split: str(folder / f"{name}_{split}.jsonl") for split in ("validation", "train")}
    config = {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "output_type": kind,
        "validation_split": "validation", "training_split": "train", "fewshot_split": "train",
        "doc_to_text": "{{query}}", "doc_to_target": "{{gold}}", "metadata": {"version": 2.5},
    }  # fmt: skip
    if kind == "multiple_choice":
        config |= {"doc_to_choice": "choices", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    else:
        config |= {"doc_to_target": "{{choices[gold]}}", "metric_list": [{"metric": "exact_match"}]}
        config |= {"generation_kwargs": {"until": ["\n\n"], "do_sample": False, "max_gen_toks": 12}}
    (folder / f"{name}.yaml").write_text(json.dumps(config | options))  # JSON is YAML


FIRST = {"sampler": "first_n"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    write_task(folder, "zero", num_fewshot=0)
    write_task(folder, "few", num_fewshot=5, fewshot_config=FIRST)
    write_task(folder, "described", num_fewshot=4, fewshot_config=FIRST, description=text(7, 30))
    write_task(folder, "drawn", num_fewshot=3)  # other examples for each question
    write_task(folder, "too_long", num_fewshot=8, fewshot_config=FIRST, description=text(8, 200))
    write_task(folder, "written", "generate_until", num_fewshot=2)
    (folder / "all.yaml").write_text(
        json.dumps({
            "group": "all", "task": ["zero", "few"], "metadata": {"version": 1},
            "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        })
    )  # fmt: skip
    return folder


TASKS = ["zero", "few", "described", "drawn", "too_long", "written"]


@pytest.fixture(scope="module")
def evals(folder, tiny_folders):
    """(tasks, ours, the plain harness's) of a tiny model."""
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32", device="cpu")
    tasks = load_tasks(TASKS, folder)
    theirs = evaluate(HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=3), tasks)
    return tasks, evaluate(HarnessLM(lm, batch_size=3), tasks), theirs


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_results_equal_those_of_the_plain_harness(evals, task):
    _, ours, theirs = (results if number == 0 else results[task] for number, results in enumerate(evals))
    assert differences(ours, theirs) == []
    assert ours.values == theirs.values
    assert (ours.n, ours.data, ours.clusters) == (8, theirs.data, theirs.clusters)
    for a, b in zip(ours.log_probs, theirs.log_probs, strict=True):
        assert a == pytest.approx(b, abs=5e-4)
    assert ours.settings["version"] == "2.5"
    assert len(set(map(str, ours.predictions))) > 1
    compared = paired(ours, theirs)
    assert (compared.flips, compared.gained, compared.lost, compared.p_value) == ([], 0, 0, 1.0)
    assert compared.max_abs_delta < 5e-4


@pytest.mark.slow
def test_the_verb_writes_results_that_can_be_paired(run, evals, folder, tiny_folders, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))  # instead of 14,000 YAML files
    results = []
    for name, model in tiny_folders.items():
        out = tmp_path / f"{name}.json"
        status, shown, _ = run(
            "eval", "--tasks", "all", "--model", model, "--dtype", "fp32", "--device", "cpu", "--include-path", folder,
            "--limit", 7, "--beside", "--json", out,
        )  # fmt: skip
        assert status == 0
        shown = " ".join(shown.split())  # however it was wrapped
        assert "as long; equal results" in shown
        assert "few-shot seed 1234" in shown
        results.append(read_results(out))
        record = json.loads(out.read_text())["tasks"]["few"]["record"]
        assert record == next(row for row in reversed(read_records()) if row["task"] == "few")
        assert record["settings"] == {"method": "shared", "version": "2.5", "num_fewshot": "5"}
        assert (record["n"], record["seed"], record["metrics"]["acc"]["unit"]) == (7, 1234, "")
    first, second = results
    assert list(first) == ["few", "zero", "all"] or list(first) == ["zero", "few", "all"]
    group = first["all"]
    assert (group.n, len(set(group.clusters))) == (14, 6)
    assert group.values["acc"].value == pytest.approx(np.mean([first[t].values["acc"].value for t in ("zero", "few")]))
    assert group.scores["acc"] == [score for task in list(first)[:2] for score in first[task].scores["acc"]]
    assert group.values["acc"].low is not None
    both = paired(first["few"], second["few"])
    a, b = (np.array(results["few"].scores["acc"]) for results in (first, second))
    assert (both.gained, both.lost) == (int((b > a).sum()), int((a > b).sum()))
    assert both.difference.value == pytest.approx(b.mean() - a.mean())
    assert both.flips == [
        i for i, (x, y) in enumerate(zip(first["few"].predictions, second["few"].predictions, strict=True)) if x != y
    ]
    assert both.max_abs_delta > 0.1
    assert paired(first["few"], first["few"]).difference.value == 0
    with pytest.raises(ValueError, match="different questions"):
        paired(first["few"], evals[1]["few"])  # of eight questions
    with pytest.raises(InputError, match=r"nothing\.json is no file that llmlab eval"):
        read_results(tmp_path / "nothing.json")


@pytest.mark.slow
def test_examples_before_a_question_can_be_chosen(evals, folder, tiny):
    few, ours = load_tasks(["few", "zero"], folder), evals[1]
    results = evaluate(HarnessLM(tiny), few, num_fewshot=2, limit=3)
    assert results["few"].settings["num_fewshot"] == "2"
    assert results["zero"].settings["num_fewshot"] == "0"  # the task says 0 and keeps to it, as in the harness
    assert results["few"].n == 3
    assert results["few"].data != ours["few"].data


def test_what_cannot_be_had_is_told_in_one_sentence_before_the_model_is_loaded(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_task(tmp_path, "far", dataset_path="llmlab-tests/is-not-there", dataset_kwargs={})
    write_task(tmp_path, "code", unsafe_code=True)
    write_task(tmp_path, "torn", doc_to_choice="{{nothing.at.all}}")
    for arguments, complaint in (
        (("--tasks", "few,no_such_task"), "unknown task no_such_task"),
        (("--tasks", "far", "--include-path", tmp_path), "the task far cannot be loaded: "),
        (("--tasks", "code", "--include-path", tmp_path), "the task code runs code that the model writes"),
        (("--tasks", "few", "--include-path", tmp_path / "none"), "no folder"),
        (("--tasks", "few", "--limit", 0), "--limit"),
        (("--tasks", "few", "--num-fewshot", -1), "--num-fewshot"),
    ):
        status, _, said = run("eval", "--model", "no/such-model", *arguments)
        assert status == 2
        assert complaint in said
        assert said.strip().count("\n") == 0
        assert ("far" in said) == ("the Hugging Face Hub cannot be reached" in said)


# Intervals


def test_the_interval_of_clusters_is_the_papers_formula():
    scores, names = np.random.default_rng(0).random(12), list("aaabbbbbcdee")
    n, off = len(scores), scores - scores.mean()
    cross = sum(off[i] * off[j] for i in range(n) for j in range(n) if i != j and names[i] == names[j])
    error = np.sqrt(scores.var(ddof=1) / n + cross / n**2)
    metric = clustered_mean(scores.tolist(), names)
    assert (metric.value - metric.low) / 1.959964 == pytest.approx(error, rel=1e-6)
    assert metric.high - metric.value == pytest.approx(metric.value - metric.low)


def test_an_interval_covers_the_truth_though_questions_of_a_text_succeed_together():
    rng, covered, naive = np.random.default_rng(0), 0, 0
    clusters = [str(n // 5) for n in range(300)]
    for _ in range(300):
        scores = (rng.random(60) < 0.7).astype(float).repeat(5)  # of a text all questions or none
        metric, plain = clustered_mean(scores.tolist(), clusters), proportion(scores.astype(bool).tolist())
        covered += metric.low <= 0.7 <= metric.high
        naive += plain.low <= 0.7 <= plain.high
    assert covered / 300 > 0.9 > 0.75 > naive / 300


def test_scores_of_single_questions_keep_wilsons_interval():
    hits = [1.0, 0.0, 1.0, 1.0]
    assert mean_score(hits, list("abcd")) == proportion([True, False, True, True])
    assert mean_score([1.0] * 6, list("aabbcc")) == proportion([True] * 3)  # three texts, no more
    assert mean_score(hits, list("aabb")) == clustered_mean(hits, list("aabb"))
    assert mean_score([0.5], ["a"]).low == 0.5
