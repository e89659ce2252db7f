"""A notebook in a process and a folder of its own: how reports and sweeps run it, watch it and end it.

The folder takes the job's place by one rename, whole: a killed attempt leaves no result, and of two attempts at the
same job one alone is kept.
"""

import contextlib
import datetime
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Self

import psutil

from llmlab.base.lock import locked
from llmlab.base.paths import atomic

ATTEMPTS = ".attempts"  # the folder beside the places of jobs in which attempts work
MARK = "LLMLAB_ATTEMPT"  # in the environment of every process of an attempt: its folder
POLL = 0.2  # seconds between two looks at a job
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


@dataclass(frozen=True)
class Outcome:
    """How a job stands: "finished", "failed" (`error` is one line), "interrupted" (killed: no result) or "waiting"."""

    status: str
    seconds: float | None = None
    error: str | None = None
    traceback: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """From the run.json of a folder; "waiting" without one."""
        if not (folder / "run.json").exists():
            return cls("waiting")
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return cls(**{field.name: content[field.name] for field in fields(cls)})

    def write(self, folder: Path, parameters: Mapping[str, object]) -> None:
        """Write the run.json of an attempt, whole or not at all."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with atomic(folder / "run.json") as path:
            path.write_text(json.dumps({"parameters": parameters, "time": now} | asdict(self), indent=1), "utf-8")


@dataclass(frozen=True)
class Job:
    """A notebook to be run with parameters, where its results go and what it may use.

    Attributes:
        place: folder of notebook.ipynb (executed), run.json, log.txt and figures once it has ended.
        folder: of notebooks and modules that belong to it, importable while it runs.
        isolated: its place, not `folder`, is its current folder and its LLMLAB_HOME, so that its records go there, too.
        timeout, memory: seconds from its start; resident bytes of all its processes together.
    """

    notebook: Path
    parameters: Mapping[str, object]
    place: Path
    folder: Path
    isolated: bool = False
    timeout: float | None = None
    memory: int | None = None

    @property
    def id(self) -> str:
        """The name of its place."""
        return self.place.name

    @property
    def records(self) -> Path:
        """The store of an isolated job's measurements."""
        return self.place / "data" / "runs" / "records.jsonl"


class Attempt:
    """A job under way: `poll` or `wait` for its outcome, or `end` it. Given `cores`, it sees no GPUs but `gpus`."""

    def __init__(self, job: Job, cores: int | None = None, gpus: Sequence[str] = ()) -> None:
        self.job, self._begin = job, time.monotonic()
        self.work = job.place.parent / ATTEMPTS / f"{job.id}-{uuid.uuid4().hex[:8]}"
        self.work.mkdir(parents=True)
        own = {MARK: str(self.work), "LLMLAB_FIGURES": str(self.work / "figures")}
        if cores is not None:
            own |= dict.fromkeys(THREADS, str(cores)) | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        if job.isolated:
            path = os.pathsep.join(filter(None, [str(job.folder), os.environ.get("PYTHONPATH")]))
            own |= {"LLMLAB_HOME": str(self.work), "PYTHONPATH": path}
        cwd = self.work if job.isolated else job.folder
        content = {"notebook": str(job.notebook), "parameters": job.parameters, "cwd": str(cwd)}
        (self.work / "job.json").write_text(json.dumps(content), encoding="utf-8")
        with (self.work / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmlab.lab.execute"], stdout=log, stderr=subprocess.STDOUT, cwd=self.work,
                stdin=subprocess.PIPE,  # its end of file tells the attempt that this process is gone
                env=os.environ | own,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the attempt
            )  # fmt: skip

    def poll(self) -> Outcome | None:
        """None while it runs, then how the job stands: "interrupted" if the attempt was killed."""
        code = self._process.poll()
        reason = self._overdrawn() if code is None else None
        if code is None and reason is None:
            return None
        self.end()
        seconds = time.monotonic() - self._begin
        if reason and Outcome.read(self.work).status == "waiting":
            Outcome("failed", seconds, reason).write(self.work, self.job.parameters)
        if settle(self.work, self.job.place):
            return Outcome.read(self.job.place)
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit status {code}"
        how += " (by someone, or for want of memory)" if code == -signal.SIGKILL else ""
        error = f"its process {how}: start again to repeat it; see {self.work / 'log.txt'}."
        return Outcome("interrupted", seconds, error)

    def wait(self) -> Outcome:
        """Poll until it has ended; it ends with this process, too."""
        try:
            while (outcome := self.poll()) is None:
                time.sleep(POLL)
            return outcome
        finally:
            self.end()

    def end(self) -> None:
        """Kill what still runs of it."""
        end_processes(self.work)
        self._process.communicate()  # closes its standard input

    def _overdrawn(self) -> str | None:
        timeout, memory = self.job.timeout, self.job.memory
        if timeout is not None and time.monotonic() - self._begin > timeout:
            return f"it ran longer than its timeout of {timeout:g} s and was ended."
        held = [process.info["memory_info"] for process in processes(self.work)] if memory is not None else []
        if memory is not None and (used := sum(each.rss for each in held if each)) > memory:
            limit = f"its memory limit of {memory / 2**30:.2f} GiB"
            return f"it used {used / 2**30:.2f} GiB, more than {limit}, and was ended."
        return None


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Keep a folder to this process (`what`: a report, a sweep) and leave no attempt in it running, no old one either.

    Raises InputError if another process is at work in it.
    """
    busy = f"another {what} is at work in {folder}: wait for it, or give another output."
    with locked(folder / ".lock", busy, seconds=0):
        end_processes(folder / ATTEMPTS)  # which a killed one left
        try:
            yield
        finally:
            end_processes(folder / ATTEMPTS)


def settle(work: Path, place: Path) -> bool:
    """Give a complete attempt its place, unless a finished one is there; return whether it was complete."""
    if Outcome.read(work).status == "waiting":
        return False
    if Outcome.read(place).status == "finished":
        shutil.rmtree(work, ignore_errors=True)
    else:
        shutil.rmtree(place, ignore_errors=True)  # of a failure that was run again
        work.rename(place)
    return True


def processes(work: Path) -> list[psutil.Process]:
    """Every other process of an attempt, or of all attempts in a folder, whatever session it went to."""
    others = [p for p in psutil.process_iter(["environ", "memory_info"]) if p.pid != os.getpid()]
    return [p for p in others if Path((p.info["environ"] or {}).get(MARK, "/")).is_relative_to(work)]


def end_processes(work: Path) -> None:
    """Kill them, and those that they started meanwhile."""
    for _ in range(20):
        running = processes(work)
        for process in running:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if not running:
            return
        psutil.wait_procs(running, timeout=1)
