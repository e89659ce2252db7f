"""GPTQ on one Linear (Frantar et al. 2022, arXiv 2210.17323).

Quantize W [rows, columns] so that the *outputs* on calibration inputs X change least:

    argmin_Q ||W X - Q X||^2 = tr((W - Q) H (W - Q)^T),    H = X X^T / n                                  (eq. 1)

Columns are rounded one after another, and what rounding column j loses is made up for by the columns not yet rounded:

    w_F <- w_F - (w_j - q_j) / [H_F^-1]_jj  [H_F^-1]_j:                                                   (eq. 2)

All the H_F^-1 that this needs, F shrinking by a column at a time, are rows of one upper triangular matrix: the Cholesky
factor U of H^-1 = U^T U (section 3.3, step 3). Rows of W do not interact, so all are treated at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmlab.base.errors import NumericalError
from llmlab.kernels.packing import Quantized
from llmlab.quantization.grid import Scheme, codes_of, find_grid, finite, group_grids

BLOCK = 128  # columns whose updates reach the columns right of them in one matmul (section 3.3, step 2)
DAMPING_STEPS = 4  # each ten times the one before


class Hessian:
    """H = sum over tokens of x x^T / n, of the inputs of a Linear (the paper's 2 X X^T without factors that cancel)."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, columns, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Take in inputs [..., columns] of any float dtype. Raises NumericalError for NaN or infinity."""
        rows = finite(inputs.reshape(-1, inputs.shape[-1]).float(), "activations")
        self.total.addmm_(rows.T, rows)
        self.tokens += len(rows)

    def matrix(self) -> torch.Tensor:
        """H, fp32 [columns, columns]."""
        return self.total / self.tokens.clamp(min=1)


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Hessian; the Linears that read the same input share it.

    Attributes:
        order: [columns], in which columns are rounded.
        upper: U with H^-1 = U^T U, for the columns in that order.
        importance: [columns], the Hessian's diagonal in the original order: mean squared activation.
        dead: [columns], columns whose input is always zero.
        hessian: H as given, in the original order.
        damping: that was needed, as a share of the mean of the diagonal.
    """

    order: torch.Tensor
    upper: torch.Tensor
    importance: torch.Tensor
    dead: torch.Tensor
    hessian: torch.Tensor
    damping: float


def factorize(hessian: torch.Tensor, scheme: Scheme) -> Factor:
    """Order the columns and invert; raises the damping where the Hessian is not positive definite.

    Raises NumericalError if that does not help.
    """
    importance = finite(hessian.diagonal().clone(), "Hessian")
    dead = importance == 0
    if dead.all():
        raise NumericalError("the calibration inputs are all zero: the calibration text or the model is broken.")
    order = torch.argsort(importance, descending=True) if scheme.act_order else torch.arange(len(importance))
    order = order.to(hessian.device)
    h = hessian[order][:, order]
    h.diagonal()[dead[order]] = importance.mean()
    damping = scheme.damping
    for _ in range(DAMPING_STEPS):
        damped = h + damping * importance.mean() * torch.eye(len(h), device=h.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return Factor(order, upper, importance, dead, hessian, damping)
        damping *= 10
    raise NumericalError(
        f"the Hessian is not positive definite, even damped by {damping / 10:g} of its mean: check the activations."
    )


def gptq(weight: torch.Tensor, factor: Factor, scheme: Scheme) -> Quantized:
    """Quantize one Linear.

    Args:
        weight: [rows, columns], any float dtype.
        factor: of the Hessian of its inputs.
        scheme: bits, groups, order.

    Raises NumericalError if a weight is NaN or infinite.
    """
    original = finite(weight.float(), "weights")
    rows, columns = original.shape
    size = scheme.columns_per_group(columns)
    order, upper = factor.order, factor.upper
    w = original[:, order].T.contiguous()  # [columns, rows]: a column of W is a row in memory
    w[factor.dead[order]] = 0
    if fixed := scheme.group_size == -1 or (scheme.act_order and scheme.static_groups):
        scales, zeros = group_grids(original, scheme, factor.importance)  # [rows, groups]
        group_of = order // size  # by the column's place in the matrix
    else:
        scales, zeros = (torch.empty(rows, columns // size, device=w.device) for _ in range(2))
        group_of = torch.arange(columns, device=w.device) // size  # by its place in the order
    codes = torch.empty_like(w)
    groups = group_of.tolist()
    block = max(BLOCK, size) if not fixed else BLOCK
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        u, part, errors = upper[start:stop, start:stop], w[start:stop], torch.empty_like(w[start:stop])
        for j in range(stop - start):
            g = groups[start + j]
            if not fixed and (start + j) % size == 0:  # the grid of a group that earlier columns have already changed
                inside = order[start + j : start + j + size]
                scales[:, g], zeros[:, g] = find_grid(part[j : j + size].T, scheme, factor.importance[inside])
            scale, zero = scales[:, g], zeros[:, g]
            codes[start + j] = q = codes_of(part[j], scale, zero, scheme)
            errors[j] = (part[j] - (q - zero) * scale) / u[j, j]  # eq. 2
            part[j + 1 :] -= torch.outer(u[j, j + 1 :], errors[j])
        w[stop:] -= upper[start:stop, stop:].T @ errors
    back = torch.argsort(order)
    result = Quantized(
        codes[back].T.to(torch.uint8).contiguous(), scales.half(), zeros.to(torch.uint8), group_of[back].int()
    )
    result.error = relative_error(original, result, factor.hessian)
    return result


def relative_error(weight: torch.Tensor, quantized: Quantized, hessian: torch.Tensor) -> float:
    """tr((W-Q) H (W-Q)^T) / tr(W H W^T): how much of the outputs' energy is lost on the calibration inputs (eq. 1)."""
    lost = weight - quantized.dequantize()
    energy = ((weight @ hessian) * weight).sum()
    return float(((lost @ hessian) * lost).sum() / energy.clamp(min=torch.finfo(torch.float32).tiny))
