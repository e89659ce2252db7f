"""A fast path serves a model only after it has given the plain path's numbers; what it fails on is scored plainly."""

import copy
import dataclasses
import json
import math
import warnings

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    Phi3Config,
    Qwen2Config,
    StableLmConfig,
)

import llmlab
from llmlab.kernels.packed_linear import quant_linears
from llmlab.model import selfcheck
from llmlab.model.card import ModelCard
from llmlab.model.lm import LM
from llmlab.model.selfcheck import Check, check, known, plain_logits, probe, small_windows, unrounded
from llmlab.quantization.grid import Scheme
from llmlab.scoring import attention, reference, shared
from llmlab.scoring.encode import Sequence

SIZES = {
    "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WINDOW, HEAD = {"sliding_window": 20}, {"head_dim": 8}
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
SHARED = {
    "a window in all layers": MistralConfig(**SIZES, **WINDOW),
    "layers with and without a window": Qwen2Config(**SIZES, **WINDOW, **MIXED, use_sliding_window=True),
    "soft-caps": Gemma2Config(**SIZES, **WINDOW, **HEAD, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
    "two rotations": Gemma3TextConfig(**SIZES, **WINDOW, **HEAD, **MIXED, query_pre_attn_scalar=8),
    "sinks": GptOssConfig(**SIZES, **WINDOW, **HEAD, **EXPERTS),
    "chunks": Llama4TextConfig(
        **SIZES, **HEAD, **EXPERTS, attention_chunk_size=20, intermediate_size_mlp=64, no_rope_layers=[1, 0]
    ),
}
PLAIN = {
    "ALiBi": BloomConfig(vocab_size=512, hidden_size=32, n_layer=2, n_head=4),
    "ALiBi as a bias": MptConfig(vocab_size=512, d_model=32, n_layers=2, n_heads=4, max_seq_len=256),
    "attention of its own": FalconConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "keywords dropped": StableLmConfig(**SIZES),
    "recurrent": MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4),
    "recurrent and attention": JambaConfig(
        **SIZES, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, num_experts=2, mamba_d_state=4,
        mamba_dt_rank=4, use_mamba_kernels=False,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(selfcheck, "_outcomes", {})


def tiny_lm(config, seed=0, dtype=torch.float32):
    """A random model whose weights are large enough for a cap, a sink or a bias to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
        else:
            parameter += 0.3 * torch.randn_like(parameter)
    sizes = dict.fromkeys((f.name for f in dataclasses.fields(ModelCard)), 1)
    card = ModelCard(**sizes | {"name": "tiny", "dtype": "fp32", "vocab_size": 512, "context_length": 256})
    return LM(model, None, card, "tiny")


def sequences():
    """Two questions of three endings, with shared first tokens; the first one is longer than three windows."""
    ids = torch.randint(3, 512, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    contexts, stem = (ids[:70], ids[100:115]), ids[200:204]
    endings = ([*stem, *ids[300:303]], [*stem, *ids[310:315]], ids[320:322])
    return [Sequence(q, e, c + end, len(c)) for q, c in enumerate(contexts) for e, end in enumerate(endings)]


def definition(lm, rows):
    """transformers' plain forward pass, one sequence at a time."""
    totals = []
    for s in rows:
        logits = lm.model(torch.tensor([s.ids]), use_cache=False).logits[0].double().log_softmax(-1)
        totals.append(sum(float(logits[k - 1, s.ids[k]]) for k in range(s.n_context, len(s.ids))))
    return totals


@pytest.mark.parametrize("config", SHARED.values(), ids=SHARED)
def test_whatever_limits_a_layers_sight_holds_along_the_paths_of_tries(config):
    lm, rows = tiny_lm(config), sequences()
    expected = definition(lm, rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = shared.log_probs(lm, rows)
    assert scores.settings == {"method": "shared"}
    assert scores.log_probs == pytest.approx(expected, abs=1e-3)
    lm.model.to(torch.bfloat16)  # attention by two matmuls
    assert shared.trie_check(lm).passed


@pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN)
def test_models_that_tries_cannot_serve_are_scored_plainly_with_one_sentence(config):
    lm, rows = tiny_lm(config), sequences()
    expected = definition(lm, rows)
    with pytest.warns(UserWarning, match="tiny is scored by the reference path: shared-prefix scoring") as said:
        scores = shared.log_probs(lm, rows)
    assert len(said) == 1
    assert scores.settings == {"method": "reference", "batch_size": "8"}
    assert scores.log_probs == pytest.approx(expected, abs=1e-3)
    assert reference.log_probs(lm, rows, batch_size=4).log_probs == pytest.approx(expected, abs=1e-3)
    assert len(scores.greedy) == len(rows)


def test_score_tells_which_method_ran_and_perplexity_is_plain(tiny_folders, smollm2):
    config = MambaConfig(vocab_size=49152, hidden_size=32, num_hidden_layers=2, state_size=4)
    lm = tiny_lm(config)
    lm = dataclasses.replace(lm, tokenizer=smollm2.tokenizer, card=dataclasses.replace(lm.card, vocab_size=49152))
    questions = llmlab.data.everyday(limit=3)
    with pytest.warns(UserWarning, match="reference path"):
        result = llmlab.score(lm, questions)
    assert result.method == "reference"
    assert "reference path" in result.protocol
    assert result.log_probs == llmlab.score(lm, questions, method="reference").log_probs
    text = questions[0].context * 9
    window = torch.tensor([smollm2.encode(text)[:48]])
    loss = float(lm.model(window, labels=window).loss)
    assert llmlab.perplexity(lm, text, context=48, max_windows=1).nll == pytest.approx(loss, abs=1e-4)
    assert llmlab.perplexity(lm, text, context=24, batch_size=2).nll == pytest.approx(
        llmlab.perplexity(lm, text, context=24).nll, abs=1e-5
    )


@pytest.mark.slow
def test_rounded_activations_of_few_rows_do_not_tell_paths_apart(smollm2):
    """Rounded to 4 bits the model keeps its huge activations: rows alone and side by side differ by nats then."""
    packed = llmlab.with_dtype(llmlab.quantize(smollm2, method="rtn", scheme=Scheme(4, 64, search=False)), "fp32")
    limits = [linear.limit for linear in quant_linears(packed.model)]
    assert shared.trie_check(packed).passed
    assert [linear.limit for linear in quant_linears(packed.model)] == limits
    with unrounded(packed.model):
        exact = plain_logits(packed)
    assert bool(max(limits)) == (not torch.equal(exact, plain_logits(packed)))  # told apart by the last one's key


def test_greedy_is_the_same_by_both_paths(tiny):
    rows = sequences()
    best = tiny.model(torch.tensor([rows[0].ids])).logits[0].argmax(-1).tolist()
    rows = [*rows, Sequence(2, 0, [*rows[0].ids[:30], best[29]], 30)]
    assert reference.log_probs(tiny, rows).greedy == shared.log_probs(tiny, rows).greedy
    assert reference.log_probs(tiny, rows).greedy[-1]


def test_sequences_on_both_sides_of_longrope_are_never_in_a_batch():
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0], "original_max_position_embeddings": 48}
    config = Phi3Config(**SIZES, rope_scaling={"rope_type": "longrope"} | factors, original_max_position_embeddings=48)
    lm, rows = tiny_lm(config), sequences()
    assert reference.rotary_limit(lm) == 48
    assert reference.log_probs(lm, rows).log_probs == pytest.approx(definition(lm, rows), abs=1e-3)
    with pytest.warns(UserWarning, match="frequencies depend on a sequence's length"):
        assert shared.log_probs(lm, rows).log_probs == pytest.approx(definition(lm, rows), abs=1e-3)
    assert shared.log_probs(lm, rows[3:]).settings == {"method": "shared"}


def test_a_fast_path_that_forgets_the_window_is_caught_and_not_used(monkeypatch):
    lm, rows = tiny_lm(SHARED["a window in all layers"]), sequences()
    with monkeypatch.context() as wrong:
        wrong.setattr(attention.TrieMasks, "under", lambda self, _: self.masks[attention.causal_mask_function])
        with pytest.warns(UserWarning, match=r"differs from the plain forward pass by up to [\d.]+ nats"):
            scores = shared.log_probs(lm, rows)
        assert scores.log_probs == pytest.approx(definition(lm, rows), abs=1e-3)
    assert not shared.trie_check(lm).passed  # the outcome is kept, for this code


@pytest.mark.parametrize("sharpness", [30, 1000])
def test_a_model_that_magnifies_rounding_is_held_to_its_own_rounding(smollm2, sharpness):
    model = copy.deepcopy(smollm2.model)
    model.model.layers = model.model.layers[:8]
    for layer in model.model.layers:  # attention so sharp that a rounding decides which token is seen
        layer.self_attn.q_proj.weight *= sharpness
    lm, exact = dataclasses.replace(smollm2, model=model), copy.deepcopy(model).double()

    def in_fp64(forget=0):
        rows = [torch.tensor([ids]) for ids in probe(lm)]
        seen = [torch.ones_like(row) for row in rows]
        seen[1][0, :forget] = 0
        return torch.cat([exact(input_ids=r, attention_mask=s).logits[0] for r, s in zip(rows, seen, strict=True)])

    difference = (in_fp64().log_softmax(-1) - plain_logits(lm).log_softmax(-1)).square().mean(-1).sqrt()
    assert difference.max() > selfcheck.TOLERANCE["fp32"]
    assert check(lm, "the exact pass", in_fp64, lambda: plain_logits(lm)).passed
    assert not check(lm, "a token forgotten", lambda: in_fp64(forget=1), lambda: plain_logits(lm)).passed


def test_a_window_longer_than_the_probe_is_checked_too(monkeypatch):
    lm = tiny_lm(MistralConfig(**SIZES | {"max_position_embeddings": 8192}, sliding_window=4096))
    monkeypatch.setattr(attention.TrieMasks, "under", lambda self, _: self.masks[attention.causal_mask_function])
    assert not shared.trie_check(lm).passed
    assert lm.model.config.sliding_window == 4096
    with small_windows(lm.model):
        assert lm.model.config.sliding_window == selfcheck.WINDOW
    assert lm.model.config.sliding_window == 4096


def test_an_unknown_keyword_of_attention_is_never_left_out(monkeypatch):
    lm = tiny_lm(LlamaConfig(**SIZES))
    forward = attention.trie_attention
    with_bias = lambda *args, **kwargs: forward(*args, **kwargs, position_bias=torch.zeros(1))  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, with_bias)
    outcome = shared.trie_check(lm)
    assert outcome.reason == "shared-prefix scoring raised NotImplementedError: attention with position_bias over tries"
    assert outcome.difference == math.inf


def counted(lm, path="a path", wrong=0.0):
    """A check whose fast path counts how often it ran."""
    runs = []

    def fast():
        runs.append(1)
        return plain_logits(lm) + wrong * torch.arange(512)

    return lambda: (check(lm, path, fast, lambda: plain_logits(lm)), len(runs))


def test_outcomes_are_kept_for_what_they_hold_for(monkeypatch):
    lm = tiny_lm(LlamaConfig(**SIZES))
    run = counted(lm)
    assert run() == run() == (Check(True, 0.0), 1)
    monkeypatch.setattr(selfcheck, "_outcomes", {})  # another process
    assert run()[1] == 1
    assert counted(lm, "another path")()[1] == 1
    lm.model.model.layers[0].mlp.up_proj.weight *= 2  # weights that live in memory only
    assert run()[1] == 2
    other = dataclasses.replace(lm, transformation="rotated")
    assert counted(other)()[1] == 1
    lm.model.config.rms_norm_eps = 1e-4
    assert run()[1] == 3
    lm.model.to(torch.bfloat16)
    assert run()[1] == 4
    monkeypatch.setattr(torch, "__version__", "9.9")
    selfcheck.versions.cache_clear()
    try:
        assert run()[1] == 5
        assert len(known()) == 1  # what was found under other libraries is not told
    finally:
        selfcheck.versions.cache_clear()


def test_doctor_tells_what_is_known():
    lm = tiny_lm(LlamaConfig(**SIZES))
    counted(lm, "good")()
    counted(lm, "bad", wrong=1.0)()
    rows = {row["path"]: row for row in known()}
    assert rows["good"]["passed"]
    assert not rows["bad"]["passed"]
    assert rows["bad"]["reason"].startswith("bad differs from the plain forward pass by up to ")
    assert json.dumps(list(rows.values()))
    from llmlab.cli.terminal import console, doctor_table
    from llmlab.measure.environment import inventory

    with console.capture() as shown:
        console.print(doctor_table(inventory()))
    assert "bad, tiny, fp32" in shown.get()


def test_running_out_of_memory_and_ctrl_c_are_no_outcome():
    lm = tiny_lm(LlamaConfig(**SIZES))
    for error in (torch.OutOfMemoryError("full"), MemoryError(), KeyboardInterrupt()):

        def fast(error=error):
            raise error

        with pytest.raises(type(error)):
            check(lm, "a path", fast, lambda: plain_logits(lm))
    assert known() == []


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "file"))
    assert counted(tiny_lm(LlamaConfig(**SIZES)))()[0].passed
    assert known() == []


def test_the_probe_fits_the_model():
    lm = tiny_lm(LlamaConfig(**SIZES))
    rows = probe(lm)
    assert rows == probe(lm)
    assert [len(ids) for ids in rows] == [40, 27]
    assert rows[0][: selfcheck.SHARED] == rows[1][: selfcheck.SHARED] != rows[0][1 : selfcheck.SHARED + 1]
    assert rows[0][selfcheck.SHARED] != rows[1][selfcheck.SHARED]
    assert all(0 <= token < 512 for ids in rows for token in ids)
    assert plain_logits(lm).shape == (67, 512)
