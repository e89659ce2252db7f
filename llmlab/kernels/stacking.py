"""Where matrices stand in memory: side by side as one, or one behind another, without a second copy."""

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


@torch.inference_mode(False)
def in_a_row(tensors: list[torch.Tensor]) -> None:
    """Move contiguous tensors of one dtype one behind another, in the order in which they are read.

    Processors read ahead along one stretch of memory, not from one of a thousand small ones to the next: the 4-bit
    matrices of a small model are read a sixth faster. Whoever holds one of them has its numbers in their new place.
    """
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    if [tensor.data_ptr() for tensor in tensors[1:]] == ends[:-1]:  # by another engine of this model, or none
        return
    whole = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))  # memory is taken as it is written to
    for tensor, place in zip(tensors, torch.split(whole, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.data = place.view(tensor.shape).copy_(tensor)
