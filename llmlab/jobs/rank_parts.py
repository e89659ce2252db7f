"""What each rank does of a job: its part of scoring, generating or quantizing."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from llmlab.base.errors import InputError
from llmlab.data import Question
from llmlab.decoding.engine import Engine
from llmlab.decoding.generate import generate
from llmlab.decoding.plain_engine import engine_for
from llmlab.decoding.result import GenerateResult
from llmlab.kernels.packing import Quantized
from llmlab.kernels.plain import fastest_matmuls
from llmlab.model.layerwise import stream
from llmlab.model.lm import LM
from llmlab.model.selfcheck import Check, tell
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.fit import check_quantizable
from llmlab.quantization.gptq import Factor, gptq, target_of, with_losses
from llmlab.quantization.grid import Scheme
from llmlab.quantization.walk import Alone, Walk
from llmlab.scoring.attention import tries_attend
from llmlab.scoring.encode import Sequence, encode
from llmlab.scoring.reference import rotary_limit
from llmlab.scoring.shared import TRIES, Batch, Totals, passes
from llmlab.scoring.trie import Trie, question_tries
from llmlab.sharding import pipeline
from llmlab.sharding.busy import Busy
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.load import Shard, load_shard
from llmlab.sharding.rank import Rank

Options = dict[str, Any]  # of `llmlab.generate`
Asked = list[Question] | list[Sequence]  # what is scored: texts, or token ids where a model knows no text
NODES = {"cpu": 256, "cuda": 4096}  # of a pass: small enough that a pipeline fills


@dataclass(frozen=True)
class Job:
    """What the ranks work with: a model, how it is cut over them, and the dtype of its activations.

    `checked`: what self-checks said of a small copy of the family. Ranks are told, for none of them can break off a
    pass that others take part in. `layers`: how many a model of random weights keeps.
    """

    model: str
    cuts: Cuts
    dtype: str
    checked: dict[str, Check]
    layers: int | None = None

    def load(self, rank: Rank) -> Shard:
        """This rank's part of the model; kept between calls."""
        tell(self.checked)
        with torch.inference_mode(False):  # it serves passes outside this mode, too, which take no inference tensors
            return load_shard(rank, self.model, self.cuts, self.dtype, self.layers)


@dataclass(frozen=True)
class ScoredPart:
    """What one rank reports of a scoring job.

    Attributes:
        method: "shared" or "reference".
        log_probs: sequence number -> log-probability, on ranks that answer for their replica; empty elsewhere.
        sequences: all sequences, from rank 0 alone.
        nodes: of each pass of this replica.
        asked: positions at which the replica's output head worked.
        seconds: from the common start to the end of this rank's last work.
        busy: (start, end) of each computation, seconds after the common start.
        bytes_sent: by the pipeline.
        weight_bytes: of this rank's part of the model.
        padding: places beside the replica's nodes that were computed for nothing.
    """

    method: str
    log_probs: dict[int, float]
    sequences: list[Sequence]
    nodes: list[int]
    asked: int
    seconds: float
    busy: list[tuple[float, float]]
    bytes_sent: int
    weight_bytes: int
    padding: int = 0


@torch.inference_mode()
def score_part(
    rank: Rank,
    job: Job,
    asked: Asked,
    schedule: str = "micro-batches",
    nodes: int | None = None,
) -> ScoredPart:
    """This rank's part of a scoring job: its replica's questions, as tries, or sequence by sequence."""
    shard = job.load(rank)
    lm, place, stage = shard.lm, shard.place, shard.place.stage
    sequences = encoded(lm, asked)
    tries = _share(question_tries(sequences), job.cuts.data)[place.data]
    own = sorted({number for trie in tries for _, _, number in trie.scored})
    far = max(len(s.ids) for s in sequences) > rotary_limit(lm)
    method = "shared" if job.checked[TRIES].passed and not far else "reference"
    if method == "shared":
        batches = list(passes(lm, tries, nodes or NODES[rank.device.type]))
    else:
        batches = [alone(lm, number, sequences[number]) for number in own]
    totals = Totals(sequences, lm.dtype)

    def finish(number: int, logits: torch.Tensor) -> None:
        totals.add(batches[number], logits)
        if shard.answers and place.data == 0:
            rank.progress(number + 1, len(batches), f"scoring, {job.cuts.name}", "pass")

    stage.bytes_sent = 0
    with tries_attend(lm) if method == "shared" else nullcontext(), fastest_matmuls(lm.model):
        dist.barrier()
        begin, stage.busy = time.monotonic(), Busy(rank.device)
        pipeline.stream(lm.model, stage, [batch.model for batch in batches], finish, naive=schedule == "naive")
        busy, stage.busy = stage.busy.spans(), None  # waits for this rank's GPU
        seconds = time.monotonic() - begin
    return ScoredPart(
        method=method,
        log_probs={number: totals.log_probs[number] for number in own} if shard.answers else {},
        sequences=sequences if rank.index == 0 else [],
        nodes=[batch.nodes for batch in batches],
        asked=totals.asked,
        seconds=seconds,
        busy=busy,
        bytes_sent=stage.bytes_sent,
        weight_bytes=shard.weight_bytes,
        padding=totals.padding,
    )


def encoded(lm: LM, asked: Asked) -> list[Sequence]:
    """Sequences as they are; questions in the model's tokens."""
    sequences = [item for item in asked if isinstance(item, Sequence)]
    return sequences or encode(lm, [item for item in asked if isinstance(item, Question)])


def alone(lm: LM, number: int, sequence: Sequence) -> Batch:
    """The reference path's pass: one sequence, neither padded nor shared."""
    asked = torch.arange(sequence.n_context - 1, len(sequence.ids) - 1)
    targets = sequence.ids[sequence.n_context :]
    model = {
        "input_ids": torch.tensor([sequence.ids], device=lm.device),
        "use_cache": False,
        "logits_to_keep": asked.to(lm.device),
    }
    scored = [(node, token, number) for node, token in zip(asked.tolist(), targets, strict=True)]
    return Batch(model, scored, torch.arange(len(asked)), torch.tensor(targets, device=lm.device))


def _share(tries: list[Trie], replicas: int) -> list[list[Trie]]:
    """Tries over replicas, the longest first to the one with the least nodes."""
    parts: list[list[Trie]] = [[] for _ in range(replicas)]
    sizes = [0] * replicas
    for trie in sorted(tries, key=len, reverse=True):
        least = sizes.index(min(sizes))
        parts[least].append(trie)
        sizes[least] += len(trie)
    return parts


def generate_part(rank: Rank, job: Job, prompts: list[str], options: Options) -> tuple[int, GenerateResult] | None:
    """This rank's part of a generation: its replica's prompts, with the number of the replica; None from the others."""
    shard = job.load(rank)
    data = shard.place.data
    if not (own := prompts[data :: job.cuts.data]):
        return None
    engine = engine_for(shard.lm)
    if isinstance(engine, Engine):
        engine.times.agree = shard.agree
    result = generate(shard.lm, own, **options | {"engine": engine})
    return (data, result) if shard.answers else None


def quantize_part(
    rank: Rank, model: str, dtype: str, text: str, scheme: Scheme, rows: int, folder: str
) -> dict[str, object]:
    """GPTQ over ranks: calibration rows are split, Hessians added up, and each rank solves part of each matrix's rows.

    Rows of W do not interact in GPTQ, so the parts together are what one rank finds; the Hessian differs by the order
    of its sums.
    """
    lm, read_layer = stream(model, dtype=dtype, device=rank.device)
    check_quantizable(lm, scheme, "gptq")
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
        start, stop = bounds[self.rank.index : self.rank.index + 2]
        part = gptq(weight[start:stop], factor.of_rows(start, stop), scheme)
        whole = [_gathered(t, bounds) for t in (part.codes, part.scales, part.zeros)]
        result = Quantized(whole[0], whole[1], whole[2], part.g_idx)
        return with_losses(result, target_of(weight.float(), factor, scheme), factor)


def _gathered(part: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """The whole of which every rank has rows bounds[rank] .. bounds[rank + 1]."""
    sizes = [b - a for a, b in pairwise(bounds)]
    padded = torch.zeros(max(sizes), *part.shape[1:], dtype=part.dtype, device=part.device)
    padded[: len(part)] = part
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)])
