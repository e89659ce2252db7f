"""Jobs over ranks, and `ranks()`, the door to them.

with llmlab.ranks(4) as four:
    result = four.score("smollm2", questions, pipeline=4)
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch

from llmlab.base.errors import InputError
from llmlab.base.paths import new_folder
from llmlab.data import Question
from llmlab.decoding.engine import Engine
from llmlab.decoding.plain_engine import engine_for
from llmlab.decoding.result import Completion
from llmlab.jobs.rank_parts import Asked, Job, Options, ScoredPart, generate_part, quantize_part, score_part
from llmlab.model.lm import check_dtype
from llmlab.model.selfcheck import outcomes
from llmlab.quantization.calibration import ROWS
from llmlab.quantization.grid import Scheme
from llmlab.scoring.score import ScoreResult, summarize
from llmlab.scoring.scores import Scores, Work
from llmlab.scoring.shared import TRIES, trie_check
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.joined import Joined, launched
from llmlab.sharding.launch import Ranks
from llmlab.sharding.load import check_layout, small_model
from llmlab.sharding.timeline import Span, Task, Timeline

SCHEDULES = ("micro-batches", "naive")


class RankGroup:
    """Ranks and what they can do together. A context manager: at its end, or at any error, no process is left.

    Attributes:
        size: how many ranks.
        device: "cpu" or "cuda".
        rank: this process's number under torchrun, where every process runs the whole script; else 0.
        run: `run(function, *args)` calls `function(rank, *args)` on every rank (see `sharding.rank.Rank`); returns the
            results by rank. Raises InputError that `function` raised, or where ranks cannot import it; RankError when a
            rank raised anything else, died or was killed: all ranks have ended then.
    """

    def __init__(self, group: Ranks | Joined) -> None:
        self.group = group
        self.size, self.device, self.rank = group.size, group.device, group.index
        self.run = group.run
        self._jobs: dict[tuple[object, ...], Job] = {}

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the ranks."""
        self.group.close()

    def score(
        self,
        model: str,
        questions: list[Question],
        *,
        plan: Cuts | None = None,
        data: int = 0,
        tensor: int = 1,
        pipeline: int = 1,
        dtype: str | None = None,
        schedule: str = "micro-batches",
        nodes: int | None = None,
    ) -> ScoreResult:
        """`llmlab.score` over the ranks; exact.

        A layout that a family cannot take is refused before a rank works on it (see `sharding.rehearsal`). A family for
        which shared-prefix scoring is not exact is scored by the reference path, one sequence a pass, with a warning.

        Args:
            model: as for `llmlab.load`, not bitsandbytes; GPTQ checkpoints too. Loaded once, kept between calls.
            questions: from `llmlab.data`.
            plan: a layout, such as `llmlab.plan(...).best`; or give the three sizes.
            data: replicas; by default what is left of the ranks.
            tensor: ways to cut each layer.
            pipeline: stages.
            dtype: by default fp32 on CPU; on GPUs bf16 from compute capability 8.0, fp16 below.
            schedule: "micro-batches", or "naive": one batch at a time, as accelerate's device_map runs.
            nodes: tokens a pass; by default 256 on CPU, 4,096 on GPUs.

        Raises InputError, NumericalError and RankError.
        """
        begin = time.perf_counter()
        cuts = self.cuts(plan, data, tensor, pipeline)
        parts = self.score_parts(model, questions, cuts, dtype=dtype, schedule=schedule, nodes=nodes)
        return gather_scores(questions, parts, cuts, schedule, time.perf_counter() - begin)

    def score_parts(
        self,
        model: str,
        asked: Asked,
        cuts: Cuts,
        *,
        dtype: str | None = None,
        schedule: str = "micro-batches",
        nodes: int | None = None,
        layers: int | None = None,
    ) -> list[ScoredPart]:
        """The same with what each rank has to tell: for benchmarks and timelines.

        `random:SHAPE` models know no text, but sequences of token ids; `layers` says how many layers they keep.
        """
        if not asked:
            raise InputError("there are no questions to score: give at least one.")
        if schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}.")
        job = self.job(model, cuts, dtype, layers)
        if reason := job.checked[TRIES].reason:
            warnings.warn(f"{model} is scored by the reference path: {reason.rstrip('.')}.", stacklevel=3)
        return self.run(score_part, job, asked, schedule, nodes)

    def generate(
        self,
        model: str,
        prompts: list[str],
        *,
        plan: Cuts | None = None,
        data: int = 0,
        tensor: int = 1,
        pipeline: int = 1,
        dtype: str | None = None,
        **options: Any,
    ) -> list[str]:
        """`llmlab.generate` over the ranks: the same ids. `options` as there. Returns the completions' texts."""
        cuts = self.cuts(plan, data, tensor, pipeline)
        return [completion.text for completion in self.completions(model, prompts, cuts, dtype, options)]

    def completions(
        self, model: str, prompts: list[str], cuts: Cuts, dtype: str | None, options: Options
    ) -> list[Completion]:
        """The completions with their ids, in the order of the prompts.

        Raises InputError for stages or parts of a model that no static cache serves: they hold no other one.
        """
        job = self.job(model, cuts, dtype)
        cached = job.checked.get(f"the {Engine.kind}")
        if cuts.tensor * cuts.pipeline > 1 and cached is not None and not cached.passed:
            raise InputError(f"{model} cannot generate over stages or parts, only in replicas: {cached.reason}.")
        parts = self.run(generate_part, job, prompts, options)
        by_replica = dict(part for part in parts if part is not None)
        return [by_replica[k % cuts.data].completions[k // cuts.data] for k in range(len(prompts))]

    def quantize(
        self,
        model: str,
        folder: str | Path,
        text: str,
        *,
        scheme: Scheme | None = None,
        rows: int = ROWS,
        dtype: str = "fp32",
    ) -> dict[str, object]:
        """GPTQ over the ranks: the same checkpoint as one rank to rounding. Returns seconds, tokens and the Linears."""
        scheme = scheme or Scheme()
        scheme.check()
        return self.run(quantize_part, model, dtype, text, scheme, rows, str(new_folder(folder)))[0]

    def cuts(self, plan: Cuts | None, data: int, tensor: int, pipeline: int) -> Cuts:
        """The layout meant; replicas take the ranks that are left."""
        if plan is not None:
            return Cuts(plan.data, plan.tensor, plan.pipeline)
        return Cuts(data or self.size // max(1, tensor * pipeline), tensor, pipeline)

    def job(self, model: str, cuts: Cuts, dtype: str | None = None, layers: int | None = None) -> Job:
        """A model over these ranks; by default in the device's dtype.

        Raises InputError if it does not fit them, or its family cannot be cut so.
        """
        dtype = check_dtype(dtype, torch.device(self.device))
        key = (model, cuts, dtype, layers)  # as ranks keep its parts
        if key not in self._jobs:
            check_layout(model, cuts, self.size, layers)
            small = small_model(model, layers)
            trie_check(small)
            with warnings.catch_warnings(action="ignore"):  # a rank that decodes says it of the model
                engine_for(small)
            self._jobs[key] = Job(model, cuts, dtype, outcomes(small), layers)
        return self._jobs[key]


def gather_scores(
    questions: list[Question], parts: list[ScoredPart], cuts: Cuts, schedule: str, seconds: float
) -> ScoreResult:
    """One result out of what the ranks report; `seconds` of everything."""
    sequences = parts[0].sequences
    log_probs = {number: value for part in parts for number, value in part.log_probs.items()}
    replicas = [part for part in parts if part.log_probs]
    nodes = [n for part in replicas for n in part.nodes]
    padding = sum(part.padding for part in replicas)
    asked = sum(part.asked for part in replicas)
    work = Work(sum(nodes), len(nodes), asked, padding / (sum(nodes) + padding))
    return summarize(
        questions,
        sequences,
        Scores([log_probs[number] for number in range(len(sequences))], work),
        how_scored(parts, cuts, schedule),
        (max(part.seconds for part in parts), seconds),
        sum(part.weight_bytes for part in parts),
    )


def how_scored(parts: list[ScoredPart], cuts: Cuts, schedule: str) -> dict[str, str]:
    """The settings of a scoring job, for its result and records."""
    return {"method": parts[0].method, "ranks": str(cuts.ranks), "layout": cuts.name, "schedule": schedule}


def timeline(parts: list[ScoredPart]) -> Timeline:
    """What each rank did when, as measured."""
    spans = [Span(Task(b, r, r, e - s), s, e) for r, part in enumerate(parts) for b, (s, e) in enumerate(part.busy)]
    return Timeline(len(parts), spans)


def ranks(size: int | None = None, *, device: str | None = None, port: int = 0, timeout: float = 600) -> RankGroup:
    """Processes that work on one model together.

    In a notebook or a script `size` processes are started here. Under `torchrun` (one node or several) the processes
    exist: each runs the whole script, and `ranks()` joins them.

    Args:
        size: how many; under torchrun its own number.
        device: "cuda" (NCCL; the default where there are GPUs) or "cpu" (gloo).
        port: of the meeting point on this machine; 0 takes a free one.
        timeout: seconds that a collective operation may wait.

    Raises:
        InputError: more ranks than GPUs, a port in use, ranks with different library versions.
        RankError: a rank ends while it starts.
    """
    if launched(size):
        joined = Joined(device, timeout)
        if size not in (None, joined.size):
            joined.close()
            raise InputError(f"torchrun started {joined.size} ranks, ranks({size}) asks for {size}: make them equal.")
        return RankGroup(joined)
    if size is None:
        raise InputError("how many ranks? Give ranks(4), or start the script with torchrun.")
    return RankGroup(Ranks(size, device=device, port=port, timeout=timeout))
