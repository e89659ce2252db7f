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
    start: Optional[torch.Tensor],  # noqa: UP045  # as TorchScript spells it
    slots: Optional[torch.Tensor],  # noqa: UP045  # as TorchScript spells it
    mask: Optional[torch.Tensor],  # noqa: UP045  # as TorchScript spells it
    scale: float,
    cap: float,
    sinks: Optional[torch.Tensor],  # noqa: UP045  # as TorchScript spells it
) -> torch.Tensor:
    """Write this pass's keys and values, then attend to what the cache holds.

    Args:
        query: [batch, heads, width, d].
        key: [batch, kv_heads, width, d]; `value` alike.
        cache: keys and values of this layer, [batch, kv_heads, capacity, d] each with its own d; they may have another
            dtype.
        start, slots, mask: see `PassInputs`.
        scale: of the scores.
        cap: scores s become cap * tanh(s / cap) (Gemma 2); 0 for none.
        sinks: [heads], a score of each head that takes attention away and brings no value (gpt-oss).

    Returns:
        [batch, width, heads, d of the values].
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
    if cap == 0.0 and sinks is None:
        result = torch.nn.functional.scaled_dot_product_attention(
            grouped, keys[:, :, :seen], values[:, :, :seen], attn_mask=mask, scale=scale
        )
    else:
        scores = torch.matmul(grouped, keys[:, :, :seen].transpose(2, 3)) * scale
        if cap != 0.0:
            scores = torch.tanh(scores / cap) * cap
        if mask is not None:
            scores = scores.masked_fill(mask.logical_not(), float("-inf"))
        if sinks is not None:
            # A row of `grouped` is a head and a token, in this order.
            sink = sinks.to(scores.dtype).view(1, key.size(1), -1, 1).repeat(batch, 1, 1, width)
            scores = torch.cat([scores, sink.reshape(batch, key.size(1), -1, 1)], dim=-1)
        weights = torch.softmax(scores.float(), dim=-1).to(values.dtype)
        result = torch.matmul(weights[..., :seen], values[:, :, :seen])
    return result.reshape(batch, heads, width, -1).transpose(1, 2).to(query.dtype)
