import pytest

from llmlab import InputError, model_card, plan
from llmlab.sharding.plan import RESERVE, parse_bytes


def test_opt_30b_needs_two_gpus_in_fp16_and_one_at_four_bits():
    card = model_card("opt-30b")
    half = plan(card, devices=4, memory="32GiB")
    by_name = {layout.name: layout for layout in half.layouts}
    assert not by_name["data 4"].fits
    assert "needs 59.8 GiB a device, has 32.0" in by_name["data 4"].problem
    assert by_name["tensor 4"].fits
    assert half.best.data == 2
    assert plan(card, devices=4, memory="32GiB", bits=4).best.name == "data 4"


def test_every_layout_uses_all_devices_once():
    layouts = plan(model_card("llama-30b"), devices=12, memory="80GB").layouts
    cuts = {(x.data, x.tensor, x.pipeline) for x in layouts}
    assert all(d * t * p == 12 for d, t, p in cuts)
    assert len(cuts) == len(layouts) == 18


def test_parts_add_up_and_shrink_with_the_cuts():
    card = model_card("llama-65b")
    by_name = {x.name: x for x in plan(card, devices=8, memory="80GiB").layouts}
    whole, tensor = by_name["data 8"], by_name["tensor 8"]
    assert whole.weights == card.bytes
    assert tensor.weights * 8 == pytest.approx(card.bytes, rel=0.01)
    assert whole.kv_cache == 2048 * card.kv_bytes_per_token
    assert tensor.bytes == tensor.weights + tensor.kv_cache + tensor.activations + RESERVE
    # Eight stages of ten layers: the fullest one holds a tenth of ... 10 of 80 layers and one end of the model.
    assert by_name["pipeline 8"].weights >= card.bytes / 8


def test_heads_that_do_not_divide_are_refused_with_what_works():
    layouts = {x.name: x for x in plan(model_card("smollm2"), devices=4, memory="8GiB").layouts}
    assert layouts["tensor 4"].problem == "cannot cut 9 heads (3 KV) 4 ways; tensor 1, 3 work"
    assert layouts["pipeline 4"].fits
    three = {x.name: x for x in plan(model_card("smollm2"), devices=3, memory="8GiB").layouts}
    assert three["tensor 3"].fits


def test_more_stages_than_layers_are_refused():
    layouts = {x.name: x for x in plan(model_card("opt-125m"), devices=16, memory="8GiB").layouts}
    assert layouts["pipeline 16"].problem == "has 16 stages for 12 layers"


def test_nothing_fits_says_what_is_missing():
    made = plan(model_card("llama-65b"), devices=2, memory="24GB")
    with pytest.raises(InputError, match=r"fits on no layout of 2 devices: tensor 2 needs .* has 22\.4"):
        _ = made.best
    assert made.as_dict()["best"] is None
    assert "llama-65b, 16-bit weights, on 2 x" in str(made)
    assert "<table" in made._repr_html_()


@pytest.mark.parametrize(
    "text, expected", [("32GiB", 32 * 2**30), ("24 GB", 24 * 10**9), ("1.5gib", 3 * 2**29), (512, 512)]
)
def test_amounts_of_memory(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "lots", "-3GiB", "0", "32XB", "1e9"])
def test_amounts_that_mean_nothing(text):
    with pytest.raises(InputError, match="write it like 32GiB"):
        parse_bytes(text)


@pytest.mark.parametrize("arguments", [{"devices": 0}, {"bits": 5}, {"batch": 0}, {"context": 0}, {"context": 10**6}])
def test_numbers_that_make_no_sense(arguments):
    with pytest.raises(InputError):
        plan(model_card("opt-125m"), **arguments)
