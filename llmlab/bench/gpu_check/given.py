"""What a step of `llmlab gpu-check` is given, and what it finds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from llmlab.base.stats import Metric
from llmlab.data import Question, everyday
from llmlab.jobs.over_ranks import RankGroup, ranks
from llmlab.kernels.fast import default_dtype
from llmlab.kernels.fewops import shared_copy
from llmlab.measure.roofline import Peaks, measure_peaks
from llmlab.model.convert import with_dtype
from llmlab.model.lm import LM, decoder_layers
from llmlab.model.load import load
from llmlab.model.sources import BUILTIN
from llmlab.scoring.score import ScoreResult, score

PATIENCE = 60.0  # seconds that a collective may wait: a schedule that deadlocks is a finding, not a hang
LAYERS = 10  # of the built-in model's 30 that decode on a CPU
NATS = 5e-4  # two exact paths in fp32 may differ by so much in the log-probability of an ending


@dataclass(frozen=True)
class Finding:
    """What a step found: whether all is as it should be (None: it cannot be tried here), in words and in numbers."""

    passed: bool | None
    said: str
    values: dict[str, Metric] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """One step of the check: `cuda` if it is about CUDA itself, `several` if it takes more than one device."""

    name: str
    run: Callable[[Given], Finding]
    cuda: bool = False
    several: bool = False


class Given:
    """The devices to check, and the built-in model, in fp32, on the first of them.

    A context manager: at its end no rank is left.
    """

    def __init__(self, device: torch.device, devices: int) -> None:
        self.device, self.devices, self.on_gpu = device, devices, device.type == "cuda"
        self._group: RankGroup | None = None

    def __enter__(self) -> Given:
        return self

    def __exit__(self, *_: object) -> None:
        self.end_ranks()

    @property
    def group(self) -> RankGroup:
        """A rank a device; started when first asked for, and again after `end_ranks`."""
        if self._group is None:
            self._group = ranks(self.devices, device=self.device.type, timeout=PATIENCE)
        return self._group

    def end_ranks(self) -> None:
        """End the ranks, if there are any."""
        if self._group is not None:
            self._group.close()
        self._group = None

    @cached_property
    def lm(self) -> LM:
        """The built-in model in fp32, the dtype in which two right paths agree."""
        return load(BUILTIN, dtype="fp32", device=self.device)

    @cached_property
    def writer(self) -> LM:
        """What decodes: the built-in model, on a CPU the first layers of it, which take a third of the time."""
        if self.on_gpu:
            return self.lm
        model = shared_copy(self.lm.model)
        path, stack = decoder_layers(model)
        config = copy.copy(self.lm.model.config)
        config.num_hidden_layers = LAYERS
        for module in model.modules():
            if hasattr(module, "config"):
                module.__dict__["config"] = config
        model.set_submodule(path, stack[:LAYERS])
        return replace(self.lm, model=model, card=replace(self.lm.card, layers=LAYERS))

    @cached_property
    def dtype(self) -> str:
        """What this device is built for."""
        return default_dtype(self.device)

    @cached_property
    def fast(self) -> LM:
        """The built-in model in that dtype."""
        return self.lm if self.dtype == "fp32" else with_dtype(self.lm, self.dtype)

    @cached_property
    def questions(self) -> list[Question]:
        """Short built-in questions: five and more for each replica of a layout that has a pipeline."""
        shortest = sorted(everyday(), key=lambda q: len(q.context) + sum(map(len, q.endings)))
        return shortest[: max(6, 5 * self.devices // 2)]

    @cached_property
    def scored(self) -> ScoreResult:
        """The questions scored by one device."""
        return score(self.lm, self.questions)

    @cached_property
    def peaks(self) -> Peaks:
        """The measured limits of the first device."""
        shapes = None if self.on_gpu else [(512, 512, 512)]
        return measure_peaks([self.dtype], self.device, shapes=shapes, min_seconds=0.1)[self.dtype]

    def random_model(self, shape: str, layers: int | None = None) -> LM:
        """A shipped shape with random weights in the fast dtype, for speeds; on a CPU two layers of a small one."""
        if not self.on_gpu:
            shape, layers = "opt-125m", 2
        return load(f"random:{shape}", dtype=self.dtype, device=self.device, layers=layers)
