"""Attention over a row of packed tries: every node sees its ancestors, tries do not see one another.

The Linears of the model see all nodes as one row [1, nodes]; attention takes the tries one by one. So nothing is padded
anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface

from llmlab.kernels.plain import slow_on_cpu
from llmlab.model.lm import LM
from llmlab.scoring.trie import Trie

NAME = "llmlab_trie"


def ancestor_mask(trie: Trie, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n, n], added to the attention scores: 0 where a node (row) sees a node (column), -inf elsewhere."""
    ends = torch.tensor(trie.subtree_ends, device=device)
    place = torch.arange(len(trie), device=device)
    # Node j is an ancestor of i (or i itself) when j <= i < end of j's subtree.
    sees = (place <= place[:, None]) & (place[:, None] < ends)
    return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill(~sees, float("-inf"))


def trie_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    trie_masks: list[torch.Tensor],
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, heads, N, d] queries (keys, values: KV heads) to [1, N, heads, d]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = query.dtype
    if query.device.type == "cpu" and slow_on_cpu(dtype):
        query, key, value = query.float(), key.float(), value.float()
        trie_masks = [mask.float() for mask in trie_masks]
    # Without tensor cores torch's fused kernel is slower in bf16 than two plain matmuls, and not more precise.
    plain = query.device.type == "cpu" and query.dtype == torch.bfloat16
    attend = _matmul_attention if plain else _fused_attention
    outputs, start = [], 0
    for mask in trie_masks:
        part = slice(start, start + len(mask))
        outputs.append(attend(query[:, :, part], key[:, :, part], value[:, :, part], mask, scale).transpose(1, 2))
        start += len(mask)
    return torch.cat(outputs, dim=1).to(dtype), None


def _fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def _matmul_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(q k^T scale + mask) v, the query heads that share a KV head as rows of one matmul."""
    (_, heads, n, d), kv_heads = q.shape, k.shape[1]
    scores = torch.bmm(q.reshape(kv_heads, -1, d) * scale, k[0].transpose(1, 2)).view(heads, n, n)
    weights = scores.add_(mask).softmax(dim=-1)  # sums in fp32 inside the kernel
    return torch.bmm(weights.view(kv_heads, -1, n), v[0]).view(1, heads, n, d)


AttentionInterface.register(NAME, trie_attention)


@contextmanager
def tries_attend(lm: LM) -> Iterator[None]:
    """Within the block the model's attention is `trie_attention`: every forward pass needs `trie_masks`."""
    # Attention modules read their own `config`. Layers that were copied or streamed may hold one of their own, which
    # set_attn_implementation() does not reach; with its attention the tries would see one another, silently.
    configs = {id(module.config): module.config for module in lm.model.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
