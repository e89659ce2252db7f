"""Decoding of models that are not LLaMA: the static cache gives transformers' ids, or transformers' own passes run."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

import llmlab
from llmlab import InputError
from llmlab.decoding.draft import Sampling
from llmlab.decoding.engine import Engine, NotServed
from llmlab.decoding.generation_config import unapplied
from llmlab.decoding.lookup import PromptLookup
from llmlab.decoding.loop import Settings, decode
from llmlab.decoding.model_draft import ModelDraft
from llmlab.decoding.plain_engine import PlainEngine, engine_for
from llmlab.decoding.sampling import next_token_probs
from llmlab.decoding.text import continuation, text_until
from llmlab.kernels.fewrows import Joined
from llmlab.kernels.replay import RECORD, Recorder
from llmlab.model.card import card_from_config
from llmlab.model.lm import LM

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": None,
    "bos_token_id": None,
}  # fmt: skip
WINDOW = {"sliding_window": 8}
STATIC = {
    "mistral": {"sliding_window": 24},  # longer than the check's
    "gemma2": WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},  # it bends
    "gemma3_text": WINDOW | {"head_dim": 8, "query_pre_attn_scalar": 8},
    "gpt_oss": WINDOW | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {  # keys are wider than values
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "head_dim": 4,
    },
}  # fmt: skip
PLAIN = {
    "falcon": {"alibi": True},  # attention of its own
    "stablelm": {},  # hands nothing on to attention
    "mamba": {"state_size": 4},
    "openai-gpt": {"n_positions": 128, "n_layer": 3},  # no cache at all
}
REPEATING = [3, 9, 27, 5, 3, 9, 27, 5, 3, 9, 41, 5, 3, 9, 27]
PROMPTS = [REPEATING, [7, 80, 7, 80, 7], list(range(20, 50))]


def tiny(family, seed=0, **config):
    torch.manual_seed(seed)
    sizes = SIZES | config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        elif family == "gpt_oss":
            torch.nn.init.normal_(parameter, std=1.0)  # sinks that take something away
    card = card_from_config(AutoConfig.for_model("llama", **sizes), family, "fp32")
    return LM(model, None, replace(card, vocab_size=model.config.vocab_size), family)


def transformers_ids(lm, prompt, n):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    return lm.model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False)[0, len(prompt) :].tolist()


def ids_of(engine, prompts, n, drafts=(), k=None):
    settings = Settings(n, Sampling(0.0, 1.0, torch.Generator().manual_seed(0)), lambda prompt, new: False, k)
    written = [[] for _ in prompts]
    for steps in decode(engine, prompts, settings, drafts):
        for row, step in steps.items():
            written[row] += step.tokens
    return written


@pytest.mark.parametrize("family", STATIC)
def test_the_static_cache_gives_transformers_ids_past_the_window_in_chains_and_trees(family):
    lm = tiny(family, **STATIC[family])
    expected = [transformers_ids(lm, prompt, 20) for prompt in PROMPTS]
    engine = Engine(lm)
    assert ids_of(engine, PROMPTS, 20) == expected
    assert [ids_of(engine, [prompt], 20)[0] for prompt in PROMPTS] == expected  # rows alone have passes of their own
    tree = PromptLookup(longest=3, shortest=1, branches=3)
    assert ids_of(engine, PROMPTS, 20, [tree], k=3) == expected
    assert ids_of(engine, PROMPTS[:1], 20, [tree], k=3) == expected[:1]


@pytest.mark.parametrize("family", PLAIN)
def test_what_the_static_cache_does_not_serve_decodes_through_transformers(family):
    lm = tiny(family, **PLAIN[family])
    with pytest.raises(NotServed, match=rf"^{family}: "):
        Engine(lm)
    with pytest.warns(UserWarning, match="row by row, and no drafts"):
        engine = engine_for(lm)
    assert isinstance(engine, PlainEngine) and engine.cached == (family != "openai-gpt")
    assert ids_of(engine, PROMPTS, 12) == [transformers_ids(lm, prompt, 12) for prompt in PROMPTS]


def test_a_wrong_static_cache_is_caught_and_not_used(monkeypatch):
    right = llmlab.decoding.cache.attend

    def wrong(query, *others):
        return right(query * 1.2, *others)

    monkeypatch.setattr("llmlab.decoding.cache.attend", wrong)
    lm = tiny("llama", seed=1234)
    with pytest.raises(NotServed, match="differs from the plain forward pass"):
        Engine(lm)
    with pytest.warns(UserWarning, match="so it decodes with transformers' cache"):
        engine = engine_for(lm)
    assert ids_of(engine, PROMPTS, 8) == [transformers_ids(lm, prompt, 8) for prompt in PROMPTS]


def test_a_keyword_that_attention_does_not_know_is_never_swallowed(monkeypatch):
    lm = tiny("llama", seed=1235)
    plain = type(lm.model.model.layers[0].self_attn).forward

    def asking(self, *args, **kwargs):
        return plain(self, *args, position_bias=torch.ones(1), **kwargs)

    for layer in lm.model.model.layers:
        monkeypatch.setattr(type(layer.self_attn), "forward", asking)
    with pytest.raises(NotServed, match="its attention takes position_bias"):
        Engine(lm)


def test_a_recording_that_depends_on_the_tokens_is_not_replayed():
    lm = tiny("llama")
    recorder = Recorder(lm.model, compile=False)
    recorder.records = True
    buffers = SimpleNamespace(buffers={})
    weight = lm.model.lm_head.weight

    def run(ids):  # two ways, as to different experts
        return weight[ids] if int(ids.sum()) % 2 else weight[ids] * 2

    with pytest.warns(UserWarning, match="run unrecorded"):
        for token in range(2 * RECORD + 2):
            ids = torch.tensor([[token]])
            assert torch.equal(recorder.run(run, (ids,), buffers), run(ids))
    assert not recorder.replays


def test_joined_matrices_give_each_input_its_own_product():
    joined = Joined(torch.nn.Linear(4, 6), [2, 4])
    a, b = torch.randn(1, 4), torch.randn(1, 4)
    expected = [joined.matrix(x).split([2, 4], dim=-1) for x in (a, b)]
    assert torch.equal(joined.product(0, a), expected[0][0])
    assert torch.equal(joined.product(1, b), expected[1][1])  # not what a left over
    assert torch.equal(joined.product(0, b), expected[1][0])


def with_vocabulary(lm, size):
    lm.tokenizer = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(size)})
    return lm


@pytest.mark.parametrize("size", [8, 16])
def test_a_draft_with_another_padding_is_exact(size):
    target = with_vocabulary(tiny("llama", vocab_size=12), 8)
    draft = ModelDraft(with_vocabulary(tiny("llama", seed=3, vocab_size=size), 8))
    engine = Engine(target)
    prompts = [[1, 5, 2, 7], [3, 3]]
    assert ids_of(engine, prompts, 16, [draft], k=3) == [transformers_ids(target, prompt, 16) for prompt in prompts]
    # Samples: the second token of many rows against its marginal, summed over all first ones.
    rows = 1000
    settings = Settings(3, Sampling(1.5, 1.0, torch.Generator().manual_seed(0)), lambda prompt, new: False, 2)
    seconds = torch.zeros(12)
    written = [[] for _ in range(rows)]
    for steps in decode(engine, [prompts[0]] * rows, settings, [draft]):
        for row, step in steps.items():
            written[row] += step.tokens
    for new in written:
        seconds[new[1]] += 1
    with torch.inference_mode():
        first = next_token_probs(target.model(torch.tensor(prompts[:1])).logits[:, -1], 1.5, 1.0)[0]
        after = target.model(torch.tensor([[*prompts[0], token] for token in range(12)])).logits[:, -1]
        marginal = (first[:, None] * next_token_probs(after, 1.5, 1.0)).sum(0)
    assert chisquare(seconds.numpy(), marginal.double().numpy() * rows, sum_check=False).pvalue > 0.01


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_learned_positions_are_used_to_the_last_one(family):
    config = {"n_positions": 48, "n_embd": 32, "n_head": 4, "n_layer": 2} if family == "gpt2" else {"ffn_dim": 64}
    lm = tiny(family, max_position_embeddings=48, word_embed_proj_dim=32, **config)
    lm.card = replace(lm.card, context_length=48)
    engine = Engine(lm)
    new = 48 - len(REPEATING)
    expected = transformers_ids(lm, REPEATING, new)
    assert ids_of(engine, [REPEATING], new) == [expected]
    assert ids_of(engine, [REPEATING, [3]], new, [PromptLookup(shortest=1, branches=3)], k=5)[0] == expected


def sentencepiece():
    """As Llama's: a word begins with its space, and decoding strips the first one of a text."""
    words = ["<unk>", "<s>", "</s>", "<|end|>", "\u2581once", "\u2581upon", "\u2581time", "s", "\u2581there", "."]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>", "<|end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=["<|end|>"]
    )


def test_a_text_reads_on_behind_its_prompt_and_stops_where_it_should():
    lm = LM(None, sentencepiece(), None, "tiny")
    prompt, new = [1, 4, 5], [6, 7, 8, 9]
    assert lm.decode(prompt) + continuation(lm, prompt, new) == lm.decode(prompt + new) == "once upon times there."
    assert continuation(lm, prompt, [6, 3, 9]) == " time."
    assert continuation(lm, [1], new) == "times there."  # nothing stands before it
    assert text_until(lm, prompt, new, []) == (" times there.", False)
    assert text_until(lm, prompt, new, [" time"]) == ("", True)
    assert text_until(lm, prompt, new, ["mes the"]) == (" ti", True)
    assert text_until(lm, prompt, [6, 3], ["<|end|>"]) == (" time", True)
    assert text_until(lm, prompt, [6, 3, 8], ["time<|end|>"]) == (" ", True)
    assert text_until(lm, prompt, [6, 3, 8], ["</s>"]) == (" time there", False)


def test_settings_of_a_generation_config_are_named():
    lm = tiny("llama")
    greedy, warm = (Sampling(temperature, 1.0, torch.Generator()) for temperature in (0.0, 1.0))
    lm.model.generation_config = GenerationConfig(temperature=0.6, top_k=20, repetition_penalty=1.0, eos_token_id=2)
    assert unapplied(lm, greedy) == ""
    assert unapplied(lm, warm) == "top_k = 20"
    lm.model.generation_config = GenerationConfig(repetition_penalty=1.3, suppress_tokens=[5], no_repeat_ngram_size=0)
    assert unapplied(lm, greedy) == "repetition_penalty = 1.3, suppress_tokens = [5]"


def test_generate_says_what_it_left_out(smollm2, monkeypatch):
    settings = GenerationConfig(no_repeat_ngram_size=2, eos_token_id=smollm2.model.generation_config.eos_token_id)
    monkeypatch.setattr(smollm2.model, "generation_config", settings)
    with pytest.warns(UserWarning, match="no_repeat_ngram_size = 2: not applied"):
        llmlab.generate(smollm2, ["a"], max_new_tokens=2)


def test_the_lowest_temperature_is_greedy():
    logits = torch.tensor([[1.0, 3.0, float("-inf"), 2.0]])
    for temperature in (1e-3, 1e-40, 5e-324):
        assert next_token_probs(logits, temperature, 1.0).tolist() == [[0.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_p": float("nan")}, "top-p nan"),
        ({"max_new_tokens": 2.5}, "new tokens 2.5"),
        ({"k": 1.5}, "k 1.5"),
        ({"seed": 2**64}, "64 bits"),
        ({"prompts": "a text"}, "lists of texts"),
        ({"stop": "."}, "lists of texts"),
    ],
)
def test_odd_settings_are_one_sentence(arguments, expected):
    with pytest.raises(InputError, match=expected):
        llmlab.generate(None, **({"prompts": ["a"]} | arguments))


def test_a_model_without_windows_computes_no_second_mask():
    engine = Engine(tiny("llama"))
    engine.start(2, 40)
    engine.prefill(PROMPTS[:2])
    assert engine._inputs([[1, 2], [3]], None, 0, pad=True).near is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(engine_for(tiny("llama")), Engine)
