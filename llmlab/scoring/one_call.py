"""Attention over a row of tries in one call a layer: what GPUs need, where a call costs more than a small trie's work.

`Slots` serves every GPU: tries of a pass, which are of nearly equal length as they are sorted by it, stand in slots of
the longest one's length, so the row is a batch without a copy. `Flex` takes the row as it is; its compiled kernel needs
tensor cores of compute capability 8.0 and skips the blocks in which no node sees another. Both state the interval rule
of `Trie`: the query at q sees the key at kv when kv <= q < end[kv].
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.masking_utils import causal_mask_function

from llmlab.scoring.attention import Asked, Rule, Sight, matmul_attention
from llmlab.scoring.trie import Trie

ALIGNED = 16  # elements between the rows of a mask: torch's memory-efficient kernel copies other masks at every call


class Slots(Sight):
    """Tries in slots of equal length, a batch for one call of the memory-efficient kernel; fillers see themselves."""

    def __init__(self, tries: list[Trie], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(tries, dtype, device)
        self.length = max(map(len, tries))
        fill = [list(range(len(trie), self.length)) for trie in tries]
        ends = [trie.subtree_ends + [place + 1 for place in rest] for trie, rest in zip(tries, fill, strict=True)]
        depths = [trie.depths + [0] * len(rest) for trie, rest in zip(tries, fill, strict=True)]
        self.ends, self.depths = torch.tensor(ends, device=device), torch.tensor(depths, device=device)  # [tries, slot]
        self.masks: dict[Rule, torch.Tensor] = {}

    @staticmethod
    def places(lengths: list[int]) -> list[int]:
        """Where each slot begins, and where the row ends."""
        return [number * max(lengths) for number in range(len(lengths) + 1)]

    def under(self, rule: Rule) -> torch.Tensor:
        """[tries, 1, slot, slot]: -inf where a node is no ancestor or `rule` forbids it; made once a pass."""
        if rule not in self.masks:
            place, zero = torch.arange(self.length, device=self.device), self.depths.new_zeros(())
            sees = (place <= place[:, None]) & (place[:, None] < self.ends[:, None, :])
            sees &= rule(zero, zero, self.depths[:, :, None], self.depths[:, None, :])
            columns = -(-self.length // ALIGNED) * ALIGNED
            mask = torch.zeros(*sees.shape[:2], columns, dtype=self.dtype, device=self.device)[..., : self.length]
            self.masks[rule] = mask.masked_fill_(~sees, float("-inf"))[:, None]
        return self.masks[rule]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule, asked: Asked
    ) -> torch.Tensor:
        """One call. KV heads are repeated: with a mask and grouped heads torch would fall back to its math kernel."""
        mask, tries = self.under(rule), len(self.tries)
        plain = asked.softcap is None and asked.sinks is None
        keys, values = repeated(key[0], value[0], query.shape[1] // key.shape[1] if plain else 1)
        q, k, v = (x.view(len(x), tries, self.length, -1).transpose(0, 1) for x in (query[0], keys, values))
        if plain:
            output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=asked.scale)
        else:
            output = matmul_attention(q, k, v, mask, asked)
        return output.transpose(1, 2).flatten(0, 1)[None]


def repeated(key: torch.Tensor, value: torch.Tensor, groups: int) -> list[torch.Tensor]:
    """Keys and values [KV heads, N, d], each head `groups` times: [heads, N, d].

    Together by one kernel: on a GPU torch's `cat` has it for inputs of up to four dimensions, whatever their strides.
    """
    if groups == 1:
        return [key, value]
    wide = [x[:, None].expand(-1, groups, -1, -1) for x in (key, value)]
    if key.shape == value.shape:
        return [x.flatten(0, 1) for x in torch.cat(wide).chunk(2)]
    return [x.flatten(0, 1) for x in wide]


class Flex(Sight):
    """FlexAttention (arXiv 2412.05496) over the row as it is."""

    def __init__(self, tries: list[Trie], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(tries, dtype, device)
        starts = self.places(list(map(len, tries)))
        ends = [start + end for trie, start in zip(tries, starts, strict=False) for end in trie.subtree_ends]
        self.ends = torch.tensor(ends, device=device)  # [nodes]
        self.depths = torch.tensor([depth for trie in tries for depth in trie.depths], device=device)
        self.masks: dict[Rule, BlockMask] = {}

    def under(self, rule: Rule) -> BlockMask:
        """Which blocks hold a pair that sees one another, and the rule for the pairs; made once a pass."""
        ends, depths = self.ends, self.depths

        def sees(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            ancestor = (kv <= q) & (q < ends[kv])
            return ancestor if rule is causal_mask_function else ancestor & rule(batch, head, depths[q], depths[kv])

        if rule not in self.masks:
            nodes = len(ends)
            self.masks[rule] = create_block_mask(sees, None, None, nodes, nodes, device=self.device)
        return self.masks[rule]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule, asked: Asked
    ) -> torch.Tensor:
        """One call; grouped heads are the kernel's own."""
        if asked.softcap is not None or asked.sinks is not None:
            raise NotImplementedError("FlexAttention with capped scores or sinks")
        grouped = query.shape[1] != key.shape[1]
        run = _compiled() if query.is_cuda else flex_attention
        output = run(query, key, value, block_mask=self.under(rule), scale=asked.scale, enable_gqa=grouped)
        return output.transpose(1, 2)  # type: ignore[no-any-return]  # untyped in torch


@cache
def _compiled() -> Any:
    """FlexAttention's kernel, for rows of any length."""
    return torch.compile(flex_attention, dynamic=True)
