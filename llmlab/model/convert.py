"""A model in another dtype, or with its packed weights unpacked."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from llmlab.kernels.choose import NATIVE
from llmlab.kernels.fast import packed_dtype
from llmlab.kernels.packed_linear import QuantLinear, prepare, quant_linears
from llmlab.model.lm import DTYPES, LM, check_dtype


def with_dtype(lm: LM, dtype: str | None = None) -> LM:
    """A copy of a model, quantized or not, with activations in `dtype`; grids stay as they are.

    Args:
        lm: the model.
        dtype: "fp32", "bf16" or "fp16"; by default what is fast around packed weights on this device.

    Raises InputError for an unknown dtype.
    """
    dtype = check_dtype(dtype or packed_dtype(lm.device), lm.device)
    # deepcopy takes what its memo has under a tensor's id: nothing is copied that the new dtype replaces.
    memo: dict[int, object] = {
        id(p): torch.nn.Parameter(p.detach().to(DTYPES[dtype], copy=True), requires_grad=p.requires_grad)
        for p in lm.model.parameters()
    }
    for linear in quant_linears(lm.model):
        # The C++ kernel holds the codes themselves; another one's copy of them is made anew below.
        memo[id(linear.fast)] = linear.fast if linear.kernel == NATIVE else None
        if linear.bias is not None:
            memo[id(linear.bias)] = linear.bias.to(DTYPES[dtype], copy=True)
    model = copy.deepcopy(lm.model, memo)
    model.config.dtype = DTYPES[dtype]
    prepare(model, DTYPES[dtype])
    return replace(lm, model=model, card=replace(lm.card, dtype=dtype))


def dequantized(lm: LM) -> LM:
    """A copy with plain Linears that hold the dequantized weights: the same outputs at a plain model's speed and size.

    For measuring what a grid loses, which needs no packed kernel.
    """
    plain = {id(linear): _plain(linear, lm.model.dtype) for linear in quant_linears(lm.model)}
    model = copy.deepcopy(lm.model, plain)  # deepcopy takes what its memo has in the place of each QuantLinear
    del model.config.quantization_config
    return replace(lm, model=model)


def _plain(packed: QuantLinear, dtype: torch.dtype) -> torch.nn.Linear:
    linear = torch.nn.Linear(packed.in_features, packed.out_features, bias=packed.bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(packed.dequantize(dtype).contiguous(), requires_grad=False)
    if packed.bias is not None:
        linear.bias = torch.nn.Parameter(packed.bias.clone(), requires_grad=False)
    return linear


def bits_per_weight(model: torch.nn.Module) -> float:
    """Bits that a weight of a model's QuantLinears takes as saved: codes and grids, not biases or a kernel's copies."""
    linears = quant_linears(model)
    saved: list[int] = [t.nbytes for m in linears for name, t in m.state_dict().items() if name != "bias"]
    return 8 * sum(saved) / sum(m.in_features * m.out_features for m in linears)
