"""Engine: forward passes over a static KV cache, for rows of different lengths.

The model's code is transformers'. Its attention is replaced by one that writes keys and values into buffers of a fixed
size and reads what each token may see: the row's past, and within the pass its ancestors, so that chains and trees of
drafted tokens are one case. Nothing is kept until `keep` says so: a rejected draft costs no copying.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from llmlab.base.errors import InputError
from llmlab.decoding.cache import NAME, Cache, PassInputs
from llmlab.decoding.timing import PassTimes, padded
from llmlab.decoding.visible import visible
from llmlab.kernels.fewops import shared_copy
from llmlab.kernels.fewrows import prepare
from llmlab.kernels.replay import Recorder
from llmlab.model.lm import LM
from llmlab.model.selfcheck import check, plain_logits, probe, small_windows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CHUNK = 512  # tokens of a prompt that go through the model at once
WIDTHS = (1, 2, 3, 5, 9, 17)  # of a pass; others are padded to the next one, so that few shapes are recorded


class NotServed(InputError):
    """A model that the static cache does not serve exactly."""


class Engine:
    """A model ready to decode.

    Args:
        lm: the model. Weights are shared and keep their values; matrices with the same input move side by side, and
            bf16's, where the processor multiplies it, are laid out a second time (see `fewrows`).
        cache_of: share this engine's cache: a draft that is a cheaper version of the same model reads the keys and
            values of the exact one, and needs no prefill of its own.
        compile: let torch.compile make the passes of a few tokens: the first pass of each shape takes up to a minute.
            By default they are recorded on CPU, which is faster there (see `record`). On a GPU they are captured as
            CUDA graphs, compiled or not; prompts are read as they come.

    Raises `NotServed` for a model for which these passes do not give the numbers of its plain forward pass (see
    `selfcheck`); a draft on another's cache is not checked, since it is verified anyway.
    """

    kind = "static KV cache"

    def __init__(self, lm: LM, *, cache_of: Engine | None = None, compile: bool = False) -> None:
        self.lm = lm
        self.device = lm.device
        self.owner = cache_of
        self.own_cache = Cache(0, 0)
        self.compile = compile
        self.times = PassTimes(WIDTHS)
        if cache_of is not None:  # on another's cache it goes token by token
            self.times = PassTimes(WIDTHS[:1], cache_of.times.agree)
        self._pending: list[list[int]] = []  # slots of the last pass, by row
        if cache_of is None:
            checked = check(lm, f"the {self.kind}", self._probed, lambda: torch.cat([plain_logits(lm)] * 2))
            if not checked.passed:
                raise NotServed(f"{lm.name}: {checked.reason}.")
            self.__dict__.pop("model", None)  # made for the check, with short windows
            self.own_cache = Cache(0, 0)
        self.recorder = Recorder(self.model, compile=compile)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model with this attention and matrices joined; its weights are shared."""
        model: PreTrainedModel = shared_copy(self.lm.model)
        configs: dict[int, PreTrainedConfig] = {}
        for module in model.modules():
            if hasattr(module, "config"):
                config = configs.setdefault(id(module.config), copy.copy(module.config))
                config._attn_implementation_internal = NAME  # the property would change the original's parts
                module.__dict__["config"] = config
        with torch.inference_mode(False):  # its tensors outlive the check
            prepare(model, self.lm.model.dtype, pack=not self.compile)
        return model

    @cached_property
    def groups(self) -> int:
        """Query heads that share a KV head."""
        config = self.lm.model.config
        heads: int = config.num_attention_heads
        return heads // int(getattr(config, "num_key_value_heads", None) or heads)

    def _probed(self) -> torch.Tensor:
        """What is held against the plain forward pass's logits, twice."""
        self.recorder = Recorder(self.model, compile=False)
        self.recorder.records = False  # a recording is held against the pass that it records
        with small_windows(self.model):
            rows = probe(self.lm)
            return torch.cat([*self._read(rows), *(self._read([ids])[0] for ids in rows)])

    def _read(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """Logits [tokens, vocabulary] of rows read in two chunks, a step, and a tree with their last tokens."""
        self.start(len(rows), max(map(len, rows)) + 2)
        logits: list[list[torch.Tensor]] = [[] for _ in rows]
        # The rows' chunks differ in length.
        ends = [(0, len(ids) // (2 + row), len(ids) - 4, len(ids) - 3) for row, ids in enumerate(rows)]
        for part in range(3):
            chunk = [ids[end[part] : end[part + 1]] for ids, end in zip(rows, ends, strict=True)]
            passed = self.forward(chunk)
            self.keep([list(range(len(ids))) for ids in chunk])
            for row, ids in enumerate(chunk):
                logits[row].append(passed[row, : len(ids)])
        tree = [[ids[-3], ids[-2], ids[-2], ids[-3], ids[-1]] for ids in rows]
        passed = self.forward(tree, [[-1, -1, 0, 0, 2]] * len(rows))
        return [torch.cat([*logits[row], passed[row, [0, 2, 4]]]) for row in range(len(rows))]

    @property
    def cache(self) -> Cache:
        """The cache in use."""
        return self.owner.cache if self.owner else self.own_cache

    @property
    def seconds_recording(self) -> float:
        """Seconds spent on recording and compiling passes."""
        return self.recorder.seconds

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
            window = getattr(self.model.config, "sliding_window", None)
            self.own_cache = Cache(max(batch, cache.rows), -(-capacity // 128) * 128, window)
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
        logits = self._forward(*inputs, logits_to_keep=keep.to(self.device))
        if logits.shape[1] != len(keep):  # some models give all
            where = at
        return logits[torch.arange(len(tokens)), where]

    def _forward(self, *tensors: torch.Tensor | None, logits_to_keep: int | torch.Tensor = 0) -> torch.Tensor:
        """The pass itself; what is recorded. `tensors` are those of a PassInputs."""
        inputs = PassInputs(*tensors)  # type: ignore[arg-type]  # the first two are never None
        if inputs.start is not None:
            inputs = inputs._replace(slots=inputs.start + torch.arange(inputs.input_ids.shape[1]))
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
            wider = padded(width, WIDTHS)
            width = wider if max(past) + wider <= cache.capacity else width
        seen = max(past) + width
        if seen > cache.capacity:
            raise InputError(f"{seen} tokens do not fit a cache of {cache.capacity}: start it larger.")
        fixed = self.recorder.fixed and pad
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in tokens])
        self._pending = [[n + i for i in range(width)] for n in past]
        alone = cache.batch == 1 and not fixed  # a row alone needs no slots, and one token of it no mask
        far = cache.window is not None and seen > cache.window
        if alone and width == 1 and not far:
            positions, mask, near = torch.tensor([[n] for n in past]), None, None
        else:
            positions, *sees = visible(past, width, cache.capacity if fixed else seen, parents, cache.window)
            mask, near = (None if s is None else s[:, None].repeat(1, 1, self.groups, 1).to(device) for s in sees)
        # Padding, and drafts that reach beyond the end, are not kept: their positions only have to exist.
        positions = positions.clamp_(max=self.lm.card.context_length - 1)
        start = torch.tensor(past[0]) if alone else None
        slots = None if alone else (torch.tensor(past)[:, None] + torch.arange(width)).to(device)
        return PassInputs(input_ids.to(device), positions.to(device), start, slots, mask, near)

    def select(self, rows: list[int]) -> None:
        """Only these rows go on."""
        self.cache.select(rows)

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
        if not self.times.reach(self.cache.batch):
            self.profile()
        return self.times.seconds(batch or self.cache.batch, width)

    def observe(self, width: int, seconds: float) -> None:
        """What a pass over `width` tokens of each row took, see `PassTimes.observe`."""
        self.times.observe(self.cache.batch, width, seconds)

    def agreed(self, seconds: float) -> float:
        """What the ranks that share the model take for these seconds, of which each has measured its own."""
        return self.times.agree([seconds])[0]

    def profile(self) -> dict[int, float]:
        """Seconds of a pass by its width at the batch size of the cache, measured once. Keeps nothing in the cache.

        Every batch size is measured for itself: eight rows of five tokens cost more than the widest pass of one row.
        """
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
