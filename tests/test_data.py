import json
import os
from pathlib import Path

import datasets
import pytest
from lm_eval.tasks.hellaswag import utils as lm_eval_hellaswag

from llmlab import InputError, data
from llmlab.scoring.encode import encode

GOOD = {"ctx": "A man opens a door.", "endings": ["a b", "c d", "e f", "g h"], "label": 1}


def raw_rows():
    """The shared HellaSwag sample where there is one, and the built-in rows."""
    files = [Path(data.builtin_data("everyday.jsonl"))]
    if folder := os.environ.get("LLMLAB_DATA"):
        files += sorted(Path(folder).glob("hellaswag*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_text_rules_equal_lm_evaluation_harness_on_every_text():
    texts = [t for row in raw_rows() for t in (row["ctx"], *row["endings"])]
    texts += [
        "x [title] y",
        " [step] a  b [substeps] c ",
        "[header] [title] a",
        "double  space   three",
        "a [b [c] d] e",
    ]
    assert [data.clean(t) for t in texts] == [lm_eval_hellaswag.preprocess(t) for t in texts]
    assert any("[" in t for t in texts)


def test_rows_with_the_hubs_fields_equal_lm_evaluation_harness_documents():
    rows = [json.loads(line) for line in data.builtin_data("everyday.jsonl").read_text().splitlines()]
    documents = lm_eval_hellaswag.process_docs(datasets.Dataset.from_list(rows))
    questions = data.everyday()
    assert len(questions) == len(documents) == 260
    for question, document in zip(questions, documents, strict=True):
        assert question.context == document["query"]
        assert list(question.endings) == document["choices"]
        assert question.label == document["gold"]


def test_everyday_has_the_promised_form(smollm2):
    questions = data.everyday()
    sequences = encode(smollm2, questions)
    contexts = [s.n_context for s in sequences if s.ending == 0]
    endings = [s.n_ending for s in sequences]
    assert len(questions) >= 240
    assert min(contexts) <= 12
    assert 100 <= max(contexts) <= 130
    assert 45 <= sum(contexts) / len(contexts) <= 65
    assert min(endings) <= 3
    assert 85 <= max(endings) <= 110
    first = [[e.split()[:2] for e in q.endings] for q in questions]
    shared = sum(
        starts[q.label] in starts[: q.label] + starts[q.label + 1 :] for q, starts in zip(questions, first, strict=True)
    )
    assert 0.45 <= shared / len(questions) <= 0.6
    labels = [q.label for q in questions]
    assert all(abs(labels.count(k) / len(labels) - 0.25) < 0.05 for k in range(4))
    # The right ending must not be betrayed by its length.
    ranks = [sorted(range(4), key=lambda k, q=q: len(q.endings[k])).index(q.label) for q in questions]
    assert all(abs(ranks.count(k) / len(ranks) - 0.25) < 0.08 for k in range(4))
    assert len({(q.context, q.endings) for q in questions}) == len(questions)


def test_prompts_have_five_kinds_of_ten():
    prompts = data.prompts()
    assert len(prompts) >= 40
    assert {p.kind for p in prompts} == set(data.PROMPT_KINDS)
    assert all(len(data.prompts(kind)) >= 8 for kind in data.PROMPT_KINDS)
    assert data.prompts("edit", limit=2) == data.prompts("edit")[:2]


@pytest.mark.parametrize(
    "line, expected",
    [
        ('{"ctx": "a"', "invalid JSON"),
        ("[1, 2]", "expected a JSON object"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "ctx"}), "field 'ctx' is missing"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "endings"}), "field 'endings' is missing"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "label"}), "field 'label' is missing"),
        (json.dumps(GOOD | {"label": 4}), "label must be 0, 1, 2 or 3, got 4"),
        (json.dumps(GOOD | {"label": -1}), "label must be"),
        (json.dumps(GOOD | {"label": True}), "label must be"),
        (json.dumps(GOOD | {"label": ""}), "label must be"),
        (json.dumps(GOOD | {"endings": ["a", "b", "c"]}), "expected four endings, got 3"),
        (json.dumps(GOOD | {"endings": "abcd"}), "expected four endings, got str"),
        (json.dumps(GOOD | {"endings": ["a", "b", " ", "d"]}), "ending 2 is empty"),
        (json.dumps(GOOD | {"endings": ["a", "[title]", "c", "d"]}), "ending 1 is empty"),
        (json.dumps(GOOD | {"endings": ["a", "b", "c", 4]}), "ending 3 is empty or no text"),
        (json.dumps(GOOD | {"ctx": "  "}), "context is empty"),
        (json.dumps(GOOD | {"ctx": 3}), "must be text"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path, line, expected):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD) + "\n\n" + line + "\n")
    with pytest.raises(InputError) as caught:
        data.read_questions(file)
    assert f"{file}, line 3" in str(caught.value)
    assert expected in str(caught.value)
    assert data.read_questions(file, limit=1)[0].label == 1


def test_labels_may_be_text_as_on_the_hub(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD | {"label": "3"}))
    assert data.read_questions(file)[0] == data.Question("A man opens a door.", ("a b", "c d", "e f", "g h"), 3, "rows")


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_must_be_positive(limit):
    with pytest.raises(InputError, match=f"limit {limit}"):
        data.everyday(limit)


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"none\.jsonl"):
        data.read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match="holds no rows"):
        data.read_questions(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"ctx": "caf\xe9"}')
    with pytest.raises(InputError, match="not UTF-8"):
        data.read_questions(tmp_path / "latin.jsonl")
    (tmp_path / "prompts.jsonl").write_text('{"kind": "qa"}')
    with pytest.raises(InputError, match="line 1"):
        data.read_prompts(tmp_path / "prompts.jsonl")
    (tmp_path / "text.txt").write_text(" ")
    with pytest.raises(InputError, match="is empty"):
        data.read_text(tmp_path / "text.txt")
    with pytest.raises(InputError, match="unknown prompt kind"):
        data.prompts("poetry")


def test_public_sets_come_from_llmlab_data_or_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_DATA", str(tmp_path))
    with pytest.raises(InputError, match="set LLMLAB_DATA to a folder with hellaswag"):
        data.hellaswag()
    with pytest.raises(InputError, match=r"wikitext2_test\.txt"):
        data.wikitext()
    (tmp_path / "hellaswag_dev.jsonl").write_text(json.dumps(GOOD))
    (tmp_path / "wikitext2_valid.txt").write_text("some text")
    assert data.hellaswag()[0].source == "hellaswag"
    assert data.wikitext("valid") == "some text"
    with pytest.raises(InputError, match="unknown WikiText split"):
        data.wikitext("train")
    monkeypatch.setenv("LLMLAB_DATA", str(tmp_path / "none"))
    with pytest.raises(InputError, match="which is no folder"):
        data.hellaswag()
