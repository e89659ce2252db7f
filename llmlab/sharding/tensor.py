"""Tensor parallelism after Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053, section 3).

Every matrix of a layer is cut. With W1 = [A | B] by outputs (column-parallel: q, k, v, gate, up) and W2 = [C ; D] by
inputs (row-parallel: o, down), each rank computes its heads and its part of the MLP alone,

    y = f(x W1) W2 = f(x A) C + f(x B) D,

and one all-reduce after each row-parallel matrix adds the parts: two a layer. Which matrix is cut how is the family's
own plan in transformers (`base_model_tp_plan`). Embedding and output head are cut by vocabulary. The matrices stay
plain Linears or QuantLinears of a smaller shape, and hooks exchange what ranks need of one another: one mechanism for
both, and a decode step pays for nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import CONFIG_MAPPING

from llmlab.base.errors import InputError
from llmlab.model.lm import decoder_layers
from llmlab.sharding.peers import Peers
from llmlab.sharding.pipeline import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Kind:
    """What a family's plan says of a module or parameter.

    Attributes:
        dimension: of its weight, the outputs (-2) or the inputs (-1), which ranks share; None: every rank has all.
        blocks: matrices that lie one after another along it, such as gate and up, and are cut each.
        local: whether the neighbours are cut, too: outputs stay with their rank, inputs are there already.
        adds: whether the ranks' results are parts of a sum.
    """

    dimension: int | None = None
    blocks: int = 1
    local: bool = True
    adds: bool = False


KINDS = {
    "colwise": Kind(-2),
    "colwise_gather_output": Kind(-2, local=False),
    "packed_colwise": Kind(-2, blocks=2),
    "rowwise": Kind(-1, adds=True),
    "rowwise_split_input": Kind(-1, local=False, adds=True),
    "packed_rowwise": Kind(-1, blocks=2, adds=True),
    "moe_tp_experts": Kind(adds=True),
    "all_reduce": Kind(adds=True),
    "mla_kv_a_proj": Kind(),
    "replicate": Kind(),
    "replicated_with_grad_allreduce": Kind(),
    "sequence_parallel": Kind(),
}
OUTPUTS = KINDS["colwise_gather_output"]  # of the output head, too
OPT = "decoder.layers.*."
PLANS = {  # of families for which transformers has none
    "opt": {f"{OPT}self_attn.{name}_proj": "colwise" for name in "qkv"}
    | {f"{OPT}self_attn.out_proj": "rowwise", f"{OPT}fc1": "colwise", f"{OPT}fc2": "rowwise"}
}


@dataclass(frozen=True)
class Cut:
    """Part `index` of `size` of every layer; `unit` is the least number of neurons of an MLP that stay together."""

    index: int
    size: int
    unit: int = 1

    def of(self, total: int, unit: int = 1) -> tuple[int, int]:
        """This part of `total` things in units, as even as whole units allow: (first, end)."""
        units = total // unit
        first, end = self.index * units // self.size * unit, (self.index + 1) * units // self.size * unit
        return first, total if self.index == self.size - 1 else end


class Part(NamedTuple):
    """A rank's share of a weight: the `kind` of its cut, and (first, end) of `total` in each of its blocks."""

    kind: Kind
    first: int
    end: int
    total: int


class Cutter:
    """What of a model's weights a rank has; made from the model while its weights are whole, and empty.

    Attributes:
        cut: which part of how many.
        kv_heads: heads of keys and values in a layer of the whole model.

    Raises InputError where the family has no plan, or one that llmlab does not know.
    """

    def __init__(self, model: PreTrainedModel, cut: Cut) -> None:
        self.cut, self.prefix = cut, f"{model.base_model_prefix}."
        self.kv_heads = kv_heads(model.config)
        self.kinds = {} if cut.size == 1 else _kinds(model)
        self.vocabulary = len(model.get_input_embeddings().weight)

    def kind(self, name: str) -> Kind | None:
        """Of the module or parameter of that name; None if the plan leaves it out."""
        local = name.removeprefix(self.prefix)
        return next((kind for pattern, kind in self.kinds.items() if re.fullmatch(pattern, local)), None)

    def part(self, name: str, sizes: Sequence[int]) -> Part | None:
        """This rank's part of a weight [..., outputs, inputs] of those sizes; None if it has all of it.

        In attention whole groups of query heads and their KV head stay together; the last groups may make some ranks
        larger.
        """
        kind = self.kind(name)
        if kind is None or kind.dimension is None:
            return None
        total = sizes[kind.dimension] // kind.blocks
        unit = self.cut.unit
        if kind.local and re.search("att", name):
            if total % self.kv_heads:
                raise InputError(f"{name}: its {total} neurons are no whole number of {self.kv_heads} KV heads.")
            unit = total // self.kv_heads
        return Part(kind, *self.cut.of(total, unit), total)


def _kinds(model: PreTrainedModel) -> dict[str, Kind]:
    """Pattern of a name in the base model -> kind."""
    family = model.config.model_type
    plan = plan_of(family, type(model.config))
    if not plan:
        raise InputError(f"transformers has no plan to cut the layers of {family}: use data or pipeline parallelism.")
    kinds = {}
    for pattern, name in plan.items():
        if name not in KINDS:
            raise InputError(f"{family}: {pattern} is to be cut {name!r}, which llmlab cannot: use data or pipeline.")
        kinds[re.escape(pattern).replace(r"\*", "[^.]+")] = KINDS[name]
    return kinds


def plan_of(family: str, config_class: type[PreTrainedConfig] | None = None) -> dict[str, str]:
    """How transformers would cut a family's layers: pattern of a name in the base model -> kind; {} if it would not."""
    if config_class is None and family in CONFIG_MAPPING:
        config_class = CONFIG_MAPPING[family]
    return getattr(config_class, "base_model_tp_plan", None) or PLANS.get(family) or {}


def kv_heads(config: PreTrainedConfig) -> int:
    """Heads of keys and values in a layer; 1 where a family has none."""
    return int(getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None) or 1)


class VocabularyEmbedding(torch.nn.Module):
    """An embedding that holds rows `first` .. of the vocabulary; other ranks' rows come in by the all-reduce.

    The family's own module looks its rows up, so a scale in it stays.
    """

    def __init__(self, embedding: torch.nn.Module, first: int, peers: Peers) -> None:
        super().__init__()
        self.embedding, self.first, self.peers = embedding, first, peers

    @property
    def weight(self) -> torch.Tensor:
        """This rank's rows [part, width]."""
        weight: torch.Tensor = self.embedding.weight  # type: ignore[assignment]  # every embedding has one
        return weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] to hidden states [..., width]."""
        local = ids - self.first
        outside = (local < 0) | (local >= len(self.weight))
        rows: torch.Tensor = self.embedding(local.masked_fill(outside, 0)).masked_fill(outside[..., None], 0)
        self.peers.add_up(rows)
        return rows


def attach(model: PreTrainedModel, cutter: Cutter, parts: dict[str, Part], peers: Peers, stage: Stage) -> None:
    """Make a model whose layers hold their parts compute the whole.

    Args:
        model: with the parts.
        cutter: that said which they are.
        parts: of each Linear, by name.
        peers: the ranks that share the layers. What they send one another is counted in `stage`.
        stage: this rank's.
    """
    cut, config = cutter.cut, model.config
    heads = getattr(config, "num_attention_heads", 0)
    first, end = cut.of(cutter.kv_heads)
    path, stack = decoder_layers(model)
    for name, module in stack.named_modules(prefix=path):
        kind = cutter.kind(name)
        if vars(module).get("num_heads") == heads and "head_dim" in vars(module) and kind is None:
            vars(module)["num_heads"] = (end - first) * heads // cutter.kv_heads  # OPT's attention reshapes by it
        if kind is None or (kind.dimension is None and not kind.adds):
            continue
        if kind.dimension == -1 and not kind.local:
            module.register_forward_pre_hook(_own_inputs(parts[name]))
        if kind.dimension == -2 and not kind.local:
            module.register_forward_hook(_joined(cut, parts[name].total, peers, stage))
        if kind.adds:
            if cut.index and getattr(module, "bias", None) is not None:
                module.bias = None  # one rank's is enough: the sum would hold it `size` times
            module.register_forward_hook(_added_up(peers, stage))
    if stage.last:
        model.get_output_embeddings().register_forward_hook(_joined(cut, cutter.vocabulary, peers, stage))
    if stage.first:
        first = cut.of(cutter.vocabulary, cut.unit)[0]
        model.set_input_embeddings(VocabularyEmbedding(model.get_input_embeddings(), first, peers))


Hook = Callable[[torch.nn.Module, tuple[Any, ...], Any], Any]


def _own_inputs(part: Part) -> Callable[[torch.nn.Module, tuple[torch.Tensor, ...]], torch.Tensor]:
    """Hands on a rank's part of the inputs [..., total]."""
    return lambda module, args: args[0][..., part.first : part.end]


def _added_up(peers: Peers, stage: Stage) -> Hook:
    """Sums the ranks' outputs."""

    def add_up(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        output = output.contiguous()
        peers.add_up(output)
        # A ring sends 2 (t - 1) / t of the tensor from each rank (Patarasuk and Yuan 2009).
        stage.bytes_sent += 2 * (peers.size - 1) * output.nbytes // peers.size
        return output

    return add_up


def _joined(cut: Cut, width: int, peers: Peers, stage: Stage) -> Hook:
    """Puts the ranks' outputs [..., part] side by side: [..., width]."""
    bounds = [Cut(i, cut.size, cut.unit).of(width, cut.unit) for i in range(cut.size)]
    sizes = [end - first for first, end in bounds]

    def join(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(output, (0, max(sizes) - output.shape[-1])).contiguous()
        stage.bytes_sent += (peers.size - 1) * padded.nbytes
        return torch.cat([p[..., :size] for p, size in zip(peers.gather(padded), sizes, strict=True)], dim=-1)

    return join
