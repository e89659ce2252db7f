"""What each token of a pass sees: its row's past and its ancestors in the pass; with a sliding window those near it."""

from __future__ import annotations

import torch


def visible(
    past: list[int], width: int, seen: int, parents: list[list[int]] | None, window: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Positions and masks of a pass.

    Args:
        past: tokens of each row before it.
        width: tokens of each row in it, padding included.
        seen: slots of the cache to look at, those of the pass included.
        parents: see `Engine.forward`.
        window: how many tokens, itself included, a token sees in layers with a sliding window.

    Returns:
        Positions [batch, width]; whether a token sees a slot, [batch, width, seen]; the same within the window, None if
        all slots are.
    """
    start, place, columns = torch.tensor(past)[:, None], torch.arange(width), torch.arange(seen)
    at = columns  # position of each slot
    if parents is None:
        positions = start + place
        sees = columns <= positions[..., None]  # token i of row b sees slot j
    else:
        depths, inner = zip(*(_ancestors(row, width) for row in parents), strict=True)
        positions = start + torch.stack(depths)
        sees = (columns < start)[:, None].expand(-1, width, -1).clone()
        slots = (start + place)[:, None].expand(-1, width, -1)  # [batch, width, width]
        sees.scatter_(2, slots, torch.stack(inner))
        at = columns.repeat(len(past), 1).scatter_(1, start + place, positions)[:, None]
    if window is None or seen <= window:
        return positions, sees, None
    return positions, sees, sees & (positions[..., None] - at < window)


def _ancestors(parents: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth of each token below the past [width], and which tokens each sees within the pass [width, width]."""
    depths = torch.zeros(width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            depths[node] = depths[parent] + 1
            sees[node] |= sees[parent]
    return depths, sees
