"""GGUF files become whole models: split or not, of every type of block, or they are refused."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quants

import llmlab
from llmlab import InputError
from llmlab.base.paths import cache_folder

D, F, V, LAYERS = 64, 256, 320, 2
SHAPES = {"token_embd.weight": (V, D), "output_norm.weight": (D,), "output.weight": (V, D)}
for i in range(LAYERS):
    SHAPES |= {f"blk.{i}.attn_{n}.weight": (r, D) for n, r in {"q": D, "k": 32, "v": 32, "output": D}.items()}
    SHAPES |= {f"blk.{i}.{n}.weight": s for n, s in {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}.items()}
    SHAPES |= {f"blk.{i}.{n}.weight": (D,) for n in ("attn_norm", "ffn_norm")}
DOWN = "model.layers.1.mlp.down_proj.weight"
IDS = torch.arange(20)[None] + 60


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))


def tensors():
    rng = np.random.default_rng(0)
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in SHAPES.items()}


def write(path, values, *, part=None, arch="llama", types=None, **settings):
    """A tiny file; `part` is (number, count); `types` says which tensors are stored in blocks."""
    writer = GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(D)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(F)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(V)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    writer.add_token_list([*letters, *(chr(256 + n) for n in range(V - len(letters) - 3)), "<s>", "</s>", "th"])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(V - 3)
    writer.add_eos_token_id(V - 2)
    if part:
        writer.add_uint16("split.no", part[0])
        writer.add_uint16("split.count", part[1])
        writer.add_int32("split.tensors.count", len(SHAPES))
    for key, value in settings.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{arch}.{key.replace('__', '.')}", value)
    for name, value in values.items():
        if types and name in types:
            writer.add_tensor(name, quants.quantize(value, types[name]), raw_dtype=types[name])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def load(path):
    return llmlab.load(path, dtype="fp32", device="cpu")


def logits(lm):
    with torch.inference_mode():
        return lm.model(input_ids=IDS).logits


def test_a_split_file_is_read_whole_and_cached_whole(tmp_path):
    values = tensors()
    want = logits(load(write(tmp_path / "whole.gguf", values)))
    second = {name: value for name, value in values.items() if name.startswith("blk.1")}
    first = {name: value for name, value in values.items() if name not in second}
    parts = [tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    write(parts[0], first, part=(0, 2))
    with pytest.raises(InputError, match=r"lacks m-00002-of-00002\.gguf"):
        load(str(parts[0]))
    write(parts[1], second, part=(1, 2))
    for part in parts:  # any part is the model
        assert torch.equal(logits(load(str(part))), want)
    assert len(list(cache_folder().iterdir())) == 2


def test_a_part_under_another_name_is_refused(tmp_path):
    with pytest.raises(InputError, match="is one of 2 parts"):
        load(write(tmp_path / "renamed.gguf", tensors(), part=(0, 2)))


def edited(**edits):
    return {name: value for name, value in (tensors() | edits).items() if value is not None}


@pytest.mark.parametrize(
    "values, settings, says",
    [
        (edited(**{"blk.1.ffn_down.weight": None}), {}, f"{DOWN} of this model is missing"),
        (edited(**{"blk.1.ffn_down.weight": np.ones((D, D), np.float32)}), {}, f"{DOWN}.* is mismatched"),
        (edited(**{"blk.1.extra.weight": np.ones((D,), np.float32)}), {}, "no place for blk.1.extra.weight"),
        (edited(**{"rope_freqs.weight": np.arange(1, 9, dtype=np.float32)}), {}, "no scaling of Llama 3's kind"),
        (tensors(), {"attn_logit_softcapping": 30.0}, "llama.attn_logit_softcapping .* is 30.0"),
        (tensors(), {"rope__scaling__type": "longrope", "rope__scaling__factor": 4.0}, "longrope, factor 4.0"),
        (tensors(), {"arch": "deci"}, "cannot read the GGUF model|not a causal|deci"),
        (tensors(), {"arch": "no-such-thing"}, "no-such-thing"),
    ],
)
def test_what_would_be_left_out_is_refused_and_not_cached(tmp_path, values, settings, says):
    path = write(tmp_path / "m.gguf", values, **settings)
    for _ in range(2):
        with pytest.raises(InputError, match=says) as caught:
            load(path)
        assert "\n" not in str(caught.value)
    assert list(cache_folder().iterdir()) == []


def test_scaled_rotary_frequencies(tmp_path):
    theta, factor = 10000.0, 8.0
    turns = 8192 * theta ** -(np.arange(8) / 8) / (2 * np.pi)
    smooth = np.clip((turns - 1) / 3, 0, 1)
    freqs = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    lm = load(write(tmp_path / "m.gguf", edited(**{"rope_freqs.weight": freqs})))
    plain = theta ** -(torch.arange(8) / 8)
    assert torch.allclose(lm.model.model.rotary_emb.inv_freq, plain / torch.from_numpy(freqs), rtol=1e-4)
    linear = load(write(tmp_path / "l.gguf", tensors(), rope__scaling__type="linear", rope__scaling__factor=4.0))
    assert torch.allclose(linear.model.model.rotary_emb.inv_freq, plain / 4)


def blocks():
    """Every type that gguf can write; it can read these and more."""
    for kind in GGMLQuantizationType:
        try:
            quants.quantize(np.ones((1, 256), np.float32), kind)
        except (NotImplementedError, ValueError, KeyError):
            continue
        yield kind


def test_every_type_of_block_is_read_exactly(tmp_path):
    values, kinds = tensors(), list(blocks())
    assert {GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, GGMLQuantizationType.BF16} <= set(kinds)
    for kind in kinds:
        name = "blk.1.ffn_down.weight"
        lm = load(write(tmp_path / f"{kind.name}.gguf", values, types={name: kind}))
        want = dequantize(quants.quantize(values[name], kind), kind)
        assert torch.equal(lm.model.state_dict()[DOWN], torch.from_numpy(want.astype(np.float32))), kind.name
