"""The peers of `make peers`: refused with what to run when missing, and equal outputs both ways when they are here."""

import hashlib
import importlib.util
import json

import pytest
import torch
from conftest import CHECKOUT
from safetensors.torch import load_file

import llmlab
from llmlab import InputError
from llmlab.bench import peers
from llmlab.bench.peers import call, missing, peer_quantize
from llmlab.model.convert import dequantized
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.grid import Scheme
from llmlab.quantization.walk import quantize

pytestmark = pytest.mark.slow

TEXT = "\n".join(f"{q.context} {q.endings[q.label]}" for q in llmlab.data.everyday())


def test_a_missing_peer_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "PACKAGE", tmp_path / "llmlab")
    with pytest.raises(InputError, match="clone it and run make peers"):
        call("gptqmodel", {})
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "gptqmodel_worker.py").touch()
    with pytest.raises(InputError, match="gptqmodel is not here: run make peers"):
        call("gptqmodel", {})


def test_a_pair_of_models_is_joined_from_parts_and_known_by_its_hash(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("pair", CHECKOUT / "peers" / "pair.py")
    pair = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pair)
    monkeypatch.setattr(pair, "FOLDER", tmp_path)
    monkeypatch.setattr(pair, "FILES", {"1B": ("model_part", 2, hashlib.sha256(b"first second").hexdigest())})
    for number, part in ((1, b"first "), (2, b"second")):
        with pytest.raises(InputError, match=f"part0{number}.bin is missing: run make pair"):
            pair.joined("1B")
        data = tmp_path / f"model_part{number}" / "data"
        data.mkdir(parents=True)
        (data / f"part0{number}.bin").write_bytes(part)
    assert pair.joined("1B").read_bytes() == b"first second"
    assert [p.name for p in tmp_path.glob("*.gguf*")] == ["qwen2.5-coder-1B.gguf"]
    pair.joined("1B").write_bytes(b"another")
    with pytest.raises(InputError, match="has the hash"):
        pair.joined("1B")


@pytest.mark.parametrize(
    ("worker", "complaint"),
    [
        ("print('noise'); print('{\"error\": \"no memory\"}')", "failed on logits: no memory"),
        ("import sys; sys.exit('boom')", "failed on logits: boom"),
        ("import time; time.sleep(60)", "did not answer within 1 s"),
    ],
)
def test_a_peer_that_fails_is_named(tmp_path, monkeypatch, worker, complaint):
    monkeypatch.setattr(peers, "PACKAGE", tmp_path / "llmlab")
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "gptqmodel_worker.py").write_text(worker)
    python = tmp_path / ".peers" / "gptqmodel" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to("/usr/bin/env")
    monkeypatch.setattr(peers, "_python", lambda peer: __import__("sys").executable)
    monkeypatch.setattr(peers, "missing", lambda peer: None)
    with pytest.raises(RuntimeError, match=complaint):
        call("gptqmodel", {"job": "logits"}, timeout=1 if "sleep" in worker else 60)


def peer_logits(peer, folder, ids, temporary, loader=None):
    """fp32 logits [rows, tokens, vocabulary] that a peer computes with a quantized checkpoint.

    `loader` "transformers" makes GPTQModel's environment load through transformers' GPTQConfig.
    """
    loader, output = loader or {"autogptq": "auto_gptq"}.get(peer, peer), str(temporary / "logits.safetensors")
    call(peer, {"job": "logits", "folder": str(folder), "ids": ids.tolist(), "loader": loader, "output": output})
    return load_file(output)["logits"]


def test_gptqmodel_reads_other_bits_for_single_matrices(tiny_folders, tmp_path):
    if reason := missing("gptqmodel"):
        pytest.skip(reason)
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    others = (("model.layers.1.mlp.up_proj", 4), ("model.layers.0.self_attn.k_proj", 2))
    mixed = quantize(lm, method="rtn", scheme=Scheme(3, 32, others=others))
    ids = calibration_rows(lm, TEXT, rows=1)[:, :64]
    with torch.inference_mode():
        here = dequantized(mixed).model(input_ids=ids).logits
    theirs = peer_logits("gptqmodel", mixed.save(tmp_path / "mixed"), ids, tmp_path, "gptqmodel")
    assert (here - theirs).abs().max() <= 1e-2


@pytest.mark.parametrize("peer", ["gptqmodel", "autogptq"])
@pytest.mark.parametrize("static", [True, False])
def test_checkpoints_go_both_ways(tiny_folders, tmp_path, peer, static):
    if reason := missing(peer):
        pytest.skip(reason)
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    rows = calibration_rows(lm, TEXT, rows=8)
    ids = rows[:1, :64]
    loaders = [None, "transformers"] if peer == "gptqmodel" else [None]
    scheme = Scheme(4, 32, act_order=True, static_groups=static)
    ours = quantize(lm, scheme=scheme, calibration=rows)
    ours.save(tmp_path / "ours")
    answer = peer_quantize(peer, lm, rows, scheme, tmp_path / "theirs")
    assert json.dumps(answer["versions"])
    theirs = llmlab.load(str(tmp_path / "theirs"), dtype="fp32")
    for folder, model in ((tmp_path / "ours", ours), (tmp_path / "theirs", theirs)):
        with torch.inference_mode():
            here = dequantized(model).model(input_ids=ids).logits
        for loader in loaders:
            assert (here - peer_logits(peer, folder, ids, tmp_path, loader)).abs().max() <= 1e-2
