"""Sweeps: a notebook over a grid of its parameters, here or on Ray, each run in its own process, resumable.

What has finished is skipped, so a killed sweep goes on when it is started again. The records of a run come into the
lab's store when it has finished, each once.
"""

import importlib
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic, check_writable
from llmlab.base.progress import progress
from llmlab.kernels.cuda import nvidia, usable
from llmlab.lab.attempt import ATTEMPTS, POLL, Attempt, Job, Outcome, alone, settle
from llmlab.lab.sweep.grid import Content, Grid, read_grid
from llmlab.measure.environment import usable_cores
from llmlab.measure.record import check_store, merge, read_records

Done = Callable[[Job, Outcome], None]
Executor = Callable[[Sequence[Job], Done], None]
OBJECTS = 80 * 2**20  # bytes of a local Ray's object store, near the least it takes: runs share files, not objects


def sweep(
    grid: str | Path | Content, *, output: str | Path | None = None, executor: str = "local",
    address: str | None = None, retry_failed: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Run what of a grid has not finished yet, as many runs at a time as cores and GPUs allow.

    Args:
        grid: see `read_grid`.
        output: folder of the results, by default data/runs/sweeps/NAME; a run's is `output`/ID.
        executor: "local" (processes of this machine) or "ray", at the `address` of a cluster that shares the folder, by
            default on a Ray of this machine.
        retry_failed: run again what failed before. What was killed is always run again.

    Returns a row a run: `run` (its id), parameters, `status` ("finished", "failed", "interrupted"), `seconds`, `error`,
    `folder`, and the metrics that it recorded. `DataFrame.attrs["varying"]` names the parameters that differ among the
    runs, `attrs["metrics"]` the metrics.

    Raises InputError before the first run: a wrong grid, too few cores or GPUs, an unwritable folder, another sweep at
    work in the same folder, no Ray.
    """
    plan = read_grid(grid)
    folder = plan.folder(output)
    jobs, run = plan.runs(folder), _executor(executor, address, plan)
    check_store()
    check_writable(folder / ATTEMPTS)
    with alone(folder, "sweep"):
        for work in (folder / ATTEMPTS).iterdir():  # of a killed sweep keep what had ended, remove the rest
            settle(work, folder / work.name.rpartition("-")[0])
            shutil.rmtree(work, ignore_errors=True)
        outcomes = {job.id: Outcome.read(job.place) for job in jobs}
        merge([job.records for job in jobs if outcomes[job.id].status == "finished"])
        again = ("waiting", "failed") if retry_failed else ("waiting",)
        to_do = [job for job in jobs if outcomes[job.id].status in again]
        with atomic(jobs[0].notebook) as copy:
            shutil.copyfile(plan.notebook, copy)
        with progress(len(jobs), "sweep", "run") as bar:
            bar.initial = bar.n = len(jobs) - len(to_do)

            def done(job: Job, outcome: Outcome) -> None:
                outcomes[job.id] = outcome
                if outcome.status == "finished":
                    merge([job.records])
                varied = ", ".join(f"{name}={job.parameters[name]}" for name in plan.varying if name in job.parameters)
                seconds = "" if outcome.seconds is None else f" in {outcome.seconds:.1f} s"
                error = f": {outcome.error}" if outcome.error else ""
                bar.write(f"{outcome.status}  {varied or job.id}{seconds}{error}")
                bar.update()

            if to_do:
                run(to_do, done)
    return _table(plan, jobs, outcomes)


def status(grid: str | Path | Content, *, output: str | Path | None = None) -> pd.DataFrame:
    """How the runs of a grid stand, as `sweep` would return them; those still to be run are "waiting"."""
    plan = read_grid(grid)
    jobs = plan.runs(plan.folder(output))
    return _table(plan, jobs, {job.id: Outcome.read(job.place) for job in jobs})


def _executor(name: str, address: str | None, plan: Grid) -> Executor:
    if name == "ray":
        # Ray itself would wait for minutes for an address at which nothing listens.
        if find_spec("ray") is None:
            raise InputError("the executor ray needs the package ray: run pip install 'llmlab[ray]'.")
        if address not in (None, "auto"):
            host, _, port = str(address).removeprefix("ray://").rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
            except (OSError, ValueError, OverflowError):
                raise InputError(f"no Ray answers at {address!r}: give HOST:PORT of its head node, or auto.") from None
        return partial(_there, plan, address)
    if name != "local":
        raise InputError(f"unknown executor {name!r}: choose local or ray.")
    if address is not None:
        raise InputError(f"the address {address} is of a Ray cluster: give the executor ray, too.")
    cores, cards = usable_cores(), [str(index) for index in usable(nvidia())]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        cards = [visible.split(",")[int(index)] for index in cards]
    if plan.cores > cores or plan.gpus > len(cards):
        needs = f"a run needs {plan.cores} cores and {plan.gpus} GPUs"
        raise InputError(f"{needs}, this machine has {cores} and {len(cards)}: ask for fewer, or use a Ray cluster.")
    count = min(cores // plan.cores, len(cards) // plan.gpus if plan.gpus else cores)
    return partial(_here, plan.cores, [cards[k * plan.gpus : (k + 1) * plan.gpus] for k in range(count)])


def _here(cores: int, slots: list[list[str]], jobs: Sequence[Job], done: Done) -> None:
    """Run all; a slot is the GPUs of one run at a time. What still runs when this is interrupted, the sweep ends."""
    waiting, free, active = list(jobs), list(slots), dict[Attempt, list[str]]()
    while waiting or active:
        while waiting and free:
            slot = free.pop()
            active[Attempt(waiting.pop(0), cores, slot)] = slot
        for attempt in list(active):
            if (outcome := attempt.poll()) is not None:
                free.append(active.pop(attempt))
                done(attempt.job, outcome)
        time.sleep(POLL)


def _there(plan: Grid, address: str | None, jobs: Sequence[Job], done: Done) -> None:
    """Run all on Ray: a run is a task that holds its cores and GPUs and starts the same process as locally.

    Ray is the cluster at `address`, one that this process has joined, or a local one for the sweep.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray = importlib.import_module("ray")
    ours = not ray.is_initialized()
    if ours:
        local = {"num_cpus": usable_cores(), "num_gpus": len(usable(nvidia())), "object_store_memory": OBJECTS}
        how = {"address": address} if address else {"address": "local", "include_dashboard": False} | local
        try:
            ray.init(**how, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise InputError(f"cannot join a Ray at {address}: {' '.join(str(error).split())[:200]}.") from None
    waiting: dict[object, Job] = {}
    try:
        check_capacity(ray.nodes(), plan)
        task = ray.remote(_attempt).options(num_cpus=plan.cores, num_gpus=plan.gpus, max_retries=0)
        waiting = {task.remote(job, plan.cores): job for job in jobs}
        while waiting:
            for reference in ray.wait(list(waiting), timeout=1)[0]:
                job = waiting.pop(reference)
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayError as error:
                    reason = " ".join(str(error).split())[:300]
                    again = f"its Ray task ended ({reason}): start the sweep again to repeat it."
                    outcome = Outcome("interrupted", error=again)
                if outcome.status != "interrupted" and Outcome.read(job.place).status == "waiting":
                    unseen = "its node wrote a result that cannot be seen here: put"
                    where = f"{job.place.parent} on a file system that both share."
                    outcome = Outcome("interrupted", error=f"{unseen} {where}")
                done(job, outcome)
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)  # the task's process ends, and with it the run's
        if ours:
            ray.shutdown()


def _attempt(job: Job, cores: int) -> Outcome:
    ray = importlib.import_module("ray")
    return Attempt(job, cores, ray.get_runtime_context().get_accelerator_ids()["GPU"]).wait()


def check_capacity(nodes: Sequence[dict[str, Any]], plan: Grid) -> None:
    """Raise InputError if a run fits on none of Ray's nodes: its task would wait for ever."""
    alive = [(node["Resources"].get("CPU", 0), node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"]]
    if not any(cores >= plan.cores and gpus >= plan.gpus for cores, gpus in alive):
        most = max(alive, default=(0, 0))
        needs = f"a run needs {plan.cores} cores and {plan.gpus} GPUs"
        raise InputError(f"{needs}, Ray's largest node has {most[0]:g} and {most[1]:g}: ask for fewer.")


def _table(plan: Grid, jobs: Sequence[Job], outcomes: Mapping[str, Outcome]) -> pd.DataFrame:
    """A row a run; a parameter or metric whose name is taken says which it is, as in `seconds (metric)`."""
    states = pd.DataFrame([outcomes[job.id] for job in jobs])[["status", "seconds", "error"]]
    states["folder"] = [str(job.place) for job in jobs]
    own = {"run", *states}
    parameters = pd.DataFrame([job.parameters for job in jobs])
    parameters = parameters.rename(columns={name: f"{name} (parameter)" for name in own})
    records = [read_records(job.records) if outcomes[job.id].status == "finished" else [] for job in jobs]
    metrics = pd.DataFrame([{n: m["value"] for record in run for n, m in record["metrics"].items()} for run in records])
    metrics = metrics.rename(columns={name: f"{name} (metric)" for name in own | {*parameters}})
    frame = pd.concat([parameters, states, metrics], axis=1)
    frame.insert(0, "run", [job.id for job in jobs])
    frame.attrs |= {"varying": [name for name in plan.varying if name in frame], "metrics": list(metrics)}
    return frame
