"""A model in another dtype, or with its packed weights unpacked."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch

from llmlab.kernels.fast import packed_dtype
from llmlab.kernels.packed_linear import QuantLinear, prepare
from llmlab.model.lm import DTYPES, LM, check_dtype


def with_dtype(lm: LM, dtype: str | None = None) -> LM:
    """A copy of a model, quantized or not, with activations in `dtype`; grids stay as they are.

    Args:
        lm: the model.
        dtype: "fp32", "bf16" or "fp16"; by default what is fast around packed weights on this device.

    Raises InputError for an unknown dtype.
    """
    dtype = check_dtype(dtype or packed_dtype(lm.device), lm.device)
    model = copy.deepcopy(lm.model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
    for module in model.modules():
        if isinstance(module, QuantLinear) and module.bias is not None:
            module.bias = module.bias.to(DTYPES[dtype])
    model.config.dtype = DTYPES[dtype]
    prepare(model, DTYPES[dtype])
    return replace(lm, model=model, card=replace(lm.card, dtype=dtype))


def dequantized(lm: LM) -> LM:
    """A copy with plain Linears that hold the dequantized weights: the same outputs at a plain model's speed and size.

    For measuring what a grid loses, which needs no packed kernel.
    """
    model = copy.deepcopy(lm.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            plain = torch.nn.Linear(
                module.in_features, module.out_features, bias=module.bias is not None, device="meta"
            )
            plain.weight = torch.nn.Parameter(module.dequantize(lm.model.dtype).contiguous(), requires_grad=False)
            if module.bias is not None:
                plain.bias = torch.nn.Parameter(module.bias, requires_grad=False)
            model.set_submodule(name, plain)
    del model.config.quantization_config
    return replace(lm, model=model)


def bits_per_weight(model: torch.nn.Module) -> float:
    """Bits that a weight of a model's QuantLinears takes as saved: codes and grids, not biases or a kernel's copies."""
    linears = [m for m in model.modules() if isinstance(m, QuantLinear)]
    saved = [b for m in linears for name, b in m.named_buffers(recurse=False) if name != "bias"]
    return 8 * sum(b.numel() * b.element_size() for b in saved) / sum(m.in_features * m.out_features for m in linears)
