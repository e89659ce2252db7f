"""Sweeps: a notebook over a grid of its parameters, each run in its own process and folder, resumable.

What has finished is skipped, so a killed sweep goes on when it is started again. The records of a run come into the
lab's store when it has finished, each once.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from filelock import FileLock, Timeout
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic, check_writable
from llmlab.base.progress import in_notebook, progress
from llmlab.kernels.cuda import nvidia, usable
from llmlab.lab.sweep.grid import Grid, read_grid
from llmlab.lab.sweep.on_ray import check_ray, run_on_ray
from llmlab.lab.sweep.run import ATTEMPTS, Attempt, Run, end_processes, settle
from llmlab.measure.environment import usable_cores
from llmlab.measure.record import check_store, merge, read_records

Done = Callable[[Run, dict[str, Any]], None]
EXECUTORS = ("local", "ray")


def sweep(
    grid: str | Path | Mapping[str, Any],
    *,
    output: str | Path | None = None,
    executor: str = "local",
    address: str | None = None,
    retry_failed: bool = False,
) -> pd.DataFrame:
    """Run what of a grid has not finished yet, as many runs at a time as cores and GPUs allow.

    Args:
        grid: see `read_grid`.
        output: folder of the results, by default data/runs/sweeps/NAME; a run's is `output`/ID.
        executor: "local" (processes of this machine) or "ray".
        address: of a Ray cluster; by default a local Ray is started.
        retry_failed: run again what failed before. What was killed is always run again.

    Returns:
        A row a run of the grid: its id, parameters, `status` ("finished", "failed", "interrupted"), `seconds`,
        `error`, `folder`, and the metrics that it recorded. `DataFrame.attrs["varying"]` names the parameters that
        differ among the runs, `attrs["metrics"]` the metrics.

    Raises:
        InputError: before the first run: a wrong grid, too few cores or GPUs, an unwritable folder, another sweep at
            work in the same folder, no Ray.
    """
    plan, folder, runs = _plan(grid, output)
    execute = _executor(executor, address, plan)
    check_store()
    check_writable(folder / ATTEMPTS)
    with _alone(folder):
        _recover(folder)
        results = {run.id: run.result() for run in runs}
        merge([run.records for run in runs if results[run.id]["status"] == "finished"])
        again = ("waiting", "failed") if retry_failed else ("waiting",)
        to_do = [run for run in runs if results[run.id]["status"] in again]
        with atomic(runs[0].notebook) as copy:
            nbformat.write(plan.source(), copy)
        with _view(plan, len(runs), len(runs) - len(to_do)) as show:

            def done(run: Run, result: dict[str, Any]) -> None:
                results[run.id] = result
                if result["status"] == "finished":
                    merge([run.records])
                show(run, result)

            try:
                if to_do:
                    execute(to_do, done)
            finally:
                end_processes(folder / ATTEMPTS)
    return _table(plan, runs, results)


def status(grid: str | Path | Mapping[str, Any], *, output: str | Path | None = None) -> pd.DataFrame:
    """How the runs of a grid stand, as `sweep` would return them; those still to be run are "waiting"."""
    plan, _, runs = _plan(grid, output)
    return _table(plan, runs, {run.id: run.result() for run in runs})


def _plan(grid: str | Path | Mapping[str, Any], output: str | Path | None) -> tuple[Grid, Path, list[Run]]:
    plan = read_grid(grid)
    folder = plan.folder(output)
    return plan, folder, plan.runs(folder)


def _executor(name: str, address: str | None, plan: Grid) -> Callable[[Sequence[Run], Done], None]:
    if name == "ray":
        check_ray(address)
        return partial(run_on_ray, address=address)
    if name != "local":
        raise InputError(f"unknown executor {name!r}: choose {' or '.join(EXECUTORS)}.")
    if address is not None:
        raise InputError(f"the address {address} is of a Ray cluster: give the executor ray, too.")
    return partial(_run_here, slots=_slots(plan))


def _slots(plan: Grid) -> list[list[str]]:
    """The GPUs of each run that may be under way at a time; there are as many slots as cores and GPUs allow."""
    cores, cards = usable_cores(), [str(index) for index in usable(nvidia())]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        cards = [visible.split(",")[int(index)] for index in cards]
    if plan.cores > cores or plan.gpus > len(cards):
        needs = f"a run needs {plan.cores} cores and {plan.gpus} GPUs"
        raise InputError(f"{needs}, this machine has {cores} and {len(cards)}: ask for fewer, or use a Ray cluster.")
    count = min(cores // plan.cores, len(cards) // plan.gpus if plan.gpus else cores)
    return [cards[index * plan.gpus : (index + 1) * plan.gpus] for index in range(count)]


def _run_here(runs: Sequence[Run], done: Done, *, slots: list[list[str]]) -> None:
    waiting, free = deque(runs), list(slots)
    active: dict[Attempt, list[str]] = {}
    try:
        while waiting or active:
            while waiting and free:
                slot = free.pop(0)
                active[Attempt(waiting.popleft(), slot)] = slot
            for attempt in list(active):
                if (result := attempt.poll()) is not None:
                    free.append(active.pop(attempt))
                    done(attempt.run, result)
            time.sleep(0.05)
    finally:
        for attempt in active:
            attempt.end()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"another sweep is at work in {folder}: wait for it, or give another output.") from None
    try:
        yield
    finally:
        lock.release()


def _recover(folder: Path) -> None:
    """End what a killed sweep left running, keep what had ended, remove the rest."""
    end_processes(folder / ATTEMPTS)
    for work in (folder / ATTEMPTS).iterdir():
        settle(work, folder / work.name.rpartition("-")[0])
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def _view(plan: Grid, total: int, finished: int) -> Iterator[Done]:
    """One bar, and a line for each run that ends: tqdm in a notebook, rich elsewhere."""

    def line(run: Run, result: dict[str, Any]) -> str:
        what = ", ".join(f"{name}={run.parameters[name]}" for name in plan.varying if name in run.parameters)
        seconds = f" in {result['seconds']:.1f} s" if result["seconds"] is not None else ""
        return f"{result['status']}  {what or run.id}{seconds}" + (f": {result['error']}" if result["error"] else "")

    if in_notebook():
        with progress(total, "sweep", "run") as bar:
            bar.initial = bar.n = finished

            def show(run: Run, result: dict[str, Any]) -> None:
                bar.write(line(run, result))
                bar.update()

            yield show
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as rich_bar:
        task = rich_bar.add_task("sweep", total=total, completed=finished)

        def print_line(run: Run, result: dict[str, Any]) -> None:
            rich_bar.console.print(line(run, result), markup=False, highlight=False, soft_wrap=True)
            rich_bar.advance(task)

        yield print_line


def _table(plan: Grid, runs: Sequence[Run], results: dict[str, dict[str, Any]]) -> pd.DataFrame:
    rows, metrics = [], {}
    for run in runs:
        result = results[run.id]
        row = {"run": run.id, "status": None, "seconds": None, "error": None, "folder": None}
        for name, value in run.parameters.items():
            row[_free(name, row, "parameter")] = value
        row |= {"status": result["status"], "seconds": result["seconds"], "error": result["error"]}
        row["folder"] = str(run.place)
        taken = dict(row)
        for record in read_records(run.records) if result["status"] == "finished" else []:
            for name, metric in record["metrics"].items():
                row[_free(name, taken, "metric")] = metric["value"]
                metrics[_free(name, taken, "metric")] = metric["unit"]
        rows.append(row)
    frame = pd.DataFrame(rows)
    last = [name for name in ("status", "seconds", "error", "folder") if name in frame]
    parameters = [name for name in frame if name not in ("run", *last, *metrics)]
    frame = frame[["run", *parameters, *last, *metrics]]
    frame.attrs |= {"varying": [name for name in plan.varying if name in frame], "metrics": list(metrics)}
    return frame


def _free(name: str, taken: Mapping[str, Any], kind: str) -> str:
    """A column's name that is not taken: a metric `seconds` beside the run's becomes `seconds (metric)`."""
    return f"{name} ({kind})" if name in taken else name
