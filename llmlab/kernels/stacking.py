"""Matrices with the same input side by side, as one matrix, without a second copy of their numbers."""

import torch


@torch.inference_mode(False)
def stacked(parts: list[torch.Tensor], dim: int = 0) -> torch.Tensor:
    """One matrix of several, below one another (dim 0) or side by side (1); they become views of it.

    Whoever holds one of these tensors has its numbers in their new place.
    """
    first, size = parts[0], sum(part.shape[dim] for part in parts)
    ends = [part.data_ptr() + part.shape[dim] * part.stride(dim) * part.element_size() for part in parts]
    in_order = [part.data_ptr() for part in parts[1:]] == ends[:-1]
    whole = [size if axis == dim else length for axis, length in enumerate(first.shape)]
    if in_order and len({(part.untyped_storage().data_ptr(), part.stride()) for part in parts}) == 1:
        # They are such views already: another engine of this model made them.
        return first.detach().as_strided(whole, first.stride())
    matrix = torch.cat([part.detach() for part in parts], dim=dim)
    for part, place in zip(parts, torch.split(matrix, [part.shape[dim] for part in parts], dim=dim), strict=True):
        part.data = place
    return matrix
