"""A sweep on Ray: each run is a task that holds its cores and GPUs and starts the same process as locally."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from llmlab.base.errors import InputError
from llmlab.kernels.cuda import nvidia, usable
from llmlab.lab.sweep.run import Attempt, Run, state
from llmlab.measure.environment import usable_cores

OBJECTS = 80 * 2**20  # bytes of a local Ray's object store, near the least it takes: runs share files, not objects


def check_ray(address: str | None) -> None:
    """Raise InputError if ray is not installed or nothing listens at `address` (Ray itself would wait for minutes)."""
    if importlib.util.find_spec("ray") is None:
        raise InputError("the executor ray needs the package ray: run pip install 'llmlab[ray]'.")
    if address in (None, "auto"):
        return
    host, _, port = str(address).removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError, OverflowError):
        raise InputError(f"no Ray answers at {address!r}: give HOST:PORT of its head node, or auto.") from None


def run_on_ray(runs: Sequence[Run], done: Callable[[Run, dict[str, Any]], None], address: str | None) -> None:
    """Run all on the cluster at `address`, or on a local Ray that ends with the sweep; `done` hears of each result.

    A Ray that this process has joined already is used and left running. The sweep's folder must be on a file system
    that the nodes share.

    Raises InputError, before the first run, if no node has a run's cores and GPUs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray: Any = importlib.import_module("ray")
    ours = not ray.is_initialized()
    if ours:
        local = {"num_cpus": usable_cores(), "num_gpus": len(usable(nvidia())), "object_store_memory": OBJECTS}
        how = {"address": address} if address else {"address": "local", "include_dashboard": False} | local
        try:
            ray.init(**how, log_to_driver=False, logging_level=logging.ERROR)
        except ConnectionError as error:
            raise InputError(f"cannot join a Ray at {address}: {' '.join(str(error).split())[:200]}.") from None
    waiting: dict[Any, Run] = {}
    try:
        check_capacity(ray.nodes(), runs[0])
        task = ray.remote(_attempt).options(num_cpus=runs[0].cores, num_gpus=runs[0].gpus, max_retries=0)
        waiting = {task.remote(run): run for run in runs}
        while waiting:
            for reference in ray.wait(list(waiting), timeout=1)[0]:
                run = waiting.pop(reference)
                done(run, _result(ray, reference, run))
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)  # the task's process ends, and with it the run's
        if ours:
            ray.shutdown()


def _attempt(run: Run) -> dict[str, Any]:
    ray: Any = importlib.import_module("ray")
    return Attempt(run, ray.get_runtime_context().get_accelerator_ids()["GPU"]).wait()


def _result(ray: Any, reference: Any, run: Run) -> dict[str, Any]:
    try:
        result: dict[str, Any] = ray.get(reference)
    except ray.exceptions.RayError as error:
        reason = " ".join(str(error).split())[:300]
        return state("interrupted", error=f"its Ray task ended ({reason}): start the sweep again to repeat it.")
    if result["status"] != "interrupted" and run.result()["status"] == "waiting":
        unseen = f"its node wrote a result that cannot be seen here: put {run.output} on a file system that both share."
        return state("interrupted", error=unseen)
    return result


def check_capacity(nodes: list[dict[str, Any]], run: Run) -> None:
    """Raise InputError if a run fits on none of Ray's nodes: its task would wait for ever."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(has.get("CPU", 0) >= run.cores and has.get("GPU", 0) >= run.gpus for has in alive):
        most = max(((has.get("CPU", 0), has.get("GPU", 0)) for has in alive), default=(0, 0))
        raise InputError(
            f"a run needs {run.cores} cores and {run.gpus} GPUs, Ray's largest node has {most[0]:g} and {most[1]:g}: "
            "ask for fewer."
        )
