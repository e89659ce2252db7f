"""Whole models: the walk through the layers, rotation, streaming, resuming, the command line."""

import copy
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest
import torch
from conftest import inputs_of, reference_kernel
from safetensors.torch import load_file, save_file

import llmlab
from llmlab import InputError, NumericalError
from llmlab.kernels.choose import INT4_CPU, NATIVE
from llmlab.kernels.packed_linear import QuantLinear, quant_linears
from llmlab.model.convert import bits_per_weight, dequantized, with_dtype
from llmlab.model.layerwise import stream
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.gptq import Hessian, factorize, gptq
from llmlab.quantization.grid import Scheme, rtn
from llmlab.quantization.head import quantize_head
from llmlab.quantization.job import quantize_to
from llmlab.quantization.report import Report
from llmlab.quantization.rotate import random_orthogonal, rotate, rotated
from llmlab.quantization.walk import Walk, quantize

TEXT = "\n".join(f"{q.context} {ending}" for q in llmlab.data.everyday(60) for ending in q.endings)


def logits(lm, n=64):
    ids = torch.tensor([lm.encode(TEXT)[:n]])
    with torch.inference_mode():
        return lm.model(input_ids=ids).logits.float()


def assert_same(a, b):
    """Every packed tensor is equal, and so are the outputs, to the last bits that a memory's alignment may change."""
    one, other = a.model.state_dict(), b.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    with reference_kernel(a, b):  # packed kernels round to bf16, which makes last bits large
        assert (logits(a) - logits(b)).abs().max() < 1e-5


@pytest.fixture(scope="module")
def calibration(smollm2):
    return calibration_rows(smollm2, TEXT, rows=8, context=64)


def test_the_walk_equals_solving_by_hand(tiny, calibration):
    """The first layer's Linears, with the inputs that a plain forward hook sees in the partly quantized model."""
    scheme = Scheme(4, 32)
    q = quantize(tiny, scheme=scheme, calibration=calibration)
    name = next(
        n for n, m in q.model.named_modules() if isinstance(m, QuantLinear) and n.endswith(("o_proj", "out_proj"))
    )
    seen = inputs_of(q.model, name, calibration)
    hessian = Hessian(64, seen.device)
    hessian.add(seen)
    expected = gptq(tiny.model.get_submodule(name).weight, factorize(hessian.matrix(), scheme), scheme)
    found = q.model.get_submodule(name).unpacked()
    assert (found.codes == expected.codes).float().mean() > 0.995
    assert torch.equal(found.g_idx, expected.g_idx)


def test_the_original_is_left_alone_and_only_layers_change(tiny, calibration):
    before = {name: tensor.clone() for name, tensor in tiny.model.state_dict().items()}
    report = Report()
    q = quantize(tiny, 4, 32, calibration=calibration, report=report)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.model.state_dict().items())
    assert getattr(tiny.model.config, "quantization_config", None) is None
    plain = [m for m in q.model.modules() if type(m) is torch.nn.Linear]
    assert plain == [q.model.get_output_embeddings()]
    assert len(report.linears) == sum(isinstance(m, QuantLinear) for m in q.model.modules())
    assert report.tokens == 512 and report.seconds > 0
    assert q.transformation == "gptq 4 bits, group 32"
    assert 0 < q.weight_bytes < tiny.weight_bytes


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_codes_of_a_packed_model_count_as_its_weights(tiny, bits):
    """Also where a kernel holds them in a form of its own, and the checkpoint's is given up."""
    q = with_dtype(quantize(tiny, bits, 32, method="rtn"), "fp32")
    dense = sum(parameter.nbytes for parameter in q.model.parameters())
    codes = sum(linear.in_features * linear.out_features for linear in quant_linears(q.model)) * bits / 8
    assert dense + codes <= q.weight_bytes <= dense + 4 * codes  # with grids, and twice where torch's kernel serves


def test_a_weight_takes_its_bits_and_its_share_of_the_grid(tiny):
    q = quantize(tiny, 4, 32, method="rtn")
    assert any(m.fast for m in q.model.modules() if isinstance(m, QuantLinear))  # whose own copy is not saved
    # 4 bits of code; an fp16 scale and a 4-bit zero point for 32 weights; 32 bits of g_idx for a column of m weights.
    linears = [m for m in q.model.modules() if isinstance(m, QuantLinear)]
    columns = sum(m.in_features for m in linears) / sum(m.in_features * m.out_features for m in linears)
    assert bits_per_weight(q.model) == pytest.approx(4 + 20 / 32 + 32 * columns)


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.2), (3, 0.4)])
def test_more_bits_lose_less(tiny, calibration, bits, bound):
    q = quantize(tiny, bits, 32, calibration=calibration)
    exact, found = logits(tiny), logits(q)
    assert ((exact - found).norm() / exact.norm()) < bound


@pytest.mark.slow
def test_gptq_beats_rounding_on_the_real_model(smollm2):
    """Two layers of the built-in model: output error against round-to-nearest, on text not calibrated with."""
    short = llmlab.load("smollm2", dtype="fp32")
    short.model.model.layers = short.model.model.layers[:2]
    short.model.config.num_hidden_layers = 2
    rows = calibration_rows(short, TEXT, rows=16, context=128)
    held_out = calibration_rows(short, TEXT, rows=24, context=128)[16:]
    errors = {}
    with torch.no_grad():
        exact = short.model.model(held_out).last_hidden_state
        for method in ("rtn", "gptq"):
            q = quantize(short, 3, 64, method=method, calibration=rows)
            errors[method] = float((q.model.model(held_out).last_hidden_state - exact).norm() / exact.norm())
    assert errors["gptq"] < 0.8 * errors["rtn"]


@pytest.mark.slow
def test_rotation_changes_nothing_but_the_weights(smollm2):
    turned = rotated(smollm2)
    exact, found = logits(smollm2), logits(turned)
    assert (exact - found).abs().max() <= 1e-3
    assert torch.equal(exact.argmax(-1), found.argmax(-1))
    assert turned.transformation == "rotated"
    questions = llmlab.data.everyday(3)
    scores = [
        torch.tensor([x for row in llmlab.score(lm, questions).log_probs for x in row]) for lm in (smollm2, turned)
    ]
    assert (scores[0] - scores[1]).abs().max() < 1e-3
    assert not turned.model.config.tie_word_embeddings and smollm2.model.config.tie_word_embeddings
    q = random_orthogonal(96, torch.Generator().manual_seed(1))
    assert (q @ q.T - torch.eye(96)).abs().max() < 1e-12
    channel = smollm2.model.model.layers[0].mlp.gate_proj.weight.abs().amax()
    assert turned.model.model.layers[0].mlp.gate_proj.weight.abs().amax() < channel


def test_layernorm_models_are_not_rotated(tiny_folders):
    with pytest.raises(InputError, match="opt cannot be rotated: it needs RMSNorm"):
        rotate(llmlab.load(str(tiny_folders["opt"]), dtype="fp32"))


def test_streamed_layers_are_the_models_own(tiny, tiny_folders):
    folder = str(tiny_folders["llama" if tiny.card.model_type == "llama" else "opt"])
    ends, read_layer = stream(folder)
    from llmlab.model.lm import decoder_layers

    for index, layer in enumerate(decoder_layers(tiny.model)[1]):
        read = read_layer(index).state_dict()
        assert all(torch.equal(read[name], tensor) for name, tensor in layer.state_dict().items())
    assert all(p.is_meta for p in decoder_layers(ends.model)[1].parameters())
    assert not ends.model.get_output_embeddings().weight.is_meta
    with pytest.raises(InputError, match="no files"):
        stream("random:llama-7b")


def test_names_without_the_models_prefix_are_read_and_missing_tensors_counted(tiny_folders, tmp_path):
    folder = shutil.copytree(tiny_folders["opt"], tmp_path / "opt")
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    _, read_layer = stream(str(folder))
    assert torch.equal(read_layer(1).fc1.weight, tensors["model.decoder.layers.1.fc1.weight"])
    del short["decoder.layers.1.fc1.weight"], short["decoder.layers.1.fc2.weight"]
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    _, read_layer = stream(str(folder))
    with pytest.raises(InputError, match=r"model\.decoder\.layers\.1\.fc1\.weight is missing and 1 more"):
        read_layer(1)


def test_the_job_equals_quantizing_in_memory(tiny, tiny_folders, calibration, tmp_path):
    folder = str(tiny_folders["llama" if tiny.card.model_type == "llama" else "opt"])
    target = tmp_path / "q"
    made, report = quantize_to(folder, target, TEXT, Scheme(4, 32), rows=2)  # rows of 256, this model's positions
    direct = quantize(tiny, 4, 32, calibration=calibration_rows(tiny, TEXT, rows=2))
    assert_same(made, direct)
    loaded = llmlab.load(str(target), dtype="fp32")
    assert_same(loaded, made)
    assert loaded.transformation == "gptq 4 bits, group 32"
    assert {p.name for p in tmp_path.iterdir()} == {"q"}
    assert report.tokens == 512
    with pytest.raises(InputError, match="exists already"):
        quantize_to(folder, target, TEXT, Scheme(4, 32))


def _job(folder, target):
    quantize_to(folder, target, TEXT, Scheme(4, 32), rows=2)


@pytest.mark.slow
def test_a_killed_job_goes_on_behind_its_finished_layers(tiny_folders, tmp_path):
    folder, target = str(tiny_folders["llama"]), tmp_path / "q"
    quantize_to(folder, tmp_path / "whole", TEXT, Scheme(4, 32), rows=2)
    process = multiprocessing.get_context("spawn").Process(target=_job, args=(folder, target))
    process.start()
    first = tmp_path / ".q.layers" / "layer-000.safetensors"
    while not first.exists():
        assert process.is_alive() or target.exists()
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if not target.exists():  # else the job was faster than the signal
        stamp = first.stat().st_mtime_ns
        report = Report()
        quantize_to(folder, target, TEXT, Scheme(4, 32), rows=2)
        assert stamp
        assert report.linears == []
    assert torch.equal(
        logits(llmlab.load(str(target), dtype="fp32")), logits(llmlab.load(str(tmp_path / "whole"), dtype="fp32"))
    )


def test_layers_of_another_job_are_not_taken(tiny_folders, tmp_path):
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    rows = calibration_rows(lm, TEXT, rows=2, context=64)
    with pytest.warns(UserWarning) if rows.numel() < lm.card.intermediate_size else pytest.MonkeyPatch.context():
        whole = Walk(lm, Scheme(4, 32), rows=rows, keep=tmp_path / "keep").run()
    again = Walk(lm, Scheme(4, 32), rows=rows, keep=tmp_path / "keep")
    assert_same(again.run(), whole)
    assert again.report.linears == []  # nothing was solved anew
    with pytest.raises(InputError, match="layers of another job"):
        Walk(lm, Scheme(3, 32), rows=rows, keep=tmp_path / "keep").run()


def test_bad_input_is_refused_before_the_work(tiny, calibration, monkeypatch):
    monkeypatch.delenv("LLMLAB_DATA", raising=False)
    with pytest.raises(InputError, match="wikitext"):
        quantize(tiny, 4, 32)  # no calibration text given, none here
    with pytest.raises(InputError, match="unknown method 'awq'"):
        quantize(tiny, 4, 32, method="awq", calibration=calibration)
    with pytest.raises(InputError, match=r"only 0% of the weights.* 48 does not divide"):
        quantize(tiny, 4, 48, calibration=calibration)
    with pytest.raises(InputError, match="give at least one row of 256"):
        calibration_rows(tiny, "too short")
    q = quantize(tiny, 4, 32, method="rtn")
    with pytest.raises(InputError, match="no plain Linears"):
        quantize(q, 4, 32, method="rtn")


def test_a_broken_weight_is_named(tiny_folders, calibration):
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    for method in ("gptq", "rtn"):
        with pytest.raises(NumericalError, match=r"model\.layers\.1\.mlp\.up_proj: the weights hold NaN"):
            quantize(lm, 4, 32, method=method, calibration=calibration)


def test_little_text_warns_with_the_rank(tiny):
    with pytest.warns(UserWarning, match="has rank 64 at most, but 128 columns"):
        quantize(tiny, 4, 32, calibration=calibration_rows(tiny, TEXT, rows=1, context=64))


@pytest.fixture(scope="module")
def short():
    """The first four layers of the built-in model: real weights, and fast."""
    lm = llmlab.load("smollm2", dtype="fp32")
    lm.model.model.layers = lm.model.model.layers[:4]
    lm.model.config.num_hidden_layers = 4
    return lm


@pytest.mark.slow
def test_every_way_to_run_packed_weights_agrees(short):
    """Plain Linears of the same weights, the reference, and packed kernels with fp32 and bf16 activations."""
    q = quantize(short, 4, 64, method="rtn")
    questions = llmlab.data.everyday(3)
    plain, packed, half = dequantized(q), with_dtype(q, "fp32"), with_dtype(q, "bf16")
    assert not any(isinstance(m, QuantLinear) for m in plain.model.modules())
    for lm in (q, packed, half):
        assert {m.kernel for m in lm.model.modules() if isinstance(m, QuantLinear)} in ({NATIVE}, {INT4_CPU})
    with reference_kernel(q):
        scores = {name: llmlab.score(lm, questions).log_probs for name, lm in [("q", q), ("plain", plain)]}
        scores["reference"] = llmlab.score(plain, questions, method="reference").log_probs
        made = [llmlab.generate(lm, ["The capital of France is"], max_new_tokens=3) for lm in (q, plain)]
    assert made[0].completions[0].ids == made[1].completions[0].ids
    flat = {name: torch.tensor([x for row in rows for x in row]) for name, rows in scores.items()}
    assert (flat["q"] - flat["plain"]).abs().max() < 1e-3
    assert (flat["reference"] - flat["plain"]).abs().max() < 1e-3
    exact = logits(plain)
    assert (exact - logits(half)).norm() / exact.norm() < 0.02  # bf16 has eight bits
    for module in quant_linears(packed.model):
        module.limit = 10_000  # the kernel, however many rows
    rounded = (exact - logits(packed)).norm() / exact.norm()
    assert 0 < rounded < (0.06 if module.kernel == NATIVE else 0.01)  # to int8, or bf16, around each product alone


def test_quantized_weights_are_packed_for_the_kernel_of_this_device(tiny, calibration):
    q = quantize(tiny, 4, 32, calibration=calibration)
    assert {m.kernel for m in q.model.modules() if isinstance(m, QuantLinear)} in ({NATIVE}, {INT4_CPU})


def test_a_head_in_few_bits_is_packed_saved_and_read_again(tiny, tmp_path):
    """GPTQModel's `lm_head` and `dynamic`; an embedding that shares the head's numbers keeps them."""
    tied = copy.deepcopy(tiny.model).requires_grad_(False)
    if tiny.model.config.model_type == "llama":
        tied.config.tie_word_embeddings = True
        tied.tie_weights()
    q = quantize(replace(tiny, model=tied), 4, 32, method="rtn")
    whole = quantize_head(q, 8, 32)
    head, plain = whole.model.get_output_embeddings(), q.model.get_output_embeddings()
    assert isinstance(head, QuantLinear) and head.bits == 8 and type(plain) is torch.nn.Linear
    assert whole.model.get_input_embeddings().weight is q.model.get_input_embeddings().weight
    rounded = rtn(plain.weight, Scheme(8, 32, search=False)).dequantize()
    with reference_kernel(q, whole):
        expected = logits(q)
        assert 0 < (logits(whole) - expected).abs().max() < 0.02 * expected.abs().max()
        plain.weight = torch.nn.Parameter(rounded, requires_grad=False)
        assert (logits(whole) - logits(q)).abs().max() < 1e-4
    assert whole.transformation == "rtn 4 bits, group 32, head 8 bits" and "head" not in q.transformation
    again = llmlab.load(str(whole.save(tmp_path / "head")), dtype="fp32")
    again.tokenizer = tiny.tokenizer
    assert_same(again, whole)
    at_once = quantize(replace(tiny, model=tied), method="rtn", scheme=Scheme(4, 32, head_bits=8))
    assert_same(at_once, whole)
    for lm, message in [(tiny, "is not quantized"), (whole, "has a QuantLinear as its output head")]:
        with pytest.raises(InputError, match=message):
            quantize_head(lm, 8, 32)
    with pytest.raises(InputError, match=r"the output head of .* 48 does not divide"):
        quantize_head(q, 8, 48)
    with pytest.raises(InputError, match="5 bits: choose one of"):
        quantize(tiny, method="rtn", scheme=Scheme(4, 32, head_bits=5))


def test_real_zero_points_copy_a_grid_such_as_ggufs_without_loss():
    """Q4_1's w = d q + m, whose least and largest weights are levels; other weights lose less than by integers."""
    torch.manual_seed(0)
    real = Scheme(4, 32, search=False, zero_points="real")
    d, m = (1 + torch.rand(8, 4)).half().float() / 32, torch.randn(8, 4).half().float() / 4
    codes = torch.randint(0, 16, (8, 4, 32))
    codes[..., 0], codes[..., 1] = 0, 15
    weight = (codes * d[..., None] + m[..., None]).flatten(1)
    copied = rtn(weight, real)
    assert torch.equal(copied.codes.view(8, 4, 32).long(), codes)
    assert ((copied.dequantize() - weight).abs().view(8, 4, 32) <= 0.02 * d[..., None]).all()
    other = torch.randn(64, 256)
    losses = [(rtn(other, s).dequantize() - other).norm() for s in (real, Scheme(4, 32, search=False))]
    assert losses[0] < 0.98 * losses[1]
    constant = torch.tensor([0.0, 0.3, 1e-9, -7.0])[:, None].expand(4, 32)
    torch.testing.assert_close(rtn(constant, real).dequantize(), constant, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(rtn(other + 100, real).dequantize(), other + 100, rtol=0.05, atol=0)


def test_real_zero_points_are_not_saved(tiny, tmp_path):
    real = Scheme(4, 32, search=False, zero_points="real")
    lm = quantize(tiny, method="rtn", scheme=real)
    with reference_kernel(lm):
        assert (logits(lm) - logits(tiny)).abs().max() < 0.2 * logits(tiny).abs().max()
    with pytest.raises(InputError, match="real zero points fit into no GPTQ checkpoint"):
        lm.save(tmp_path / "real")
    with pytest.raises(InputError, match="real zero points fit into no GPTQ checkpoint"):
        quantize_to("smollm2", tmp_path / "real", "", scheme=real, method="rtn")
    with pytest.raises(InputError, match="choose method rtn"):
        quantize(tiny, scheme=real, calibration=torch.zeros(1, 64, dtype=torch.long))
    with pytest.raises(InputError, match="unknown zero_points 'float'"):
        quantize(tiny, method="rtn", scheme=Scheme(zero_points="float"))
    assert not (tmp_path / "real").exists()
