"""Jobs over ranks, and `ranks()`, the door to them.

with llmlab.ranks(4) as four:
    result = four.score("smollm2", questions, pipeline=4)
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llmlab.base.errors import InputError, NumericalError
from llmlab.base.paths import new_folder
from llmlab.data import Question
from llmlab.decoding.generate import generate
from llmlab.decoding.result import GenerateResult
from llmlab.kernels.fast import default_dtype
from llmlab.kernels.packing import Quantized
from llmlab.kernels.plain import fastest_matmuls
from llmlab.model.layerwise import stream
from llmlab.quantization.calibration import ROWS, calibration_rows
from llmlab.quantization.gptq import Factor, gptq, relative_error
from llmlab.quantization.grid import Scheme
from llmlab.quantization.walk import Alone, Walk
from llmlab.scoring import shared
from llmlab.scoring.attention import tries_attend
from llmlab.scoring.encode import Sequence, encode
from llmlab.scoring.pack import Passes
from llmlab.scoring.score import ScoreResult, summarize
from llmlab.scoring.trie import Trie, question_tries
from llmlab.sharding import pipeline
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.launch import Group, Joined, Ranks
from llmlab.sharding.load import check_layout, load_shard
from llmlab.sharding.rank import Rank

NODES = {"cpu": 256, "cuda": 4096}  # of a pass: small enough that a pipeline fills
SCHEDULES = ("micro-batches", "naive")


@dataclass(frozen=True)
class ScoredPart:
    """What one rank reports of a scoring job.

    Attributes:
        log_probs: sequence number -> log-probability, on ranks that answer for their replica; empty elsewhere.
        sequences: all sequences, from rank 0 alone.
        nodes: of each pass of this replica.
        seconds: from the common start to this rank's end.
        busy: (start, end) of each computation, seconds after the common start.
        bytes_sent: by the pipeline.
    """

    log_probs: dict[int, float]
    sequences: list[Sequence]
    nodes: list[int]
    seconds: float
    busy: list[tuple[float, float]]
    bytes_sent: int


@torch.inference_mode()
def score_part(
    rank: Rank, name: str, questions: list[Question], cuts: Cuts, dtype: str, schedule: str, nodes: int | None
) -> ScoredPart:
    """This rank's part of a scoring job: shared-prefix scoring of its replica's questions."""
    shard = load_shard(rank, name, cuts, dtype)
    lm, stage = shard.lm, shard.lm.model.stage
    sequences = encode(lm, questions)
    mine = _share(question_tries(sequences), cuts.data)[shard.data]
    waiting = Passes(mine, lm.card.vocab_size)
    asked = []
    while waiting.waiting:
        asked.append(shared.inputs(lm, waiting.take(nodes or NODES[rank.device.type])))
    totals: dict[int, float] = {}

    def finish(number: int, logits: torch.Tensor) -> None:
        found = shared.read(asked[number], logits[0])
        for (_, _, sequence), value in zip(found.scored, found.log_probs, strict=True):
            totals[sequence] = totals.get(sequence, 0.0) + value
        if shard.answers and shard.data == 0:
            rank.progress(number + 1, len(asked), f"scoring, {cuts.name}", "pass")

    stage.busy, stage.bytes_sent = [], 0
    with tries_attend(lm), fastest_matmuls(lm.model):
        dist.barrier()
        begin = time.monotonic()
        pipeline.stream(lm.model, [one.model for one in asked], finish, naive=schedule == "naive")
        seconds = time.monotonic() - begin
    for number, value in totals.items():
        if not torch.isfinite(torch.tensor(value)):
            raise NumericalError(f"question {sequences[number].question}: its log-probability is {value} in {dtype}.")
    return ScoredPart(
        totals if shard.answers else {},
        sequences if rank.index == 0 else [],
        [one.nodes for one in asked],
        seconds,
        [(start - begin, end - begin) for start, end in stage.busy],
        stage.bytes_sent,
    )


def _share(tries: list[Trie], replicas: int) -> list[list[Trie]]:
    """Tries over replicas, the longest first to the one with the least nodes."""
    parts: list[list[Trie]] = [[] for _ in range(replicas)]
    sizes = [0] * replicas
    for trie in sorted(tries, key=len, reverse=True):
        least = sizes.index(min(sizes))
        parts[least].append(trie)
        sizes[least] += len(trie)
    return parts


def generate_part(
    rank: Rank, name: str, prompts: list[str], cuts: Cuts, dtype: str, options: dict[str, Any]
) -> tuple[int, GenerateResult] | None:
    """This rank's part of a generation: its replica's prompts, with the number of the replica; None from the others."""
    shard = load_shard(rank, name, cuts, dtype)
    mine = prompts[shard.data :: cuts.data]
    result = generate(shard.lm, mine, **options) if mine else None
    return (shard.data, result) if shard.answers and result else None


def quantize_part(
    rank: Rank, name: str, text: str, scheme: Scheme, folder: str, rows: int, dtype: str
) -> dict[str, Any]:
    """GPTQ over ranks: calibration rows are split, Hessians added up, and each rank solves part of each matrix's rows.

    Rows of W do not interact in GPTQ, so the parts together are what one rank finds; the Hessian differs by the order
    of its sums.
    """
    lm, read_layer = stream(name, dtype=dtype, device=rank.device)
    calibration = calibration_rows(lm, text, rows=rows)
    if len(calibration) < rank.size:
        raise InputError(f"{len(calibration)} calibration rows for {rank.size} ranks: give at least one a rank.")
    rows_of_rank = calibration[rank.index :: rank.size]
    walk = Walk(lm, scheme, "gptq", rows_of_rank, read_layer=read_layer, workers=_Together(rank))
    dist.barrier()
    quantized = walk.run()
    if rank.index == 0:
        quantized.save(folder)
    dist.barrier()
    return {"seconds": walk.report.seconds, "linears": walk.report.linears, "tokens": walk.report.tokens}


class _Together(Alone):
    """Ranks that share the calibration rows and the rows of each matrix."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def add_up(self, total: torch.Tensor) -> None:
        dist.all_reduce(total)

    def solve(self, weight: torch.Tensor, factor: Factor, scheme: Scheme) -> Quantized:
        bounds = [len(weight) * i // self.rank.size for i in range(self.rank.size + 1)]
        part = gptq(weight[bounds[self.rank.index] : bounds[self.rank.index + 1]], factor, scheme)
        whole = [_gathered(t, bounds) for t in (part.codes, part.scales, part.zeros)]
        result = Quantized(whole[0], whole[1], whole[2], part.g_idx)
        result.error = relative_error(weight.float(), result, factor.hessian)
        return result


def _gathered(part: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    sizes = [b - a for a, b in pairwise(bounds)]
    padded = torch.zeros(max(sizes), *part.shape[1:], dtype=part.dtype, device=part.device)
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)])


class RankGroup:
    """Ranks and what they can do together. A context manager: at its end, or at any error, no process is left."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.group.close()

    @property
    def size(self) -> int:
        """How many."""
        return self.group.size

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """`function(rank, *args, **kwargs)` on every rank (see `sharding.rank.Rank`); the results by rank.

        Raises:
            InputError: what `function` raised as such; or it cannot be imported by the ranks.
            RankError: a rank raised anything else, died or was killed; all ranks have ended then.
        """
        return self.group.run(function, *args, **kwargs)

    def score(
        self,
        model: str,
        questions: list[Question],
        *,
        plan: Any = None,
        data: int = 0,
        tensor: int = 1,
        pipeline: int = 1,
        dtype: str | None = None,
        schedule: str = "micro-batches",
        nodes: int | None = None,
    ) -> ScoreResult:
        """`llmlab.score` over the ranks; exact.

        Args:
            model: as for `llmlab.load`, not bitsandbytes; GPTQ checkpoints too. Loaded once, kept between calls.
            questions: from `llmlab.data`.
            plan: a Layout of `llmlab.plan` (its `.best`); or give the three sizes.
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
        return gather_scores(questions, parts, cuts, time.perf_counter() - begin)

    def score_parts(
        self,
        model: str,
        questions: list[Question],
        cuts: Cuts,
        *,
        dtype: str | None = None,
        schedule: str = "micro-batches",
        nodes: int | None = None,
    ) -> list[ScoredPart]:
        """The same with what each rank has to tell: for benchmarks and timelines."""
        if not questions:
            raise InputError("there are no questions to score: give at least one.")
        if schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}.")
        check_layout(model, cuts, self.size)
        return self.run(score_part, model, questions, cuts, dtype or self._dtype(), schedule, nodes)

    def generate(
        self,
        model: str,
        prompts: list[str],
        *,
        plan: Any = None,
        data: int = 0,
        tensor: int = 1,
        pipeline: int = 1,
        dtype: str | None = None,
        **options: Any,
    ) -> list[str]:
        """`llmlab.generate` over the ranks: the same ids. `options` as there. Returns the completions' texts."""
        return [
            c.text for c in self.completions(model, prompts, self.cuts(plan, data, tensor, pipeline), dtype, options)
        ]

    def completions(
        self, model: str, prompts: list[str], cuts: Cuts, dtype: str | None, options: dict[str, Any]
    ) -> list[Any]:
        """The completions with their ids, in the order of the prompts."""
        check_layout(model, cuts, self.size)
        parts = self.run(generate_part, model, prompts, cuts, dtype or self._dtype(), options)
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
    ) -> dict[str, Any]:
        """GPTQ over the ranks: the same checkpoint as one rank to rounding. Returns seconds, tokens and the Linears."""
        scheme = scheme or Scheme()
        scheme.check()
        target = str(new_folder(folder))
        found: dict[str, Any] = self.run(quantize_part, model, text, scheme, target, rows, dtype)[0]
        return found

    def cuts(self, plan: Any, data: int, tensor: int, pipeline: int) -> Cuts:
        """The layout meant; replicas take the ranks that are left. Raises InputError if it does not come out even."""
        if plan is not None:
            return Cuts(plan.data, plan.tensor, plan.pipeline)
        if data == 0:
            data = self.size // max(1, tensor * pipeline)
        return replace(Cuts(), data=data, tensor=tensor, pipeline=pipeline)

    def _dtype(self) -> str:
        return default_dtype(torch.device(self.group.device))


def gather_scores(questions: list[Question], parts: list[ScoredPart], cuts: Cuts, seconds: float) -> ScoreResult:
    """One result out of what the ranks report."""
    sequences = parts[0].sequences
    table = [[float("nan")] * len(q.endings) for q in questions]
    for part in parts:
        for number, value in part.log_probs.items():
            table[sequences[number].question][sequences[number].ending] = value
    answering = [part for part in parts if part.log_probs]
    nodes = sum(sum(part.nodes) for part in answering)
    passes = sum(len(part.nodes) for part in answering)
    inference = max(part.seconds for part in parts)
    return summarize(questions, sequences, table, f"shared, {cuts.name}", (nodes, passes, 0.0), (inference, seconds))


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
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        joined = Joined(device, timeout)
        if size not in (None, joined.size):
            joined.close()
            raise InputError(f"torchrun started {joined.size} ranks, ranks({size}) asks for {size}: make them equal.")
        return RankGroup(joined)
    if size is None:
        raise InputError("how many ranks? Give ranks(4), or start the script with torchrun.")
    return RankGroup(Ranks(size, device=device, port=port, timeout=timeout))
