"""`make gpu-dry`: the package's own code for GPUs, walked at full size without a GPU.

Every rank of every layout of LLaMA-30B and OPT-30B that the planner fits on four cards of 32 GB, and of their 4-bit
replicas, loads its part, scores passes of 4,096 nodes, reads prompts, and decodes alone and with drafts; one layer of
LLaMA-30B is quantized by GPTQ. Ends with status 1 on a tensor of a wrong device or a bar missed.
"""

import gc
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from walk import Walk, fake_card

from llmlab.bench.challenge import synthetic_sequences
from llmlab.decoding.draft import Draft, Sampling
from llmlab.decoding.engine import Engine
from llmlab.decoding.lookup import PromptLookup
from llmlab.decoding.loop import Settings, decode
from llmlab.jobs.rank_parts import Job, score_part
from llmlab.model import selfcheck
from llmlab.model.fill import Slices, empty_model
from llmlab.model.gptq_checkpoint import PARTS
from llmlab.model.lm import decoder_layers
from llmlab.model.load import model_card
from llmlab.model.sources import read_config, resolve
from llmlab.quantization import calibration, gptq
from llmlab.quantization.grid import Scheme
from llmlab.quantization.settings import quant_config
from llmlab.quantization.walk import Walk as Quantization
from llmlab.scoring.shared import TRIES
from llmlab.sharding import load
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.load import RandomTensors
from llmlab.sharding.plan import Layout, plan
from llmlab.sharding.rank import Rank

MODELS, DEVICES = ("llama-30b", "opt-30b"), 4
BATCH, CONTEXT = 8, 512  # rows of the KV cache and tokens of each: as many as the places of a scoring pass
PROMPT, NEW, K = 460, 30, 4  # tokens of a prompt and behind it, and drafted ones: the cache takes CONTEXT
QUESTIONS = 34  # of a pass or two
CLOSE = 0.1  # memory may be off the planner's by so much
MOST_KERNELS, MOST_WAITS = 25, 1  # of a layer in scoring, and 7 that unpack; of a decoding step
PASSED = {name: selfcheck.Check(True, 0.0) for name in (TRIES, f"the {Engine.kind}")}
GB = 1e9


class PackedTensors(RandomTensors):
    """Random weights of which those of the layers' Linears are packed."""

    rename = staticmethod(str)

    def has(self, name: str) -> bool:
        """Whether a checkpoint has it."""
        *_, module, part = ("", *name.split("."))
        packed = module.endswith("proj") or module.startswith("fc")
        return packed if part in PARTS else part != "weight" or not packed

    def read(self, name: str, like: torch.Tensor, part: Slices) -> torch.Tensor:
        """Words and groups are no numbers to draw."""
        if like.is_floating_point():
            return super().read(name, like, part)
        return torch.zeros(like.shape, dtype=like.dtype, device=self.device)


@dataclass
class Report:
    """What the walk of a rank found; bytes at the peak are above those held before."""

    name: str
    planned: Layout
    bits: int
    weights: int = 0
    kv_cache: int = 0
    scoring: int = 0
    kernels: dict[str, int] = field(default_factory=dict)  # of a layer, by work
    launches: dict[str, int] = field(default_factory=dict)  # in all, by work
    waits: dict[str, int] = field(default_factory=dict)
    lines: Counter[str] = field(default_factory=Counter)  # at which a step waits
    graphs: str = ""
    seconds: float = 0.0  # of a core

    @property
    def ratio(self) -> float:
        """Weights, KV cache and activations over the planner's of the fullest rank."""
        return (self.weights + self.kv_cache + self.scoring) / (self.planned.bytes - self.planned.reserve)

    def problems(self) -> list[str]:
        """Bars that are missed here."""
        told, most = [], MOST_KERNELS + (7 if self.bits < 16 else 0)
        if self.kernels["scoring"] > most:
            told.append(f"{self.kernels['scoring']} kernels a layer in scoring, {most} at most")
        told += [f"{self.waits[work]} waits a {work}" for work in ("step", "drafted") if self.waits[work] > MOST_WAITS]
        told += [self.graphs] if "gone" in self.graphs else []
        return [f"{self.name}: {problem}" for problem in told]

    def row(self) -> str:
        """Of the table."""
        launches = " ".join(f"{self.kernels[w]:5d}" for w in ("scoring", "prefill")) + "".join(
            f" {self.launches[w]:5d}" for w in ("step", "drafted")
        )
        waits = " ".join(f"{self.waits[w]:3d}" for w in ("scoring", "step", "drafted"))
        parts = (
            self.weights,
            self.planned.weights,
            self.kv_cache,
            self.planned.kv_cache,
            self.scoring,
            self.planned.activations,
        )
        memory = " ".join(f"{n / GB:6.2f}" for n in parts)
        return f"{self.name:<48} {launches}  {waits}  {memory}  {self.ratio:5.3f}  {self.seconds:4.0f} s"


HEAD = f"""{"":<48} kernels a  launches   waits of the  GB of
{"":<48} layer of   of a       host in a    weights       KV cache      activations   of the
{"":<48} scor. pref. step draft.  job step draft.  here planned  here planned  here planned  plan"""


def walk_rank(shape: str, layout: Layout, index: int, bits: int) -> Report:
    """Walk one rank: loading, a scoring job, prefill, steps of decoding alone and with drafts."""
    begin, cuts = time.process_time(), Cuts(layout.data, layout.tensor, layout.pipeline)
    report = Report(f"{shape}, {bits} bits, {cuts.name}, rank {index}", layout, bits)
    _walked(shape, cuts, index, bits, None, lambda walk, rank, job: _rank(walk, rank, job, report))
    report.seconds = time.process_time() - begin
    return report


def walk_gptq(shape: str) -> str:
    """Walk GPTQ of one layer at full width; what it takes, in a line.

    Of a matrix's columns the first and the last block are rounded: a column is a dozen operations, all columns take the
    same ones, and a layer of 30B has 58,000 of them.
    """
    told = []

    def ends(*bounds: int) -> Sequence[int]:
        """In the place of `range` in gptq.py, where blocks alone have a step."""
        every = range(*bounds)
        return every if len(bounds) < 3 else [every[0], every[-1]]

    def solve(walk: Walk, rank: Rank, job: Job) -> None:
        lm = job.load(rank).lm
        rows = torch.ones(calibration.ROWS, calibration.CONTEXT, dtype=torch.int64)
        quantization = Quantization(lm, Scheme(4, 64), "gptq", rows)
        with mock.patch.object(gptq, "range", ends, create=True):
            launches, waits, peak = walk.during(quantization.run)
        linears = len(quantization.report.linears)
        told.append(
            f"{shape}, GPTQ of one layer, {rows.numel():,} tokens: {linears} matrices, two blocks of columns of each, "
            f"{launches:,} launches, {waits} waits, {peak / GB:.2f} GB at the peak above the weights"
        )

    _walked(shape, Cuts(), 0, 16, 1, solve)
    return told[0]


def _walked(
    shape: str, cuts: Cuts, index: int, bits: int, layers: int | None, work: Callable[[Walk, Rank, Job], None]
) -> None:
    """Do a rank's work on a card that is not there, other ranks' part of collectives left out."""
    torch.set_num_threads(1)
    gc.freeze()  # what is there before it is nobody's garbage: collections stay short
    warnings.simplefilter("ignore")
    walk, config = Walk(), read_config(resolve(f"random:{shape}"))
    config.num_hidden_layers = layers or config.num_hidden_layers
    if bits < 16:
        config.quantization_config = quant_config(Scheme(bits, 64), "gptq")
    dist.init_process_group("fake", store=FakeStore(), rank=index, world_size=cuts.ranks)
    selfcheck.tell(PASSED)

    def outside(*arguments: object) -> torch.nn.Module:
        with _disable_current_modes():  # on the meta device already
            return empty_model(*arguments)

    try:
        with (
            mock.patch.object(load, "_folder_and_config", lambda source, layers: (None, config)),
            mock.patch.object(load, "RandomTensors", RandomTensors if bits == 16 else PackedTensors),
            mock.patch.object(load, "empty_model", outside),
            # A model of one card checks itself by its numbers.
            mock.patch("llmlab.decoding.engine.check", lambda lm, path, fast, plain: PASSED[path]),
            fake_card(walk),
        ):
            work(walk, Rank(index, cuts.ranks, torch.device("cuda", 0)), Job(f"random:{shape}", cuts, "fp16", PASSED))
    finally:
        dist.destroy_process_group()


def _rank(walk: Walk, rank: Rank, job: Job, report: Report) -> None:
    """The works of a rank, in turn."""
    walk.during(lambda: job.load(rank))
    gc.collect()
    report.weights, lm = walk.held, job.load(rank).lm
    layer = type(decoder_layers(lm.model)[1][0])

    def count(name: str, work: Callable[[], object]) -> int:
        walk.layers.clear()
        report.launches[name], report.waits[name], peak = walk.during(work)
        report.kernels[name] = statistics.median_low(walk.layers or [0])
        return peak

    with mock.patch.object(layer, "forward", walk.layer(layer.forward)):
        questions = synthetic_sequences(QUESTIONS * job.cuts.data, lm.card.vocab_size)
        report.scoring = count("scoring", lambda: score_part(rank, job, questions, nodes=BATCH * CONTEXT))
        engine, drafts = Engine(lm), list[Draft]()
        engine.recorder.records &= not rank.index  # replicas are alike: one of them captures
        engine.times.measured = {(BATCH, 1): 1.0}  # nothing is timed
        settings = Settings(NEW, Sampling(0.0, 1.0, torch.Generator(lm.device)), lambda *_: False, K)
        passes = decode(engine, prompts := [[0] * PROMPT] * BATCH, settings, drafts)
        count("prefill", lambda: next(passes))
        for name in ("step", "drafted"):
            for _ in range(3 if engine.recorder.records else 1):  # the second pass of a shape is captured
                walk.waits.clear()
                count(name, lambda: next(passes))
            report.lines |= walk.waits
            drafts.append(PromptLookup())  # from now on
            drafts[0].begin(engine, prompts, settings.length(prompts))
        report.kv_cache = sum(tensor.nbytes for pair in engine.cache.buffers.values() for tensor in pair)
        report.graphs = _captured(walk, engine)


def _captured(walk: Walk, engine: Engine) -> str:
    """What captured passes write, and whether all that they read is still there."""
    cache = {tensor.untyped_storage()._cdata for pair in engine.cache.buffers.values() for tensor in pair}
    weights = {tensor.untyped_storage()._cdata for tensor in engine.tensors()}
    told = []
    for reads, writes in walk.graphs:
        gone, other = len((reads | writes) - set(walk.alive)), len(writes - cache)
        told.append(f"reads {len(reads & weights)} tensors and {len(reads - weights)} inputs, writes {len(writes)}")
        told += [f"{gone} of them gone, {other} not the cache's"] if gone or other else []
    return "; ".join(told)


def main() -> int:
    """Walk everything and print the table; the exit status."""
    begin, works = time.perf_counter(), []
    for shape in MODELS:
        for bits in (16, 4):
            card = model_card(f"random:{shape}")
            planned = plan(card, devices=DEVICES, memory="32GiB", bits=bits, batch=BATCH, context=CONTEXT)
            fitting = [layout for layout in planned.layouts if layout.fits and (bits == 16 or layout.data == DEVICES)]
            works += [(shape, layout, index, bits) for layout in fitting for index in range(DEVICES)]
    print(HEAD, flush=True)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=fresh) as pool:
        reports = []
        for report in pool.map(walk_rank, *zip(*works, strict=True)):
            reports.append(report)
            print(report.row(), flush=True)
        print(pool.submit(walk_gptq, MODELS[0]).result())
    lines = sum((report.lines for report in reports), Counter())
    print("A step waits at:", *(f"  {line}" for line in sorted(lines)), sep="\n")
    print("Captured passes:", *sorted({f"  {r.name}: {r.graphs}" for r in reports if r.graphs}), sep="\n")
    problems = [problem for report in reports for problem in report.problems()]
    for layout in {report.name.rpartition(",")[0] for report in reports}:
        fullest = max(report.ratio for report in reports if report.name.startswith(layout))
        problems += [f"{layout}: {fullest:.2f} of the planner's memory"] if abs(fullest - 1) > CLOSE else []
    seconds, work = time.perf_counter() - begin, sum(report.seconds for report in reports)
    print(
        f"{len(reports)} ranks walked in {seconds:.0f} s ({work:.0f} s of a core); no tensor met another device's, "
        f"{len(problems)} bars missed",
        *problems,
        sep="\n",
    )
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
