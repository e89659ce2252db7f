"""A small copy of each family, cut over stages and parts on threads, computes what the whole copy computes."""

import warnings

import pytest
import torch
from transformers import AutoConfig

from llmlab import InputError
from llmlab.sharding import assemble, rehearsal, tensor
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.joined import TORCHRUN, launched

BASE = {
    "vocab_size": 150, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128,
}  # fmt: skip
KV = BASE | {"num_key_value_heads": 2}
WINDOW = KV | {"head_dim": 16, "sliding_window": 16}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = KV | {"head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
TENSOR = {
    "llama": KV | {"attention_bias": True, "mlp_bias": True}, "mistral": WINDOW, "qwen3": KV | {"head_dim": 16},
    "gemma2": WINDOW, "gemma3_text": WINDOW | {"layer_types": MIXED},
    "cohere2": WINDOW, "phi": BASE, "phi3": KV, "gpt_neox": BASE, "olmo2": BASE, "glm4": KV | {"head_dim": 16},
    "opt": {"vocab_size": 150, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "max_position_embeddings": 128, "word_embed_proj_dim": 32, "do_layer_norm_before": False},
    "mixtral": KV | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3_moe": EXPERTS | {"num_experts": 4},
    "deepseek_v3": BASE | {"q_lora_rank": 32, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                           "v_head_dim": 16, "n_routed_experts": 4, "n_group": 2, "topk_group": 1,
                           "first_k_dense_replace": 1, "n_shared_experts": 1, "num_experts_per_tok": 2,
                           "moe_intermediate_size": 64},
}  # fmt: skip
GPT2 = {"vocab_size": 150, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}
PIPELINE = TENSOR | {
    "gpt2": GPT2, "gptj": GPT2 | {"rotary_dim": 8}, "bloom": {"vocab_size": 150, "hidden_size": 64, "n_layer": 3},
    "mpt": {"vocab_size": 150, "d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}, "stablelm": KV,
    "falcon": BASE | {"new_decoder_architecture": True, "num_kv_heads": 2}, "gemma": KV | {"head_dim": 16},
    "gpt_oss": WINDOW | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"vocab_size": 150, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 8},
}  # fmt: skip
UNEVEN, THREE = [(0, 1), (1, 3)], [(0, 1), (1, 2), (2, 3)]
WHOLE = [(0, 3)]


def config(family):
    return AutoConfig.for_model(family, **PIPELINE[family])


def difference(family, parts, layers):
    """Largest |parts - whole| of log-probabilities, in units of their spread."""
    small = rehearsal.small_copy(config(family), parts)
    whole = rehearsal.random_model(small)
    ids = torch.randint(150, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = whole(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    together = rehearsal._together(small, whole, parts, layers, ids).log_softmax(-1)
    return float((together - expected).abs().max() / expected.std())


@pytest.mark.parametrize("family", sorted(PIPELINE))
def test_stages_compute_the_whole(family):
    assert max(difference(family, 1, layers) for layers in (UNEVEN, THREE)) < 1e-3


@pytest.mark.parametrize("family", sorted(TENSOR))
def test_parts_of_layers_compute_the_whole(family):
    assert max(difference(family, 2, layers) for layers in (WHOLE, UNEVEN)) < 1e-3


def test_heads_that_ranks_do_not_divide():
    """Three KV heads, each with two query heads, and 150 tokens of the vocabulary over two and four ranks' parts."""
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 96}
    uneven = AutoConfig.for_model("qwen2", **BASE | heads)
    assert rehearsal._problem(uneven, 2, WHOLE) == ""


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gpt_oss", "mamba"])
def test_a_family_without_a_plan_is_refused(family):
    with pytest.raises(InputError, match=f"no plan to cut the layers of {family}: use data or pipeline"):
        rehearsal.rehearse(config(family), Cuts(tensor=2), WHOLE)


def test_a_kind_that_is_not_known_is_refused(monkeypatch):
    llama = config("llama")
    monkeypatch.setattr(type(llama), "base_model_tp_plan", {"layers.*.mlp.up_proj": "diagonal"})
    with pytest.raises(InputError, match=r"layers\.\*\.mlp\.up_proj is to be cut 'diagonal'"):
        rehearsal.rehearse(llama, Cuts(tensor=2), WHOLE)


def test_layer_types_that_stay_behind_are_found(monkeypatch):
    """What a stage would do with its layers' types counted from the first layer of all."""

    def keep(config, first, end):
        config.num_hidden_layers = end - first

    monkeypatch.setattr(assemble, "_keep_layers", keep)
    assert "off by" in rehearsal._problem(config("gemma3_text"), 1, UNEVEN)


def test_a_bias_that_is_added_by_every_rank_is_found(monkeypatch):
    monkeypatch.setitem(tensor.KINDS, "rowwise", tensor.Kind(-1))
    assert "off by" in rehearsal._problem(config("llama"), 2, WHOLE)


def test_a_part_that_fails_ends_the_rehearsal(monkeypatch):
    def fail(*_):
        raise ValueError("no luck")

    monkeypatch.setattr(tensor.VocabularyEmbedding, "forward", fail)
    assert "no luck" in rehearsal._problem(config("llama"), 2, UNEVEN)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("llama", {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
                   "num_key_value_heads": 8}),
        ("opt", {"hidden_size": 7168, "ffn_dim": 28672, "num_hidden_layers": 48, "num_attention_heads": 56,
                 "word_embed_proj_dim": 7168}),
        ("phi3", {}), ("gemma3_text", {}), ("mixtral", {}), ("gpt2", {}),
    ],
)  # fmt: skip
def test_the_copy_of_a_large_model_is_small(family, sizes):
    large = AutoConfig.for_model(family, **sizes)
    small = rehearsal.small_copy(large, tensor=2)
    assert small.num_hidden_layers == large.num_hidden_layers
    assert getattr(small, "layer_types", None) == getattr(large, "layer_types", None)
    assert sum(p.numel() for p in rehearsal.empty_model(small, torch.float32).parameters()) < 5e7


def test_what_works_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    answers = ["no luck", "", "never asked"]
    monkeypatch.setattr(rehearsal, "_problem", lambda *about: answers.pop(0))
    with pytest.raises(InputError, match="llama as tensor 2 cannot run over ranks: no luck"):
        rehearsal.rehearse(config("llama"), Cuts(tensor=2), WHOLE)
    for _ in range(2):
        rehearsal.rehearse(config("llama"), Cuts(tensor=2), WHOLE)
    assert answers == ["never asked"]


def set_torchrun(monkeypatch, **values):
    for name in (*TORCHRUN, "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_only_torchruns_complete_set_is_torchrun(monkeypatch):
    complete = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    complete["TORCHELASTIC_RUN_ID"] = "none"
    set_torchrun(monkeypatch, **complete)
    assert launched(2)
    set_torchrun(monkeypatch, SLURM_PROCID="0", RANK="", WORLD_SIZE="")
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert not launched(2)
    set_torchrun(monkeypatch, RANK="0", WORLD_SIZE="4", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    with pytest.warns(UserWarning, match="RANK and WORLD_SIZE.*not torchrun's LOCAL_RANK.*2 ranks are started here"):
        assert not launched(2)
    set_torchrun(monkeypatch, **complete | {"RANK": "two"})
    with pytest.raises(InputError, match=r"make no sense .*RANK=two"):
        launched(2)
