"""Tensors of old checkpoints that no model needs: a short list, each with its reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch

# Never a weight in any model: recomputed from the config, or a constant, by every reader.
BY_NAME = re.compile(
    r"\.rotary\w*\.inv_freq$"  # rotary frequencies: a buffer until transformers 4.31
    r"|\.(cos|sin)_cached$"  # and the angles made of them
    r"|\.masked_bias$"  # the -1e4 or -1e9 that GPT-2, GPT-J and GPT-NeoX put in the place of masked scores
    r"|(^|\.)position_ids$"  # 0, 1, 2, ...
    r"|\.embed_positions\.weights$"  # sines and cosines of positions, in XGLM
    r"|(^|\.)decoder\.version$"  # fairseq's number of its own format, in OPT
)
# GPT-2, GPT-J, GPT-NeoX, CodeGen: a triangle of ones; a band of it in GPT-Neo's local layers.
CAUSAL_MASK = re.compile(r"\.((attn|attention)\.bias|causal_mask)$")
BIAS = re.compile(r"\.bias$")


def harmless(name: str, read: Callable[[], torch.Tensor] | None, ignored: Iterable[str] = ()) -> bool:
    """Whether a stored tensor that has no place in its model changes nothing.

    Args:
        name: of the tensor.
        read: gives its values, asked for only where the name is not enough; None if they cannot be had.
        ignored: patterns that the model's own class leaves out, such as a head for drafting tokens.
    """
    if BY_NAME.search(name) or any(re.search(pattern, name) for pattern in ignored):
        return True
    if read is None:
        return False
    if CAUSAL_MASK.search(name):
        mask = read()
        if mask.dim() >= 2 and mask.shape[-1] == mask.shape[-2]:
            sees_itself = mask.diagonal(dim1=-2, dim2=-1).all()
            return bool(sees_itself) and torch.equal(mask, mask.bool().tril().to(mask.dtype))
    # A bias of zeros, which some writers of GPTQ checkpoints give every Linear.
    return BIAS.search(name) is not None and not read().any()
