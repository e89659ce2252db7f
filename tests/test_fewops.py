"""Norms, gates and rotations as one operation: only where a model's own give the same numbers."""

import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from llmlab.kernels import fewops
from llmlab.kernels.fewops import few_ops, shared_copy
from llmlab.kernels.native import compiler, native

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}  # ours keep more bits on the way
HALF = list(ROUNDING)
pytestmark = pytest.mark.skipif(compiler() is None or sys.platform != "linux", reason="no C++ compiler here")
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def tiny(family, **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | settings)).eval()


def replaced(model, name):
    """Whether modules of this name have another forward pass now."""
    return {"forward" in vars(module) for path, module in model.named_modules() if path.endswith(name)}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(1, 1, 40), (2, 9, 40)])
def test_a_gate_equals_silu_times_the_other_half(dtype, shape):
    assert native().problem == ""
    torch.manual_seed(0)
    both = 4 * torch.randn(*shape[:2], 2 * shape[2]).to(dtype)
    a, b = both.split(shape[2], dim=-1)  # parts of the rows of one product
    torch.testing.assert_close(torch.ops.llmlab.gated(a, b), torch.nn.functional.silu(a) * b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("batch, width", [(1, 1), (3, 5)])
def test_a_rotation_equals_the_models(dtype, batch, width):
    assert native().problem == ""
    torch.manual_seed(0)
    q, k = (torch.randn(batch, width, heads, 24).to(dtype).transpose(1, 2) for heads in (6, 2))
    cos, sin = torch.rand(2, batch, width, 24).to(dtype)
    for result, expected in zip(
        torch.ops.llmlab.rotate(q, k, cos, sin), modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), strict=True
    ):
        assert result.is_contiguous()
        torch.testing.assert_close(result, expected, rtol=ROUNDING[dtype], atol=ROUNDING[dtype])


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "granite", "phi3", "gemma2", "stablelm"])
def test_few_operations_give_what_the_model_does(family):
    """Gates and rotations of every family are replaced or left, and the numbers stay; so does the model itself."""
    settings = {"head_dim": 8} if family in ("qwen3", "gemma2") else {}
    model = tiny(family, **settings)
    ids = torch.arange(20).view(2, 10) % 64
    with torch.inference_mode():
        expected = model(ids).logits
        fast = shared_copy(model)
        few_ops(fast, torch.float32)
        torch.testing.assert_close(fast(ids).logits, expected, rtol=1e-4, atol=1e-5)
        assert replaced(fast, ".mlp") == {family in ("llama", "qwen2", "qwen3", "mistral", "granite", "stablelm")}
        assert replaced(fast, ".self_attn") == {True}
        assert replaced(model, ".mlp") == replaced(model, ".self_attn") == {False}
        assert torch.equal(model(ids).logits, expected)


def test_other_gates_and_rotations_stay(monkeypatch):
    monkeypatch.setattr(fewops, "_gates", {})
    monkeypatch.setattr(fewops, "_forwards", {})
    mlp = tiny("llama").model.layers[0].mlp
    assert fewops._is_gated(mlp, torch.float32)
    mlp.act_fn = ACT2FN["gelu"]
    assert not fewops._is_gated(mlp, torch.float32)

    class Clamped(type(mlp)):
        def forward(self, x):
            return super().forward(x).clamp(max=0.5)

    mlp.act_fn, mlp.__class__ = ACT2FN["silu"], Clamped
    assert not fewops._is_gated(mlp, torch.float32)

    def pairs(q, k, cos, sin, unsqueeze_dim=1):  # GPT-J's order
        return modeling_llama.apply_rotary_pos_emb(q.flip(-1), k, cos, sin, unsqueeze_dim)

    assert fewops._rotates(modeling_llama.apply_rotary_pos_emb, torch.float32)
    assert not fewops._rotates(pairs, torch.float32)
    assert not fewops._rotates(modeling_gpt_oss.apply_rotary_pos_emb, torch.float32)


def test_the_generator_of_random_numbers_is_left_alone(monkeypatch):
    monkeypatch.setattr(fewops, "_gates", {})
    monkeypatch.setattr(fewops, "_forwards", {})
    model = tiny("llama")
    before = torch.get_rng_state()
    few_ops(shared_copy(model), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rotation_of_a_part_of_each_head_is_the_models_own():
    rotate = fewops._rotation(modeling_gpt_neox.apply_rotary_pos_emb)
    q, k, cos, sin = torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), torch.rand(1, 3, 4), torch.rand(1, 3, 4)
    expected = modeling_gpt_neox.apply_rotary_pos_emb(q, k, cos, sin)
    assert all(map(torch.equal, rotate(q, k, cos, sin), expected))
