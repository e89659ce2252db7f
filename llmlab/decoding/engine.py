"""Engine: forward passes over a static KV cache, for rows of different lengths.

The model's code is transformers'. Its attention is replaced by one that writes keys and values into buffers of a fixed
size and reads what each token may see: the row's past, and within the pass its ancestors, so that chains and trees of
drafted tokens are one case. Nothing is kept until `keep` says so: a rejected draft costs no copying.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from llmlab.base.clock import seconds_of
from llmlab.base.errors import InputError
from llmlab.decoding.attend import attend
from llmlab.decoding.cache import NAME, Cache, Pass
from llmlab.kernels import fewrows
from llmlab.kernels.replay import compiled, record, recordable, scripted
from llmlab.model.lm import LM

CHUNK = 512  # tokens of a prompt that go through the model at once
WIDTHS = (1, 2, 3, 5, 9, 17)  # of a pass; others are padded to the next one, so that few shapes are recorded
RECORD = 2  # passes of one shape before it is recorded


class Engine:
    """A model ready to decode.

    Args:
        lm: the model; it stays as it is, weights are shared (and laid out a second time on CPU, see `fewrows`).
        cache_of: share this engine's cache: a draft that is a cheaper version of the same model reads the keys and
            values of the exact one, and needs no prefill of its own.
        layers: use the first N decoder layers alone.
        compile: let torch.compile make the passes of a few tokens (CUDA graphs on a GPU, inductor on CPU): the first
            pass of each shape takes up to a minute. By default they are recorded on CPU, which is faster there (see
            `record`), and run as they are on a GPU.

    Raises InputError for models whose layers see a part of the past only (sliding windows).
    """

    def __init__(
        self, lm: LM, *, cache_of: Engine | None = None, layers: int | None = None, compile: bool = False
    ) -> None:
        config = copy.copy(lm.model.config)
        if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            raise InputError(f"{lm.name} attends within windows of {config.sliding_window} tokens: not supported.")
        self.lm = lm
        self.model: Any = fewrows.shared_copy(lm.model)
        config._attn_implementation = NAME
        for module in self.model.modules():
            if hasattr(module, "config"):
                module.__dict__["config"] = config
        if layers is not None:
            _shorten(self.model, layers)
        fewrows.prepare(self.model, lm.model.dtype, pack=not compile)
        self.groups = config.num_attention_heads // (
            getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        )
        self.device = lm.device
        self.owner = cache_of
        self.widths = WIDTHS if cache_of is None else WIDTHS[:1]  # a draft on another's cache goes token by token
        self.cache = Cache(0, 0)
        self.seconds_recording = 0.0  # spent on recording or compiling, to be told apart from decoding
        self.compile = compile
        self._recordable = recordable(self.model)
        self._recorded_for: Cache | None = None
        self._replays: dict[Any, Callable[..., torch.Tensor]] = {}  # by shape
        self._uses: dict[Any, int] = {}
        self._pending: list[list[int]] = []  # slots of the last pass, by row
        self._timed: dict[tuple[int, int], float] = {}  # seconds by rows and width

    def start(self, batch: int, capacity: int) -> None:
        """An empty cache for `batch` rows of up to `capacity` tokens, drafted ones included.

        The buffers of before serve again if they are large enough: recorded passes write into them.
        """
        if batch > self.cache.rows or capacity > self.cache.capacity:
            # A little more than asked for, so that a slightly longer prompt needs no new ones.
            self.cache = Cache(max(batch, self.cache.rows), -(-capacity // 128) * 128)
        self.cache.clear(batch)

    @property
    def held(self) -> Cache:
        """The cache in use."""
        return self.owner.held if self.owner else self.cache

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """Read the prompts into the cache; logits [batch, vocabulary] that follow each prompt's last token."""
        logits: list[torch.Tensor | None] = [None] * len(prompts)
        for first in range(0, max(map(len, prompts)), CHUNK):
            chunk = [ids[first : first + CHUNK] for ids in prompts]
            found = self.forward(chunk, last=True)
            self.keep([list(range(len(ids))) for ids in chunk])
            for row, ids in enumerate(chunk):
                if ids:
                    logits[row] = found[row]
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
        tensors = self._tensors(tokens, parents, ahead, pad=not last)
        if not last:
            return self._run(tensors)
        at = torch.tensor([max(0, len(ids) - 1) for ids in tokens])
        keep, where = torch.unique(at, return_inverse=True)
        return self._forward(attend, *tensors, logits_to_keep=keep.to(self.device))[torch.arange(len(tokens)), where]

    def _forward(
        self,
        attention: Callable[..., torch.Tensor],
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        start: torch.Tensor | None,
        slots: torch.Tensor | None,
        mask: torch.Tensor | None,
        *,
        logits_to_keep: int | torch.Tensor = 0,
    ) -> torch.Tensor:
        one = Pass(self.held, start, slots, mask, attention)
        output = self.model(
            input_ids=input_ids, position_ids=positions, use_cache=False, one=one, logits_to_keep=logits_to_keep
        )
        logits: torch.Tensor = output.logits
        return logits

    def _run(self, tensors: tuple[Any, ...]) -> torch.Tensor:
        """A pass; one whose shape comes often is recorded and replayed."""
        if self._recorded_for is not self.held:  # recordings write into the buffers they were made with
            self._replays, self._uses, self._recorded_for = {}, {}, self.held
        shape = (tensors[0].shape, tensors[2] is None, tensors[4] is None)
        if shape in self._replays:
            return self._replays[shape](*tensors)
        logits = self._forward(attend, *tensors)
        self._uses[shape] = self._uses.get(shape, 0) + 1
        if (self.compile or self._recordable) and self._uses[shape] == RECORD:
            begin = time.perf_counter()
            if self.compile:
                replay = compiled(partial(self._forward, attend), tensors, logits)
            else:
                replay = record(self.model, self.held, partial(self._forward, scripted(attend)), tensors, logits)
            self._replays[shape] = replay or partial(self._forward, attend)
            self.seconds_recording += time.perf_counter() - begin
        return logits

    def _tensors(
        self, tokens: list[list[int]], parents: list[list[int]] | None, ahead: int, pad: bool
    ) -> tuple[Any, ...]:
        """input_ids, positions, start, slots and mask of a pass; see `Pass`."""
        cache, device = self.held, self.device
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
        return input_ids.to(device), positions.to(device), start, slots, None if mask is None else mask.to(device)

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
            first = self.held.lengths[row]
            slots = [self._pending[row][i] for i in indices]
            if slots != list(range(first, first + len(slots))):
                self.held.move(row, slots, first)
            self.held.lengths[row] = first + len(slots)

    def seconds(self, width: int, batch: int | None = None) -> float:
        """Of one pass over `width` tokens a row, from what `profile` measured.

        Matrices are read once for all tokens of a pass, so rows x width decides: between measured points by lines. A
        width is what it is padded to.
        """
        if not self._timed:
            self.profile()
        wanted = (batch or self.held.batch) * next((w for w in self.widths if w >= width), width)
        points = sorted((rows * w, seconds) for (rows, w), seconds in self._timed.items())
        below = max((point for point in points if point[0] <= wanted), default=points[0])
        above = min((point for point in points if point[0] >= wanted), default=points[-1])
        if above[0] == below[0]:
            return max(below[1], above[1])
        return below[1] + (above[1] - below[1]) * (wanted - below[0]) / (above[0] - below[0])

    def profile(self) -> dict[int, float]:
        """Seconds of a pass by its width at the batch size of the cache, measured once. Keeps nothing in the cache."""
        cache = self.held
        batch, lengths = cache.batch, cache.lengths
        most = max(max(lengths), min(cache.capacity // 2, cache.capacity - WIDTHS[-1]))
        widths = [w for w in self.widths if most + w <= cache.capacity]
        # A batch shrinks when rows end: a point or two of a row alone tell what fewer rows cost.
        for rows, some in ((batch, widths), (1, [w for w in widths if w in (1, 5)])):
            missing = [w for w in some if (rows, w) not in self._timed]
            cache.batch = rows
            cache.lengths = [max(1, most - row % 2) for row in range(rows)]  # they differ in length, as they do later
            self._time(rows, missing)
            cache.batch, cache.lengths = batch, lengths
        return {w: self._timed[batch, w] for w in widths}

    def _time(self, rows: int, widths: list[int], repeats: int = 3) -> None:
        runs: dict[int, list[float]] = {w: [] for w in widths}
        for turn in range(RECORD + 1 + repeats):
            for width in widths:
                seconds = seconds_of(partial(self.forward, [[0] * width] * rows))
                if turn > RECORD:  # those before are warm-ups, and record the passes
                    runs[width].append(seconds)
        least = 0.0
        for width, times in runs.items():
            least = max(least, statistics.median(times))  # a wider pass is never cheaper: that would be noise
            self._timed[rows, width] = least


def _ancestors(parents: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Depth of each token below the past [width], and which tokens each sees within the pass [width, width]."""
    depths = torch.zeros(width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            depths[node] = depths[parent] + 1
            sees[node] |= sees[parent]
    return depths, sees


def _shorten(model: Any, layers: int) -> None:
    for module in model.modules():
        for name, child in list(module._modules.items()):
            if isinstance(child, torch.nn.ModuleList) and len(child) == model.config.num_hidden_layers:
                module._modules[name] = torch.nn.ModuleList(list(child)[:layers])
