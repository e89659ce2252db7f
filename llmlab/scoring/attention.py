"""Attention over a row of packed tries: every node sees its ancestors, tries do not see one another.

The Linears of the model see all nodes as one row [1, nodes]; how attention takes them is the device's (`Sight`). On CPU
it takes the tries one by one, so nothing is padded anywhere; on GPUs in one call a layer (see `one_call`). What else
limits a layer's sight (a sliding window, a chunk) transformers says as a rule of two positions. It is asked of the
depths of two nodes here, so it holds along every path of a trie as along a plain sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from llmlab.kernels.fewops import rms_norm
from llmlab.kernels.plain import slow_on_cpu
from llmlab.model.lm import LM
from llmlab.scoring.trie import Trie

NAME = "llmlab_trie"

# transformers' mask functions: (batch, head, position of the query, position of the key) to whether it sees it.
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# What transformers hands to attention and means nothing here.
HARMLESS = {
    "sliding_window": "the rule has it",
    "is_causal": "the rule says so",
    "position_ids": "for flash attention; queries and keys are rotated already",
    "use_cache": "nothing is cached",
    "output_attentions": "nobody reads them",
    "output_hidden_states": "of the decoder's loop",
    "output_router_logits": "of the experts",
    "return_dict": "of the model's output",
}


def ancestor_mask(trie: Trie, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n, P + n], added to the attention scores: 0 where a node (row) sees a token of the P of the stem or a node
    (column), -inf elsewhere."""
    before = trie.depths[0]
    ends = torch.tensor([len(trie)] * before + trie.subtree_ends, device=device)
    place = torch.arange(-before, len(trie), device=device)
    # Node j is an ancestor of i (or i itself) when j <= i < end of j's subtree.
    sees = (place <= place[before:, None]) & (place[before:, None] < ends)
    return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill(~sees, float("-inf"))


def behind(before: int, depths: torch.Tensor) -> torch.Tensor:
    """Depths [..., n] behind those of a stem: [..., P + n]."""
    stem = torch.arange(before, device=depths.device).expand(*depths.shape[:-1], -1)
    return torch.cat([stem, depths], dim=-1)


@dataclass(frozen=True)
class Asked:
    """What a layer asks of attention: softmax(cap(q k^T scale)) v.

    Attributes:
        scale: of the scores.
        softcap: scores are capped at +-softcap (Gemma 2).
        sinks: [heads], scores of a place that holds nothing (gpt-oss).
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class Sight(ABC):
    """Who sees whom in a pass's row of tries, which have the same stem, and the attention that follows from it.

    Attributes:
        before: P, how many keys and values of the stem stand before those of the row.
    """

    def __init__(self, tries: list[Trie], dtype: torch.dtype, device: torch.device) -> None:
        self.tries, self.dtype, self.device = tries, dtype, device
        self.before = tries[0].depths[0]

    @staticmethod
    def places(lengths: list[int]) -> list[int]:
        """Where each trie of a row begins, and where the row ends."""
        return list(accumulate(lengths, initial=0))

    @abstractmethod
    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule, asked: Asked
    ) -> torch.Tensor:
        """[1, heads, N, d] queries (keys, values: [1, KV heads, P + N, d]) to [1, N, heads, d]; `rule`: see `under`."""

    def behind_stem(self, module: torch.nn.Module, *own: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """A layer's keys and values behind those of the stem; in the stem's own pass they are kept."""
        if not (stem := self.tries[0].stem):
            return own
        if self.before:
            return tuple(torch.cat(pair, dim=2) for pair in zip(stem.layers[module], own, strict=True))
        key, value = own
        stem.layers[module] = key.contiguous(), value.contiguous()
        return own


class TrieMasks(Sight):
    """Trie by trie, for CPU: the masks of a pass's tries, under each rule that a layer has; made once a pass."""

    def __init__(self, tries: list[Trie], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(tries, dtype, device)
        self.depths = [torch.tensor(trie.depths, device=device) for trie in tries]
        self.masks = {causal_mask_function: [ancestor_mask(trie, dtype, device) for trie in tries]}

    def under(self, rule: Rule) -> list[torch.Tensor]:
        """[n, P + n] for each trie: -inf where a node is no ancestor, or `rule` forbids what lies between depths."""
        if rule not in self.masks:
            ancestors, zero = self.masks[causal_mask_function], self.depths[0].new_zeros(())
            allowed = [rule(zero, zero, depths[:, None], behind(self.before, depths)) for depths in self.depths]
            self.masks[rule] = [
                mask.masked_fill(~sees, float("-inf")) for mask, sees in zip(ancestors, allowed, strict=True)
            ]
        return self.masks[rule]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rule: Rule, asked: Asked
    ) -> torch.Tensor:
        """One call a trie."""
        masks, dtype = self.under(rule), query.dtype
        if query.device.type == "cpu" and slow_on_cpu(dtype):
            query, key, value = query.float(), key.float(), value.float()
            masks = [mask.float() for mask in masks]
        # Without tensor cores torch's fused kernel is slower in bf16 than two plain matmuls, and not more precise.
        plain = query.device.type == "cpu" and query.dtype == torch.bfloat16
        fused = not plain and asked.softcap is None and asked.sinks is None
        outputs, start = [], 0
        for mask in masks:
            part = slice(start, start + len(mask))
            q, k, v = query[:, :, part], self.seen_by(part, key), self.seen_by(part, value)
            output = _fused_attention(q, k, v, mask, asked.scale) if fused else matmul_attention(q, k, v, mask, asked)
            outputs.append(output.transpose(1, 2))
            start += len(mask)
        return torch.cat(outputs, dim=1).to(dtype)

    def seen_by(self, part: slice, keys: torch.Tensor) -> torch.Tensor:
        """Keys (or values) of the stem and of a trie, which is that part of the row."""
        own = keys[:, :, self.before :][:, :, part]
        return torch.cat([keys[:, :, : self.before], own], dim=2) if self.before else own


def trie_rule(*, mask_function: Rule, use_vmap: bool = False, **_: object) -> Rule:
    """transformers' mask interface: instead of a mask the rule itself, which `trie_attention` applies to depths."""
    if use_vmap:
        raise NotImplementedError("its mask depends on more than positions")
    return mask_function


def trie_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Rule,
    *,
    sight: Sight,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: object,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, heads, N, d] queries (keys, values: KV heads) to [1, N, heads, d].

    `softcap` and `s_aux` are those of `Asked`. A keyword that is not known and not neutral raises: what a model asks
    for is never left out.
    """
    for name, wanted in others.items():
        if name not in HARMLESS and (isinstance(wanted, torch.Tensor) or wanted):
            raise NotImplementedError(f"attention with {name} over tries")
    if not callable(attention_mask):
        raise NotImplementedError("attention over tries with a mask that is made elsewhere")
    asked = Asked(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    key, value = sight.behind_stem(module, key, value)
    return sight.attend(query, key, value, attention_mask, asked), None


def _fused_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    grouped = q.shape[1] != k.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)


def matmul_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, asked: Asked
) -> torch.Tensor:
    """softmax(cap(q k^T scale) + mask) v: [batch, heads, n, d], the query heads of a KV head as rows of one matmul."""
    (batch, heads, n, d), (_, kv_heads, seen, _) = q.shape, k.shape
    keys, values = k.reshape(-1, seen, d), v.reshape(-1, seen, v.shape[-1])  # [batch x KV heads, P + n, d]
    folded = q.reshape(batch * kv_heads, -1, d) * asked.scale
    scores = torch.bmm(folded, keys.transpose(1, 2)).view(batch, heads, n, seen)
    if asked.softcap is not None:
        scores = scores.div_(asked.softcap).tanh_().mul_(asked.softcap)
    scores = scores.add_(mask)
    if asked.sinks is not None:
        sinks = asked.sinks.to(scores.dtype).view(1, heads, 1, 1).expand(batch, heads, n, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(dim=-1)[..., :seen]  # sums in fp32 inside the kernel
    return torch.bmm(weights.reshape(batch * kv_heads, -1, seen), values).view(batch, heads, n, v.shape[-1])


AttentionInterface.register(NAME, trie_attention)
AttentionMaskInterface.register(NAME, trie_rule)


@contextmanager
def tries_attend(lm: LM) -> Iterator[None]:
    """Within the block the model's attention is `trie_attention`: every forward pass needs its `sight`.

    Off the CPU an RMSNorm is one kernel there, where that gives its numbers: eight of torch's own would take turns.
    """
    # Attention modules read their own `config`. Layers that were copied or streamed may hold one of their own, which
    # set_attn_implementation() does not reach; with its attention the tries would see one another, silently.
    configs = {id(module.config): module.config for module in lm.model.modules() if hasattr(module, "config")}
    with ExitStack() as restored:
        for config in configs.values():
            restored.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = NAME
        for parent in list(lm.model.modules()) if lm.device.type != "cpu" else []:
            for name, child in list(parent.named_children()):
                if type(child).__name__.endswith("RMSNorm") and (fused := rms_norm(child)) is not child:
                    restored.callback(setattr, parent, name, child)
                    setattr(parent, name, fused)
        yield


@contextmanager
def decoded_once(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the layers run in the first forward pass alone; the others are given what came out of it.

    So the family's own forward pass says what becomes of the hidden states: norms, scales and caps around the head.
    """
    decoder = model.get_decoder()
    if decoder is model or "forward" in vars(decoder):
        yield
        return
    outputs: list[Any] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not outputs:
            outputs.append(type(decoder).forward(decoder, *args, **kwargs))
        return outputs[0]

    decoder.forward = forward
    try:
        yield
    finally:
        del decoder.forward
