import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, T5Config

import llmlab
from llmlab import InputError
from llmlab.base.paths import cache_folder
from llmlab.model.sources import resolve


@pytest.mark.slow
def test_conversion_keeps_every_value_of_the_gguf_file(smollm2):
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(resolve("smollm2").location)
    tensors = {t.name: t for t in reader.tensors}
    state = smollm2.model.state_dict()
    pairs = {
        "blk.0.ffn_up.weight": "model.layers.0.mlp.up_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
        "blk.7.attn_v.weight": "model.layers.7.self_attn.v_proj.weight",
        "blk.3.attn_norm.weight": "model.layers.3.input_layernorm.weight",
        "token_embd.weight": "model.embed_tokens.weight",
    }
    for theirs, ours in pairs.items():
        expected = torch.from_numpy(dequantize(tensors[theirs].data, tensors[theirs].tensor_type).copy())
        assert torch.equal(state[ours], expected.reshape(state[ours].shape)), ours


def test_the_built_in_model_knows_the_capital_of_france(smollm2):
    ids = torch.tensor([smollm2.encode("The capital of France is")])
    assert smollm2.decode([int(smollm2.model(ids).logits[0, -1].argmax())]) == " Paris"


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_model(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path))
    truncated = tmp_path / "half.gguf"
    whole = Path(resolve("smollm2").location)
    truncated.write_bytes(whole.read_bytes()[:30_000_000])
    with pytest.raises(InputError, match=r"half\.gguf"):
        llmlab.load(str(truncated))
    assert cache_folder() == tmp_path
    assert list(tmp_path.iterdir()) == [truncated]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16", "bfloat16"])
def test_folder_loads_in_each_dtype(tiny_folders, dtype):
    lm = llmlab.load(str(tiny_folders["llama"]), dtype=dtype)
    assert lm.dtype == {"bfloat16": "bf16"}.get(dtype, dtype)
    assert lm.card.bytes == lm.weight_bytes
    assert lm.revision.startswith("sha256:")
    assert not lm.model.training
    assert not any(p.requires_grad for p in lm.model.parameters())


@pytest.mark.parametrize("method", ["int8", "nf4"])
def test_bitsandbytes_at_load(tiny_folders, method):
    plain = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    packed = llmlab.load(str(tiny_folders["llama"]), dtype="fp32", bitsandbytes=method)
    assert packed.transformation == f"bitsandbytes-{method}"
    linears = [m for m in packed.model.modules() if type(m).__name__ in ("Linear8bitLt", "Linear4bit")]
    assert len(linears) == 14
    assert packed.weight_bytes < plain.weight_bytes
    ids = torch.tensor([plain.encode("The kettle boils")])
    a, b = plain.model(ids).logits, packed.model(ids).logits
    assert (a - b).norm() / a.norm() < {"int8": 0.1, "nf4": 0.5}[method]


@pytest.mark.slow
def test_the_built_in_model_in_nf4_still_knows_the_capital_of_france():
    lm = llmlab.load("smollm2", bitsandbytes="nf4")
    ids = torch.tensor([lm.encode("The capital of France is")])
    assert lm.decode([int(lm.model(ids).logits[0, -1].argmax())]) == " Paris"


@pytest.mark.slow
def test_random_weights_of_a_shape_with_fewer_layers():
    lm = llmlab.load("random:opt-125m", layers=2, seed=1)
    again = llmlab.load("random:opt-125m", layers=2, seed=1)
    assert lm.card.layers == 2
    assert torch.equal(lm.model.lm_head.weight, again.model.lm_head.weight)
    assert lm.card.parameters == sum(p.numel() for p in lm.model.parameters())
    with pytest.raises(InputError, match="no tokenizer"):
        lm.encode("text")


def bad_loads(tmp_path, tiny_folders):
    fake = tmp_path / "fake.gguf"
    fake.write_bytes(b"PK\x03\x04 not a model")
    encoder = tmp_path / "encoder"
    BertConfig(architectures=["BertForMaskedLM"]).save_pretrained(encoder)
    seq2seq = tmp_path / "seq2seq"
    T5Config().save_pretrained(seq2seq)
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_folders["llama"], pickled)
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"not read")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    return {
        "unknown": ({"name": "gpt-5"}, "unknown model 'gpt-5'"),
        "says where it looked": ({"name": "gpt-5"}, str(tmp_path.cwd())),
        "missing file": ({"name": str(tmp_path / "none.gguf")}, "no such model file"),
        "no GGUF": ({"name": str(fake)}, "is no GGUF file"),
        "no config": ({"name": str(tmp_path / "empty")}, "holds no config.json"),
        "broken config": ({"name": str(broken)}, "cannot read the config"),
        "encoder": ({"name": str(encoder)}, "is an encoder model"),
        "encoder-decoder": ({"name": str(seq2seq)}, "is an encoder-decoder model"),
        "pickle": ({"name": str(pickled)}, "or holds more than tensors"),
        "no network": ({"name": "someone/some-model"}, "Hub cannot be reached"),
        "dtype": ({"name": "smollm2", "dtype": "int3"}, "unknown dtype 'int3'"),
        "device": ({"name": "smollm2", "device": "toaster"}, "unknown device"),
        "absent GPU": ({"name": "smollm2", "device": "cuda:99"}, "no device 'cuda:99'"),
        "bitsandbytes": ({"name": "smollm2", "bitsandbytes": "int5"}, "unknown bitsandbytes method"),
        "layers": ({"name": "smollm2", "layers": 3}, "random:SHAPE models only"),
        "random shape": ({"name": "random:gpt-5"}, "known shapes are llama-7b"),
        "random quantized": ({"name": "random:opt-125m", "bitsandbytes": "nf4"}, "choose a real model"),
    }


def test_bad_input_is_one_sentence_before_any_weight_is_read(tmp_path, tiny_folders, monkeypatch):
    for what, (arguments, expected) in bad_loads(tmp_path, tiny_folders).items():
        with pytest.raises(InputError) as caught:
            llmlab.load(**arguments)
        message = str(caught.value)
        assert expected in message, what
        assert "\n" not in message, what
        assert message.endswith("."), what


def test_a_decoder_of_an_encoder_family_is_accepted(tmp_path):
    from llmlab.model.sources import read_config

    folder = tmp_path / "decoder"
    BertConfig(architectures=["BertLMHeadModel"], is_decoder=True).save_pretrained(folder)
    assert read_config(resolve(str(folder))).model_type == "bert"


def test_changed_weights_change_the_revision(tiny_folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folders["llama"], copy)
    before = llmlab.load(str(copy)).revision
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert llmlab.load(str(copy)).revision != before
