"""Which matrices of a model can be packed; what stays as it is, and why."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch

from llmlab.base.errors import InputError
from llmlab.kernels.fewops import shared_copy
from llmlab.model.lm import LM, decoder_layers
from llmlab.model.matrices import expert_names, matrices, matrix_of, split_experts
from llmlab.quantization.grid import Scheme
from llmlab.quantization.head import plain_head

METHODS = ("gptq", "rtn")
NOT_CALLED = "the layer's code does not call it"


def fitting(layer: torch.nn.Module, scheme: Scheme) -> tuple[dict[str, torch.nn.Linear], dict[str, str]]:
    """The matrices of a layer, its experts split, that can be packed; the names of the others with the reason."""
    every = matrices(layer)
    kept = {name: reason for name, m in every.items() if (reason := scheme.misfit(*matrix_of(m).shape))}
    return {name: m for name, m in every.items() if name not in kept}, kept


def check_quantizable(lm: LM, scheme: Scheme, method: str) -> None:
    """Raise InputError for settings that make no sense or do not fit the model's layers; reads no weight."""
    scheme.check()
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    if method == "rtn" and scheme.target != "gptq":
        raise InputError(f"the target {scheme.target!r} is GPTQ's: round-to-nearest has no inputs; choose method gptq.")
    if method == "gptq" and scheme.zero_points == "real":
        raise InputError("real zero points are for copies that are rounded to nearest: choose method rtn.")
    if getattr(lm.model.config, "quantization_config", None) is not None:
        raise InputError(f"{lm.name} has no plain Linears ({lm.transformation}): quantize the original model.")
    if scheme.head_bits is not None:
        plain_head(lm, scheme)
    path, layers = decoder_layers(lm.model)
    names, packed, total, named = expert_names(lm.model), 0, 0, set[str]()
    left: dict[str, tuple[int, str]] = {}
    for index, original in enumerate(layers):
        layer = shared_copy(original)
        split_experts(layer, names)
        fits, kept = fitting(layer, scheme)
        named |= {f"{path}.{index}.{name}" for name in fits}
        inside = {id(m.weight) for m in fits.values()}
        for name, parameter in layer.named_parameters():
            if parameter.dim() > 1:
                total += parameter.numel()
                packed += parameter.numel() if id(parameter) in inside else 0
                reason = kept.get(name.removesuffix(".weight"), "it is not a matrix that checkpoints pack")
                if id(parameter) not in inside:
                    left[f"{path}.{index}.{name}"] = parameter.numel(), reason
    if unknown := dict(scheme.mixed_bits).keys() - named:
        raise InputError(f"{lm.name} has no matrix {min(unknown)} that can be packed: its bits are of another model.")
    if packed < scheme.at_least * total:
        largest = max(left, key=lambda name: left[name][0])
        raise InputError(
            f"only {packed / total:.0%} of the weights in {lm.name}'s layers can be packed; the largest of the "
            f"{len(left)} others is {largest}, {left[largest][1]}. Less than {scheme.at_least:.0%} is refused "
            "(at_least in the scheme)."
        )


def in_short(names: Iterable[str]) -> str:
    """Names of matrices for people: those that differ by layer or expert alone are one, with * for the number."""
    return ", ".join(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+\.", ".*.", name)) for name in names))
