"""Mixtures of experts, and other layers that are not made of plain Linears: every matrix is quantized, or named."""

import warnings

import pytest
import torch
from conftest import inputs_of
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import llmlab
from llmlab import InputError
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.model.matrices import Experts, expert_names, matrices, matrix_of, split_experts
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.gptq import Hessian, factorize, gptq
from llmlab.quantization.grid import Scheme
from llmlab.quantization.job import quantize_to
from llmlab.quantization.report import Report
from llmlab.quantization.walk import quantize

TEXT = "\n".join(f"{q.context} {ending}" for q in llmlab.data.everyday(60) for ending in q.endings)
SIZES = dict(  # noqa: C408
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, num_experts_per_tok=2, num_experts=4, num_local_experts=4, moe_intermediate_size=32,
    head_dim=16, sliding_window=None, bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip
GPT2 = dict(n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2)  # noqa: C408
# family -> config, and what a checkpoint calls one of its matrices
FAMILIES = {
    "mixtral": (SIZES, "model.layers.1.block_sparse_moe.experts.3.w1"),
    "qwen3_moe": (SIZES, "model.layers.1.mlp.experts.3.gate_proj"),
    "gpt_oss": (SIZES | {"sliding_window": 8}, "model.layers.1.mlp.experts.3.down_proj"),
    "gpt2": (GPT2, "transformer.h.1.attn.c_attn"),
    "falcon": (
        {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "new_decoder_architecture": True,
         "num_kv_heads": 2, "alibi": False},
        "transformer.h.1.self_attention.query_key_value",
    ),
    "gpt_neox": (SIZES, "gpt_neox.layers.1.attention.query_key_value"),
}  # fmt: skip


def logits(lm, n=40):
    with torch.inference_mode():
        return lm.model(input_ids=torch.tensor([lm.encode(TEXT)[:n]])).logits.float()


def model_of(family, vocabulary, **more):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family][0], vocab_size=vocabulary, **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.15)
    return model


@pytest.fixture(scope="module")
def folders(smollm2, tmp_path_factory):
    made = {}
    for family in FAMILIES:
        folder = made[family] = tmp_path_factory.mktemp(family)
        model_of(family, smollm2.card.vocab_size).save_pretrained(folder)
        smollm2.tokenizer.save_pretrained(folder)
    return made


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_apart_compute_what_they_compute_together(family):
    model = model_of(family, 100)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        together = model(input_ids=ids).logits
        split_experts(model, expert_names(model))
        apart = model(input_ids=ids).logits
        for module in model.modules():
            if isinstance(module, Experts):
                module.visit_all = True
        visiting = model(input_ids=ids).logits
    assert sum(isinstance(m, Experts) for m in model.modules()) == 2
    assert torch.allclose(apart, together, atol=1e-4)
    assert torch.allclose(visiting, apart, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_is_quantized_saved_and_read_back(family, folders, tmp_path):
    lm = llmlab.load(str(folders[family]), dtype="fp32", device="cpu")
    report = Report()
    q = quantize(lm, 4, 32, calibration=calibration_rows(lm, TEXT, rows=8, context=128), report=report)
    layers = [p for n, p in lm.model.named_parameters() if p.dim() > 1 and any(x in n for x in (".layers.", ".h."))]
    packed = [m for m in q.model.modules() if isinstance(m, QuantLinear)]
    assert sum(m.in_features * m.out_features for m in packed) > 0.97 * sum(p.numel() for p in layers)
    assert report.kept == {} and q.transformation == "gptq 4 bits, group 32"
    assert all(m["error"] < 0.1 for m in report.linears if m["tokens"])
    folder = q.save(tmp_path / "q")
    assert f"{FAMILIES[family][1]}.qweight" in load_file(folder / "model.safetensors")
    loaded = llmlab.load(str(folder), dtype="fp32", device="cpu")
    assert torch.equal(logits(loaded), logits(q))
    finer = quantize(lm, 8, 32, method="rtn")  # at 4 bits some tokens of random models go to other experts
    assert (logits(lm) - logits(finer)).norm() / logits(lm).norm() < 0.1


@pytest.mark.parametrize("target", ["gptq", "qronos"])
def test_an_expert_is_solved_for_the_tokens_that_are_routed_to_it(folders, target):
    """By GPTQ, whatever the target: the exact model routes other tokens to it."""
    lm = llmlab.load(str(folders["mixtral"]), dtype="fp32", device="cpu")
    rows = calibration_rows(lm, TEXT, rows=8, context=128)
    report, scheme = Report(), Scheme(4, 32, target=target)
    q = quantize(lm, scheme=scheme, calibration=rows, report=report)
    name = "model.layers.0.mlp.experts.2.w2"
    seen = inputs_of(q.model, name, rows)
    hessian = Hessian(96, seen.device)
    hessian.add(seen)
    weight = lm.model.model.layers[0].mlp.experts.down_proj[2]
    expected = gptq(weight, factorize(hessian.matrix(), scheme), scheme)
    assert (q.model.get_submodule(name).unpacked().codes == expected.codes).float().mean() > 0.99
    tokens = {m["name"]: m["tokens"] for m in report.linears}
    assert tokens[name] == len(seen) < rows.numel()
    assert sum(tokens[f"model.layers.0.mlp.experts.{e}.w1"] for e in range(4)) == 2 * rows.numel()


def test_experts_without_tokens_are_rounded_and_named(folders):
    lm = llmlab.load(str(folders["mixtral"]), dtype="fp32", device="cpu")
    calibration = calibration_rows(lm, TEXT, rows=1, context=128)[:, :1]  # one token goes to two of four experts
    report = Report()
    with pytest.warns(UserWarning, match="experts' matrices saw fewer calibration tokens.*none"):
        q = quantize(lm, 4, 32, calibration=calibration, report=report)
    assert [m for m in report.linears if m["tokens"] == 0]
    assert torch.isfinite(logits(q)).all()


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_layers_from_disk_give_the_same(family, folders, tmp_path):
    """Files hold Mixtral's experts one by one, and gpt-oss's together."""
    lm = llmlab.load(str(folders[family]), dtype="fp32", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an expert of gpt-oss sees few tokens
        made, _ = quantize_to(str(folders[family]), tmp_path / "q", TEXT, Scheme(4, 32), rows=4)
        direct = quantize(lm, 4, 32, calibration=calibration_rows(lm, TEXT, rows=4))
    one, other = made.model.state_dict(), direct.model.state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_widths_that_cannot_be_packed_stay_and_are_listed(smollm2, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model("phi3", **SIZES | {"intermediate_size": 520}, vocab_size=smollm2.card.vocab_size)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    smollm2.tokenizer.save_pretrained(tmp_path / "m")
    lm = llmlab.load(str(tmp_path / "m"), dtype="fp32", device="cpu")
    with pytest.raises(InputError, match=r"only \d+% of the weights.*gate_up_proj.*1040.*Less than 90% is refused"):
        quantize(lm, 4, 32, method="rtn")
    report = Report()
    with pytest.warns(UserWarning, match=r"4 matrices stay as they are: model\.layers\.\*\.mlp\.gate_up_proj"):
        q = quantize(lm, method="rtn", scheme=Scheme(4, 32, at_least=0.1), report=report)
    assert set(report.kept) == {f"model.layers.{i}.mlp.{m}_proj" for i in (0, 1) for m in ("gate_up", "down")}
    assert q.transformation == "rtn 4 bits, group 32, mixed"
    loaded = llmlab.load(str(q.save(tmp_path / "q")), dtype="fp32", device="cpu")
    assert torch.equal(logits(loaded), logits(q))
    from llmlab.bench.quantization import quantizing

    assert quantizing(q, report).settings["kept"].startswith("4 matrices: model.layers.*.mlp.gate_up_proj")


def test_what_multiplies_by_a_weight_itself_is_no_matrix_of_ours():
    config = AutoConfig.for_model("mamba", hidden_size=64, num_hidden_layers=1, state_size=8, time_step_rank=32)
    model = AutoModelForCausalLM.from_config(config)
    assert {name.rpartition(".")[2] for name in matrices(model.backbone.layers[0])} == {"in_proj", "x_proj", "out_proj"}


def test_a_conv1d_is_a_transposed_linear():
    layer = model_of("gpt2", 100).transformer.h[0]
    x = torch.randn(3, 64)
    linear = layer.attn.c_attn
    assert torch.allclose(linear(x), torch.nn.functional.linear(x, matrix_of(linear), linear.bias), atol=1e-5)
