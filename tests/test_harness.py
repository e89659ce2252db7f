"""llmlab inside lm-evaluation-harness."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from llmlab.jobs.harness import HarnessLM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def both(smollm2):
    """(theirs, ours) over the same model."""
    return HFLM(pretrained=smollm2.model, tokenizer=smollm2.tokenizer, batch_size=4), HarnessLM(smollm2)


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


def test_a_whole_task_runs_with_equal_results(both, rows, tmp_path):
    import json

    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

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
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = []
    for model in both:
        made = simple_evaluate(
            model=model, tasks=["llmlab_rows"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
        )
        results.append({k: v for k, v in made["results"]["llmlab_rows"].items() if k.startswith("acc")})
    assert results[0] == results[1]
