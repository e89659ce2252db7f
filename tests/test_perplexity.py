import json
import math

import pytest
import torch

import llmlab
from llmlab import InputError

TEXT = " ".join(q.context for q in llmlab.data.everyday(30))


def definition(lm, ids, context, stride):
    """Mean NLL of each token scored once, in the first window that holds it with a predecessor, one token at a time."""
    total, scored = 0.0, set()
    for start in range(0, max(1, len(ids) - context + 1), stride):
        window = ids[start : start + context]
        logits = lm.model(torch.tensor([window])).logits[0].double().log_softmax(-1)
        for position in range(1, len(window)):
            if start + position not in scored:
                scored.add(start + position)
                total -= float(logits[position - 1, window[position]])
    return total / len(scored), len(scored)


@pytest.mark.parametrize("context, stride", [(64, 64), (64, 16), (50, 49), (100, 7)])
def test_perplexity_equals_its_definition(tiny, context, stride):
    text = TEXT[:1500]
    expected, n = definition(tiny, tiny.encode(text), context, stride)
    result = llmlab.perplexity(tiny, text, context=context, stride=stride)
    assert result.n == n
    assert result.nll == pytest.approx(expected, abs=1e-4)
    assert result.perplexity.value == pytest.approx(math.exp(expected), rel=1e-4)


def test_real_model_equals_transformers_loss(smollm2):
    ids = torch.tensor([smollm2.encode(TEXT)[:256]])
    loss = float(smollm2.model(ids, labels=ids).loss)
    result = llmlab.perplexity(smollm2, TEXT, context=256, max_windows=1)
    assert result.nll == pytest.approx(loss, abs=1e-4)
    assert result.perplexity.low is None
    assert "1 windows of 256 tokens" in result.protocol


def test_batches_do_not_change_it(tiny):
    one = llmlab.perplexity(tiny, TEXT, context=48)
    many = llmlab.perplexity(tiny, TEXT, context=48, batch_size=5)
    assert many.nll == pytest.approx(one.nll, abs=1e-5)
    assert one.perplexity.low < one.perplexity.value < one.perplexity.high
    assert many.settings == {"context": "48", "stride": "48", "batch_size": "5"}
    plain = json.loads(json.dumps(many.as_dict()))
    assert (plain["perplexity"], plain["n"], plain["settings"]) == (many.perplexity.value, many.n, many.settings)


def test_shorter_text_than_one_window_is_scored(tiny):
    assert llmlab.perplexity(tiny, "A short text.", context=200).n == len(tiny.encode("A short text.")) - 1


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"context": 1}, "context 1"),
        ({"context": 10_000}, "choose 2 to 256 tokens"),
        ({"stride": 0}, "stride 0"),
        ({"context": 32, "stride": 33}, "stride 33"),
        ({"max_windows": 0}, "0 windows"),
        ({"batch_size": 0}, "batch size 0"),
    ],
)
def test_protocols_that_make_no_sense(tiny, arguments, expected):
    with pytest.raises(InputError, match=expected):
        llmlab.perplexity(tiny, TEXT, **({"context": 64} | arguments))


def test_one_token_is_no_text(tiny):
    with pytest.raises(InputError, match="at least two"):
        llmlab.perplexity(tiny, "a", context=64)
