"""What is a matrix in a model: Linears and their spellings, and experts taken out of the tensors that hold them all.

transformers holds the experts of a mixture-of-experts layer as a few tensors [experts, ...]. Quantization treats each
expert as matrices of its own, with the tokens that are routed to it, and checkpoints name them so:
`mlp.experts.3.gate_proj`, in Mixtral `experts.3.w1`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter, WeightRenaming
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Mamba's code multiplies by this one's weight itself, without calling the module.
READ_DIRECTLY = ("dt_proj",)
# Which of gate, up and down transformers' fused tensors hold.
FUSED: dict[str, tuple[int, ...]] = {"gate_up_proj": (0, 1), "up_proj": (1,), "down_proj": (2,)}
EXPERT_NAMES = ("gate_proj", "up_proj", "down_proj")


def is_matrix(module: torch.nn.Module) -> TypeGuard[torch.nn.Linear]:
    """Whether a module computes x W^T + b and nothing else: a Linear, Falcon's own, or GPT-2's transposed Conv1D."""
    kind = type(module)
    falcon = kind.__name__ == "FalconLinear" and isinstance(module, torch.nn.Linear)
    return kind is torch.nn.Linear or kind is Conv1D or falcon


def matrix_of(module: torch.nn.Linear) -> torch.Tensor:
    """Its weight [outputs, inputs]."""
    weight: torch.Tensor = module.weight
    return weight.T if isinstance(module, Conv1D) else weight


def set_matrix(module: torch.nn.Linear, weight: torch.Tensor) -> None:
    """Give it another weight [outputs, inputs]."""
    module.weight = torch.nn.Parameter(weight.T if isinstance(module, Conv1D) else weight, requires_grad=False)


def matrices(layer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """The matrices of a layer by name, without those that its code reads directly and the routers of experts."""
    routed = {f"{name.rpartition('.')[0]}.": len(m) for name, m in layer.named_modules() if isinstance(m, Experts)}

    def routes(name: str, module: torch.nn.Linear) -> bool:
        return routed.get(f"{name.rpartition('.')[0]}.") == len(matrix_of(module))

    every = {name: module for name, module in layer.named_modules() if is_matrix(module)}
    return {n: m for n, m in every.items() if n.rpartition(".")[2] not in READ_DIRECTLY and not routes(n, m)}


class Experts(torch.nn.ModuleList):
    """Experts as modules of their own, in the place of transformers' fused ones; the same function.

    Child e holds the matrices of expert e: up (and gate) and down, under the names that checkpoints use.

    Args:
        fused: a module that transformers' `use_experts_implementation` prepared; its tensors become parts' views.
        names: of gate, up and down.
    """

    between: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, fused: Any, names: tuple[str, str, str]) -> None:
        super().__init__()
        self.interleaved, self.gated = not fused.is_concatenated, bool(fused.has_gate)
        self.names = names if self.gated else names[1:]
        self.visit_all = False  # call experts that have no token, too: calibration over ranks counts on each call
        for e in range(fused.num_experts):
            expert = torch.nn.Module()
            for name, (weight, bias) in zip(self.names, self._parts(fused, e), strict=True):
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
                linear.weight = torch.nn.Parameter(weight, requires_grad=False)
                if bias is not None:
                    linear.bias = torch.nn.Parameter(bias, requires_grad=False)
                expert.add_module(name, linear)
            self.append(expert)
        rule = copy.copy(fused)  # what is between the matrices, without them
        vars(rule)["_parameters"] = {}
        between = MethodType(type(fused)._apply_gate, rule) if self.gated else fused.act_fn
        vars(self)["between"] = between  # no child of this list

    def _parts(self, fused: Any, e: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """(weight [out, in], bias) of an expert's matrices."""
        parts: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for name in ("gate_up_proj" if self.gated else "up_proj", "down_proj"):
            weight = getattr(fused, name).detach()[e]
            weight = weight.T if fused.is_transposed else weight
            bias = getattr(fused, f"{name}_bias").detach()[e] if fused.has_bias else None
            if name != "gate_up_proj":
                parts.append((weight, bias))
                continue
            for half in range(2):
                width = len(weight) // 2
                rows = slice(half, None, 2) if self.interleaved else slice(half * width, (half + 1) * width)
                parts.append((weight[rows], None if bias is None else bias[rows]))
        return parts

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Hidden states [tokens, hidden], the k experts of each token and their weights [tokens, k], to the same."""
        out = torch.zeros_like(hidden_states)
        for e in range(len(self)) if self.visit_all else torch.unique(top_k_index).tolist():
            if e >= len(self):  # how transformers marks a token that is not routed
                continue
            token, place = torch.where(top_k_index == e)
            matrix = [getattr(self[e], name) for name in self.names]
            x = hidden_states[token]
            wide = [m(x) for m in matrix[:-1]]
            if self.gated:
                x = torch.stack(wide, -1).flatten(-2) if self.interleaved else torch.cat(wide, -1)
            else:
                x = wide[0]
            y = matrix[-1](self.between(x)) * top_k_weights[token, place, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def split_experts(module: torch.nn.Module, names: tuple[str, str, str]) -> None:
    """Put `Experts` in the place of every fused one in a model or layer that transformers declares to be of its kinds.

    Others keep their tensors: they do not count as matrices.
    """
    for name, fused in list(module.named_modules()):
        if "is_concatenated" in vars(fused) and not vars(fused).get("has_post_expert_norm"):
            module.set_submodule(name, Experts(fused, names))


def expert_names(model: PreTrainedModel) -> tuple[str, str, str]:
    """What checkpoints of this architecture call gate, up and down of an expert."""
    names = list(EXPERT_NAMES)
    for rule in get_model_conversion_mapping(model, add_legacy=False):
        if not isinstance(rule, WeightConverter) or "experts" not in rule.target_patterns[0]:
            continue
        own = [s.rpartition("*.")[2].removesuffix(".weight") for s in rule.source_patterns if s.endswith(".weight")]
        fused = rule.target_patterns[0].rpartition(".")[2]
        for place, name in zip(FUSED.get(fused, ()), own, strict=False):
            names[place] = name
    return names[0], names[1], names[2]


def stored_names(model: PreTrainedModel) -> Callable[[str], str]:
    """From what the model calls a tensor to what checkpoints of its architecture call it."""
    rules = get_model_conversion_mapping(model, add_legacy=False)[::-1]
    renamings = [
        rule.reverse_transform()
        for rule in rules
        if isinstance(rule, WeightRenaming) and not isinstance(rule, PrefixChange)
    ]

    def stored(name: str) -> str:
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        return name

    return stored
