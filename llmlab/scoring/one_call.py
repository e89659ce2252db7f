"""Attention over a row of tries in one call a layer: what GPUs need, where a call costs more than a small trie's work.

`Slots` serves every GPU: tries of a pass, which are of nearly equal length as they are sorted by it, stand in slots of
the longest one's length, so the row is a batch without a copy. `Flex` takes the row as it is; its compiled kernel needs
tensor cores of compute capability 8.0 and skips the blocks in which no node sees another. Both state the interval rule
of `Trie`: the query at q sees the key at kv when kv <= q < end[kv]. The P tokens of a stem stand at -P .. -1.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers.masking_utils import causal_mask_function

from llmlab.scoring.attention import Asked, Rule, Sight, behind, matmul_attention
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
        ends = [[self.length] * self.before + row for row in ends]
        self.ends = torch.tensor(ends, device=device)  # [tries, P + slot]
        self.depths = torch.tensor(depths, device=device)  # [tries, slot]
        self.masks: dict[Rule, torch.Tensor] = {}

    @staticmethod
    def places(lengths: list[int]) -> list[int]:
        """Where each slot begins, and where the row ends."""
        return [number * max(lengths) for number in range(len(lengths) + 1)]

    def under(self, rule: Rule) -> torch.Tensor:
        """[tries, 1, slot, P + slot]: -inf where a node is no ancestor or `rule` forbids it; made once a pass."""
        if rule not in self.masks:
            place, zero = torch.arange(-self.before, self.length, device=self.device), self.depths.new_zeros(())
            node = place[self.before :, None]
            sees = (place <= node) & (node < self.ends[:, None, :])
            sees &= rule(zero, zero, self.depths[:, :, None], behind(self.before, self.depths)[:, None, :])
            columns = -(-len(place) // ALIGNED) * ALIGNED
            mask = torch.zeros(*sees.shape[:2], columns, dtype=self.dtype, device=self.device)[..., : len(place)]
            self.masks[rule] = mask.masked_fill_(~sees, float("-inf"))[:, None]
        return self.masks[rule]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule, asked: Asked
    ) -> torch.Tensor:
        """One call. KV heads are repeated: with a mask and grouped heads torch would fall back to its math kernel."""
        plain = asked.softcap is None and asked.sinks is None
        keys, values = repeated(key[0], value[0], query.shape[1] // key.shape[1] if plain else 1)
        masks, queries, outputs = self.under(rule), self.slots(query[0]), []
        # Every trie has its own copy of the stem: so many at once that keys take about the memory of the row's.
        some = max(1, keys.shape[1] // (self.before + self.length))
        for first in range(0, len(self.tries), some):
            part = slice(first, first + some)
            q, mask, (k, v) = queries[part], masks[part], (self.seen_by(part, x) for x in (keys, values))
            if plain:
                output = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=asked.scale)
            else:
                output = matmul_attention(q, k, v, mask, asked)
            outputs.append(output)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output.transpose(1, 2).flatten(0, 1)[None]

    def slots(self, x: torch.Tensor) -> torch.Tensor:
        """[heads, N, d] of a row to [tries, heads, slot, d]."""
        return x.view(len(x), -1, self.length, x.shape[-1]).transpose(0, 1)

    def seen_by(self, part: slice, keys: torch.Tensor) -> torch.Tensor:
        """Keys (or values) of the stem and of some tries: [heads, P + N, d] to [tries, heads, P + slot, d]."""
        if not self.before:
            return self.slots(keys)[part]
        own = self.slots(keys[:, self.before :])[part]
        return torch.cat([keys[:, : self.before].expand(len(own), -1, -1, -1), own], dim=2)


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
        self.ends = torch.tensor([starts[-1]] * self.before + ends, device=device)  # [P + nodes]
        self.depths = torch.tensor([depth for trie in tries for depth in trie.depths], device=device)
        self.masks: dict[Rule, BlockMask] = {}

    def under(self, rule: Rule) -> BlockMask:
        """Which blocks hold a pair that sees one another, and the rule for the pairs; made once a pass."""
        before, ends, depths, seen = self.before, self.ends, self.depths, behind(self.before, self.depths)

        def sees(batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            ancestor = (kv - before <= q) & (q < ends[kv])
            return ancestor if rule is causal_mask_function else ancestor & rule(batch, head, depths[q], seen[kv])

        if rule not in self.masks:
            self.masks[rule] = create_block_mask(sees, None, None, len(depths), len(ends), device=self.device)
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
