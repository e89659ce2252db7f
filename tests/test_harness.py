"""llmlab inside lm-evaluation-harness."""

import json
from types import SimpleNamespace

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import llmlab
from llmlab import InputError
from llmlab.jobs.harness import HarnessLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both(smollm2):
    """(theirs, ours) over the same model."""
    return HFLM(pretrained=smollm2.model, tokenizer=smollm2.tokenizer, batch_size=4), HarnessLM(
        smollm2, batch_size=2, draft="lookup"
    )


def instances(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_loglikelihoods_and_greedy_flags_equal_the_harness(both, rows):
    arguments = [(q.context, " " + e) for q in rows[40:44] for e in q.endings]
    arguments += [
        ("The capital of France is", " Paris"),
        ("The capital of France is", " Rome"),
        ("", "Once upon a time"),
        ("Trailing space ", "moves over"),
        ("One, two, three, four,", " five, six"),
    ]
    theirs, ours = both
    expected = theirs.loglikelihood(instances("loglikelihood", arguments), disable_tqdm=True)
    found = ours.loglikelihood(instances("loglikelihood", arguments))
    assert [v for v, _ in found] == pytest.approx([v for v, _ in expected], abs=5e-4)
    assert [g for _, g in found] == [g for _, g in expected]
    assert any(g for _, g in found)
    assert not all(g for _, g in found)


def test_rolling_loglikelihood_equals_the_harness(both, rows):
    theirs, ours = both
    texts = [(rows[3].context,), ("A short text.",)]
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
    assert ours.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) == pytest.approx(expected, abs=2e-3)


def test_generate_until_equals_the_harness(both):
    theirs, ours = both
    settings = {"until": ["\n", "."], "max_gen_toks": 16, "do_sample": False}
    requests = instances("generate_until", [("The capital of France is", settings), ("Two plus two is", settings)])
    expected = theirs.generate_until(requests, disable_tqdm=True)
    assert ours.generate_until(requests) == expected


def word_problem(a, b):
    """(question, answer) in the form of GSM8K."""
    total = a + b
    question = f"Anna has {a} apples. Ben gives her {b} more apples. How many apples does Anna have now?"
    return question, f"Anna starts with {a} apples. With {b} more she has {a} + {b} = {total}.\n#### {total}"


EXAMPLES = "".join("Question: {}\nAnswer: {}\n\n".format(*word_problem(a, b)) for a, b in ((3, 4), (21, 8)))
UNTIL = ["Question:", "</s>", "<|im_end|>"]


def asked(a, b, **settings):
    """A request as GSM8K makes it, with two examples."""
    return f"{EXAMPLES}Question: {word_problem(a, b)[0]}\nAnswer:", {"until": UNTIL, "max_gen_toks": 32} | settings


def test_requests_of_several_settings_and_lengths_come_back_in_order(both, smollm2):
    theirs, ours = both
    arguments = [
        asked(5, 6, do_sample=False),
        ("The capital of France is", {"until": "\n", "max_new_tokens": 9, "do_sample": False, "num_beams": 1}),
        asked(12, 30, until=["s 12 + 3", "#"], temperature=0.0),  # the stop string spans tokens, and parts of them
        ("Two plus two is", {"until": [], "max_gen_toks": 6, "repetition_penalty": 1.3}),
        asked(7, 20, do_sample=False),
    ]
    requests = instances("generate_until", arguments)
    seen = []
    ours.cache_hook = SimpleNamespace(add_partial=lambda *call: seen.append(call))
    texts = ours.generate_until(requests)
    assert texts == theirs.generate_until(instances("generate_until", arguments), disable_tqdm=True)
    assert sorted(seen, key=str) == sorted(
        [("generate_until", arguments, text) for arguments, text in zip(arguments, texts, strict=True)], key=str
    )
    assert texts[0].endswith("#### 11\n\n")
    assert texts[2] == " Anna starts with 12 apples. With 30 more she ha"
    for (prompt, settings), text in list(zip(arguments, texts, strict=True))[1:3]:  # each alone, without a draft
        until = settings["until"]
        alone = llmlab.generate(
            smollm2, [prompt], max_new_tokens=settings.get("max_gen_toks", 9), engine=ours.engine,
            stop=[until] if isinstance(until, str) else until,
        )  # fmt: skip
        assert alone.texts == [text]


def test_samples_repeat_and_what_is_not_known_is_refused_before_the_work(both):
    _, ours = both
    warm = {"until": ["\n"], "max_gen_toks": 8, "do_sample": True, "temperature": 0.9, "top_k": 40, "min_p": 0.01}
    (first,), (again,), (other,) = (
        ours.generate_until(instances("generate_until", [("Once upon a time", warm | {"seed": seed})]))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    ours.__dict__.pop("engine")  # it is not asked for what follows
    for settings, message in (
        ({"length_penalty": 2.0}, "length_penalty is not known; known are until, max_gen_toks"),
        ({"num_beams": 4}, "num_beams is not known"),
        ({"top_p": 0}, "top-p 0"),
        ({"top_k": "many"}, "top-k many: give a whole number"),
        ({"temperature": "hot"}, "hot"),
        ({"do_sample": True}, "sampling needs a temperature above 0"),
        ({"logit_bias": {"49152": 1}}, "bias of token 49152"),
        ({"max_gen_toks": 8192}, "8192 new tokens: give 1 to 8191"),
    ):
        arguments = [("The sky is", {"until": ["."]}), ("The sky is", {"until": ["."]} | settings)]
        with pytest.raises(InputError, match=message):
            ours.generate_until(instances("generate_until", arguments))
    with pytest.raises(InputError, match="request 0 has an empty context"):
        ours.generate_until(instances("generate_until", [("", {})]))
    with pytest.raises(InputError, match="batch size 0"):
        HarnessLM(ours.lm, batch_size=0)
    assert "engine" not in ours.__dict__


def test_a_context_that_is_too_long_loses_its_beginning_as_in_the_harness(tiny, monkeypatch):
    theirs, ours = HFLM(pretrained=tiny.model, tokenizer=tiny.tokenizer, batch_size=2), HarnessLM(tiny, batch_size=2)
    settings = {"until": [], "max_gen_toks": 10, "do_sample": False}
    arguments = [("one two three " * 100, settings), ("a b c", settings)]
    expected = theirs.generate_until(instances("generate_until", arguments), disable_tqdm=True)
    with pytest.warns(UserWarning, match="1 contexts are longer than 246 tokens"):
        assert ours.generate_until(instances("generate_until", arguments)) == expected
    assert not ours.engine.times.measured  # so little is written without a draft
    monkeypatch.setattr("llmlab.jobs.harness.ENOUGH", 1)
    assert ours.generate_until(instances("generate_until", arguments[::-1])) == expected[::-1]
    assert ours.engine.times.measured


def evaluated(models, folder, task):
    """What the harness makes of a task in a folder, with each model."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    for model in models:
        yield simple_evaluate(model=model, tasks=[task], task_manager=manager, bootstrap_iters=0, verbosity="ERROR")


def test_a_task_of_word_problems_has_the_harness_score(both, tmp_path):
    data = [{"prompt": asked(a, b)[0], "answer": word_problem(a, b)[1]} for a, b in ((5, 6), (12, 30), (7, 20))]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (tmp_path / "problems.yaml").write_text(
        f"""
task: problems
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "problems.jsonl"}"}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["Question:", "</s>", "<|im_end|>"], do_sample: false, max_gen_toks: 32}}
metric_list:
  - metric: exact_match
    regexes_to_ignore: [",", "(?s).*#### "]
filter_list:
  - name: strict-match
    filter:
      - {{function: regex, regex_pattern: "#### ([0-9]+)"}}
      - {{function: take_first}}
"""
    )
    results = []
    for made in evaluated(both, tmp_path, "problems"):
        score = made["results"]["problems"]["exact_match,strict-match"]
        results.append((score, [sample["resps"] for sample in made["samples"]["problems"]]))
    assert results[0] == results[1]
    assert results[0][0] == pytest.approx(2 / 3)  # the third answer is wrong: 7 + 20 = 14


def test_a_whole_task_runs_with_equal_results(both, rows, tmp_path):
    data = [{"query": q.context, "choices": list(q.endings), "gold": q.label} for q in rows[44:50]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    (tmp_path / "llmlab_rows.yaml").write_text(
        f"""
task: llmlab_rows
dataset_path: json
dataset_kwargs: {{data_files: {{validation: "{tmp_path / "rows.jsonl"}"}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{query}}}}"
doc_to_target: "{{{{gold}}}}"
doc_to_choice: choices
metric_list:
  - metric: acc
  - metric: acc_norm
"""
    )
    results = [
        {k: v for k, v in made["results"]["llmlab_rows"].items() if k.startswith("acc")}
        for made in evaluated(both, tmp_path, "llmlab_rows")
    ]
    assert results[0] == results[1]
