import dataclasses
import json

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import llmlab
from llmlab import InputError, NumericalError, Question
from llmlab.scoring.encode import encode
from llmlab.scoring.paired import paired
from llmlab.scoring.reference import log_probs
from llmlab.scoring.score import METHODS


def harness_log_probs(lm, questions):
    """The same log-probabilities from lm-evaluation-harness, one list a question."""
    harness = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4)
    requests = [
        Instance("loglikelihood", {}, (q.context, " " + ending), i)
        for q in questions
        for i, ending in enumerate(q.endings)
    ]
    values = iter(value for value, _ in harness.loglikelihood(requests, disable_tqdm=True))
    return [[next(values) for _ in q.endings] for q in questions]


@pytest.mark.slow
def test_score_equals_lm_evaluation_harness_on_the_real_model(smollm2, rows):
    questions = rows[:20]
    expected = harness_log_probs(smollm2, questions)
    characters = [[len(e) for e in q.endings] for q in questions]
    for method in METHODS:
        result = llmlab.score(smollm2, questions, method=method)
        assert np.abs(np.array(result.log_probs) - np.array(expected)).max() <= 5e-4
        assert result.predictions == [int(np.argmax(row)) for row in expected]
        assert result.predictions_norm == [
            int(np.argmax(np.array(row) / np.array(length))) for row, length in zip(expected, characters, strict=True)
        ]


def odd_questions():
    """Endings that are equal, prefixes of one another, one token long; contexts that end in spaces; many endings."""
    return [
        Question("The cat", ("sat", "sat down", "sat", "sat down on the mat"), 0),
        Question("Once upon a time ", ("there", "there was", "x", "!"), 1),
        Question("Numbers:   ", ("1", "12", "123", "1234"), 2),
        Question("Two endings only", ("yes", "no"), 1),
        Question("Six endings", ("a", "b", "c", "d", "e", "f g h i j k l m n o p"), 5),
    ]


def test_score_equals_lm_evaluation_harness_on_odd_questions(tiny):
    questions = odd_questions()
    expected = harness_log_probs(tiny, questions)
    for method in METHODS:
        result = llmlab.score(tiny, questions, method=method, batch_size=3)
        for ours, theirs in zip(result.log_probs, expected, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_batches_do_not_change_the_result(tiny, rows, batch_size):
    sequences = encode(tiny, rows[:6])
    one_by_one = []
    for s in sequences:  # no padding, no batch: the definition
        logits = tiny.model(torch.tensor([s.ids])).logits[0].double().log_softmax(-1)
        one_by_one.append(sum(float(logits[p - 1, s.ids[p]]) for p in range(s.n_context, len(s.ids))))
    scores = log_probs(tiny, sequences, batch_size=batch_size)
    assert scores.log_probs == pytest.approx(one_by_one, abs=1e-3)
    assert (scores.work.padding == 0) == (batch_size == 1)
    assert scores.work.passes == -(-len(sequences) // batch_size)
    assert scores.work.tokens == sum(len(s.ids) for s in sequences) <= scores.work.asked


def test_result_keeps_everything(tiny, rows):
    result = llmlab.score(tiny, rows[:5], method="reference")
    assert result.n == 5
    assert [len(row) for row in result.log_probs] == [4] * 5
    assert result.labels == [q.label for q in rows[:5]]
    assert result.acc.low <= result.acc.value <= result.acc.high
    assert 0 < result.seconds_inference <= result.seconds_total
    assert result.tokens == sum(len(s.ids) for s in encode(tiny, rows[:5]))
    plain = json.loads(json.dumps(result.as_dict()))
    assert plain["acc"] == result.acc.value
    assert plain["predictions"] == result.predictions
    assert plain["method"] == "reference"
    assert result.settings.items() >= {"method": "reference", "batch_size": "8"}.items()
    assert llmlab.score(tiny, rows[:5]).settings.keys() == {"method", "token_ids"}


def test_normalisations_divide_by_characters_and_by_tokens(tiny):
    question = Question("A", ("aaaa bbbb", "c", "ddddddddddddddd eeeeeeeeeeeeeeee", "f g"), 0)
    result = llmlab.score(tiny, [question])
    row = np.array(result.log_probs[0])
    tokens = [s.n_ending for s in encode(tiny, [question])]
    assert result.predictions_norm == [int(np.argmax(row / [9, 1, 32, 3]))]
    assert result.predictions_norm_token == [int(np.argmax(row / tokens))]


def test_paired_comparison(tiny, rows):
    a = llmlab.score(tiny, rows[:8])
    shifted = [[value + (3.0 if k == 0 else 0.0) for k, value in enumerate(row)] for row in a.log_probs]
    b = dataclasses.replace(a, log_probs=shifted, predictions=[0] * 8)
    both = paired(a, b)
    assert both.max_abs_delta == pytest.approx(3.0)
    assert both.flips == [i for i, p in enumerate(a.predictions) if p != 0]
    assert both.gained - both.lost == sum(q.label == 0 for q in rows[:8]) - round(a.acc.value * 8)
    assert paired(a, a).flips == []
    with pytest.raises(ValueError, match="different questions"):
        paired(a, llmlab.score(tiny, rows[8:10]))


@pytest.mark.parametrize("method", METHODS)
def test_not_finite_logits_are_an_error_with_their_place(tiny_folders, rows, method):
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    with torch.no_grad():
        lm.model.model.norm.weight[0] = float("nan")
    with pytest.raises(NumericalError, match="batch 0: question"):
        llmlab.score(lm, rows[:2], method=method)
    assert lm.model.config._attn_implementation == "sdpa"


def test_bad_questions_are_named(tiny):
    long = Question("word " * 300, ("a", "b", "c", "d"), 0)
    with pytest.raises(InputError, match=r"question 1 with ending 0 has \d+ tokens, more than the context of 256"):
        llmlab.score(tiny, [Question("a", ("b", "c"), 0), long])
    with pytest.raises(InputError, match="no questions"):
        llmlab.score(tiny, [])
    with pytest.raises(InputError, match="unknown method 'fast'"):
        llmlab.score(tiny, [Question("a", ("b", "c"), 0)], method="fast")
    with pytest.raises(InputError, match="batch size 0"):
        llmlab.score(tiny, [Question("a", ("b", "c"), 0)], batch_size=0)
    with pytest.raises(InputError, match="question 0: its context has no token"):
        llmlab.score(tiny, [Question(" ", ("b", "c"), 0)])
