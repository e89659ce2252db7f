"""Attention over a static cache, in the Python that TorchScript knows, too (see `whole`): annotations are objects."""

from typing import Optional

import torch

from llmlab.kernels.replay import whole


@whole
def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: tuple[torch.Tensor, torch.Tensor],
    start: Optional[torch.Tensor],  # noqa: UP045
    slots: Optional[torch.Tensor],  # noqa: UP045
    mask: Optional[torch.Tensor],  # noqa: UP045
    scale: float,
) -> torch.Tensor:
    """Write this pass's keys and values, then attend to what the cache holds.

    Args:
        query: [batch, heads, width, d].
        key: [batch, kv_heads, width, d]; `value` alike.
        cache: keys and values of this layer, both [batch, kv_heads, capacity, d]; they may have another dtype.
        start, slots, mask: see `PassInputs`.
        scale: of the scores.

    Returns:
        [batch, width, heads, d].
    """
    keys, values = cache
    batch, heads, width, d = query.size(0), query.size(1), query.size(2), query.size(3)
    if start is not None:
        seen = int(start) + width
        keys[:, :, seen - width : seen] = key
        values[:, :, seen - width : seen] = value
    else:
        assert slots is not None
        assert mask is not None
        rows = torch.arange(batch, device=key.device).unsqueeze(1)
        keys[rows, :, slots] = key.transpose(1, 2).to(keys.dtype)
        values[rows, :, slots] = value.transpose(1, 2).to(values.dtype)
        seen = mask.size(3)
    # Query heads that share a KV head stand as rows of one product, so that keys and values are read once.
    grouped = query.reshape(batch, key.size(1), -1, d).to(keys.dtype)
    result = torch.nn.functional.scaled_dot_product_attention(
        grouped, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask, scale=scale
    )
    return result.reshape(batch, heads, width, d).transpose(1, 2).to(query.dtype)
