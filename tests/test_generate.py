import pytest
import torch
from scipy.stats import chisquare

import llmlab
from llmlab import InputError
from llmlab.decoding.draft import Proposal, Sampling
from llmlab.decoding.sampling import next_token_probs
from llmlab.decoding.verify import verify

PROMPTS = [
    "The capital of France is",
    "Once upon a time, a small fox",
    "Water boils at",
    "List three fruits: apples,",
]


def transformers_greedy(lm, prompt, n):
    ids = torch.tensor([lm.encode(prompt)])
    out = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :].tolist()
    eos = lm.tokenizer.eos_token_id
    return out[: out.index(eos)] if eos in out else out


def test_greedy_equals_transformers_on_the_real_model(smollm2):
    result = llmlab.generate(smollm2, PROMPTS, max_new_tokens=24)
    assert [c.ids for c in result.completions] == [transformers_greedy(smollm2, p, 24) for p in PROMPTS]
    assert result.completions[0].text.startswith(" Paris")


@pytest.mark.slow
def test_a_ragged_batch_equals_single_rows(smollm2):
    single = llmlab.generate(smollm2, PROMPTS, max_new_tokens=24)
    batch = llmlab.generate(smollm2, PROMPTS, max_new_tokens=24, batch_size=4)
    assert [c.ids for c in batch.completions] == [c.ids for c in single.completions]


def test_both_architectures_equal_transformers_in_batches(tiny):
    result = llmlab.generate(tiny, PROMPTS, max_new_tokens=20, batch_size=3)
    assert [c.ids for c in result.completions] == [transformers_greedy(tiny, p, 20) for p in PROMPTS]


def test_tokens_are_counted_from_ids_and_the_end_token_stops(smollm2):
    result = llmlab.generate(smollm2, ["Say hello and nothing else."], max_new_tokens=60, chat=True)
    completion = result.completions[0]
    assert completion.stopped
    assert smollm2.tokenizer.eos_token_id not in completion.ids
    assert result.new_tokens == len(completion.ids) + 1  # the end token was produced too
    assert result.decoded_tokens == result.new_tokens - 1
    assert "<|im_end|>" not in completion.text


def test_a_chat_prompt_is_the_templates_text(smollm2):
    text = smollm2.chat("Hi")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_samples_repeat_with_the_seed(tiny):
    def draw(seed):
        result = llmlab.generate(tiny, PROMPTS, max_new_tokens=8, temperature=1.0, seed=seed)
        return [c.ids for c in result.completions]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.slow
@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.3, 0.8), (1.0, 0.5)])
def test_samples_follow_the_distribution(temperature, top_p):
    logits = torch.tensor([2.0, 1.5, 1.0, 0.3, 0.0, -0.5, -1.0, -3.0])
    # By hand: soft-max, then the smallest set of most probable tokens that reaches top_p.
    probs = torch.exp(logits / temperature)
    probs = probs / probs.sum()
    kept, mass = [], 0.0
    for token in probs.argsort(descending=True).tolist():
        if mass >= top_p:
            break
        kept.append(token)
        mass += float(probs[token])
    expected = torch.zeros(8)
    expected[kept] = probs[kept] / probs[kept].sum()
    assert torch.allclose(next_token_probs(logits[None], temperature, top_p)[0], expected, atol=1e-6)
    draws = 20_000
    generator = torch.Generator().manual_seed(0)

    def sampled(temperature):
        sampling = Sampling(temperature, top_p, generator)
        tokens = [verify(Proposal(), logits[None], sampling)[1] for _ in range(draws)]
        return torch.bincount(torch.tensor(tokens), minlength=8)

    counts = sampled(temperature)
    assert counts[expected == 0].sum() == 0
    alive = expected > 0

    def p_value(counts):
        share = expected[alive].double() * int(counts[alive].sum())
        return chisquare(counts[alive].numpy(), share.numpy(), sum_check=False).pvalue

    assert p_value(counts) > 0.01
    assert p_value(sampled(temperature * 1.15)) < 0.01  # the same test rejects a wrong temperature


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": ["a", " "]}, "prompt 1 is empty"),
        ({"max_new_tokens": 0}, "0 new tokens"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.5}, "top-p 1.5"),
        ({"batch_size": 0}, "batch size 0"),
        ({"prompts": ["word " * 250]}, "prompt 0 has"),
    ],
)
def test_settings_that_make_no_sense(tiny, arguments, expected):
    with pytest.raises(InputError, match=expected):
        llmlab.generate(tiny, **({"prompts": ["a"], "max_new_tokens": 16} | arguments))


def test_a_model_without_chat_template_says_so(tiny):
    template, tiny.tokenizer.chat_template = tiny.tokenizer.chat_template, None
    try:
        with pytest.raises(InputError, match="no chat template"):
            llmlab.generate(tiny, ["a"], chat=True)
    finally:
        tiny.tokenizer.chat_template = template
