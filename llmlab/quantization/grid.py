"""Uniform grids: where the 2^bits levels of a group of weights lie, and rounding to them.

A group of weights w is stored as integers q in 0 .. 2^bits - 1 with one scale s and one zero point z:

    q = clamp(round(w / s) + z, 0, 2^bits - 1),    w ≈ s (q - z)

Round-to-nearest (RTN) stops there; GPTQ uses the same grids and chooses the q better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from llmlab.base.errors import InputError, NumericalError
from llmlab.kernels.packing import BITS, Quantized
from llmlab.quantization.neuqi import HUGE, TINY, judged_by_gptq, neuqi

SHRINKS = 24  # candidates of the grid search, from the full range of a group down to SMALLEST of it
SMALLEST = 0.4
TARGETS = ("gptq", "gptaq", "qronos")
GRIDS = ("shrink", "neuqi", "gptq")
ZERO_POINTS = ("integer", "real")
FAR = 64  # levels between zero and a group's weights: fp16 then still rounds a zero point by less than a 30th


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized.

    Attributes:
        bits: of a weight: 2, 3, 4 or 8.
        group_size: consecutive input columns that share scale and zero point; -1 for a whole row.
        symmetric: the zero point is the middle of the range; else each group has its own.
        act_order: GPTQ treats the columns with the largest activations first (`desc_act` in checkpoints).
        static_groups: with act_order, a group stays a run of neighbouring columns, so that kernels need no gather;
            its grid is found before GPTQ starts.
        search: find each grid by a search instead of taking the range of the weights.
        grid: how it is searched, where zero points are free (symmetric ones shrink). "shrink" tries shrunken ranges,
            "neuqi" scales and for each its best zero point, both for the least error weighted by the activations;
            "gptq" takes neuqi's grids and judges them by GPTQ's own loss.
        target: what GPTQ's columns are rounded to: "gptq" keeps the outputs for the inputs that the quantized model
            gives, "gptaq" and "qronos" those of the exact model (see `targets`).
        sweeps: over the codes that GPTQ found, each behind a new fit of the scales to them (see `refine`).
        zero_points: "integer", as checkpoints hold them, or "real": fp16 numbers, for copies that are not saved; the
            grid then reaches from the least to the largest weight, as GGUF's Q4_1 does, and is not searched.
        mixed_bits: (name of a matrix, its bits) for those that differ (see `mixed`).
        head_bits: of the output head, which is rounded to nearest (see `head`); None leaves it as it is.
        damping: added to the Hessian's diagonal, as a share of its mean.
        at_least: share of the layers' weights that must be in matrices that can be packed; else it is refused.
    """

    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    act_order: bool = True
    static_groups: bool = True
    search: bool = True
    grid: Literal["shrink", "neuqi", "gptq"] = "shrink"
    target: Literal["gptq", "gptaq", "qronos"] = "gptq"
    sweeps: int = 0
    zero_points: Literal["integer", "real"] = "integer"
    mixed_bits: tuple[tuple[str, int], ...] = ()
    head_bits: int | None = None
    damping: float = 0.01
    at_least: float = 0.9

    @property
    def levels(self) -> int:
        """Number of the highest level, 2^bits - 1."""
        return (1 << self.bits) - 1

    def columns_per_group(self, columns: int) -> int:
        """Group size of a Linear with that many input columns."""
        return columns if self.group_size == -1 else self.group_size

    def of(self, name: str) -> Scheme:
        """The scheme of one matrix."""
        return replace(self, bits=dict(self.mixed_bits).get(name, self.bits), mixed_bits=())

    def check(self) -> None:
        """Raise InputError for settings that make no sense."""
        head_bits = self.bits if self.head_bits is None else self.head_bits
        for bits in (self.bits, head_bits, *dict(self.mixed_bits).values()):
            if bits not in BITS:
                raise InputError(f"{bits} bits: choose one of {', '.join(map(str, BITS))}.")
        if self.group_size != -1 and (self.group_size < 8 or self.group_size % 8):
            raise InputError(f"group size {self.group_size}: choose -1 (a whole row) or a multiple of 8 such as 64.")
        of_names = (("grid", self.grid, GRIDS), ("target", self.target, TARGETS))
        for what, name, names in (*of_names, ("zero_points", self.zero_points, ZERO_POINTS)):
            if name not in names:
                raise InputError(f"unknown {what} {name!r}: choose one of {', '.join(names)}.")
        if self.sweeps < 0:
            raise InputError(f"{self.sweeps} sweeps: give 0 or a positive number.")
        if not 0 < self.damping < 1:
            raise InputError(f"damping {self.damping}: choose a share between 0 and 1, such as 0.01.")

    def misfit(self, rows: int, columns: int) -> str | None:
        """Why a matrix of this shape cannot be packed; None if it can."""
        if columns % 32 or rows % 32:
            return f"{rows} x {columns}, while the checkpoint format packs 32 weights at a time"
        if columns % self.columns_per_group(columns):
            fitting = ", ".join(str(g) for g in (16, 32, 64, 128, 256) if columns % g == 0)
            return f"whose {columns} input columns {self.group_size} does not divide: choose groups of {fitting} or -1"
        return None


def find_grid(
    weight: torch.Tensor,
    scheme: Scheme,
    importance: torch.Tensor | None = None,
    upper: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each row.

    Args:
        weight: [..., columns]; a grid for each row of the last dimension.
        scheme: bits, symmetry, search.
        importance: [columns] or [..., columns], weight of each squared error in the search: the mean squared activation
            of the column. Uniform by default.
        upper: of the factor of the columns of weight [rows, columns], for the grid "gptq"; without it that is "neuqi".

    Returns:
        (scales, zeros), fp32 [...]: scales as fp16 can hold them, zeros whole numbers in 1 .. 2^bits - 1, or real ones.
    """
    if scheme.zero_points == "real":
        return _whole_range(weight, scheme)
    importance = torch.ones_like(weight[..., :1]) if importance is None else importance
    if scheme.search and scheme.grid != "shrink" and not scheme.symmetric:
        if scheme.grid == "neuqi" or upper is None:
            return neuqi(weight, scheme.levels, importance)
        return judged_by_gptq(weight, scheme.levels, importance, upper)
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)  # zero is always a level
    if scheme.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    best = _grid(low, high, scheme)
    if not scheme.search:
        return best
    least = torch.full_like(low, float("inf"))
    for step in range(SHRINKS):
        shrink = 1 - step * (1 - SMALLEST) / SHRINKS
        scales, zeros = _grid(low * shrink, high * shrink, scheme)
        rounded = round_to(weight, scales[..., None], zeros[..., None], scheme)
        error = ((rounded - weight).square() * importance).sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, scales, best[0]), torch.where(better, zeros, best[1])
    return best


def _grid(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    scales = ((high - low) / scheme.levels).clamp(min=TINY)
    if scheme.symmetric:
        return scales.half().float(), torch.full_like(scales, (scheme.levels + 1) // 2)
    # Checkpoints store z - 1 in `bits` bits, so 0 cannot be written: a group without negative weights wastes a level.
    zeros = torch.round(-low / scales).clamp(1, scheme.levels)
    scales = torch.maximum(scales, high / (scheme.levels - zeros).clamp(min=1))
    return scales.clamp(max=HUGE).half().float(), zeros


def _whole_range(weight: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and real zero points of grids from the least to the largest weight, or to zero if that is far away."""
    low, high = weight.amin(-1), weight.amax(-1)
    far = torch.minimum(low.abs(), high.abs()) * scheme.levels > FAR * (high - low)
    low, high = torch.where(far, low.clamp(max=0), low), torch.where(far, high.clamp(min=0), high)
    scales = ((high - low) / scheme.levels).clamp(TINY, HUGE).half().float()
    return scales, (-low / scales).half().float()


def codes_of(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """q = clamp(round(w / s + z)), as floats; everything broadcasts."""
    return torch.clamp(torch.round(weight / scales + zeros), 0, scheme.levels)


def round_to(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The level of the grid nearest to each weight."""
    return (codes_of(weight, scales, zeros, scheme) - zeros) * scales


def group_grids(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grids of all groups of consecutive columns: weight [rows, columns] to (scales, zeros) [rows, groups]."""
    rows, columns = weight.shape
    size = scheme.columns_per_group(columns)
    if importance is not None:
        importance = importance.view(1, -1, size)
    return find_grid(weight.view(rows, -1, size), scheme, importance)


def rtn(weight: torch.Tensor, scheme: Scheme) -> Quantized:
    """Round-to-nearest: every weight to the nearest level of its group's grid.

    Raises NumericalError if a weight is NaN or infinite.
    """
    weight = finite(weight.float(), "weights")
    size = scheme.columns_per_group(weight.shape[1])
    scales, zeros = group_grids(weight, scheme)
    g_idx = torch.arange(weight.shape[1], device=weight.device) // size
    codes = codes_of(weight, scales[:, g_idx], zeros[:, g_idx], scheme)
    zeros = zeros.half() if scheme.zero_points == "real" else zeros.to(torch.uint8)
    return Quantized(codes.to(torch.uint8), scales.half(), zeros, g_idx.int())


def finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    """The tensor itself; raises NumericalError if it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        raise NumericalError(f"the {what} hold NaN or infinity: quantizing them makes no sense.")
    return tensor
