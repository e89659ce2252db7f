"""The AutoGPTQ checkpoint format: written, read, and refused when something is wrong with it."""

import json
import shutil

import pytest
import torch
from conftest import reference_kernel
from safetensors.torch import load_file, save_file

import llmlab
from llmlab import InputError
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.kernels.packing import unpack
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.grid import Scheme
from llmlab.quantization.walk import quantize

NAME = "model.layers.0.self_attn.q_proj"
TEXT = "\n".join(f"{q.context} {ending}" for q in llmlab.data.everyday(30) for ending in q.endings)


def logits(lm):
    with torch.inference_mode():
        return lm.model(input_ids=torch.tensor([lm.encode(TEXT)[:48]])).logits.float()


def assert_same(a, b):
    """Every packed tensor is equal, and so are the outputs, to the last bits that a memory's alignment may change."""
    one, other = a.model.state_dict(), b.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with reference_kernel(a, b):  # packed kernels round to bf16, which makes last bits large
        assert (logits(a) - logits(b)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def saved(tiny_folders, tmp_path_factory):
    """A quantized tiny LLaMA on disk, and the LM it came from."""
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    scheme = Scheme(4, 32, act_order=True, static_groups=False)
    q = quantize(lm, scheme=scheme, calibration=calibration_rows(lm, TEXT, rows=4, context=64))
    return q.save(tmp_path_factory.mktemp("saved") / "q"), q


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
def test_what_is_saved_is_what_is_loaded(tiny, bits, group_size, tmp_path):
    q = quantize(tiny, bits, group_size, method="rtn")
    loaded = llmlab.load(str(q.save(tmp_path / "q")), dtype="fp32")
    assert_same(loaded, q)


def test_the_file_is_in_autogptqs_layout(saved):
    folder, q = saved
    tensors = load_file(folder / "model.safetensors")
    shapes = {p: list(tensors[f"{NAME}.{p}"].shape) for p in ("qweight", "qzeros", "scales", "g_idx")}
    assert shapes == {"qweight": [8, 64], "qzeros": [2, 8], "scales": [2, 64], "g_idx": [64]}
    assert [tensors[f"{NAME}.{p}"].dtype for p in shapes] == [torch.int32, torch.int32, torch.float16, torch.int32]
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings == json.loads((folder / "quantize_config.json").read_text())
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
    assert wanted.items() <= settings.items()
    # By hand: w = s (q - (z + 1)), nibbles low first.
    codes = unpack(tensors[f"{NAME}.qweight"], 4).double()  # [in, out]
    zeros = torch.stack([(tensors[f"{NAME}.qzeros"] >> shift) & 15 for shift in range(0, 32, 4)], -1).flatten(1) + 1
    group = tensors[f"{NAME}.g_idx"].long()
    weight = (codes - zeros[group]) * tensors[f"{NAME}.scales"].double()[group]
    linear = q.model.get_submodule(NAME)
    assert isinstance(linear, QuantLinear) and (linear.order is not None or not linear.sequential)
    assert torch.equal(weight.T.float(), linear.dequantize(torch.float32))


def test_version_2_zero_points_are_read(saved, tmp_path):
    """gptq_v2 stores zero points as they are: a zero of 0 exists there."""
    folder, q = saved
    shutil.copytree(folder, tmp_path / "v2")
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if n.endswith("qzeros")]:
        tensors[name] = tensors[name] + 0x11111111  # no nibble is 15, so nothing is carried
    save_file(tensors, tmp_path / "v2" / "model.safetensors", metadata={"format": "pt"})
    change(tmp_path / "v2", checkpoint_format="gptq_v2")
    assert_same(llmlab.load(str(tmp_path / "v2"), dtype="fp32"), q)


def change(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("qweight", lambda t: t[:-1].clone(), r"qweight is \[7, 64\], expected \[8, 64\]"),
        ("scales", lambda t: t.fill_(float("nan")), "scales holds NaN"),
        ("g_idx", lambda t: t + 7, r"g_idx names a group outside 0 \.\. 1"),
        ("g_idx", lambda t: t - 1, r"g_idx names a group outside 0 \.\. 1"),
        ("qzeros", lambda t: t.float(), r"qzeros is torch.float32, expected torch.int32"),
        ("scales", lambda t: None, "scales is missing"),
        ("qweight", lambda t: None, "qweight is missing"),
    ],
)
def test_damaged_tensors_are_named(saved, tmp_path, part, damage, message):
    folder = shutil.copytree(saved[0], tmp_path / "bad")
    tensors = load_file(folder / "model.safetensors")
    damaged = damage(tensors.pop(f"{NAME}.{part}"))
    if damaged is not None:
        tensors[f"{NAME}.{part}"] = damaged
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"{NAME}\.{message}"):
        llmlab.load(str(folder))


def test_other_damage_is_named(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "bad")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=r"cannot read .*model\.safetensors, it may be truncated"):
        llmlab.load(str(folder))
    tensors = load_file(saved[0] / "model.safetensors")
    save_file(tensors | {"model.extra.weight": torch.zeros(2)}, file)
    with pytest.raises(InputError, match=r"model\.extra\.weight has no place in a llama model"):
        llmlab.load(str(folder))
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"model\.norm\.weight is missing"):
        llmlab.load(str(folder))
    file.unlink()
    with pytest.raises(InputError, match="holds no safetensors file"):
        llmlab.load(str(folder))


def test_settings_that_cannot_be_run_are_refused(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "bad")
    change(folder, bits=5)
    with pytest.raises(InputError, match="5 bits: llmlab reads 2, 3, 4, 8"):
        llmlab.load(str(folder))
    change(folder, bits=4, checkpoint_format="marlin")
    with pytest.raises(InputError, match="format is 'marlin'"):
        llmlab.load(str(folder))
    with pytest.raises(InputError, match="quantized with GPTQ already"):
        llmlab.load(str(saved[0]), bitsandbytes="nf4")


def test_a_failed_save_leaves_nothing(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("llmlab.model.lm.save_torch_state_dict", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saved[1].save(tmp_path / "q")
    assert list(tmp_path.iterdir()) == []
