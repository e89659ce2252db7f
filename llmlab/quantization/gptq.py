"""GPTQ on one Linear (Frantar et al. 2022, arXiv 2210.17323).

Quantize W [rows, columns] so that the *outputs* on calibration inputs X change least:

    argmin_Q ||W X - Q X||^2 = tr((W - Q) H (W - Q)^T),    H = X X^T / n                                  (eq. 1)

Columns are rounded one after another, and what rounding column j loses is made up for by the columns not yet rounded:

    w_F <- w_F - (w_j - q_j) / [H_F^-1]_jj  [H_F^-1]_j:                                                   (eq. 2)

All the H_F^-1 that this needs, F shrinking by a column at a time, are rows of one upper triangular matrix: the Cholesky
factor U of H^-1 = U^T U (section 3.3, step 3). Rows of W do not interact, so all are treated at once.

Read from the last column to the first this is Babai's nearest plane algorithm (arXiv 2507.18553): without clipping, a
row's loss is at most sum_j (s_j / 2)^2 / U_jj^2, s_j being the scale of column j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from llmlab.base.errors import NumericalError
from llmlab.kernels.packing import Quantized
from llmlab.quantization.grid import Scheme, codes_of, find_grid, finite
from llmlab.quantization.refine import refine
from llmlab.quantization.targets import Drift, Target, gptaq, qronos

BLOCK = 128  # columns whose updates reach the columns right of them in one matmul (section 3.3, step 2)
DAMPING_STEPS = 4  # each ten times the one before


class Hessian:
    """H = sum over tokens of x x^T / n, of the inputs of a Linear (the paper's 2 X X^T without factors that cancel),
    and the sums that tell how far the inputs are off the exact model's, if those are known."""

    def __init__(self, columns: int, device: torch.device) -> None:
        self.total = torch.zeros(columns, columns, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.off: list[torch.Tensor] = []  # sums of dx x^T and r x^T

    def add(self, inputs: torch.Tensor, off: Sequence[torch.Tensor] = ()) -> None:
        """Take in inputs [..., columns] of any float dtype; `off`: dx, and r [..., rows] where it is known.

        Raises NumericalError for NaN or infinity.
        """
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        finite(self.total.addmm_(x.T, x).diagonal(), "activations")  # sums of squares: what is not finite stays so
        self.tokens += len(x)
        products = [part.reshape(len(x), -1).float().T @ x for part in off]
        self.off = [a + b for a, b in zip(self.off, products, strict=True)] if self.off else products

    def sums(self) -> list[torch.Tensor]:
        """What is added up over processes, in place."""
        return [self.total, self.tokens, *self.off]

    def matrix(self) -> torch.Tensor:
        """H, fp32 [columns, columns]."""
        return self.total / self.tokens.clamp(min=1)

    def drift(self) -> Drift | None:
        """How far the inputs are off."""
        return Drift(*(part / self.tokens.clamp(min=1) for part in self.off)) if self.off else None


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
        drift: how far the inputs are off, in the original order, if the target makes up for that.
    """

    order: torch.Tensor
    upper: torch.Tensor
    importance: torch.Tensor
    dead: torch.Tensor
    hessian: torch.Tensor
    damping: float
    drift: Drift | None = None

    def of_rows(self, start: int, stop: int) -> Factor:
        """The same for a part of the weight's rows."""
        if self.drift is None or self.drift.residual is None:
            return self
        return replace(self, drift=Drift(self.drift.inputs, self.drift.residual[start:stop]))


def factorize(hessian: torch.Tensor, scheme: Scheme, drift: Drift | None = None) -> Factor:
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
                return Factor(order, upper, importance, dead, hessian, damping, drift)
        damping *= 10
    raise NumericalError(
        f"the Hessian is not positive definite, even damped by {damping / 10:g} of its mean: check the activations."
    )


def target_of(weight: torch.Tensor, factor: Factor, scheme: Scheme) -> Target:
    """What the columns of weight [rows, columns] are rounded to, in the factor's order."""
    order, drift = factor.order, factor.drift
    w = weight[:, order].T.contiguous()  # [columns, rows]: a column of W is a row in memory
    w[factor.dead[order]] = 0
    if drift is None or scheme.target == "gptq":
        return Target(w, w)
    pull = drift.pull(weight)[:, order].T
    if scheme.target == "gptaq":
        return gptaq(w, pull, factor.upper, drift.inputs[order][:, order])
    return qronos(w, pull, factor.upper, factor.importance[order[0]])


def gptq(weight: torch.Tensor, factor: Factor, scheme: Scheme) -> Quantized:
    """Quantize one Linear.

    Args:
        weight: [rows, columns], any float dtype.
        factor: of the Hessian of its inputs.
        scheme: bits, groups, order, grid, target.

    Raises NumericalError if a weight is NaN or infinite.
    """
    original = finite(weight.float(), "weights")
    order, columns = factor.order, len(factor.order)
    fixed = scheme.group_size == -1 or (scheme.act_order and scheme.static_groups)
    # A column's group goes by its place in the matrix, or by its place in the order.
    group_of = (order if fixed else torch.arange(columns, device=order.device)) // scheme.columns_per_group(columns)
    target = target_of(original, factor, scheme)
    codes, scales, zeros = round_columns(target, factor, scheme, group_of, fixed)
    if scheme.sweeps:
        scales = refine(target.best, codes, (scales, zeros), group_of, damped_hessian(factor), scheme)
    back = torch.argsort(order)
    result = Quantized(
        codes[back].T.to(torch.uint8).contiguous(),
        scales.T.half().contiguous(),
        zeros.T.to(torch.uint8).contiguous(),
        group_of[back].int(),
    )
    return with_losses(result, target, factor)


def round_columns(
    target: Target, factor: Factor, scheme: Scheme, group_of: torch.Tensor, fixed: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Equation 2 down the columns: codes [columns, rows], and scales and zero points [groups, rows].

    `fixed`: all grids are found before the first column is rounded; else each when the first of its columns is reached,
    which earlier ones have already changed.
    """
    w, upper, ahead = target.w.clone(), factor.upper, target.ahead
    size = scheme.columns_per_group(len(w))
    members = torch.argsort(group_of, stable=True).view(-1, size)  # [groups, size], in the order of rounding
    scales, zeros = (torch.empty(len(members), w.shape[1], device=w.device) for _ in range(2))

    def set_grid(g: int) -> None:
        inside = members[g]
        u = group_factor(upper, inside) if scheme.grid == "gptq" else None
        scales[g], zeros[g] = find_grid(w[inside].T.contiguous(), scheme, factor.importance[factor.order[inside]], u)

    for g in range(len(members)) if fixed else ():
        set_grid(g)
    codes, groups = torch.empty_like(w), group_of.tolist()
    block = BLOCK if fixed else size * max(1, BLOCK // size)  # no group in two blocks
    for start in range(0, len(w), block):
        stop = min(start + block, len(w))
        u, part, errors = upper[start:stop, start:stop], w[start:stop], torch.empty_like(w[start:stop])
        for j in range(stop - start):
            g = groups[start + j]
            if not fixed and (start + j) % size == 0:
                set_grid(g)
            column = part[j] if target.first is None or start + j else target.first
            codes[start + j] = q = codes_of(column, scales[g], zeros[g], scheme)
            errors[j] = (part[j] - (q - zeros[g]) * scales[g]) / u[j, j]
            part[j + 1 :] -= torch.outer(u[j, j + 1 :], errors[j])
            if ahead is not None:
                part[j + 1 :] += torch.outer(ahead[start + j, start + j + 1 : stop], part[j])
        w[stop:] -= upper[start:stop, stop:].T @ errors
        if ahead is not None:
            w[stop:] += ahead[start:stop, stop:].T @ part
    return codes, scales, zeros


def group_factor(upper: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """U of a few columns [n], in the order of rounding, all columns behind the first of them being free: [n, n]."""
    behind = upper[columns[0] :, columns]
    factor: torch.Tensor = torch.linalg.cholesky(behind.T @ behind, upper=True)
    return factor


def with_losses(quantized: Quantized, target: Target, factor: Factor) -> Quantized:
    """The same with its error against the target, and Babai's bound on it, both relative to the outputs' energy."""
    best = target.best[torch.argsort(factor.order)].T
    quantized.error = relative_error(best, quantized, factor.hessian)
    steps = quantized.scales.float()[:, quantized.g_idx.long()[factor.order]] / factor.upper.diagonal()
    quantized.bound = float((steps / 2).square().sum() / _energy(best, factor.hessian))
    return quantized


def damped_hessian(factor: Factor) -> torch.Tensor:
    """H in the order of rounding, damped as it was for the factor."""
    h = factor.hessian[factor.order][:, factor.order]
    h.diagonal()[factor.dead[factor.order]] = factor.importance.mean()
    h.diagonal().add_(factor.damping * factor.importance.mean())
    return h


def relative_error(weight: torch.Tensor, quantized: Quantized, hessian: torch.Tensor) -> float:
    """tr((W-Q) H (W-Q)^T) / tr(W H W^T): how much of the outputs' energy is lost on the calibration inputs (eq. 1)."""
    lost = weight - quantized.dequantize()
    return float(((lost @ hessian) * lost).sum() / _energy(weight, hessian))


def _energy(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return ((weight @ hessian) * weight).sum().clamp(min=torch.finfo(torch.float32).tiny)
