"""Sweeps: a notebook over a grid of its parameters, each run in its own process and folder, resumable.

What has finished is skipped, so a killed sweep goes on when it is started again. The records of a run come into the
lab's store when it has finished, each once.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic, check_writable
from llmlab.base.progress import progress
from llmlab.lab.attempt import ATTEMPTS, Job, Outcome, alone, settle
from llmlab.lab.sweep.grid import Content, Grid, read_grid
from llmlab.lab.sweep.local import Executor, local
from llmlab.lab.sweep.on_ray import on_ray
from llmlab.measure.record import check_store, merge, read_records


def sweep(
    grid: str | Path | Content,
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
                bar.write(_line(plan, job, outcome))
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
        return on_ray(plan, address)
    if name != "local":
        raise InputError(f"unknown executor {name!r}: choose local or ray.")
    if address is not None:
        raise InputError(f"the address {address} is of a Ray cluster: give the executor ray, too.")
    return local(plan)


def _line(plan: Grid, job: Job, outcome: Outcome) -> str:
    """What is printed of a run that has ended."""
    varied = ", ".join(f"{name}={job.parameters[name]}" for name in plan.varying if name in job.parameters)
    seconds = f" in {outcome.seconds:.1f} s" if outcome.seconds is not None else ""
    return f"{outcome.status}  {varied or job.id}{seconds}" + (f": {outcome.error}" if outcome.error else "")


def _table(plan: Grid, jobs: Sequence[Job], outcomes: Mapping[str, Outcome]) -> pd.DataFrame:
    """A row a run; a parameter or metric whose name is taken says which it is, as in `seconds (metric)`."""
    states = pd.DataFrame([outcomes[job.id] for job in jobs])[["status", "seconds", "error"]]
    states["folder"] = [str(job.place) for job in jobs]
    own = {"run", *states}
    parameters = pd.DataFrame([job.parameters for job in jobs])
    parameters = parameters.rename(columns={name: f"{name} (parameter)" for name in own})
    metrics = pd.DataFrame([_metrics(job, outcomes[job.id]) for job in jobs])
    metrics = metrics.rename(columns={name: f"{name} (metric)" for name in own | {*parameters}})
    frame = pd.concat([parameters, states, metrics], axis=1)
    frame.insert(0, "run", [job.id for job in jobs])
    frame.attrs |= {"varying": [name for name in plan.varying if name in frame], "metrics": list(metrics)}
    return frame


def _metrics(job: Job, outcome: Outcome) -> dict[str, float]:
    records = read_records(job.records) if outcome.status == "finished" else []
    return {name: metric["value"] for record in records for name, metric in record["metrics"].items()}
