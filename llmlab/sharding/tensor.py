"""Tensor parallelism after Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3).

Every matrix of a layer is cut. With W1 = [A | B] by outputs (column-parallel: q, k, v, gate, up) and W2 = [C ; D] by
inputs (row-parallel: o, down), each rank computes its heads and its part of the MLP alone,

    y = f(x W1) W2 = f(x A) C + f(x B) D,

and one all-reduce after each row-parallel matrix adds the parts: two a layer. Embedding and output head are cut by
vocabulary. The matrices stay plain Linears or QuantLinears of a smaller shape, and a hook does the all-reduce: one
mechanism for both, and a decode step pays for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from llmlab.base.errors import InputError
from llmlab.model.lm import decoder_layers
from llmlab.sharding.pipeline import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

QUERIES, KEYS = ("q_proj",), ("k_proj", "v_proj")
COLUMNS = ("gate_proj", "up_proj", "fc1")
ATTENTION_ROWS, ROWS = ("o_proj", "out_proj"), ("down_proj", "fc2")


@dataclass(frozen=True)
class Cut:
    """Part `index` of `size` of every layer; `unit` is the least number of neurons of an MLP that stay together."""

    index: int
    size: int
    unit: int = 1

    def of(self, total: int, unit: int = 1) -> tuple[int, int]:
        """This part of `total` things in units, as even as whole units allow: (first, end)."""
        units = total // unit
        return self.index * units // self.size * unit, (self.index + 1) * units // self.size * unit


def part_of(linear: str, config: PreTrainedConfig, cut: Cut) -> tuple[int, tuple[int, int]]:
    """Which dimension of a Linear's weight [out, in] is cut (0: by outputs, 1: by inputs), and this rank's part of it.

    Whole groups of query heads with their KV head stay together; the last groups may make some ranks larger.
    """
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    first, end = cut.of(kv_heads)
    width = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * config.hidden_size
    per_group = heads // kv_heads
    kind = linear.rpartition(".")[2]
    if kind in KEYS:
        return 0, (first * head_dim, end * head_dim)
    if kind in QUERIES + ATTENTION_ROWS:
        return int(kind in ATTENTION_ROWS), (first * per_group * head_dim, end * per_group * head_dim)
    if kind in COLUMNS + ROWS:
        return int(kind in ROWS), cut.of(width, cut.unit)
    raise InputError(f"tensor parallelism does not know the matrix {linear}: use data or pipeline parallelism.")


class VocabularyEmbedding(torch.nn.Module):
    """Rows `first` .. of an embedding; rows of other ranks come in by the all-reduce."""

    def __init__(self, weight: torch.nn.Parameter, first: int, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.first, self.group = weight, first, group

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] to hidden states [..., hidden]."""
        local = ids - self.first
        outside = (local < 0) | (local >= len(self.weight))
        rows = torch.nn.functional.embedding(local.masked_fill(outside, 0), self.weight)
        rows = rows.masked_fill(outside[..., None], 0)
        dist.all_reduce(rows, group=self.group)
        return rows


class VocabularyHead(torch.nn.Module):
    """The output head's rows of this rank; logits [..., part] are gathered to [..., vocabulary]."""

    def __init__(self, weight: torch.nn.Parameter, vocab_size: int, cut: Cut, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.vocab_size, self.cut, self.group = weight, vocab_size, cut, group

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Only the positions that are asked for come here, so only their logits cross the wires."""
        logits = torch.nn.functional.linear(hidden_states, self.weight)
        bounds = [Cut(i, self.cut.size).of(self.vocab_size) for i in range(self.cut.size)]
        largest = max(end - first for first, end in bounds)
        padded = torch.nn.functional.pad(logits, (0, largest - logits.shape[-1])).contiguous()
        parts = [torch.empty_like(padded) for _ in bounds]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[..., : end - first] for part, (first, end) in zip(parts, bounds, strict=True)], dim=-1)


def attach(model: PreTrainedModel, cut: Cut, group: dist.ProcessGroup, stage: Stage) -> None:
    """Make a model whose layers hold their parts compute the whole: all-reduces, and the head counts of this rank.

    What the all-reduces send is counted in `stage`.
    """
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    first, end = cut.of(kv_heads)

    def add_up(module: torch.nn.Module, args: tuple[object, ...], output: torch.Tensor) -> torch.Tensor:
        output = output.contiguous()
        dist.all_reduce(output, group=group)
        # A ring sends 2 (t - 1) / t of the tensor from each rank (Patarasuk and Yuan 2009).
        stage.bytes_sent += 2 * (cut.size - 1) * output.nbytes // cut.size
        return output

    for layer in decoder_layers(model)[1]:
        for name, module in layer.named_modules():
            if name.rpartition(".")[2] in ATTENTION_ROWS + ROWS:
                if cut.index and getattr(module, "bias", None) is not None:
                    module.bias = None  # one rank's is enough: the sum would hold it `size` times
                module.register_forward_hook(add_up)
            if hasattr(module, "num_heads") and hasattr(module, "head_dim"):  # OPT's attention reshapes by it
                module.num_heads = (end - first) * heads // kv_heads
