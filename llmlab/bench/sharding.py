"""`llmlab bench sharding`: every layout of a few ranks, measured and simulated, against one process.

The simulation's times are measured: in the naive schedule one rank works at a time, so the times of its batches are
those of an undisturbed device. What ranks lose by sharing this machine's cores is measured, too.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from llmlab.base.clock import seconds_of
from llmlab.base.errors import InputError
from llmlab.base.stats import Metric
from llmlab.bench.challenge import plan_here
from llmlab.data import Question
from llmlab.jobs.over_ranks import RankGroup, gather_scores, timeline
from llmlab.jobs.rank_parts import ScoredPart
from llmlab.measure.record import Measurement, Row
from llmlab.model.card import ModelCard
from llmlab.model.lm import DTYPES, LM
from llmlab.model.load import model_card
from llmlab.scoring.paired import paired
from llmlab.scoring.score import ScoreResult
from llmlab.sharding.cuts import Cuts, all_cuts
from llmlab.sharding.pipeline import layers_of
from llmlab.sharding.plan import plan
from llmlab.sharding.rank import Rank
from llmlab.sharding.timeline import Task, Timeline, simulate, tasks

MATRICES = 2**28  # bytes of what all-reduces are timed between: more than caches hold, little beside a model's part
Runs = list[list[ScoredPart]]  # of each run, what each rank reported


@dataclass(frozen=True)
class RankTimes:
    """Seconds of one undisturbed rank: a decoder layer and the ends over the nodes of a pass, as fitted lines."""

    card: ModelCard
    layer: tuple[float, float]  # per node and fixed, of one layer
    head: tuple[float, float]  # the same of the output head and what follows it
    link: float  # seconds from a stage's end to the next one's start
    reduce: float  # seconds of one all-reduce of 256 nodes' hidden states
    cores: float  # how many ranks' worth of work this machine does at once

    def timeline(self, nodes: list[list[int]], cuts: Cuts, schedule: str, cores: float | None) -> Timeline:
        """Passes over so many `nodes`, of each replica, as simulated on `cores`; on devices of their own for None."""
        card, share, reduces = self.card, 1.0, 0.0  # share of each layer's work; all-reduces over `reduce`
        if cuts.tensor > 1:  # MLP evenly, attention in whole KV groups: weighed by their matrices
            layer = card.linear_parameters / card.layers
            attention = 2 * card.hidden_size * (card.heads + card.kv_heads) * card.head_dim / layer
            share = attention * -(-card.kv_heads // cuts.tensor) / card.kv_heads + (1 - attention) / cuts.tensor
            # Reduces were timed while all ranks shared the cores: their share of a core is what they cost here.
            reduces = 2.0 if cores is None else 2.0 * cores / cuts.ranks

        def seconds(n: int, first: int, end: int) -> float:
            head = float(np.polyval(self.head, n)) if end == card.layers else 0.0
            work = (end - first) * float(np.polyval(self.layer, n)) + head
            return work * share + reduces * (end - first) * self.reduce * n / 256

        queue: list[Task] = []
        for replica, passes in enumerate(nodes):
            work = [[seconds(n, first, end) for first, end in layers_of(card, cuts.pipeline)] for n in passes]
            for way in range(cuts.tensor):
                offset = len(queue)
                for task in tasks(work, schedule):
                    rank = (replica * cuts.pipeline + task.stage) * cuts.tensor + way
                    after = None if task.after is None else task.after + offset
                    queue.append(replace(task, rank=rank, after=after))
        return simulate(queue, link=self.link, cores=cores)


def bench_sharding(
    group: RankGroup, lm: LM, questions: list[Question], alone: ScoreResult, *, repeats: int = 3
) -> Measurement:
    """Everything that the benchmark reports, ready for JSON in `details`; speeds are ratios to the naive split.

    Layouts that the planner finds no memory for are left out; `details` has a sentence on them under "left_out".

    Args:
        group: the ranks.
        lm: the model or its `outline`; ranks load it by its name.
        questions: to score.
        alone: their scores by one process in the same dtype.
        repeats: runs of each layout, interleaved.

    Raises InputError where the naive split, which all are compared with, does not fit.
    """
    card, score = lm.card, partial(group.score_parts, lm.name, dtype=lm.dtype)
    problems = {layout.name: layout.problem for layout in plan_here(lm, group.size).layouts}
    fitting = [cuts for cuts in all_cuts(group.size) if problems[cuts.name] is None]
    pipeline = Cuts(pipeline=group.size)
    if pipeline not in fitting:
        raise InputError(f"{pipeline.name} {problems[pipeline.name]}: all layouts are compared with it.")
    layouts = [(pipeline, "naive"), *((cuts, "micro-batches") for cuts in fitting)]
    runs: dict[tuple[Cuts, str], Runs] = {layout: [] for layout in layouts}
    for _ in range(repeats):
        for (cuts, schedule), of_layout in runs.items():
            if not of_layout:
                score(questions[: 4 * cuts.data], cuts, schedule=schedule)  # loads and warms up
            of_layout.append(score(questions, cuts, schedule=schedule))
    naive = runs[layouts[0]]
    times = _measured_times(score, questions, naive, card, fitting)
    reduce = statistics.median(group.run(time_reduce, card.hidden_size, card.intermediate_size, lm.dtype))
    times = replace(times, reduce=reduce)
    rows = [_row(times, of_layout, *layout, questions, alone) for layout, of_layout in runs.items()]
    # The micro-batched pipeline on devices of its own, for more questions of the same kind.
    passes = naive[0][0].nodes
    many = (passes * (400 // len(questions) + 1))[: max(1, round(len(passes) * 400 / len(questions)))]
    projected = plan(model_card("llama-30b"), devices=4, device="v100", workload="hellaswag")
    assert projected.best.predicted is not None
    base = rows[0]["seconds_measured"]
    values = {f"speedup {row['layout']}": Metric(base / row["seconds_measured"], "x") for row in rows[1:]}
    totals = {
        "prediction_agreement": Metric(min(row["prediction_agreement"] for row in rows)),
        "max_abs_delta_log_prob": Metric(max(row["max_abs_delta_log_prob"] for row in rows), "nat"),
        "simulator_error_max": Metric(max(abs(row["simulator_error"]) for row in rows)),
        "bubble_simulated_400": Metric(times.timeline([many], pipeline, "micro-batches", None).bubble),
        "projected_seconds_v100x4": Metric(projected.best.predicted.seconds, "s"),
    }
    details: Row = {"n": len(questions), "devices": group.size, "repeats": repeats, "layouts": rows}
    details |= {name: metric.value for name, metric in totals.items()}
    left_out = [f"{name} {problem}" for name, problem in problems.items() if problem is not None]
    details["left_out"] = f"left out: {'; '.join(left_out)}" if left_out else ""
    details |= {"effective_cores": times.cores, "link_seconds": times.link}
    details["projection"] = f"LLaMA-30B, fp16, {projected.best.name}; {projected.assumptions}"
    protocol = (
        f"{group.size} ranks, median of {repeats} interleaved runs; baseline: the naive layer split, "
        f"one batch at a time; this machine does {times.cores:.2f} ranks' work at once"
    )
    settings = {"ranks": str(group.size)}
    return Measurement("bench sharding", values | totals, len(questions), protocol, settings=settings, details=details)


def _row(times: RankTimes, runs: Runs, cuts: Cuts, schedule: str, questions: list[Question], alone: ScoreResult) -> Row:
    """A layout as measured, in the run of median length, and as simulated: here, and on devices of its own."""
    seconds_all = list(map(_seconds, runs))
    seconds = statistics.median(seconds_all)
    parts = min(runs, key=lambda parts: abs(_seconds(parts) - seconds))
    here, apart = (times.timeline(_nodes(parts, cuts), cuts, schedule, cores) for cores in (times.cores, None))
    compared = paired(alone, gather_scores(questions, parts, cuts, schedule, seconds))
    row: Row = {"layout": cuts.name, "schedule": schedule, "seconds_measured": seconds, "seconds_all": seconds_all}
    row |= {"seconds_simulated": here.seconds, "simulator_error": here.seconds / seconds - 1}
    row |= {"bubble_measured": timeline(parts).bubble, "bubble_simulated": here.bubble}
    row |= {"bubble_on_own_devices": apart.bubble, "seconds_on_own_devices": apart.seconds}
    row |= {"bytes_sent": sum(p.bytes_sent for p in parts)}
    row |= {"efficiency": sum(span.task.work for span in apart.spans) / times.cores / seconds}
    row |= {"prediction_agreement": 1 - len(compared.flips) / compared.n}
    return row | {"max_abs_delta_log_prob": compared.max_abs_delta}


def _seconds(parts: list[ScoredPart]) -> float:
    """Of a run: until its last rank is done."""
    return max(part.seconds for part in parts)


def _nodes(parts: list[ScoredPart], cuts: Cuts) -> list[list[int]]:
    """Of each replica the nodes of its passes."""
    return [part.nodes for part in parts[:: cuts.pipeline * cuts.tensor]]


def _measured_times(
    score: Callable[[list[Question], Cuts], list[ScoredPart]],
    questions: list[Question],
    naive: Runs,
    card: ModelCard,
    fitting: list[Cuts],
) -> RankTimes:
    """Lines through the naive schedule's times, and what cores and links do in the layouts that fit."""
    size = fitting[0].ranks
    bounds, nodes = layers_of(card, size), np.array(naive[0][0].nodes, dtype=float)
    # [stages][passes], the median over the runs
    seconds = np.median([[[e - s for s, e in part.busy] for part in parts] for parts in naive], axis=0)
    inner = sum(end - first for first, end in bounds[:-1]) or 1
    layer = np.polyfit(nodes, seconds[:-1].sum(axis=0) / inner, 1) if size > 1 else np.zeros(2)
    last = bounds[-1][1] - bounds[-1][0]
    head = np.polyfit(nodes, seconds[-1] - last * np.polyval(layer, nodes), 1)
    hops = len(nodes) * size  # a batch's hops from stage to stage, and the word that it has left
    link = max(0.0, (statistics.median(map(_seconds, naive)) - seconds.sum()) / hops)
    times = RankTimes(card, tuple(layer.tolist()), tuple(head.tolist()), link, reduce=0.0, cores=float(size))
    # How many undisturbed ranks' work this machine does at once: what makes the simulation of a short run of as many
    # replicas as fit take as long as the run did.
    replicas = max((cuts for cuts in fitting if cuts.tensor == 1), key=lambda cuts: cuts.data)
    few = questions[: max(size, len(questions) // 4)]
    score(questions[:size], replicas)  # loads and warms up
    runs = [score(few, replicas) for _ in range(3)]
    measured, work = statistics.median(map(_seconds, runs)), _nodes(runs[0], replicas)
    low, high = 0.25, float(size)
    for _ in range(20):  # bisection: more cores, fewer seconds
        cores = (low + high) / 2
        slower = times.timeline(work, replicas, "micro-batches", cores).seconds > measured
        low, high = (cores, high) if slower else (low, cores)
    return replace(times, cores=(low + high) / 2)


def time_reduce(rank: Rank, hidden_size: int, intermediate_size: int, dtype: str = "fp32", rounds: int = 40) -> float:
    """Seconds that an all-reduce of 256 nodes' hidden states adds to the matmuls before it.

    Between pairs of ranks, all pairs at once, with half an MLP between two reduces as in a layer: where ranks share
    cores most of a reduce is waiting until the other rank gets one.
    """
    group = rank.join(torch.arange(rank.size).view(-1, 2).tolist()) if rank.size % 2 == 0 else None
    where: dict[str, Any] = {"dtype": DTYPES[dtype], "device": rank.device}
    x = torch.randn(256, hidden_size, **where)
    copies = max(1, min(rounds, MATRICES // (hidden_size * intermediate_size * x.element_size())))
    weights = [torch.randn(intermediate_size, hidden_size, **where) for _ in range(copies)]

    def multiply(reduce: bool) -> None:
        for index in range(rounds):
            torch.nn.functional.linear(x, weights[index % copies])
            if reduce:
                dist.all_reduce(x, group=group)
                x.mul_(0.5)  # the sum of two halves stays of a size

    def run(reduce: bool) -> float:
        dist.barrier()
        return seconds_of(lambda: multiply(reduce)) / rounds

    run(True)
    return statistics.median(max(0.0, run(True) - run(False)) for _ in range(3))
