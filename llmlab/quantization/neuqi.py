"""Grids by search: NeUQI's (arXiv 2505.17595), and the same judged by GPTQ's own loss.

NeUQI looks for scale and zero point together, with the Hessian's diagonal h as weights and L = 2^bits - 1:

    argmin_{s, z} sum_i h_i (w_i - s (clamp(round(w_i / s) + z, 0, L) - z))^2

and finds, for each of a few scales, the best zero point. The paper's may lie between whole numbers, where the loss is
piecewise quadratic; checkpoints store whole ones. For those round(w_i / s) does not depend on z, which only moves the
window -z .. L - z in which it may lie: every window within the range of the weights is tried.

What a group loses in GPTQ is something else, for its columns make up for each other's errors. With U of the group's
columns, H^-1 = U^T U, GPTQ's recursion tells it without the other groups:

    loss = sum_j ((w_j - q_j) / U_jj)^2,    w_k <- w_k - (w_j - q_j) / U_jj  U_jk  for k > j
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

SCALES = 24  # candidates, from the full range of a group down to SMALLEST of it
SMALLEST = 0.4
TINY, HUGE = torch.finfo(torch.float16).tiny, torch.finfo(torch.float16).max  # of scales, as checkpoints store them

Grid = tuple[torch.Tensor, torch.Tensor]  # scales and zero points, fp32 [...]


def neuqi(weight: torch.Tensor, levels: int, importance: torch.Tensor) -> Grid:
    """The least weighted error of all scales and zero points.

    Args:
        weight: fp32 [..., columns], a grid for each row of the last dimension.
        levels: the highest code, L.
        importance: h, what `weight`'s shape broadcasts to.

    Returns:
        (scales, zeros), as `grid.find_grid`.
    """
    return _best(candidates(weight, levels, importance))[0]


def judged_by_gptq(weight: torch.Tensor, levels: int, importance: torch.Tensor, upper: torch.Tensor) -> Grid:
    """Of NeUQI's grids for each scale, the one with the least loss in GPTQ (idea: Samsung/TICO, pull request 746).

    Args:
        weight: fp32 [rows, columns] of one group, the columns in the order of rounding.
        levels, importance: as for `neuqi`.
        upper: U [columns, columns].
    """
    grids = candidates(weight, levels, importance)
    return _best((grid, gptq_loss(weight, grid, levels, upper)) for grid, _ in grids)[0]


def _best(grids: Iterator[tuple[Grid, torch.Tensor]]) -> tuple[Grid, torch.Tensor]:
    (scales, zeros), least = next(grids)
    for (scale, zero), loss in grids:
        better = loss < least
        least = torch.where(better, loss, least)
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
    return (scales, zeros), least


def candidates(weight: torch.Tensor, levels: int, importance: torch.Tensor) -> Iterator[tuple[Grid, torch.Tensor]]:
    """For each scale the grid with its best zero point, and what it loses."""
    low, high = weight.amin(-1).clamp(max=0), weight.amax(-1).clamp(min=0)
    root = importance.sqrt()
    weighted = weight * root
    for step in range(SCALES):
        share = 1 - step * (1 - SMALLEST) / SCALES
        scales = ((high - low) * share / levels).clamp(TINY, HUGE).half().float()
        rounded, steps = torch.round(weight / scales[..., None]), scales[..., None] * root
        # The window that starts at the least weight, and those further up; checkpoints store z - 1.
        first = (-rounded.amin(-1)).clamp(1, levels)
        windows = [(first - k).clamp(min=1) for k in range(min(levels, 2 + int(levels / share - levels)))]
        losses = [_loss(weighted, rounded, steps, zeros, levels) for zeros in windows]
        yield _best(((scales, zeros), loss) for zeros, loss in zip(windows, losses, strict=True))


def _loss(
    weighted: torch.Tensor, rounded: torch.Tensor, steps: torch.Tensor, zeros: torch.Tensor, levels: int
) -> torch.Tensor:
    """Of one window, from sqrt(h) w and sqrt(h) s: three passes over the weights."""
    inside = torch.clamp(rounded, -zeros[..., None], (levels - zeros)[..., None])
    return torch.addcmul(weighted, inside, steps, value=-1).square_().sum(-1)


def gptq_loss(weight: torch.Tensor, grid: Grid, levels: int, upper: torch.Tensor) -> torch.Tensor:
    """What GPTQ loses in each row of weight [rows, columns], by U [columns, columns] in the order of rounding."""
    (scales, zeros), w, loss = grid, weight.T.contiguous(), torch.zeros_like(grid[0])
    for j in range(len(w)):
        codes = torch.clamp(torch.round(w[j] / scales) + zeros, 0, levels)
        error = (w[j] - (codes - zeros) * scales) / upper[j, j]
        loss += error.square()
        w[j + 1 :] -= torch.outer(upper[j, j + 1 :], error)
    return loss
