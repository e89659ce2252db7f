"""`llmlab bench sharding`: every layout of a few ranks, measured and simulated, against one process.

The profile of the simulation is measured: in the naive schedule one rank works at a time, so the times of its batches
are those of an undisturbed device. What ranks lose by sharing this machine's cores is measured, too.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from llmlab.base.stats import Metric
from llmlab.data import Question
from llmlab.jobs.over_ranks import RankGroup, ScoredPart, gather_scores
from llmlab.measure.record import Measurement
from llmlab.model.card import ModelCard
from llmlab.model.load import model_card
from llmlab.scoring.score import ScoreResult
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.pipeline import stage_layers
from llmlab.sharding.plan import plan
from llmlab.sharding.rank import Rank
from llmlab.sharding.timeline import Span, Task, Timeline, simulate, tasks

ASKED = 0.6  # of a trie's nodes ask the output head; as in `shard.load_shard`


@dataclass(frozen=True)
class Profile:
    """Seconds of one undisturbed rank: a decoder layer and the ends over the nodes of a pass, as fitted lines.

    Attributes:
        layer: (fixed, per node) of one layer.
        head: (fixed, per node) of the output head and what follows it.
        link: seconds from a stage's end to the next one's start.
        reduce: seconds of one all-reduce of 256 nodes' hidden states.
        cores: how many ranks' worth of work this machine does at once.
    """

    layer: tuple[float, float]
    head: tuple[float, float]
    link: float
    reduce: float
    cores: float

    def seconds(self, nodes: int, layers: int, head: bool, share: float = 1.0) -> float:
        """Of `layers` layers, of which this rank computes `share`, with the head or without."""
        fixed, each = self.layer
        found = layers * (fixed + each * nodes) * share
        return found + (self.head[0] + self.head[1] * nodes) * share if head else found


def layouts(devices: int, card: ModelCard) -> list[tuple[Cuts, str]]:
    """What is measured: the naive split first, then every layout that the model allows."""
    found = [(Cuts(pipeline=devices), "naive")]
    for data in range(1, devices + 1):
        for tensor in range(1, devices + 1):
            cuts = Cuts(data, tensor, devices // max(1, data * tensor))
            if cuts.ranks == devices and tensor <= card.kv_heads and cuts.pipeline <= card.layers:
                found.append((cuts, "micro-batches"))
    return found


def bench_sharding(
    group: RankGroup,
    model: str,
    questions: list[Question],
    alone: ScoreResult,
    *,
    repeats: int = 3,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Everything that the benchmark reports.

    Args:
        group: the ranks.
        model: as for `llmlab.load`.
        questions: to be scored.
        alone: their scores by one process.
        repeats: runs of each layout, interleaved.
        on_row: called with each layout's row.
    """
    card = model_card(model)
    chosen = layouts(group.size, card)
    runs: dict[str, list[list[ScoredPart]]] = {}
    for _ in range(repeats):
        for cuts, schedule in chosen:
            if not runs.get(key := f"{cuts.name}, {schedule}"):
                group.score_parts(model, questions[:4], cuts, schedule=schedule)  # loads and warms up
            runs.setdefault(key, []).append(group.score_parts(model, questions, cuts, schedule=schedule))
    naive = runs[f"{chosen[0][0].name}, naive"]
    profile = measured_profile(group, model, questions, naive, card, chosen[0][0])
    rows: list[dict[str, Any]] = []
    delta, agreement = 0.0, 1.0
    for cuts, schedule in chosen:
        parts_of_runs = runs[f"{cuts.name}, {schedule}"]
        seconds = statistics.median(max(p.seconds for p in parts) for parts in parts_of_runs)
        parts = min(parts_of_runs, key=lambda ps: abs(max(p.seconds for p in ps) - seconds))
        here = simulated(profile, parts, cuts, schedule, card, profile.cores)
        apart = simulated(profile, parts, cuts, schedule, card, None)
        spans = [Span(Task(b, r, r, e - s), s, e) for r, p in enumerate(parts) for b, (s, e) in enumerate(p.busy)]
        result = gather_scores(questions, parts, cuts, seconds)
        pairs = zip(alone.log_probs, result.log_probs, strict=True)
        worst = max(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
        same = sum(a == b for a, b in zip(alone.predictions, result.predictions, strict=True)) / len(questions)
        delta, agreement = max(delta, worst), min(agreement, same)
        work = sum(span.task.work for span in simulated(profile, parts, cuts, schedule, card, None).spans)
        row = {
            "layout": cuts.name,
            "schedule": schedule,
            "seconds_measured": seconds,
            "seconds_all": [max(p.seconds for p in ps) for ps in parts_of_runs],
            "seconds_simulated": here.seconds,
            "simulator_error": here.seconds / seconds - 1,
            "bubble_measured": Timeline(group.size, spans).bubble,
            "bubble_simulated": here.bubble,
            "bubble_on_own_devices": apart.bubble,
            "seconds_on_own_devices": apart.seconds,
            "bytes_sent": sum(p.bytes_sent for p in parts),
            "efficiency": work / profile.cores / seconds,
            "max_abs_delta_log_prob": worst,
            "spans": [(r, s, e) for r, p in enumerate(parts) for s, e in p.busy],
        }
        rows.append(row)
        on_row(row)
    projected = plan(model_card("llama-30b"), devices=4, device="v100", workload="hellaswag")
    assert projected.best.predicted is not None
    return {
        "n": len(questions),
        "devices": group.size,
        "repeats": repeats,
        "layouts": rows,
        "prediction_agreement": agreement,
        "max_abs_delta_log_prob": delta,
        "simulator_error_max": max(abs(row["simulator_error"]) for row in rows),
        "bubble_simulated_400": bubble_at(profile, naive[0], chosen[0][0], card, len(questions), 400),
        "effective_cores": profile.cores,
        "link_seconds": profile.link,
        "projected_seconds_v100x4": projected.best.predicted.seconds,
        "projection": f"LLaMA-30B, fp16, {projected.best.name}; {projected.assumptions}",
    }


def measured_profile(
    group: RankGroup,
    model: str,
    questions: list[Question],
    naive: list[list[ScoredPart]],
    card: ModelCard,
    cuts: Cuts,
) -> Profile:
    """Lines through the naive schedule's times, and what cores and links do."""
    bounds = _bounds(card, cuts.pipeline)
    nodes = np.array(naive[0][0].nodes, dtype=float)
    # [stages][passes], the median over the runs
    times = np.median([[[e - s for s, e in part.busy] for part in parts] for parts in naive], axis=0)
    inner = sum(end - first for first, end in bounds[:-1]) or 1
    layer = np.polyfit(nodes, times[:-1].sum(axis=0) / inner, 1) if cuts.pipeline > 1 else (0.0, 0.0)
    last = bounds[-1][1] - bounds[-1][0]
    head = np.polyfit(nodes, times[-1] - last * np.polyval(layer, nodes), 1)
    total = statistics.median(max(p.seconds for p in parts) for parts in naive)
    hops = len(nodes) * cuts.pipeline  # a batch's hops from stage to stage, and the word that it has left
    link = max(0.0, (total - times.sum()) / hops)
    lines = (float(layer[1]), float(layer[0])), (float(head[1]), float(head[0]))
    alone = Profile(*lines, link, 0.0, float(group.size))
    reduce = statistics.median(group.run(time_reduce, card.hidden_size, card.intermediate_size))
    return Profile(*lines, link, reduce, effective_cores(group, model, questions, alone, card))


def effective_cores(
    group: RankGroup, model: str, questions: list[Question], alone: Profile, card: ModelCard, share: int = 4
) -> float:
    """How many undisturbed ranks' work this machine does at once: what makes the simulation of a short run of replicas
    take as long as the run did."""
    replicas, few = Cuts(data=group.size), questions[: max(group.size, len(questions) // share)]
    group.score_parts(model, questions[: group.size], replicas)  # loads and warms up
    runs = [group.score_parts(model, few, replicas) for _ in range(3)]
    measured = statistics.median(max(part.seconds for part in parts) for parts in runs)
    low, high = 0.25, float(group.size)
    for _ in range(20):  # bisection: more cores, fewer seconds
        cores = (low + high) / 2
        slower = simulated(alone, runs[0], replicas, "micro-batches", card, cores).seconds > measured
        low, high = (cores, high) if slower else (low, cores)
    return (low + high) / 2


def simulated(
    profile: Profile, parts: list[ScoredPart], cuts: Cuts, schedule: str, card: ModelCard, cores: float | None
) -> Timeline:
    """The timeline of a measured run's passes."""
    bounds = _bounds(card, cuts.pipeline)
    share = -(-card.kv_heads // cuts.tensor) / card.kv_heads if cuts.tensor > 1 else 1.0
    if cuts.tensor > 1:  # MLP evenly, attention in whole KV groups: weighed by their matrices
        attention = 2 * card.hidden_size * (card.heads + card.kv_heads) * card.head_dim / (
            card.linear_parameters / card.layers
        )  # fmt: skip
        share = attention * share + (1 - attention) / cuts.tensor
    made: list[Task] = []
    for replica in range(cuts.data):
        first_rank = replica * cuts.pipeline * cuts.tensor
        nodes = parts[first_rank].nodes
        # Reduces were timed while all ranks shared the cores: their share of a core is what they cost here.
        reduces = 0.0 if cuts.tensor == 1 else 2.0 if cores is None else 2.0 * cores / len(parts)
        for way in range(cuts.tensor):
            work = [
                [
                    profile.seconds(n, end - first, end == card.layers, share)
                    + reduces * (end - first) * profile.reduce * n / 256
                    for first, end in bounds
                ]
                for n in nodes
            ]
            offset = len(made)
            for task in tasks(work, schedule):
                rank = first_rank + task.stage * cuts.tensor + way
                after = None if task.after is None else task.after + offset
                made.append(Task(task.batch, task.stage, rank, task.work, after))
    return simulate(made, link=profile.link, cores=cores)


def bubble_at(profile: Profile, parts: list[ScoredPart], cuts: Cuts, card: ModelCard, n: int, questions: int) -> float:
    """The micro-batched pipeline's bubble on devices of its own, for more questions of the same kind."""
    nodes = (parts[0].nodes * (questions // n + 1))[: max(1, round(len(parts[0].nodes) * questions / n))]
    bounds = _bounds(card, cuts.pipeline)
    work = [[profile.seconds(k, end - first, end == card.layers) for first, end in bounds] for k in nodes]
    return simulate(tasks(work, "micro-batches"), link=profile.link).bubble


def _bounds(card: ModelCard, stages: int) -> list[tuple[int, int]]:
    return stage_layers(card.layers, stages, ASKED * card.head_parameters / (card.linear_parameters / card.layers))


def time_reduce(rank: Rank, hidden_size: int, intermediate_size: int, rounds: int = 40) -> float:
    """Seconds that an all-reduce of 256 nodes' hidden states adds to the matmuls before it.

    Between pairs of ranks, all pairs at once, with half an MLP between two reduces as in a layer: where ranks share
    cores most of a reduce is waiting until the other rank gets one.
    """
    group = None
    if rank.size % 2 == 0:
        group = init_device_mesh(rank.device.type, (rank.size // 2, 2)).get_group(1)
    x = torch.randn(256, hidden_size, device=rank.device)
    weights = [torch.randn(intermediate_size, hidden_size, device=rank.device) for _ in range(rounds)]

    def run(reduce: bool) -> float:
        dist.barrier()
        begin = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(x, weight)
            if reduce:
                dist.all_reduce(x, group=group)
                x.mul_(0.5)  # the sum of two halves stays of a size
        return (time.perf_counter() - begin) / rounds

    run(True)
    return statistics.median(max(0.0, run(True) - run(False)) for _ in range(3))


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    return (
        f"{row['layout']:<24} {row['schedule']:<14} {row['seconds_measured']:7.2f} s, simulated "
        f"{row['seconds_simulated']:7.2f} s   bubble {row['bubble_measured']:.0%}, "
        f"simulated {row['bubble_simulated']:.0%}"
    )


def measurement(result: dict[str, Any]) -> Measurement:
    """The main numbers for a record; speeds are ratios to the naive split of the same run."""
    naive = result["layouts"][0]["seconds_measured"]
    values = {f"speedup {row['layout']}": Metric(naive / row["seconds_measured"], "x") for row in result["layouts"][1:]}
    values |= {
        "simulator_error_max": Metric(result["simulator_error_max"]),
        "bubble_simulated_400": Metric(result["bubble_simulated_400"]),
        "prediction_agreement": Metric(result["prediction_agreement"]),
        "max_abs_delta_log_prob": Metric(result["max_abs_delta_log_prob"], "nat"),
        "projected_seconds_v100x4": Metric(result["projected_seconds_v100x4"], "s"),
    }
    protocol = (
        f"{result['devices']} ranks, median of {result['repeats']} interleaved runs; baseline: the naive layer split, "
        f"one batch at a time; this machine does {result['effective_cores']:.2f} ranks' work at once"
    )
    return Measurement("bench sharding", values, result["n"], protocol)
