import copy
import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

import llmlab
from llmlab import InputError
from llmlab.model.card import card_from_config
from llmlab.scoring.divergence import Exact

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
    assert many.settings.items() > {"context": "48", "stride": "48", "batch_size": "5"}.items()
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
        ({"protocol": "gptq-2048"}, "gptq-2048 sets context"),
        ({"protocol": "gptq-2048", "context": None}, "context 2048: choose 2 to 256 tokens"),
        ({"protocol": "gptq"}, "unknown protocol 'gptq': choose gptq-2048"),
    ],
)
def test_protocols_that_make_no_sense(tiny, arguments, expected):
    with pytest.raises(InputError, match=expected):
        llmlab.perplexity(tiny, TEXT, **({"context": 64} | arguments))


def test_words_and_bytes_are_those_of_the_text(tiny):
    """lm-evaluation-harness's definitions, on a text whose every token but the first is scored."""
    text = TEXT[:300].strip()
    ids = tiny.encode(text)
    mean, n = definition(tiny, ids, len(ids), len(ids))
    assert n == len(ids) - 1
    result = llmlab.perplexity(tiny, text, context=len(ids))
    total = mean * len(ids)  # the first token's is taken for the mean
    words = math.exp(total / len(re.split(r"\s+", text)))
    assert result.word_perplexity.value == pytest.approx(words, rel=1e-3)
    assert result.byte_perplexity.value == pytest.approx(math.exp(total / len(text.encode())), rel=1e-4)
    assert result.as_dict()["byte_perplexity"] == result.metrics()["byte_perplexity"].value


def test_a_text_without_white_space_is_no_overflow(tiny):
    result = llmlab.perplexity(tiny, "x" * 2000, context=64)
    assert math.isfinite(result.word_perplexity.value) and json.dumps(result.as_dict())


@pytest.fixture(scope="module")
def long_opt(smollm2):
    """A tiny random OPT with as many positions as the paper's."""
    config = OPTConfig(
        vocab_size=49152, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=32, max_position_embeddings=2048, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    return llmlab.LM(model, smollm2.tokenizer, card_from_config(config, "long", "fp32"), "long")


@pytest.mark.slow
@torch.no_grad()
def test_gptq_2048_is_what_its_code_computes(long_opt):
    """opt_eval of github.com/IST-DASLab/gptq: whole windows side by side, the mean of their mean losses."""
    text = "\n\n".join(q.context for q in llmlab.data.everyday(110))
    ids = torch.tensor([long_opt.encode(text)])
    windows = ids.numel() // 2048
    assert windows >= 2 and ids.numel() % 2048
    losses = []
    for i in range(windows):
        batch = ids[:, i * 2048 : (i + 1) * 2048]
        logits = long_opt.model(batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), batch[:, 1:].reshape(-1))
        losses.append(loss.float() * 2048)
    expected = float(torch.exp(torch.stack(losses).sum() / (windows * 2048)))
    result = llmlab.perplexity(long_opt, text, protocol="gptq-2048")
    assert result.perplexity.value == pytest.approx(expected, rel=1e-4)
    assert result.protocol.startswith(f"gptq-2048: {windows} windows of 2048 tokens, non-overlapping")
    assert result.n == windows * 2047
    with pytest.raises(InputError, match="needs at least one window of 2048"):
        llmlab.perplexity(long_opt, text[:3000], protocol="gptq-2048")


def test_divergences_are_their_definitions(tiny):
    ids = torch.tensor(tiny.encode(TEXT)[: 3 * 40]).view(3, 40)
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        p, q = (lm.model(ids).logits.double().log_softmax(-1).flatten(0, 1) for lm in (tiny, other))
    kl = sorted(float((a.exp() * (a - b)).sum()) for a, b in zip(p, q, strict=True))
    place = 0.99 * (len(kl) - 1)  # between two of the sorted, as quantiles are usually taken
    low = int(place)
    divergence = Exact(tiny, ids).against(other)
    assert divergence.kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert divergence.kl_99 == pytest.approx(kl[low] + (place - low) * (kl[low + 1] - kl[low]), rel=1e-3)
    agreed = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True))
    assert divergence.top1 == pytest.approx(agreed / len(kl))
    assert 0 < divergence.top1 < 1 and divergence.kl > 0
    same = Exact(tiny, ids).against(tiny)
    assert same.top1 == 1 and same.kl_99 == pytest.approx(0, abs=1e-6)


def test_one_token_is_no_text(tiny):
    with pytest.raises(InputError, match="at least two"):
        llmlab.perplexity(tiny, "a", context=64)
