import pytest
import torch
import transformers as hf

from llmlab import InputError, model_card, plan
from llmlab.model.card import UNLIMITED, card_from_config
from llmlab.model.sources import read_config, resolve


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("llama-7b", 6_738_415_616),  # the sizes of the published checkpoints
        ("llama-13b", 13_015_864_320),
        ("llama-30b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
        ("opt-125m", 125_239_296),
        ("opt-6.7b", 6_658_473_984),
        ("opt-30b", 29_974_540_288),
        ("opt-66b", 65_719_701_504),
    ],
)
def test_shipped_shapes_have_the_published_sizes(name, parameters):
    assert model_card(name).parameters == parameters


def test_a_shape_is_known_by_its_hub_id_without_a_network():
    by_hub = model_card("facebook/opt-30b")
    assert by_hub.parameters == model_card("opt-30b").parameters


def test_card_of_the_built_in_model_equals_the_loaded_model(smollm2):
    card = smollm2.card
    assert card.parameters == sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert card.bytes == smollm2.weight_bytes
    assert (card.layers, card.heads, card.kv_heads, card.head_dim) == (30, 9, 3, 64)
    assert card.tied
    assert card.context_length == 8192
    assert model_card("smollm2").parameters == card.parameters


def test_kv_cache_bytes_equal_a_real_cache(smollm2):
    cache = smollm2.model(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 10 * smollm2.card.kv_bytes_per_token


def test_flops_equal_torchs_own_counter(tiny):
    from torch.utils.flop_counter import FlopCounterMode

    tiny.model.set_attn_implementation("eager")  # the counter knows matmuls
    try:
        with FlopCounterMode(display=False) as counter:
            tiny.model(torch.ones(1, 24, dtype=torch.long), use_cache=False)
    finally:
        tiny.model.set_attn_implementation("sdpa")
    # Eager attention multiplies the whole 24 x 24 square, the card counts the causal half.
    card = tiny.card
    square = 4 * card.layers * card.heads * card.head_dim * 24 * 24
    causal = 4 * card.layers * card.heads * card.head_dim * 24 * 25 // 2
    assert counter.get_total_flops() == card.sequence_flops(24) - causal + square
    steps = sum(card.flops_per_token(context) for context in range(24))
    assert steps == card.sequence_flops(24)


def test_four_bit_weights_of_llama_30b_fit_one_gpu():
    card = model_card("llama-30b")
    assert card.weight_bytes(16) == card.bytes
    assert 17e9 < card.weight_bytes(4) < 19e9


def test_unknown_shape_is_one_sentence():
    with pytest.raises(InputError, match="unknown model 'opt-31b'"):
        model_card("opt-31b")


SMALL = {"vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 96}
EXPERTS = SMALL | HEADS | {"num_experts_per_tok": 2}
HYBRID = ["linear_attention", "full_attention"] * 2
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 24, "v_head_dim": 12}
# Config, context length, layers that attend, numbers that a token adds to the KV cache.
FAMILIES = {
    "bloom": (hf.BloomConfig(**SMALL, n_head=4), UNLIMITED, 4, 512),
    "mpt": (hf.MptConfig(vocab_size=320, d_model=64, n_layers=4, n_heads=4, max_seq_len=96), 96, 4, 512),
    "gpt2": (hf.GPT2Config(vocab_size=320, n_embd=64, n_layer=4, n_head=4, n_positions=96), 96, 4, 512),
    "mamba": (hf.MambaConfig(**SMALL, state_size=8), UNLIMITED, 0, 0),
    "rwkv": (hf.RwkvConfig(**SMALL, attention_hidden_size=64, context_length=96), 96, 0, 0),
    "falcon 7b": (hf.FalconConfig(**SMALL, num_attention_heads=4, multi_query=True), 2048, 4, 128),
    "falcon 40b": (
        hf.FalconConfig(**SMALL, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True), 2048, 4, 512
    ),
    "mixtral": (hf.MixtralConfig(**EXPERTS, num_local_experts=4), 96, 4, 256),
    "qwen 3.5": (hf.Qwen3_5TextConfig(**SMALL, **HEADS, **LINEAR, head_dim=16, layer_types=HYBRID), 96, 2, 128),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_a_card_knows_the_cache_and_the_context_of_every_family(name):
    config, context, attending, kv_values = FAMILIES[name]
    card = card_from_config(config, name, "fp32")
    assert (card.context_length, card.attention_layers, card.kv_values) == (context, attending, kv_values)
    assert (card.layers, card.hidden_size, card.vocab_size) == (4, 64, 320)
    model = hf.AutoModelForCausalLM.from_config(config)
    assert card.parameters == sum(p.numel() for p in model.parameters())
    assert (f"{context:,} tokens" if context != UNLIMITED else "unlimited") in dict(card.rows())["context length"]
    assert ("none" in dict(card.rows())["attention"]) == (not attending)
    if attending:
        cache = model(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
        kept = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
        assert sum(x.keys.nbytes + x.values.nbytes for x in kept) == 10 * card.kv_bytes_per_token


def test_latent_attention_keeps_its_latent():
    card = card_from_config(hf.DeepseekV3Config(**EXPERTS | LATENT | {"num_key_value_heads": 4}), "v3", "fp16")
    assert (card.kv_values, card.head_dim, card.value_dim) == (4 * (16 + 8), 32, 12)
    assert card.attention_flops == 2 * 4 * 4 * (32 + 12)


def test_a_token_meets_the_experts_to_which_it_is_routed():
    card = card_from_config(hf.MixtralConfig(**EXPERTS, num_local_experts=8), "m", "fp16")
    expert, attention, router = 3 * 64 * 128, 64 * (64 + 32 + 32 + 64), 8 * 64
    assert card.linear_parameters == 4 * (8 * expert + attention + router)
    assert card.active_parameters == 4 * (2 * expert + attention + router)
    assert card.flops_per_token(head=False) == 2 * card.active_parameters + card.attention_flops
    assert f"{(card.parameters - 4 * 6 * expert) / 1e6:,.1f} M active" in str(card)


def test_the_text_part_of_a_composite_config_is_the_model(tmp_path):
    text = FAMILIES["qwen 3.5"][0]
    hf.Qwen3_5Config(text_config=text.to_dict()).save_pretrained(tmp_path)
    config = read_config(resolve(str(tmp_path)))
    assert config.model_type == "qwen3_5_text"
    assert card_from_config(config, "q", "fp16") == card_from_config(text, "q", "fp16")


@pytest.mark.parametrize(
    "config, why",
    [
        (hf.Gemma3Config(), "is a multimodal model"),
        (hf.FuyuConfig(), "is a multimodal model"),
        (hf.BertConfig(architectures=["BertLMHeadModel"]), "reads both ways"),
        (hf.XLNetConfig(), "reads both ways"),
        (hf.T5Config(), "is an encoder-decoder model"),
        (hf.CLIPConfig(), "is not a causal language model"),
    ],
)
def test_what_is_no_decoder_alone_is_refused_in_a_sentence(tmp_path, config, why):
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=why):
        model_card(str(tmp_path))


def test_what_transformers_cannot_build_is_refused_in_a_sentence(tmp_path):
    hf.LlamaConfig(**SMALL, num_attention_heads=4, hidden_act="unheard-of").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"transformers cannot build .*\(llama\): KeyError: .*unheard-of"):
        model_card(str(tmp_path))


def test_there_is_no_plan_for_a_model_without_heads():
    with pytest.raises(InputError, match=r"mamba \(mamba\) has no attention heads"):
        plan(card_from_config(FAMILIES["mamba"][0], "mamba", "fp16"))
