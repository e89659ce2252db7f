"""ModelCard: what a model costs, computed from its config without reading a weight."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmlab.base.errors import InputError

DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
UNLIMITED = 2**31 - 1  # tokens of context: recurrent models, and ALiBi where the config states no length
# What configs call the same thing.
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx", "max_target_positions")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")


@dataclass(frozen=True)
class ModelCard:
    """Sizes and costs of a decoder-only model.

    Parameters are exact: the model is built on torch's meta device (shapes, no memory) and its tensors are counted, so
    any `AutoModelForCausalLM` architecture works. What a model has not is 0: Mamba has no heads and no KV cache.
    """

    name: str
    model_type: str
    dtype: str
    parameters: int  # every tensor once (tied weights once)
    linear_parameters: int  # matrices of the decoder layers: what quantization shrinks and tensor parallelism cuts
    active_parameters: int  # of these, what one token meets: of the experts only those to which it is routed
    head_parameters: int  # vocabulary x hidden of the output head, counted here also when tied to the embedding
    layers: int
    attention_layers: int  # those that attend to all earlier tokens or to a window of them, and keep keys and values
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    kv_values: int  # numbers that one token adds to the KV cache, in all layers together
    head_dim: int  # of queries and keys
    value_dim: int
    vocab_size: int  # rows of the embedding
    context_length: int  # UNLIMITED where no position is too far
    tied: bool

    @property
    def bytes(self) -> int:
        """Bytes of the weights at the card's dtype."""
        return self.parameters * DTYPE_BYTES[self.dtype]

    def weight_bytes(self, bits: int = 16, group_size: int = 64) -> int:
        """Bytes of the weights with the decoder layers' matrices at `bits`, the rest at 16 bits.

        Below 16 bits each group of `group_size` weights adds a 16-bit scale and a zero point of `bits` bits.
        """
        rest = 2 * (self.parameters - self.linear_parameters)
        per_weight = bits if bits >= 16 else bits + (16 + bits) / group_size
        return rest + round(self.linear_parameters * per_weight / 8)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to the KV cache, 2 of each number (4 in fp32); windows, which end that, ignored."""
        return self.kv_values * DTYPE_BYTES[self.dtype]

    def flops_per_token(self, context: int = 0, *, head: bool = True) -> int:
        """FLOPs of one token's forward pass after `context` earlier tokens.

        A matrix with P weights costs 2P (multiply and add). Attention costs 2·d·(context+1) for QKᵀ and as much for
        AV in every layer, d = heads x head_dim. Norms, rotations and the soft-max are left out, as is usual, and so are
        the states of recurrent layers.
        """
        matrices = self.active_parameters + (self.head_parameters if head else 0)
        return 2 * matrices + self.attention_flops * (context + 1)

    @property
    def attention_flops(self) -> int:
        """FLOPs with which one token attends to one token, in all layers."""
        return 2 * self.attention_layers * self.heads * (self.head_dim + self.value_dim)

    def sequence_flops(self, length: int, *, head_positions: int | None = None) -> int:
        """FLOPs of one forward pass over a causal sequence of `length` tokens.

        The output head works at `head_positions` of them, by default at all.
        """
        attention = self.attention_flops * length * (length + 1) // 2
        head = 2 * self.head_parameters * (length if head_positions is None else head_positions)
        return 2 * length * self.active_parameters + head + attention

    @property
    def bytes_read_per_pass(self) -> int:
        """Bytes of weights that every forward pass reads, however few its tokens: matrices and output head.

        Of an untied embedding only the rows of the pass's tokens are read.
        """
        return (self.active_parameters + self.head_parameters) * DTYPE_BYTES[self.dtype]

    def as_dict(self) -> dict[str, object]:
        """All fields and the derived costs, ready for JSON."""
        derived = {
            "bytes": self.bytes,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "flops_per_token": self.flops_per_token(),
        }
        return asdict(self) | derived

    def rows(self) -> list[tuple[str, str]]:
        """The card as (what, value) pairs for people."""
        return [
            ("model", self.name),
            ("architecture", f"{self.model_type}, {self.layers} layers, hidden {self.hidden_size:,}"),
            ("attention", self._attention),
            ("MLP width", f"{self.intermediate_size:,}"),
            ("vocabulary", f"{self.vocab_size:,} tokens, {'tied' if self.tied else 'untied'} output head"),
            ("context length", "unlimited" if self.context_length == UNLIMITED else f"{self.context_length:,} tokens"),
            ("parameters", f"{self.parameters / 1e6:,.1f} M{self._idle}"),
            ("weights", f"{self.bytes / 1e9:,.3f} GB at {self.dtype}"),
            ("compute", f"{self.flops_per_token() / 1e9:,.3f} GFLOP a token"),
            ("KV cache", f"{self.kv_bytes_per_token / 1024:,.1f} KiB a token"),
        ]

    @property
    def _attention(self) -> str:
        if not self.attention_layers:
            return "none"
        some = "" if self.attention_layers == self.layers else f", in {self.attention_layers} of the layers"
        return f"{self.heads} heads, {self.kv_heads} KV heads, head size {self.head_dim}{some}"

    @property
    def _idle(self) -> str:
        idle = self.linear_parameters - self.active_parameters
        return f", {(self.parameters - idle) / 1e6:,.1f} M active" if idle else ""

    def _repr_html_(self) -> str:
        """A two-column table in notebooks."""
        import pandas as pd

        table = pd.DataFrame(self.rows(), columns=["", "value"])
        return str(table.to_html(index=False, header=False, border=0, escape=True))

    def __str__(self) -> str:
        return "\n".join(f"{what:<15} {value}" for what, value in self.rows())


def card_from_config(config: PreTrainedConfig, name: str, dtype: str) -> ModelCard:
    """Count a transformers config's model without allocating it.

    Args:
        config: the config of a decoder-only architecture.
        name: what to call the model.
        dtype: "fp32", "fp16" or "bf16": the dtype in which it is to run.

    Raises InputError if transformers cannot build the model, with its reason.
    """
    model = _empty(config, name)
    text = model.config.get_text_config(decoder=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not isinstance(embedding, nn.Embedding):
        raise InputError(f"{name} ({config.model_type}) has no output head over one vocabulary: llmlab cannot run it.")
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(head.weight)}
    matrices = {n: p for n, p in model.named_parameters() if p.dim() >= 2 and id(p) not in embeddings}
    linear = sum(p.numel() for p in matrices.values())
    layers, hidden, heads = (_fact(text, n) for n in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    if not layers or not hidden:
        raise InputError(f"the config of {name} ({config.model_type}) states no layers or no width.")
    attending = _attending(text, layers) if heads else []
    return ModelCard(
        name=name,
        model_type=config.model_type,
        dtype=dtype,
        parameters=sum(p.numel() for p in model.parameters()),
        linear_parameters=linear,
        active_parameters=linear - _idle(matrices, getattr(text, "ffn_config", text)),
        head_parameters=head.weight.numel(),
        layers=layers,
        attention_layers=len(attending),
        hidden_size=hidden,
        intermediate_size=_fact(text, "intermediate_size", "ffn_dim") or 4 * hidden,
        heads=heads,
        kv_heads=_kv_heads(text),
        kv_values=sum(map(_kv_values, attending)),
        head_dim=_head_dim(text),
        value_dim=_value_dim(text),
        vocab_size=embedding.num_embeddings,
        context_length=_fact(text, *CONTEXT) or UNLIMITED,
        tied=head.weight is embedding.weight,
    )


def _empty(config: PreTrainedConfig, name: str) -> PreTrainedModel:
    # The class of a config that came with its model is there only if that code was trusted.
    own_code = type(config).__module__.startswith("transformers_modules")
    try:
        with torch.device("meta"):
            alike = copy.deepcopy(config)  # which from_config writes its attention into
            return AutoModelForCausalLM.from_config(alike, attn_implementation="eager", trust_remote_code=own_code)
    except Exception as error:  # each architecture is unusable in its own way: a missing package, odd sizes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"transformers cannot build {name} ({config.model_type}): {reason}.") from error


def _fact(config: PreTrainedConfig, *names: str) -> int:
    """The first of some attributes that is a positive number, else 0; the largest of one that differs by layer."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # transformers refuses to name one number for layers that differ
            value = [getattr(layer, name) for layer in config.per_layer_config]
        largest = max(value) if isinstance(value, (list, tuple)) and value else value
        if isinstance(largest, int) and largest > 0:
            return largest
    return 0


def _attending(config: PreTrainedConfig, layers: int) -> list[PreTrainedConfig]:
    """The configs of the layers that attend; one and the same unless transformers lets layers differ (Gemma 4)."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ["attention"] * layers
    configs = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config] * layers
    attends = [("attention" in kind and "linear" not in kind) or "hybrid" in kind for kind in kinds]
    return [own for own, attend in zip(configs, attends, strict=False) if attend]


def _kv_values(config: PreTrainedConfig) -> int:
    if latent := _fact(config, "kv_lora_rank"):  # multi-head latent attention keeps what keys and values are made of
        return latent + _fact(config, "qk_rope_head_dim")
    return _kv_heads(config) * (_head_dim(config) + _value_dim(config))


def _kv_heads(config: PreTrainedConfig) -> int:
    if getattr(config, "new_decoder_architecture", False):
        return _fact(config, "num_attention_heads")  # Falcon 40B repeats its KV heads before it keeps them
    if getattr(config, "multi_query", False):
        return 1  # Falcon 7B, whose config states others
    return _fact(config, "num_key_value_heads", "num_kv_heads", "num_attention_heads")


def _head_dim(config: PreTrainedConfig) -> int:
    if unrotated := _fact(config, "qk_nope_head_dim"):  # of latent attention, where head_dim is the rotated part
        return unrotated + _fact(config, "qk_rope_head_dim")
    heads = _fact(config, "num_attention_heads")
    return (_fact(config, "head_dim") or _fact(config, "hidden_size") // heads) if heads else 0


def _value_dim(config: PreTrainedConfig) -> int:
    return _fact(config, "v_head_dim") or _head_dim(config)


def _idle(matrices: dict[str, nn.Parameter], config: PreTrainedConfig) -> int:
    """Weights of the experts to which a token is not routed."""
    experts, chosen = _fact(config, *EXPERTS), _fact(config, *CHOSEN)
    if not 0 < chosen < experts:
        return 0
    routed = [p for n, p in matrices.items() if ".experts." in n or (p.dim() == 3 and p.shape[0] == experts)]
    return sum(p.numel() for p in routed) * (experts - chosen) // experts
