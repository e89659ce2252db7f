"""Codes and scales after GPTQ, each made better for the other, by the same loss (QuantEase, arXiv 2309.01885).

GPTQ never looks back: no column is rounded anew when the ones behind it have settled, and no scale is fitted to the
codes it ended up with. With E = W - Q what remains is L = tr(E H E^T), and both steps can only make it smaller:

    scales  L is quadratic in a row's scales, Q_r = sum_g s_g c_g with c = codes - zero point: the least is at
            A s = b,    A_gh = c_g^T H c_h,    b_g = c_g^T H w_r
    codes   one column after another, all others as they are: q_j = round(q_j + (E H)_j / H_jj)
"""

from __future__ import annotations

import torch

from llmlab.quantization.grid import Scheme, codes_of
from llmlab.quantization.neuqi import HUGE, TINY

BLOCK = 128


def refine(
    w: torch.Tensor,
    codes: torch.Tensor,
    grids: tuple[torch.Tensor, torch.Tensor],
    group_of: torch.Tensor,
    hessian: torch.Tensor,
    scheme: Scheme,
) -> torch.Tensor:
    """Scales, sweep, scales, ...: changes the codes in place and returns new scales; zero points stay.

    Args:
        w: [columns, rows], what the codes come near to.
        codes: [columns, rows].
        grids: scales and zero points [groups, rows].
        group_of: [columns], the group of each column.
        hessian: [columns, columns], positive definite.
        scheme: bits, and how many sweeps.
    """
    (scales, zeros), zero = grids, grids[1][group_of]
    for _ in range(scheme.sweeps):
        scales = fit_scales(w, codes - zero, scales, group_of, hessian)
        sweep(w, codes, scales[group_of], zeros[group_of], hessian, scheme)
    return fit_scales(w, codes - zero, scales, group_of, hessian)


def fit_scales(
    w: torch.Tensor, centred: torch.Tensor, scales: torch.Tensor, group_of: torch.Tensor, hessian: torch.Tensor
) -> torch.Tensor:
    """Scales [groups, rows] of least loss for these codes; a row keeps its own where the fit is no better, or no scale.

    Args:
        w: [columns, rows]; centred: c, the same shape.
        scales: [groups, rows], so far.
        group_of: [columns].
        hessian: [columns, columns], damped.
    """
    groups, rows = scales.shape
    a = torch.zeros(rows, groups, groups, device=w.device)
    target = hessian @ w
    b = torch.zeros_like(scales).index_add_(0, group_of, centred * target)
    for g in range(groups):
        inside = torch.where(group_of == g)[0]
        reach = hessian[:, inside] @ centred[inside]  # [columns, rows]
        a[:, :, g] = torch.zeros_like(scales).index_add_(0, group_of, centred * reach).T
    diagonal = a.diagonal(dim1=-2, dim2=-1)
    # Held a little near the scales so far, for a group of zeros has no say.
    hold = 1e-4 * diagonal + 1e-8 * diagonal.mean(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    fitted, failed = torch.linalg.solve_ex(a + torch.diag_embed(hold), b.T + hold * scales.T)
    fitted = fitted.half().float()

    def loss(s: torch.Tensor) -> torch.Tensor:  # [rows, groups] to [rows], without w's own energy
        return ((a @ s[..., None])[..., 0] * s - 2 * b.T * s).sum(-1)

    better = (fitted > TINY).all(-1) & (fitted < HUGE).all(-1) & (loss(fitted) < loss(scales.T)) & (failed == 0)
    return torch.where(better[:, None], fitted, scales.T).T.contiguous()


def sweep(
    w: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    hessian: torch.Tensor,
    scheme: Scheme,
) -> None:
    """Each column once, in place: codes [columns, rows], with scale and zero point of each of them."""
    slope = hessian @ (w - (codes - zero) * scale)  # (E H)^T
    for start in range(0, len(w), BLOCK):
        stop = min(start + BLOCK, len(w))
        h, part = hessian[start:stop, start:stop], slope[start:stop]
        steps = torch.empty_like(part)
        for j, k in enumerate(range(start, stop)):
            level = (codes[k] - zero[k]) * scale[k]
            codes[k] = q = codes_of(level + part[j] / h[j, j], scale[k], zero[k], scheme)
            steps[j] = (q - zero[k]) * scale[k] - level
            part[j + 1 :] -= torch.outer(h[j, j + 1 :], steps[j])
        slope[stop:] -= hessian[stop:, start:stop] @ steps
