"""The process of an attempt: `python -m llmlab.lab.execute` runs the job.json of its folder by papermill."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color

from llmlab.lab.attempt import MARK, Outcome, end_processes


def execute(notebook: str, executed: Path, parameters: Mapping[str, object], cwd: str) -> tuple[str | None, str | None]:
    """Run a notebook with parameters in the folder `cwd` and write it, outputs included, to `executed`.

    Returns:
        Its error in one line and its traceback; both None if it ran through.
    """
    try:
        papermill.execute_notebook(
            notebook,
            str(executed),
            parameters=parameters,
            cwd=cwd,
            progress_bar=False,
            coalesce_streams=True,  # a progress bar leaves its last state, not a line per refresh
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            shutdown_kernel="immediate",  # its children with it
        )
    except PapermillExecutionError as failure:
        text = strip_color("\n".join(failure.traceback))
        return f"cell {failure.exec_count} raised {failure.ename}: {' '.join(str(failure.evalue).split())}", text
    except DeadKernelError:
        return "its kernel died: the process of a cell ended (crashed, left or was killed).", _last_cell(executed)
    except Exception as failure:  # a kernel that cannot start, a notebook that cannot be written
        return f"{type(failure).__name__}: {' '.join(str(failure).split())}", None
    return None, None


def _last_cell(executed: Path) -> str | None:
    """The cell in which a kernel died; there is no traceback of that."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"] if executed.exists() else []
    begun = [cell for cell in cells if cell["metadata"].get("papermill", {}).get("start_time")]
    return "In the cell:\n" + "".join(begun[-1]["source"]) if begun else None


def _leave_with_parent(work: Path) -> None:
    os.read(sys.stdin.fileno(), 1)  # returns at the end of file: whoever started this attempt is gone
    end_processes(work)
    os._exit(1)


def main() -> None:
    """Started by `Attempt`, which names the folder in the environment and holds on to standard input."""
    work = Path(os.environ[MARK])
    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    threading.Thread(target=_leave_with_parent, args=(work,), daemon=True).start()
    begin = time.perf_counter()
    error, traceback = execute(job["notebook"], work / "notebook.ipynb", job["parameters"], job["cwd"])
    outcome = Outcome("failed" if error else "finished", time.perf_counter() - begin, error, traceback)
    outcome.write(work, job["parameters"])


if __name__ == "__main__":
    main()
