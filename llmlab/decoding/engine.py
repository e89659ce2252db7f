"""Engine: forward passes over a static KV cache, for rows of different lengths.

The model's code is transformers'. Its attention is replaced by one that writes keys and values into buffers of a fixed
size and reads what each token may see: the row's past, and within the pass its ancestors, so that chains and trees of
drafted tokens are one case. Nothing is kept until `keep` says so: a rejected draft costs no copying.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from llmlab.base.errors import InputError
from llmlab.decoding.cache import NAME, Cache, PassInputs
from llmlab.decoding.timing import PassTimes
from llmlab.kernels import fewrows
from llmlab.kernels.replay import Recorder
from llmlab.model.lm import LM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 512  # tokens of a prompt that go through the model at once
WIDTHS = (1, 2, 3, 5, 9, 17)  # of a pass; others are padded to the next one, so that few shapes are recorded


class Engine:
    """A model ready to decode.

    Args:
        lm: the model. Weights are shared and keep their values; on CPU the engine lays them out a second time, and
            matrices with the same input move side by side (see `fewrows`).
        cache_of: share this engine's cache: a draft that is a cheaper version of the same model reads the keys and
            values of the exact one, and needs no prefill of its own.
        compile: let torch.compile make the passes of a few tokens (CUDA graphs on a GPU, inductor on CPU): the first
            pass of each shape takes up to a minute. By default they are recorded on CPU, which is faster there (see
            `record`), and run as they are on a GPU.

    Raises InputError for models whose layers see a part of the past only (sliding windows).
    """

    def __init__(self, lm: LM, *, cache_of: Engine | None = None, compile: bool = False) -> None:
        config = copy.copy(lm.model.config)
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            raise InputError(f"{lm.name} attends within windows of {config.sliding_window} tokens: not supported.")
        self.lm = lm
        self.model: PreTrainedModel = fewrows.shared_copy(lm.model)
        config._attn_implementation = NAME
        for module in self.model.modules():
            if hasattr(module, "config"):
                module.__dict__["config"] = config
        fewrows.prepare(self.model, lm.model.dtype, pack=not compile)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.groups = config.num_attention_heads // kv_heads
        self.device = lm.device
        self.owner = cache_of
        self.own_cache = Cache(0, 0)
        self.compile = compile
        self.recorder = Recorder(self.model, compile=compile)
        self.times = PassTimes(WIDTHS if cache_of is None else WIDTHS[:1])  # on another's cache it goes token by token
        self._pending: list[list[int]] = []  # slots of the last pass, by row

    @property
    def cache(self) -> Cache:
        """The cache in use."""
        return self.owner.cache if self.owner else self.own_cache

    @property
    def memory_bytes(self) -> int:
        """Bytes that the engine holds: weights shared with the model, its own copies of them, the cache."""
        return storage_bytes(self.tensors())

    def tensors(self) -> Iterator[torch.Tensor]:
        """All tensors that the engine holds; some share their memory."""
        for model in (self.lm.model, self.model):
            yield from model.parameters()
            yield from model.buffers()
        for keys, values in self.cache.buffers.values():
            yield from (keys, values)

    def start(self, batch: int, capacity: int) -> None:
        """An empty cache for `batch` rows of up to `capacity` tokens, drafted ones included.

        The buffers of before serve again if they are large enough: recorded passes write into them.
        """
        cache = self.own_cache
        if batch > cache.rows or capacity > cache.capacity:
            # A little more than asked for, so that a slightly longer prompt needs no new ones.
            self.own_cache = Cache(max(batch, cache.rows), -(-capacity // 128) * 128)
        self.own_cache.clear(batch)

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Read the prompts into the cache; logits [batch, vocabulary] that follow each prompt's last token."""
        logits: list[torch.Tensor | None] = [None] * len(prompts)
        for first in range(0, max(map(len, prompts)), CHUNK):
            chunk = [ids[first : first + CHUNK] for ids in prompts]
            after = self.forward(chunk, last=True)
            self.keep([list(range(len(ids))) for ids in chunk])
            for row, ids in enumerate(chunk):
                if ids:
                    logits[row] = after[row]
        return torch.stack([row for row in logits if row is not None])

    @torch.inference_mode()
    def forward(
        self, tokens: list[list[int]], parents: list[list[int]] | None = None, *, ahead: int = 0, last: bool = False
    ) -> torch.Tensor:
        """One pass; its tokens stand behind those of the cache but are not kept yet.

        Args:
            tokens: of each row; rows may differ in number.
            parents: for each token the index of the one before it in its row's list, -1 for the row's past; by default
                each row is a chain.
            ahead: tokens of earlier passes, not kept, that count as past.
            last: logits of each row's last token alone.

        Returns:
            [batch, width, vocabulary], or [batch, vocabulary] with `last`; rows are padded.
        """
        inputs = self._inputs(tokens, parents, ahead, pad=not last)
        if not last:
            return self.recorder.run(self._forward, inputs, self.cache)
        at = torch.tensor([max(0, len(ids) - 1) for ids in tokens])
        keep, where = torch.unique(at, return_inverse=True)
        return self._forward(*inputs, logits_to_keep=keep.to(self.device))[torch.arange(len(tokens)), where]

    def _forward(self, *tensors: torch.Tensor | None, logits_to_keep: int | torch.Tensor = 0) -> torch.Tensor:
        """The pass itself; what is recorded. `tensors` are those of a PassInputs."""
        inputs = PassInputs(*tensors)  # type: ignore[arg-type]  # the first two are never None
        logits: torch.Tensor = self.model(
            input_ids=inputs.input_ids, position_ids=inputs.positions, use_cache=False, logits_to_keep=logits_to_keep,
            static_cache=self.cache, inputs=inputs,
        ).logits  # fmt: skip
        return logits

    def _inputs(self, tokens: list[list[int]], parents: list[list[int]] | None, ahead: int, pad: bool) -> PassInputs:
        cache, device = self.cache, self.device
        width = max(map(len, tokens))
        past = [length + ahead for length in cache.lengths]
        if pad:
            padded = next((w for w in WIDTHS if w >= width), width)
            width = padded if max(past) + padded <= cache.capacity else width
        seen = max(past) + width
        if seen > cache.capacity:
            raise InputError(f"{seen} tokens do not fit a cache of {cache.capacity}: start it larger.")
        fixed = self.compile and pad  # a compiled pass reads the whole cache: its shapes never change
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in tokens])
        self._pending = [[n + i for i in range(width)] for n in past]
        alone = cache.batch == 1 and not fixed  # a row alone needs no slots, and one token of it no mask
        if alone and width == 1:
            positions, mask = torch.tensor([[n] for n in past]), None
        else:
            positions, mask = self._visible(past, width, cache.capacity if fixed else seen, parents)
        # Padding, and drafts that reach beyond the end, are not kept: their positions only have to exist.
        positions = positions.clamp_(max=self.lm.card.context_length - 1)
        start = torch.tensor(past[0]) if alone else None
        slots = None if alone else (torch.tensor(past)[:, None] + torch.arange(width)).to(device)
        mask = None if mask is None else mask.to(device)
        return PassInputs(input_ids.to(device), positions.to(device), start, slots, mask)

    def _visible(
        self, past: list[int], width: int, seen: int, parents: list[list[int]] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions [batch, width] and the mask [batch, 1, groups * width, seen]."""
        start, columns = torch.tensor(past)[:, None], torch.arange(seen)
        place = torch.arange(width)
        if parents is None:
            positions = start + place
            sees = columns <= positions[..., None]  # [batch, width, seen]: token i of row b sees slot j
        else:
            depths, inner = zip(*(_ancestors(row, width) for row in parents), strict=True)
            positions = start + torch.stack(depths)
            sees = (columns < start)[:, None].expand(-1, width, -1).clone()
            slots = (start + place)[:, None].expand(-1, width, -1)  # [batch, width, width]
            sees.scatter_(2, slots, torch.stack(inner))
        return positions, sees[:, None].repeat(1, 1, self.groups, 1)

    def keep(self, kept: list[list[int]]) -> None:
        """Keep these tokens of the last pass, in this order; indices into each row's tokens."""
        for row, indices in enumerate(kept):
            first = self.cache.lengths[row]
            slots = [self._pending[row][i] for i in indices]
            if slots != list(range(first, first + len(slots))):
                self.cache.move(row, slots, first)
            self.cache.lengths[row] = first + len(slots)

    def seconds(self, width: int, batch: int | None = None) -> float:
        """Seconds of a pass over `width` tokens of each of `batch` rows (those in the cache), from `profile`."""
        if not self.times.measured:
            self.profile()
        return self.times.seconds(batch or self.cache.batch, width)

    def profile(self) -> dict[int, float]:
        """Seconds of a pass by its width at the batch size of the cache, measured once. Keeps nothing in the cache."""
        return self.times.measure(self.forward, self.cache)


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory that lies behind tensors, counted once where they share it."""
    sizes: dict[object, int] = {}
    for tensor in tensors:
        if tensor.is_mkldnn:  # oneDNN's blocks, which tell no address
            sizes["blocks", id(tensor)] = tensor.numel() * tensor.element_size()
        else:
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _ancestors(parents: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth of each token below the past [width], and which tokens each sees within the pass [width, width]."""
    depths = torch.zeros(width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            depths[node] = depths[parent] + 1
            sees[node] |= sees[parent]
    return depths, sees
