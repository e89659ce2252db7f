"""A notebook in a process and a folder of its own: how reports and sweeps run it, watch it and end it.

From outside a `Job` under way is an `Attempt`, which starts `python -m llmlab.lab.execute`, watches time and memory and
leaves nothing running. An attempt works in a folder of its own and takes the job's place by one rename, whole: a killed
attempt leaves no result, and of two attempts at the same job one alone is kept.
"""

from __future__ import annotations

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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic

ATTEMPTS = ".attempts"  # the folder beside the places of jobs in which attempts work
MARK = "LLMLAB_ATTEMPT"  # in the environment of every process of an attempt: its folder
POLL = 0.2  # seconds between two looks at a job


@dataclass(frozen=True)
class Outcome:
    """How a job stands.

    Attributes:
        status: "finished", "failed", "interrupted" (killed, so that there is no result) or "waiting".
        seconds: that it ran.
        error, traceback: one line, and all of it, if it failed.
    """

    status: str
    seconds: float | None = None
    error: str | None = None
    traceback: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        """From the run.json of a folder; "waiting" without one."""
        file = folder / "run.json"
        if not file.exists():
            return cls("waiting")
        content = json.loads(file.read_text(encoding="utf-8"))
        return cls(content["status"], content["seconds"], content["error"], content["traceback"])

    def write(self, folder: Path, parameters: Mapping[str, object]) -> None:
        """Write the run.json of an attempt, whole or not at all."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with atomic(folder / "run.json") as path:
            path.write_text(json.dumps({"parameters": parameters, "time": now} | asdict(self), indent=1), "utf-8")


@dataclass(frozen=True)
class Job:
    """A notebook to be run with parameters, where its results go and what it may use.

    Attributes:
        notebook, parameters: the file, and values for its cell tagged `parameters`.
        place: folder of notebook.ipynb (executed), run.json, log.txt and figures once it has ended.
        folder: of notebooks and modules that belong to it, importable while it runs.
        isolated: its place is its current folder and its LLMLAB_HOME, so that its records go there, too; by default
            these are `folder` and the lab's own.
        timeout: seconds from the start of its process, or None.
        memory: resident bytes of all its processes together, or None.
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
    """A job under way: `poll` it until it says how the job stands, `end` it to stop it."""

    def __init__(self, job: Job, environment: dict[str, str] | None = None) -> None:
        """Start it, with variables beside this process's own."""
        self.job = job
        self.work = job.place.parent / ATTEMPTS / f"{job.id}-{uuid.uuid4().hex[:8]}"
        self.work.mkdir(parents=True)
        self._begin = time.monotonic()
        own = {MARK: str(self.work), "LLMLAB_FIGURES": str(self.work / "figures")}
        if job.isolated:
            path = os.pathsep.join(filter(None, [str(job.folder), os.environ.get("PYTHONPATH")]))
            own |= {"LLMLAB_HOME": str(self.work), "PYTHONPATH": path}
        cwd = self.work if job.isolated else job.folder
        content = {"notebook": str(job.notebook), "parameters": job.parameters, "cwd": str(cwd)}
        (self.work / "job.json").write_text(json.dumps(content), encoding="utf-8")
        with (self.work / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmlab.lab.execute"],
                stdin=subprocess.PIPE,  # its end of file tells the attempt that this process is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.work,
                env=os.environ | own | (environment or {}),
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the attempt
            )

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
        if code == -signal.SIGKILL:
            how += " (by someone, or for want of memory)"
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
        if memory is not None and (used := sum(map(_resident_bytes, processes(self.work)))) > memory:
            limit = f"its memory limit of {memory / 2**30:.2f} GiB"
            return f"it used {used / 2**30:.2f} GiB, more than {limit}, and was ended."
        return None


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Keep a folder to this process; at the end, as at the beginning, no attempt in it is left running.

    Raises InputError if another process is at work in it; `what`: a report, a sweep.
    """
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise InputError(f"another {what} is at work in {folder}: wait for it, or give another output.") from None
    with lock:
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
    marks = {process: (process.info["environ"] or {}).get(MARK, "/") for process in psutil.process_iter(["environ"])}
    return [p for p, mark in marks.items() if Path(mark).is_relative_to(work) and p.pid != os.getpid()]


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


def _resident_bytes(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return process.memory_info().rss
    return 0
