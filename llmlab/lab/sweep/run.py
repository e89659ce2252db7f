"""One run of a sweep: a notebook with its parameters in a process and a folder of its own.

From outside a run is an `Attempt`, which starts `python -m llmlab.lab.sweep.run`, watches time and memory and leaves
nothing running. An attempt works in a folder of its own and takes its place under the run's id by one rename, whole:
a killed attempt leaves no result and no record, and of two attempts at the same run one alone is kept.
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
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from llmlab.base.paths import atomic

ATTEMPTS = ".attempts"  # in the sweep's output
MARK = "LLMLAB_ATTEMPT"  # in the environment of every process of an attempt: its folder
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
EVERY = 0.25  # seconds between two looks at the memory of a run


@dataclass(frozen=True)
class Run:
    """What is to be run and where its result goes.

    Attributes:
        id: hash of the notebook's source, the parameters and the code version.
        notebook: the sweep's copy of the notebook, which no edit changes.
        folder: of notebooks and modules beside the original, importable in the run.
        output: the sweep's folder; the run's is `output`/`id`.
        cores, gpus: of this run alone; threads are set to `cores`, other GPUs are hidden.
        timeout: seconds from the start of its process, or None.
        memory: resident bytes of all its processes together, or None.
    """

    id: str
    notebook: Path
    folder: Path
    output: Path
    parameters: dict[str, Any]
    cores: int = 1
    gpus: int = 0
    timeout: float | None = None
    memory: int | None = None

    @property
    def place(self) -> Path:
        """Where the executed notebook, run.json, log.txt, figures and records of this run are once it has ended."""
        return self.output / self.id

    @property
    def records(self) -> Path:
        """The store to which the notebook's measurements go: its home is the run's folder."""
        return self.place / "data" / "runs" / "records.jsonl"

    def result(self) -> dict[str, Any]:
        """run.json: `status` ("finished" or "failed"), `seconds`, `error`, `traceback`; "waiting" without one."""
        file = self.place / "run.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else state("waiting")


class Attempt:
    """A run under way: `poll` it until it says how the run stands, `end` it to stop it."""

    def __init__(self, run: Run, gpus: Sequence[str] = ()) -> None:
        self.run = run
        if run.result()["status"] != "finished":
            shutil.rmtree(run.place, ignore_errors=True)  # of a failure that is run again
        self.work = run.output / ATTEMPTS / f"{run.id}-{uuid.uuid4().hex[:8]}"
        self.work.mkdir(parents=True)
        self._begin = self._looked = time.monotonic()
        path = os.pathsep.join(filter(None, [str(run.folder), os.environ.get("PYTHONPATH")]))
        own = {MARK: str(self.work), "LLMLAB_HOME": str(self.work), "PYTHONPATH": path}
        own |= {"LLMLAB_FIGURES": str(self.work / "figures")}
        own |= {name: str(run.cores) for name in THREADS} | {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        with (self.work / "log.txt").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "llmlab.lab.sweep.run"],
                stdin=subprocess.PIPE,  # its end of file tells the run that this process is gone
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.work,
                env=os.environ | own,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the run
            )
        job = {"notebook": str(run.notebook), "parameters": run.parameters, "place": str(run.place)}
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a process that died at once is found by poll()
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def poll(self) -> dict[str, Any] | None:
        """None while it runs, then its result as `Run.result` says, or the status "interrupted" if it was killed."""
        code = self._process.poll()
        reason = self._overdrawn() if code is None else None
        if code is None and reason is None:
            return None
        self.end()
        if reason and self.work.exists() and not (self.work / "run.json").exists():
            write_result(self.work, self.run.parameters, time.monotonic() - self._begin, reason)
        settle(self.work, self.run.place)
        if self.run.result()["status"] != "waiting":
            return self.run.result()
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit status {code}"
        if code == -signal.SIGKILL:
            how += " (by someone, or for want of memory)"
        error = f"its process {how}: start the sweep again to repeat it; see {self.work / 'log.txt'}."
        return state("interrupted", seconds=time.monotonic() - self._begin, error=error)

    def wait(self) -> dict[str, Any]:
        """Poll until it has ended; it ends with this process, too."""
        try:
            while (result := self.poll()) is None:
                time.sleep(0.05)
            return result
        finally:
            self.end()

    def end(self) -> None:
        """Kill what still runs of it."""
        end_processes(self.work)
        self._process.wait()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def _overdrawn(self) -> str | None:
        now = time.monotonic()
        if self.run.timeout is not None and now - self._begin > self.run.timeout:
            return f"it ran longer than its timeout of {self.run.timeout:g} s and was ended."
        if self.run.memory is not None and now - self._looked > EVERY:
            self._looked = now
            used = resident_bytes(self._process.pid)
            if used > self.run.memory:
                limit = self.run.memory / 2**30
                return f"it used {used / 2**30:.2f} GiB, more than its memory limit of {limit:.2f} GiB, and was ended."
        return None


def resident_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants together."""
    total = 0
    with contextlib.suppress(psutil.Error):
        top = psutil.Process(pid)
        for process in [top, *top.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
    return total


def end_processes(work: Path) -> None:
    """Kill every other process of an attempt, or of all attempts in a folder, whatever session it went to."""
    for _ in range(20):
        found = [process for process in psutil.process_iter() if _belongs(process, work)]
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if not psutil.wait_procs(found, timeout=1)[0] and not found:
            return


def _belongs(process: psutil.Process, work: Path) -> bool:
    try:
        mark = process.environ().get(MARK)
        return bool(mark) and process.pid != os.getpid() and Path(str(mark)).is_relative_to(work)
    except (psutil.Error, OSError):  # gone, a zombie, or someone else's
        return False


def write_result(
    work: Path, parameters: dict[str, Any], seconds: float, error: str | None = None, traceback: str | None = None
) -> None:
    """Write the run.json of an attempt, whole or not at all."""
    result = state("failed" if error else "finished", seconds=seconds, error=error, traceback=traceback)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with atomic(work / "run.json") as path:
        path.write_text(json.dumps({"parameters": parameters, "time": now} | result, indent=1), encoding="utf-8")


def settle(work: Path, place: Path) -> None:
    """Move a complete attempt to the run's place, unless an earlier one is there; do nothing with an incomplete one."""
    if not (work / "run.json").exists():
        return
    try:
        work.rename(place)
    except OSError:
        if not (place / "run.json").exists():
            raise
        shutil.rmtree(work, ignore_errors=True)


def state(
    status: str, *, seconds: float | None = None, error: str | None = None, traceback: str | None = None
) -> dict[str, Any]:
    """How a run stands, as it is in run.json."""
    return {"status": status, "seconds": seconds, "error": error, "traceback": traceback}


def _leave_with_parent(work: Path) -> None:
    os.read(sys.stdin.fileno(), 1)  # returns at the end of file: whoever started this run is gone
    end_processes(work)
    os._exit(1)


def main() -> None:
    """`python -m llmlab.lab.sweep.run`: started by `Attempt`, which sends one line of JSON on standard input."""
    from llmlab.lab.execute import execute  # papermill takes a second to import, the parent needs none of it

    job = json.loads(sys.stdin.readline())
    work, notebook = Path(os.environ[MARK]), Path(job["notebook"])
    threading.Thread(target=_leave_with_parent, args=(work,), daemon=True).start()
    begin = time.perf_counter()
    error, traceback = execute(notebook, work / "notebook.ipynb", job["parameters"], cwd=work)
    write_result(work, job["parameters"], time.perf_counter() - begin, error, traceback)
    settle(work, Path(job["place"]))


if __name__ == "__main__":
    main()
