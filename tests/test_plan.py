import pytest

from llmlab import InputError, model_card, plan
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.plan import RESERVE, parse_bytes
from llmlab.sharding.predict import DEVICES, device, predict, workload


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
    assert layouts["tensor 4"].problem == "cannot cut 3 KV heads 4 ways; tensor 3 is the most"
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


def test_predictions_of_the_challenge_server():
    """LLaMA-30B over HellaSwag on four V100s, checked against its arithmetic by hand."""
    card = model_card("llama-30b")
    made = plan(card, devices=4, device="v100", workload="hellaswag", mfu=0.9)
    assert made.memory == 32 * 2**30
    assert not {x.name: x for x in made.layouts}["data 4"].fits  # 65 GB
    assert made.best.predicted.seconds < 372
    assert "70% of 125 TFLOP/s" in made.assumptions  # whatever was measured
    job = workload("hellaswag")
    ideal = 2 * job.nodes * card.linear_parameters / (4 * 125e12 * 0.7)
    assert ideal < made.best.predicted.seconds < 1.15 * ideal
    assert all(0.6 < x.predicted.mfu <= 0.7 for x in made.layouts if x.fits)
    packed = plan(card, devices=4, device="v100", workload="hellaswag", bits=4)
    assert packed.best.name == "data 4"  # four replicas beat every cut
    assert packed.best.predicted.bytes_moved == 0
    seconds = [x.predicted.seconds for x in packed.layouts if x.fits]
    assert seconds == sorted(seconds)
    assert "assumed" in str(packed) and "bubble" in packed.table()


def test_decoding_is_predicted_from_the_bytes_it_reads():
    card = model_card("llama-30b")
    on, step = device("a100"), workload("decode", batch=1, context=0)
    whole = predict(card, Cuts(), on, step, mfu=0.5)
    assert whole.seconds == pytest.approx(card.weight_bytes(16) / (2039e9 * 0.5))
    assert predict(card, Cuts(), on, step, bits=4, mfu=0.5).seconds < 0.3 * whole.seconds
    assert predict(card, Cuts(tensor=4), on, step, mfu=0.5).seconds < 0.4 * whole.seconds
    assert predict(card, Cuts(pipeline=4), on, step, mfu=0.5).seconds > whole.seconds  # stages work one after another


def test_every_device_has_a_source_and_wrong_ones_are_named():
    assert all(device(name).source for name in DEVICES)
    with pytest.raises(InputError, match="unknown device 'k80'"):
        plan(model_card("opt-125m"), device="k80")
    with pytest.raises(InputError, match="a workload needs a device"):
        plan(model_card("opt-125m"), workload="hellaswag")
    with pytest.raises(InputError, match="unknown workload"):
        plan(model_card("opt-125m"), device="v100", workload="mmlu")
    with pytest.raises(InputError, match="MFU 2"):
        plan(model_card("opt-125m"), device="v100", workload="decode", mfu=2)
