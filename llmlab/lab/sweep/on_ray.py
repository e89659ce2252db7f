"""A sweep on Ray: each run is a task that holds its cores and GPUs and starts the same process as locally."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import socket
from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

from llmlab.base.errors import InputError
from llmlab.kernels.cuda import nvidia, usable
from llmlab.lab.attempt import Attempt, Job, Outcome
from llmlab.lab.sweep.grid import Grid
from llmlab.lab.sweep.local import Done, Executor, environment
from llmlab.measure.environment import usable_cores

OBJECTS = 80 * 2**20  # bytes of a local Ray's object store, near the least it takes: runs share files, not objects


def on_ray(plan: Grid, address: str | None) -> Executor:
    """An executor for the runs of a grid on the cluster at `address`, or on a local Ray that ends with the sweep.

    A Ray that this process has joined already is used and left running. The sweep's folder must be on a file system
    that the nodes share.

    Raises InputError if ray is not installed or nothing listens at `address` (Ray itself would wait for minutes); the
    executor raises it, before the first run, if no node has a run's cores and GPUs.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError("the executor ray needs the package ray: run pip install 'llmlab[ray]'.")
    if address not in (None, "auto"):
        host, _, port = str(address).removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError, OverflowError):
            raise InputError(f"no Ray answers at {address!r}: give HOST:PORT of its head node, or auto.") from None
    return partial(_run, plan, address)


def _run(plan: Grid, address: str | None, jobs: Sequence[Job], done: Done) -> None:
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
                done(job, _outcome(ray, reference, job))
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)  # the task's process ends, and with it the run's
        if ours:
            ray.shutdown()


def _attempt(job: Job, cores: int) -> Outcome:
    ray = importlib.import_module("ray")
    return Attempt(job, environment(cores, ray.get_runtime_context().get_accelerator_ids()["GPU"])).wait()


def _outcome(ray: ModuleType, reference: object, job: Job) -> Outcome:
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:300]
        return Outcome("interrupted", error=f"its Ray task ended ({reason}): start the sweep again to repeat it.")
    if outcome.status != "interrupted" and Outcome.read(job.place).status == "waiting":
        folder = f"put {job.place.parent} on a file system that both share"
        return Outcome("interrupted", error=f"its node wrote a result that cannot be seen here: {folder}.")
    return outcome


def check_capacity(nodes: Sequence[dict[str, Any]], plan: Grid) -> None:
    """Raise InputError if a run fits on none of Ray's nodes: its task would wait for ever."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(has.get("CPU", 0) >= plan.cores and has.get("GPU", 0) >= plan.gpus for has in alive):
        most = max(((has.get("CPU", 0), has.get("GPU", 0)) for has in alive), default=(0, 0))
        needs = f"a run needs {plan.cores} cores and {plan.gpus} GPUs"
        raise InputError(f"{needs}, Ray's largest node has {most[0]:g} and {most[1]:g}: ask for fewer.")
