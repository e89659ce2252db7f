"""A sweep on this machine: as many runs at a time as cores and GPUs allow."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from llmlab.base.errors import InputError
from llmlab.kernels.cuda import nvidia, usable
from llmlab.lab.attempt import POLL, Attempt, Job, Outcome
from llmlab.lab.sweep.grid import Grid
from llmlab.measure.environment import usable_cores

Done = Callable[[Job, Outcome], None]
Executor = Callable[[Sequence[Job], Done], None]
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def environment(cores: int, gpus: Sequence[str]) -> dict[str, str]:
    """Variables that keep a run to its cores and GPUs: threads are set, other GPUs are hidden."""
    return dict.fromkeys(THREADS, str(cores)) | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def local(plan: Grid) -> Executor:
    """An executor for the runs of a grid. Raises InputError if a run needs more than this machine has."""
    cores, cards = usable_cores(), [str(index) for index in usable(nvidia())]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        cards = [visible.split(",")[int(index)] for index in cards]
    if plan.cores > cores or plan.gpus > len(cards):
        needs = f"a run needs {plan.cores} cores and {plan.gpus} GPUs"
        raise InputError(f"{needs}, this machine has {cores} and {len(cards)}: ask for fewer, or use a Ray cluster.")
    count = min(cores // plan.cores, len(cards) // plan.gpus if plan.gpus else cores)
    slots = [environment(plan.cores, cards[k * plan.gpus : (k + 1) * plan.gpus]) for k in range(count)]
    return partial(_run, slots)


def _run(slots: list[dict[str, str]], jobs: Sequence[Job], done: Done) -> None:
    """Run all; a slot is what one run at a time may use. What still runs when this is interrupted, the sweep ends."""
    waiting, free = deque(jobs), deque(slots)
    active: dict[Attempt, dict[str, str]] = {}
    while waiting or active:
        while waiting and free:
            slot = free.popleft()
            active[Attempt(waiting.popleft(), slot)] = slot
        for attempt in list(active):
            if (outcome := attempt.poll()) is not None:
                free.append(active.pop(attempt))
                done(attempt.job, outcome)
        time.sleep(POLL)
