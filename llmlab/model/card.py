"""ModelCard: what a model costs, computed from its config without reading a weight."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

DTYPE_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class ModelCard:
    """Sizes and costs of a decoder-only model.

    Counts are exact: the model is built on torch's meta device (shapes, no memory) and its tensors are counted, so
    any `AutoModelForCausalLM` architecture works. Mixture-of-experts layers count every expert as active.
    """

    name: str
    model_type: str
    dtype: str
    parameters: int  # every tensor once (tied weights once)
    linear_parameters: int  # matrices of the decoder layers: what quantization shrinks and tensor parallelism cuts
    head_parameters: int  # vocabulary x hidden of the output head, counted here also when tied to the embedding
    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
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
        """Bytes that one token adds to the KV cache: keys and values of every layer, 2 bytes an element (4 in fp32)."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    def flops_per_token(self, context: int = 0, *, head: bool = True) -> int:
        """FLOPs of one token's forward pass after `context` earlier tokens.

        A matrix with P weights costs 2P (multiply and add). Attention costs 2·d·(context+1) for QKᵀ and as much for
        AV in every layer, d = heads x head_dim. Norms, rotations and the soft-max are left out, as is usual.
        """
        matrices = self.linear_parameters + (self.head_parameters if head else 0)
        attention = 4 * self.layers * self.heads * self.head_dim * (context + 1)
        return 2 * matrices + attention

    def sequence_flops(self, length: int, *, head_positions: int | None = None) -> int:
        """FLOPs of one forward pass over a causal sequence of `length` tokens.

        The output head works at `head_positions` of them, by default at all.
        """
        attention = 4 * self.layers * self.heads * self.head_dim * length * (length + 1) // 2
        head = 2 * self.head_parameters * (length if head_positions is None else head_positions)
        return 2 * length * self.linear_parameters + head + attention

    @property
    def bytes_read_per_pass(self) -> int:
        """Bytes of weights that every forward pass reads, however few its tokens: matrices and output head.

        Of an untied embedding only the rows of the pass's tokens are read.
        """
        return (self.linear_parameters + self.head_parameters) * DTYPE_BYTES[self.dtype]

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
            ("attention", f"{self.heads} heads, {self.kv_heads} KV heads, head size {self.head_dim}"),
            ("MLP width", f"{self.intermediate_size:,}"),
            ("vocabulary", f"{self.vocab_size:,} tokens, {'tied' if self.tied else 'untied'} output head"),
            ("context length", f"{self.context_length:,} tokens"),
            ("parameters", f"{self.parameters / 1e6:,.1f} M"),
            ("weights", f"{self.bytes / 1e9:,.3f} GB at {self.dtype}"),
            ("compute", f"{self.flops_per_token() / 1e9:,.3f} GFLOP a token"),
            ("KV cache", f"{self.kv_bytes_per_token / 1024:,.1f} KiB a token"),
        ]

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
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    output_head = model.get_output_embeddings()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(output_head.weight)}
    matrices = sum(p.numel() for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings)
    heads = int(config.num_attention_heads)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
    return ModelCard(
        name=name,
        model_type=config.model_type,
        dtype=dtype,
        parameters=sum(p.numel() for p in model.parameters()),
        linear_parameters=matrices,
        head_parameters=output_head.weight.numel(),
        layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=int(width),
        heads=heads,
        kv_heads=int(kv_heads),
        head_dim=int(head_dim),
        vocab_size=config.vocab_size,
        context_length=config.max_position_embeddings,
        tied=output_head.weight is model.get_input_embeddings().weight,
    )
