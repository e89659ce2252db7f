"""Attention over a row of packed tries: every node sees its ancestors, tries do not see one another.

The Linears of the model see all nodes as one row [1, nodes]: no padding at all, and they are over nine tenths of the
work. Only here, where the work is small, tries become the rows of a batch padded to the longest one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from llmlab.model import LM
from llmlab.scoring.trie import Trie

NAME = "llmlab_trie"


@dataclass(frozen=True)
class Layout:
    """How a row of N nodes becomes a batch of T tries padded to L nodes, and back.

    Attributes:
        rows: [T, L] index into the N nodes; padding repeats node 0.
        places: [N] index into the T * L places.
        mask: [T, 1, L, L] additive, 0 where a node (query) sees a node (key), -inf elsewhere.
    """

    rows: torch.Tensor
    places: torch.Tensor
    mask: torch.Tensor


def layout(tries: list[Trie], dtype: torch.dtype, device: torch.device) -> Layout:
    """The layout of tries that stand one after another in a row."""
    lengths = torch.tensor([len(t) for t in tries])
    longest = int(lengths.max())
    place = torch.arange(longest)
    real = place < lengths[:, None]  # [T, L]
    starts = lengths.cumsum(0) - lengths
    rows = torch.where(real, starts[:, None] + place, 0)
    ends = torch.zeros(len(tries), longest, dtype=torch.long)  # padding is nobody's ancestor
    for index, trie in enumerate(tries):
        ends[index, : len(trie)] = torch.tensor(trie.subtree_ends)
    # Node j is an ancestor of i (or i itself) when j <= i < end of j's subtree.
    sees = (place <= place[:, None]) & (place[:, None] < ends[:, None, :])  # [T, query, key]
    sees[..., 0] |= ~real  # a padded query must see something, or its soft-max is 0/0
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, float("-inf"))
    return Layout(rows.to(device), real.flatten().nonzero().squeeze(-1).to(device), mask[:, None].to(device))


def trie_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    trie_layout: Layout,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, heads, N, d] queries (keys, values: KV heads) to [1, N, heads, d]."""
    rows = trie_layout.rows
    q, k, v = (x[0].transpose(0, 1)[rows].transpose(1, 2) for x in (query, key, value))  # [T, heads, L, d]
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=trie_layout.mask, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)[trie_layout.places][None], None


AttentionInterface.register(NAME, trie_attention)


@contextmanager
def tries_attend(lm: LM) -> Iterator[None]:
    """Within the block the model's attention is `trie_attention`: every forward pass needs `trie_layout`."""
    before = lm.model.config._attn_implementation
    lm.model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        lm.model.set_attn_implementation(before)
