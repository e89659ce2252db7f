"""When each stage works: a simulated timeline of a pipeline's schedule.

A task is one batch on one stage. It starts when the stage has done the tasks before it and the hidden states have
come over the link; tasks that run at the same time share the machine where its cores are fewer than its ranks. The
times of the tasks are given: measured on the real model, one rank at work at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmlab.base.errors import InputError

SCHEDULES = ("naive", "micro-batches", "interleaved")


@dataclass(frozen=True)
class Task:
    """One batch on one stage: seconds of work, the rank that does it, and the task whose output it needs."""

    batch: int
    stage: int
    rank: int
    work: float
    after: int | None = None


@dataclass(frozen=True)
class Span:
    """A task as it ran: seconds from the start."""

    task: Task
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """A simulated or measured run.

    Attributes:
        ranks: how many took part.
        spans: what they did.
    """

    ranks: int
    spans: list[Span]

    @property
    def seconds(self) -> float:
        """From the first start to the last end."""
        return max(span.end for span in self.spans) - min(span.start for span in self.spans)

    @property
    def bubble(self) -> float:
        """Share of the ranks' time in which they wait: 1 - busy / (ranks x seconds)."""
        busy = sum(span.end - span.start for span in self.spans)
        return max(0.0, 1 - busy / (self.ranks * self.seconds))


def tasks(work: Sequence[Sequence[float]], schedule: str, ranks: int | None = None) -> list[Task]:
    """The tasks of a schedule, in the order in which each rank does its own.

    Args:
        work: [batches][stages], seconds of each batch on each stage.
        schedule: "naive": a batch enters when the one before it has left. "micro-batches": it enters as soon as the
            first stage is free. "interleaved": the same with more stages than ranks, stage s on rank s mod `ranks`, so
            that each rank has several short stages and the pipeline fills sooner (arXiv 2104.04473, section 2.2).
        ranks: for "interleaved"; else there are as many as stages.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"unknown schedule {schedule!r}: choose one of {', '.join(SCHEDULES)}.")
    stages = len(work[0])
    on = ranks if schedule == "interleaved" and ranks else stages
    planned = []
    for index in range(len(work) * stages):
        batch, stage = divmod(index, stages)
        waits = stage > 0 or (schedule == "naive" and batch > 0)  # for the task before it in this list
        planned.append(Task(batch, stage, stage % on, work[batch][stage], index - 1 if waits else None))
    return planned


def simulate(
    planned: Sequence[Task],
    *,
    link: float = 0.0,
    cores: float | None = None,
    per_node: int | None = None,
    network: float = 0.0,
) -> Timeline:
    """Run tasks.

    Args:
        planned: from `tasks`, or your own; a rank takes the first of its own that is ready, in this order.
        link: seconds from the end of a task to the start of the one that needs its output on another rank.
        per_node, network: ranks of a node, all in one by default; and the seconds where that rank is in another node.
        cores: how many tasks run at full speed side by side; more share them evenly. None: each rank has its own.
    """
    ranks = 1 + max(task.rank for task in planned)
    size = per_node or ranks
    ready_at: list[float | None] = [0.0 if task.after is None else None for task in planned]
    followers: dict[int, list[int]] = {}
    for index, task in enumerate(planned):
        if task.after is not None:
            followers.setdefault(task.after, []).append(index)
    queues = [[i for i, task in enumerate(planned) if task.rank == rank] for rank in range(ranks)]
    running: dict[int, tuple[int, float, float]] = {}  # rank -> (task, start, work left)
    spans: list[Span] = []
    now = 0.0
    while len(spans) < len(planned):
        for rank, queue in enumerate(queues):
            if rank not in running:
                able = [i for i in queue if (at := ready_at[i]) is not None and at <= now + 1e-12]
                if able:
                    queue.remove(able[0])
                    running[rank] = (able[0], now, planned[able[0]].work)
        rate = 1.0 if cores is None or not running else min(1.0, cores / len(running))
        ends = [now + left / rate for _, _, left in running.values()]
        arrivals = [at for queue in queues for i in queue if (at := ready_at[i]) is not None and at > now + 1e-12]
        then = min(ends + arrivals)
        for rank, (index, start, left) in list(running.items()):
            left -= (then - now) * rate
            if left > 1e-12:
                running[rank] = (index, start, left)
                continue
            del running[rank]
            spans.append(Span(planned[index], start, then))
            for follower in followers.get(index, []):
                there = planned[follower].rank
                away = network if there // size != rank // size else link
                ready_at[follower] = then + (away if there != rank else 0.0)
        now = then
    return Timeline(ranks, spans)
