"""How many nodes to put into one forward pass: a latency profile measured on the job's own passes.

Too few nodes leave the arithmetic units idle while weights are fetched; too many fall out of the caches. Where the best
lies is a property of the device, the model and the dtype, so it is measured, once, and kept. The first passes of the
first job try the candidates in turn: they are useful work, and the profile costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llmlab.base.paths import cache_folder, remember
from llmlab.kernels.cuda import free_bytes
from llmlab.kernels.fast import machine
from llmlab.model.card import ModelCard
from llmlab.model.lm import LM
from llmlab.scoring.attention import Sight
from llmlab.scoring.trie import Trie

LOGIT_BYTES = 256 * 2**20  # of fp32 logits at once, at least
LOGIT_SHARE = 8  # of a GPU's free memory logits may take one part in so many
CPU_BUDGETS = (256, 512, 1024, 2048)
GPU_BUDGETS = (2048, 4096, 8192, 16384)
ROUNDS = 2  # measured passes of each candidate, after one warm-up pass


@dataclass
class Profile:
    """Nodes per second over nodes a pass, as far as measured.

    Attributes:
        path: where it is kept.
        rates: budget -> measured nodes/s of passes of that budget.
        warm: whether a first pass, which pays for one-time work, has been run.
    """

    path: Path
    budgets: tuple[int, ...]
    rates: dict[int, list[float]] = field(default_factory=dict)
    warm: bool = False

    @property
    def complete(self) -> bool:
        """Whether every candidate has been measured."""
        return all(len(self.rates.get(b, [])) >= ROUNDS for b in self.budgets)

    def budget(self) -> int:
        """The next candidate to measure, or the fastest one when all are measured."""
        if not self.warm:
            return self.budgets[:2][-1]
        if self.complete:
            return max(self.budgets, key=lambda b: statistics.median(self.rates[b]))
        return min(self.budgets, key=lambda b: len(self.rates.get(b, [])))

    def observe(self, budget: int, nodes: int, seconds: float) -> None:
        """Take in one pass. What has been measured is kept: a short job leaves the rest to the next one."""
        if not self.warm:
            self.warm = True
        elif not self.complete and nodes > 0.6 * budget:  # the last pass of a job may be nearly empty
            self.rates.setdefault(budget, []).append(nodes / seconds)
            remember(self.path, json.dumps({str(b): rates for b, rates in self.rates.items()}))


def profile(lm: LM) -> Profile:
    """The profile of this model, dtype and device; empty if it was never measured."""
    on_gpu = lm.device.type == "cuda"
    device = torch.cuda.get_device_name(lm.device) if on_gpu else machine()
    identity = [lm.name, lm.revision, lm.transformation, lm.card.layers, lm.dtype, device, torch.__version__]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = cache_folder() / "profiles" / f"{name}.json"
    try:
        rates = {int(b): list(map(float, r)) for b, r in json.loads(path.read_text()).items()}
    except (OSError, ValueError):  # never measured, or not ours: measure
        rates = {}
    budgets = fitting(lm.card, free_bytes(lm.device)) if on_gpu else CPU_BUDGETS
    return Profile(path, budgets, rates, warm=bool(rates))


def fitting(card: ModelCard, free: int) -> tuple[int, ...]:
    """The GPU_BUDGETS whose passes take at most half of the free memory; at least the smallest one."""
    # Of a node in a layer: the MLP's three widest tensors, and at most ten of the hidden width, at 16 bits.
    node = 2 * (3 * card.intermediate_size + 10 * card.hidden_size)
    return tuple(b for b in GPU_BUDGETS if b * node <= free // 2) or GPU_BUDGETS[:1]


def take(waiting: list[Trie], budget: int, sight: type[Sight]) -> list[Trie]:
    """Remove the next pass from the end of a list: tries in a row of at most `budget` places, but at least one."""
    lengths: list[int] = []
    while len(lengths) < len(waiting):
        longer = [*lengths, len(waiting[-1 - len(lengths)])]
        if lengths and sight.places(longer)[-1] > budget:
            break
        lengths = longer
    taken = waiting[: -len(lengths) - 1 : -1]
    del waiting[-len(lengths) :]
    return taken


def head_rows(device: torch.device, vocab_size: int) -> int:
    """At how many positions the output head works at once: as many as there is memory for their fp32 logits."""
    room = LOGIT_BYTES
    if device.type == "cuda":
        room = max(room, free_bytes(device) // LOGIT_SHARE)
    return max(1, room // (4 * vocab_size))
