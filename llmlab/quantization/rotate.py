"""Rotate the residual stream without changing the model (QuaRot, arXiv 2404.00456; SliceGPT, arXiv 2401.15024).

With Q orthogonal, x -> x Q is undone by the next Linear: (x Q)(W Q)^T = x W^T. RMSNorm commutes with Q once its gain
is folded into the Linears behind it, because |x Q| = |x|. So the same function is computed on rotated hidden states, in
which no single channel is an outlier: their weights and activations quantize better.

Inside attention, the values of each KV head and the columns of o_proj that read them rotate against each other too.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from llmlab.base.errors import InputError
from llmlab.model.layerwise import ReadLayer
from llmlab.model.lm import LM, decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm


PARTS = ("input_layernorm", "post_attention_layernorm", "self_attn", "mlp")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rotate(lm: LM, *, read_layer: ReadLayer | None = None, seed: int = 0) -> tuple[LM, ReadLayer]:
    """Rotate an RMSNorm model (LLaMA-like): equal outputs to rounding, other weights. The sums are done in fp64.

    Args:
        lm: the model; it is not changed.
        read_layer: gives decoder layer i, if the model's own are not in memory (see `stream`).
        seed: of the random rotations.

    Returns:
        A copy without decoder layers' weights changed yet: everything around them, rotated, with an untied output
        head; and a function that gives decoder layer i, rotated. `rotated` puts them together.

    Raises:
        InputError: the architecture normalises otherwise (OPT's LayerNorm also subtracts the mean, which does not
            commute with a rotation).
    """
    check_rotatable(lm.model)
    _, layers = decoder_layers(lm.model)
    model = copy.deepcopy(lm.model, {id(layers): layers})
    q = random_orthogonal(lm.card.hidden_size, torch.Generator().manual_seed(seed)).to(lm.device)
    rotate_ends(model, q)

    def read_rotated(index: int) -> torch.nn.Module:
        layer = read_layer(index) if read_layer else copy.deepcopy(layers[index])
        rotate_layer(layer, q, lm.card.head_dim, torch.Generator().manual_seed(seed + 1 + index))
        return layer

    done = "rotated" if lm.transformation == "none" else f"{lm.transformation}, rotated"
    return LM(model, lm.tokenizer, lm.card, lm.name, lm.revision, done), read_rotated


def rotated(lm: LM, *, seed: int = 0) -> LM:
    """The whole rotated model in memory."""
    ends, read_layer = rotate(lm, seed=seed)
    path, layers = decoder_layers(ends.model)
    ends.model.set_submodule(path, torch.nn.ModuleList([read_layer(i) for i in range(len(layers))]))
    return ends


def check_rotatable(model: PreTrainedModel) -> None:
    """Raise InputError unless the model is built like LLaMA."""
    layer = decoder_layers(model)[1][0]
    norms = [getattr(layer, name, None) for name in ("input_layernorm", "post_attention_layernorm")]
    norms.append(getattr(model.base_model, "norm", None))
    # Gemma's RMSNorm multiplies by 1 + gain, and calls its epsilon otherwise; more norms stand behind what they norm.
    alike = all(type(norm).__name__.endswith("RMSNorm") and hasattr(norm, "variance_epsilon") for norm in norms)
    linears = {name.rpartition(".")[2] for name, m in layer.named_modules() if type(m) is torch.nn.Linear}
    if not alike or linears != set(LINEARS) or set(layer._modules) != set(PARTS):
        raise InputError(
            f"{model.config.model_type} cannot be rotated: it needs RMSNorm before attention and MLP, as LLaMA has."
        )


def rotate_ends(model: PreTrainedModel, q: torch.Tensor) -> None:
    """Embedding x -> x Q; output head W -> (W diag(gain)) Q, untied from it; the last norm's gain becomes 1."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False
    _columns(model.get_input_embeddings(), q)
    _fold(model.base_model.norm, [model.get_output_embeddings()])
    _columns(model.get_output_embeddings(), q)


def rotate_layer(layer: LlamaDecoderLayer, q: torch.Tensor, head_dim: int, generator: torch.Generator) -> None:
    """One decoder layer: what reads the residual stream turns its columns, what writes to it turns its rows."""
    attention, mlp = layer.self_attn, layer.mlp
    readers = [attention.q_proj, attention.k_proj, attention.v_proj]
    _fold(layer.input_layernorm, readers)
    _fold(layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj])
    for linear in (*readers, mlp.gate_proj, mlp.up_proj):
        _columns(linear, q)
    for linear in (attention.o_proj, mlp.down_proj):
        _rows(linear, q)
    _rotate_heads(attention.v_proj, attention.o_proj, head_dim, generator)


def random_orthogonal(size: int, generator: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix in fp64, uniform over the group (Haar): QR of a Gaussian one, signs fixed."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    haar: torch.Tensor = q * r.diagonal().sign()
    return haar


def _rotate_heads(v_proj: torch.nn.Linear, o_proj: torch.nn.Linear, head_dim: int, generator: torch.Generator) -> None:
    """Values of KV head k turn by R_k; the query heads that read them turn back in o_proj."""
    kv_heads = v_proj.out_features // head_dim
    group = o_proj.in_features // v_proj.out_features  # query heads a KV head
    turns = [random_orthogonal(head_dim, generator).to(v_proj.weight.device) for _ in range(kv_heads)]
    _rows(v_proj, _block_diag(*turns))
    _columns(o_proj, _block_diag(*[turn for turn in turns for _ in range(group)]))


def _block_diag(*blocks: torch.Tensor) -> torch.Tensor:
    whole: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return whole


def _fold(norm: LlamaRMSNorm, linears: list[torch.nn.Linear]) -> None:
    """W (gain * x) = (W diag(gain)) x."""
    for linear in linears:
        _set(linear, linear.weight.double() * norm.weight.double())
    norm.weight = torch.nn.Parameter(torch.ones_like(norm.weight), requires_grad=False)


def _columns(module: torch.nn.Linear | torch.nn.Embedding, q: torch.Tensor) -> None:
    _set(module, module.weight.double() @ q)


def _rows(linear: torch.nn.Linear, q: torch.Tensor) -> None:
    _set(linear, q.T @ linear.weight.double())
    if linear.bias is not None:
        linear.bias = torch.nn.Parameter((linear.bias.double() @ q).to(linear.bias.dtype), requires_grad=False)


def _set(module: torch.nn.Linear | torch.nn.Embedding, weight: torch.Tensor) -> None:
    module.weight = torch.nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
