import pytest

from llmlab import InputError, model_card


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
    import torch

    cache = smollm2.model(torch.ones(1, 10, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 10 * smollm2.card.kv_bytes_per_token


def test_flops_equal_torchs_own_counter(tiny):
    import torch
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
