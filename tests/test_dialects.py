"""What writers of quantized checkpoints do differently: read as it was meant, or refused in one sentence."""

import json
import shutil

import pytest
import torch
import transformers
from conftest import reference_kernel
from safetensors.torch import load_file, save_file

import llmlab
from llmlab import InputError
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.kernels.packing import pack, unpack
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.grid import Scheme, rtn
from llmlab.quantization.walk import quantize
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.load import check_layout

TEXT = "\n".join(f"{q.context} {ending}" for q in llmlab.data.everyday(20) for ending in q.endings)
PROJECTIONS = ("self_attn.q_proj", "mlp.down_proj")


def logits(lm):
    with torch.inference_mode(), reference_kernel(lm):
        return lm.model(input_ids=torch.tensor([lm.encode(TEXT)[:48]])).logits.float()


@pytest.fixture(scope="module")
def plain(tiny_folders):
    return llmlab.load(str(tiny_folders["llama"]), dtype="fp32", device="cpu")


@pytest.fixture(scope="module")
def saved(plain, tmp_path_factory):
    """A tiny LLaMA, rounded to 4 bits in groups of 32; the folder and its logits."""
    q = quantize(plain, 4, 32, method="rtn")
    return q.save(tmp_path_factory.mktemp("saved") / "q"), logits(q)


def variant(saved, target, tensors=None, *, older=False, **settings):
    """A copy of a saved model with other tensors or settings; a setting of None is left out."""
    folder = shutil.copytree(saved[0], target)
    config = json.loads((folder / "config.json").read_text())
    stated = {k: v for k, v in (config.pop("quantization_config") | settings).items() if v is not None}
    if not older:
        config["quantization_config"] = stated
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(stated))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def tensors_of(saved):
    return load_file(saved[0] / "model.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        {"older": True},
        {"older": True, "quant_method": None, "checkpoint_format": None},
        {"older": True, "quant_method": None, "bits": "4", "SYM": False},
        {"quant_method": "GPTQ", "checkpoint_format": "GPTQ"},
        {"checkpoint_format": None, "format": "gptq"},
        {"group_size": None},
        {"desc_act": None},
        {"dynamic": {}},
        {"dynamic": {"-:.*lm_head": {}, "+:.*mlp.*": {"bits": 4}}},
    ],
    ids=str,
)
def test_settings_wherever_and_however_they_are_written(saved, settings, tmp_path):
    lm = llmlab.load(variant(saved, tmp_path / "v", **settings), dtype="fp32")
    assert torch.equal(logits(lm), saved[1])
    assert lm.transformation.startswith("gptq 4 bits")
    record = llmlab.record(lm, llmlab.score(lm, llmlab.data.everyday(1)))
    assert record.track == "open"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "format is 'gptq' and 'gptq_v2'"),
        ({"is_marlin_format": True}, "format is 'marlin'"),
        ({"pack_dtype": "int16"}, "packed in int16 words"),
        ({"bits": "four"}, "bits is 'four': expected a whole number"),
        ({"bits": 8}, r"q_proj\.qweight is \[8, 64\], expected \[16, 64\]"),
        ({"group_size": 64}, r"(scales|qzeros) is \[\d, \d+\], expected \[1, \d+\]"),
        ({"dynamic": {"-:.*q_proj": {}}}, "q_proj is packed, but the checkpoint's settings say that it is not"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_true_are_refused(saved, settings, message, tmp_path):
    with pytest.raises(InputError, match=message):
        llmlab.load(variant(saved, tmp_path / "v", **settings), dtype="fp32")


@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_points_under_the_wrong_label_are_noticed(plain, symmetric, tmp_path):
    q = quantize(plain, scheme=Scheme(4, 32, symmetric), method="rtn")
    saved = q.save(tmp_path / "q"), logits(q)
    shifted = tensors_of(saved)
    for name in [name for name in shifted if name.endswith("qzeros")]:
        shifted[name] = pack(unpack(shifted[name].T.contiguous(), 4) + 1, 4).T.contiguous()
    with pytest.raises(InputError, match="stored as in the format 'gptq_v2', but the settings say 'gptq'"):
        llmlab.load(variant(saved, tmp_path / "a", shifted), dtype="fp32")
    with pytest.raises(InputError, match="stored as in the format 'gptq', but the settings say 'gptq_v2'"):
        llmlab.load(variant(saved, tmp_path / "b", checkpoint_format="gptq_v2"), dtype="fp32")
    lm = llmlab.load(variant(saved, tmp_path / "c", shifted, checkpoint_format="gptq_v2"), dtype="fp32")
    assert torch.equal(logits(lm), saved[1])


def test_g_idx_may_be_left_out_unless_it_matters(saved, tmp_path):
    bare = {name: t for name, t in tensors_of(saved).items() if not name.endswith("g_idx")}
    assert torch.equal(logits(llmlab.load(variant(saved, tmp_path / "a", bare), dtype="fp32")), saved[1])
    for static_groups in (True, None):
        lost = variant(saved, tmp_path / str(static_groups), bare, desc_act=True, static_groups=static_groups)
        with pytest.raises(InputError, match="g_idx is missing, but the checkpoint was quantized in act-order"):
            llmlab.load(lost, dtype="fp32")


def test_biases_that_the_model_has_no_place_for(saved, tmp_path):
    tensors = tensors_of(saved)
    biases = {
        name.replace("qweight", "bias"): torch.zeros(t.shape[1]).half()
        for name, t in tensors.items()
        if name.endswith("qweight")
    }
    lm = llmlab.load(variant(saved, tmp_path / "a", tensors | biases), dtype="fp32")
    assert torch.equal(logits(lm), saved[1])
    biases["model.layers.1.mlp.up_proj.bias"][3] = 0.5
    folder = variant(saved, tmp_path / "b", tensors | biases)
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj\.bias is not zero"):
        llmlab.load(folder, dtype="fp32")


def test_other_bits_for_some_modules_and_a_packed_head(plain, saved, tmp_path):
    """GPTQModel's `dynamic` and `lm_head`: each module equals its plain dequantized weights."""
    tensors, schemes = tensors_of(saved), {}
    for name, scheme in (("model.layers.0.mlp.down_proj", Scheme(8, 64)), ("lm_head", Scheme(4, 32))):
        schemes[name] = rtn(plain.model.get_submodule(name).weight, scheme)
        tensors.pop(f"{name}.weight", None)
        packed = QuantLinear.pack(schemes[name], scheme)
        tensors |= {f"{name}.{part}": t.contiguous() for part, t in packed.named_buffers()}
    dynamic = {"+:model\\.layers\\.0\\.mlp\\.down_.*": {"bits": 8, "group_size": 64}}
    folder = variant(saved, tmp_path / "v", tensors, dynamic=dynamic, lm_head=True)
    config = json.loads((tmp_path / "v" / "config.json").read_text())
    (tmp_path / "v" / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    lm = llmlab.load(folder, dtype="fp32")
    assert lm.transformation == "gptq 4 bits, group 32, mixed"
    for name, quantized in schemes.items():
        found = lm.model.get_submodule(name)
        assert torch.equal(found.dequantize(torch.float32), quantized.dequantize())
    with torch.inference_mode():
        hidden = lm.model.model(input_ids=torch.arange(40)[None]).last_hidden_state
        out = lm.model(input_ids=torch.arange(40)[None]).logits
    assert torch.allclose(out, hidden @ schemes["lm_head"].dequantize().T, atol=1e-4)


OTHERS = [
    ({"quant_method": "exl2", "bits": 4.0}, "exl2 4.0 bits, which transformers cannot read"),
    ({"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}, r"awq 4 bits.*pip install \w+"),
    ({"quant_method": "hqq", "quant_config": {}}, r"hqq, which cannot run here: .*hqq"),
    ({"quant_method": "aqlm"}, "aqlm, which cannot run here: .*aqlm"),
    ({"quant_method": "auto-round", "bits": 4}, "auto-round 4 bits, which cannot run here: .*auto.round"),
]


@pytest.mark.parametrize(("settings", "message"), OTHERS, ids=lambda x: str(x)[:24])
def test_other_quantizers_are_named_with_what_they_need(saved, settings, message, tmp_path, monkeypatch):
    for package in ("gptqmodel", "hqq", "aqlm", "auto_round"):  # as where none of them is installed
        monkeypatch.setattr(f"transformers.quantizers.{MODULES[package]}", lambda *_: False)
    folder = shutil.copytree(saved[0], tmp_path / "v")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        llmlab.load(str(folder), dtype="fp32")
    with pytest.raises(InputError, match="ranks read plain and GPTQ weights"):
        check_layout(str(folder), Cuts(1, 2, 1), 2)


MODULES = {
    "gptqmodel": "quantizer_awq.is_gptqmodel_available",
    "hqq": "quantizer_hqq.is_hqq_available",
    "aqlm": "quantizer_aqlm.is_aqlm_available",
    "auto_round": "quantizer_auto_round.is_auto_round_available",
}


def test_awq_settings_in_a_file_of_their_own_are_seen(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "v")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").unlink()
    (folder / "quant_config.json").write_text('{"w_bit": 4, "q_group_size": 32, "zero_point": true, "version": "EXL"}')
    with pytest.raises(InputError, match="awq 4 bits"):
        llmlab.load(str(folder), dtype="fp32")


def test_what_bitsandbytes_saved_is_on_the_open_track(plain, tmp_path):
    pytest.importorskip("bitsandbytes")
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(plain.name, quantization_config=settings)
    model.save_pretrained(tmp_path / "nf4")
    plain.tokenizer.save_pretrained(tmp_path / "nf4")
    lm = llmlab.load(str(tmp_path / "nf4"), dtype="fp32", device="cpu")
    assert lm.transformation == "bitsandbytes-nf4"
    assert {type(m).__name__ for m in lm.model.modules()} >= {"Linear4bit"}
    try:
        folder = lm.save(tmp_path / "again")
    except InputError as error:  # some versions of transformers cannot
        assert "cannot be saved again" in str(error)
        assert not (tmp_path / "again").exists()
    else:
        again = llmlab.load(str(folder), dtype="fp32", device="cpu")
        assert again.transformation == "bitsandbytes-nf4"
        assert torch.equal(logits(again), logits(lm))
    with pytest.raises(InputError, match="quantized with bitsandbytes-nf4 already"):
        llmlab.load(lm.name, bitsandbytes="int8")
    with pytest.raises(InputError, match="no plain Linears"):
        quantize(lm, 4, 32, method="rtn")


def test_calibration_calls_each_layer_as_the_model_does(smollm2, tmp_path):
    """Masks differ from layer to layer where some have a window: each Linear sees what the model shows it."""
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=smollm2.card.vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4, max_position_embeddings=64,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    smollm2.tokenizer.save_pretrained(tmp_path / "m")
    lm = llmlab.load(str(tmp_path / "m"), dtype="fp32", device="cpu")
    rows = calibration_rows(lm, TEXT, rows=2, context=64)
    seen = []
    hook = lm.model.model.layers[1].mlp.gate_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    from llmlab.quantization.calibration import layer_calls

    with torch.no_grad():
        hidden_states, calls = layer_calls(lm, rows)
        for layer, call in zip(lm.model.model.layers, calls, strict=True):
            hidden_states = call(layer, hidden_states)
        lm.model(input_ids=rows)
    hook.remove()
    assert torch.allclose(seen[0], seen[1], atol=1e-5)
    assert "forward" not in vars(lm.model.model.layers[0])
