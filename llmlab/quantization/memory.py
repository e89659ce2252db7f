"""What quantizing a model takes in memory, from its card alone: known, and refused if need be, before a weight is read.

With T calibration tokens, widths h (hidden), f (MLP) and a = heads x head size, c the widest of them, and b bytes a
number of the working dtype, the walk holds at its peak

    model        embeddings, norms and head twice (the result has its own), b bytes each, and all layers as packed
    layer        one decoder layer with all its experts, b bytes a weight
    activations  the larger one of T (2 h + 7 a) b, attention, and T (3 h + 3 f) b, the MLP: gate, up, their product;
                 half precision holds a matrix's inputs in fp32, too, and tests them: 13 f for 3 f b, 11 a more;
                 an expert gets at most twice its even share of the tokens and holds 6 f of each;
                 T (4 h + f) b more for a target that looks at the exact model's inputs, too
    solving      4 (7 c^2) or 4 (2 c^2 + 7 h f), the larger one: the Hessian with its inverse and factors; then GPTQ's
                 copies of the largest matrix

On a CPU the C library keeps up to half as much again of the activations (KEPT) between what is still in use. Foretold
over measured on a CPU: 0.8 to 1.6 (tests/test_memory.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from llmlab.base.errors import InputError
from llmlab.kernels.cuda import free_bytes
from llmlab.model.card import DTYPE_BYTES, ModelCard
from llmlab.model.lm import LM
from llmlab.quantization.grid import Scheme

KEPT = 1.5


@dataclass(frozen=True)
class Memory:
    """Bytes that quantizing takes at its peak, on the device where the layers are (see the module's equations)."""

    model: int
    layer: int
    activations: int
    solving: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.model + self.layer + self.activations + self.solving

    def __str__(self) -> str:
        parts = ("model", "layer", "activations", "solving")
        told = ", ".join(f"{part} {getattr(self, part) / 2**30:.2f}" for part in parts)
        return f"{self.total / 2**30:.2f} GiB ({told})"


def memory_needed(
    card: ModelCard,
    scheme: Scheme,
    tokens: int,
    dtype: str = "fp32",
    *,
    device: str = "cpu",
    exact: bool = False,
    loaded: bool = False,
) -> Memory:
    """What quantizing a model will take.

    Args:
        card: the model.
        scheme: bits and group size.
        tokens: of calibration, all rows together; 0 for round-to-nearest.
        dtype: "fp32", "bf16" or "fp16", in which layers are read and calibrated.
        device: its type: "cpu", "cuda" or "mps".
        exact: whether the target looks at the exact model's inputs, too.
        loaded: embeddings, norms and head are in memory already, and counted once, as copied.
    """
    size, hidden, mlp, heads = DTYPE_BYTES[dtype], card.hidden_size, card.intermediate_size, card.heads * card.head_dim
    rest = card.parameters - card.linear_parameters
    packed = card.weight_bytes(scheme.bits, scheme.columns_per_group(hidden)) - 2 * rest
    share = min(1.0, 2 * card.active_parameters / max(1, card.linear_parameters))
    held = 6 if card.active_parameters < card.linear_parameters else 3  # widths of the MLP
    half = size < 4
    attention = (2 * hidden + 7 * heads) * size + (11 * heads if half else 0)
    wide = 3 * hidden * size + share * mlp * max(held * size, 13 if half else 0)
    activations = tokens * (max(attention, wide) + (size * (4 * hidden + mlp) if exact else 0))
    columns = max(hidden, mlp, heads) if tokens else 0
    return Memory(
        model=packed + size * rest * (1 if loaded else 2),
        layer=size * card.linear_parameters // card.layers,
        activations=round(activations * (KEPT if device == "cpu" else 1)),
        solving=4 * max(7 * columns**2, 2 * columns**2 + 7 * hidden * mlp),
    )


def check_job(lm: LM, scheme: Scheme, calibration: torch.Tensor | None) -> None:
    """`check_memory` for a model whose embeddings, norms and head are loaded, with these calibration rows."""
    tokens, exact = 0 if calibration is None else calibration.numel(), scheme.target != "gptq"
    needed = memory_needed(lm.card, scheme, tokens, lm.dtype, device=lm.device.type, exact=exact, loaded=True)
    check_memory(lm.name, needed, lm.device)


def check_memory(name: str, needed: Memory, device: torch.device) -> None:
    """Raise InputError if a device has not what quantizing the model of that name needs."""
    if device.type not in ("cpu", "cuda"):  # which tell what is free
        return
    free = free_bytes(device) if device.type == "cuda" else int(psutil.virtual_memory().available)
    if needed.total > free:
        raise InputError(
            f"quantizing {name} takes about {needed}, while {free / 2**30:.2f} GiB are free on {device}: give fewer "
            "calibration rows, a half-precision dtype or a device with more memory."
        )
