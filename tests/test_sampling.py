"""How tokens are chosen: as transformers does it, greedy or sampled, with drafts and without."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaConfig

import llmlab
from llmlab import InputError
from llmlab.decoding.draft import Proposal, Sampling
from llmlab.decoding.engine import Engine
from llmlab.decoding.lookup import PromptLookup
from llmlab.decoding.loop import Settings, decode
from llmlab.decoding.model_draft import ModelDraft
from llmlab.model.card import card_from_config
from llmlab.model.lm import LM

PROMPT = [5, 5, 5, 3, 3, 3, 1, 6, 6, 6, 2]


def tiny_lm(vocabulary, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return LM(model, None, card_from_config(config, "tiny", "fp32"), "tiny")


def written(engine, prompts, n, sampling, drafts=(), k=None):
    settings = Settings(n, sampling, lambda prompt, new: False, k)
    new = [[] for _ in prompts]
    for steps in decode(engine, prompts, settings, drafts):
        for row, step in steps.items():
            new[row] += step.tokens
    return new


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 1000},
        {"min_p": 0.2, "temperature": 1.6},
        {"top_k": 12, "top_p": 0.8, "temperature": 1.4},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "sequence_bias": {(5,): 3.0, (7,): -2.5}},
        {
            "temperature": 1.5, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3,
            "sequence_bias": {(9,): 4.0},
        },
    ],
)  # fmt: skip
def test_the_distribution_is_the_one_that_transformers_samples_from(options):
    lm = tiny_lm(60)
    ids = torch.tensor([PROMPT])
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0}
    output = lm.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=True, **neutral | options,
        return_dict_in_generate=True, output_scores=True, output_logits=True,
    )  # fmt: skip
    bias = {token: value for (token,), value in options.get("sequence_bias", {}).items()}
    options = {name: value for name, value in options.items() if name != "sequence_bias"}
    sampling = Sampling(**{"temperature": 1.0} | options, logit_bias=bias)
    new = output.sequences[0, len(PROMPT) :].tolist()
    # Step by step, and all at once, as in a verifying pass: there the later tokens are drafted ones.
    paths = [new[:count] for count in range(5)]
    at_once = sampling.adjusted(torch.cat(output.logits), PROMPT, [], paths)
    for count, (logits, scores) in enumerate(zip(output.logits, output.scores, strict=True)):
        adjusted = sampling.adjusted(logits, PROMPT, new[:count], [[]])
        assert torch.equal(adjusted[0], at_once[count])
        torch.testing.assert_close(sampling.probs(adjusted), scores.softmax(dim=-1), atol=1e-6, rtol=1e-5)


def test_presence_and_frequency_count_the_output_alone():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    assert sampling.adjusts
    adjusted = sampling.adjusted(logits, [3, 3], [1, 2], [[], [2]])
    assert adjusted.tolist() == [[1.0, 1.25, 2.25, 4.0], [1.0, 1.25, 2.0, 4.0]]
    assert logits[0].tolist() == [1.0, 2.0, 3.0, 4.0]  # as they were
    assert Sampling(top_k=3, min_p=0.1, temperature=0.5).adjusts is False
    tree = Proposal([4, 5, 6, 7], [-1, 0, 0, -1])
    assert tree.paths == [[], [4], [4, 5], [4, 6], [7]]


@torch.inference_mode()
def greedy_by_hand(lm, prompt, n, sampling):
    """A whole pass a token, and the rule as it stands in OpenAI's documentation."""
    new = []
    for _ in range(n):
        logits = lm.model(torch.tensor([prompt + new])).logits[0, -1].clone()
        for token in set(new):
            logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * new.count(token)
        new.append(int(logits.argmax()))
    return new


@pytest.mark.slow
def test_greedy_ids_with_penalties_are_those_of_plain_decoding_with_every_draft_and_batch():
    lm = tiny_lm(24)
    engine, drafts = Engine(lm), (PromptLookup(shortest=1, branches=3), ModelDraft(tiny_lm(24, seed=1)), ModelDraft(lm))
    prompts = [PROMPT, [3, 1, 3, 1, 3], [2]]
    repeating = Sampling(repetition_penalty=1.2)
    expected = [
        lm.model.generate(ids := torch.tensor([p]), attention_mask=torch.ones_like(ids), max_new_tokens=16,
                          do_sample=False, repetition_penalty=1.2)[0, len(p) :].tolist()
        for p in prompts
    ]  # fmt: skip
    present = Sampling(presence_penalty=0.4, frequency_penalty=0.3)
    for sampling, ids in ((repeating, expected), (present, [greedy_by_hand(lm, p, 16, present) for p in prompts])):
        assert ids != written(engine, prompts, 16, Sampling())  # the penalty tells
        assert written(engine, prompts, 16, sampling) == ids
        for draft in drafts:
            assert written(engine, prompts, 16, sampling, [draft], k=3) == ids
            assert written(engine, prompts[:1], 16, sampling, [draft], k=3) == ids[:1]


@pytest.mark.slow
@pytest.mark.parametrize("draft", ["model", "lookup"])
def test_samples_with_penalties_keep_their_distribution_only_if_drafted_tokens_count(draft, monkeypatch):
    lm, size, rows = tiny_lm(7), 7, 500
    engine = Engine(lm)
    drafts = [PromptLookup(longest=1, shortest=1, branches=2) if draft == "lookup" else ModelDraft(tiny_lm(7, seed=2))]
    sampling = Sampling(
        2.5, 0.99, torch.Generator().manual_seed(0), top_k=6, min_p=0.001, repetition_penalty=1.2, presence_penalty=8.0,
        logit_bias={4: 0.5},
    )  # fmt: skip
    prompt = [5, 3, 3, 5, 1, 1, 3, 6, 6, 1, 2, 2, 6, 4, 4, 2, 5, 5, 4, 0, 0, 6, 0, 3, 3]  # every token before a pair
    # All sequences of three tokens, one pass each; what sampling does with their logits is tested above.
    expected = torch.zeros(size, size, size)
    with torch.inference_mode():
        for first in range(size):
            for second in range(size):
                logits = lm.model(torch.tensor([[*prompt, first, second]])).logits[0, -3:]
                adjusted = sampling.adjusted(logits, prompt, [], [[], [first], [first, second]])
                p = sampling.probs(adjusted)
                expected[first, second] = p[0, first] * p[1, second] * p[2]
    expected = expected.sum(0).double()  # of the second and third token, which the drafts guess
    common = expected * rows >= 5
    twice = torch.eye(size, dtype=torch.bool)

    def drawn():
        counts = torch.zeros(size, size, dtype=torch.double)
        for _, second, third in written(engine, [prompt] * rows, 3, sampling, drafts, k=2):
            counts[second, third] += 1
        return counts

    def p_value(counts, bins):
        """Of the pairs in `bins`, the rest of them taken together."""
        observed, share = (torch.cat([x[bins], x[~bins].sum()[None]]).numpy() for x in (counts, expected * rows))
        return chisquare(observed, share, sum_check=False).pvalue

    def repeats(counts):
        return chisquare(
            *([x[twice].sum(), x[~twice].sum()] for x in (counts, expected * rows)), sum_check=False
        ).pvalue

    counts = drawn()
    assert p_value(counts, common) > 0.01
    assert repeats(counts) > 0.01
    monkeypatch.setattr(Proposal, "paths", property(lambda self: [[]] * (1 + len(self.tokens))))
    assert repeats(drawn()) < 0.01  # the same test rejects penalties without the drafted ancestors


@pytest.mark.parametrize(
    "option, message",
    [
        ({"top_k": -1}, "top-k -1: give a whole number"),
        ({"top_k": 1.5}, "top-k 1.5"),
        ({"min_p": 2}, "min-p 2: give a number from 0 to 1"),
        ({"min_p": float("nan")}, "min-p nan"),
        ({"repetition_penalty": 0}, "repetition penalty 0: give a number above 0"),
        ({"repetition_penalty": float("inf")}, "repetition penalty inf"),
        ({"presence_penalty": float("nan")}, "presence penalty nan"),
        ({"frequency_penalty": float("inf")}, "frequency penalty inf"),
        ({"logit_bias": {3: float("inf")}}, "bias inf of token 3"),
    ],
)
def test_values_out_of_range_are_one_sentence_before_the_work(option, message):
    with pytest.raises(InputError, match=message):
        llmlab.generate(None, ["a"], **option)


def test_a_bias_beyond_the_vocabulary_is_refused(smollm2):
    for token in (49152, -1):
        with pytest.raises(InputError, match=rf"bias of token {token}: the model has tokens 0 to 49151"):
            llmlab.generate(smollm2, ["a"], logit_bias={token: 1.0})
    with pytest.raises(InputError, match="bias of token 60"):
        replace(Sampling(), logit_bias={60: 1.0}).check_vocabulary(60)
