"""The process of an attempt: `python -m llmlab.lab.execute` runs the job.json of its folder by papermill."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import papermill
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color

from llmlab.lab.attempt import MARK, Outcome, end_processes

EXECUTED = Path("notebook.ipynb")  # in the attempt's folder, in which this process starts


class OwnKernel(AsyncKernelManager):
    """The kernel of this Python, whatever kernel of the notebook's name is installed: it is what records speak of."""

    kernel_spec = KernelSpec(argv=make_ipkernel_cmd(), display_name="llmlab", language="python")


def execute(job: dict[str, Any]) -> tuple[str | None, str | None]:
    """Run a job's notebook and write it, outputs included; its error in one line and its traceback, None without."""
    notebook = job["notebook"].replace("{", "{{").replace("}", "}}")  # papermill formats paths with the parameters
    try:
        papermill.execute_notebook(
            notebook, str(EXECUTED), job["parameters"], cwd=job["cwd"],
            language="python", kernel_name="python3", kernel_manager_class=OwnKernel, progress_bar=False,
            coalesce_streams=True,  # a progress bar leaves its last state, not a line per refresh
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
            shutdown_kernel="immediate",  # its children with it
        )  # fmt: skip
    except PapermillExecutionError as failure:
        text = strip_color("\n".join(failure.traceback))
        return f"cell {failure.exec_count} raised {failure.ename}: {' '.join(str(failure.evalue).split())}", text
    except DeadKernelError:  # there is no traceback, but a cell that had begun
        cells = json.loads(EXECUTED.read_text(encoding="utf-8"))["cells"] if EXECUTED.exists() else []
        begun = ["".join(c["source"]) for c in cells if c["metadata"].get("papermill", {}).get("start_time")]
        error = "its kernel died: the process of a cell ended (crashed, left or was killed)."
        return error, f"In the cell:\n{begun[-1]}" if begun else None
    except Exception as failure:  # a kernel that cannot start, a notebook that cannot be written
        return f"{type(failure).__name__}: {' '.join(str(failure).split())}", None
    return None, None


def _leave_with_parent(work: Path) -> None:
    os.read(sys.stdin.fileno(), 1)  # returns at the end of file: whoever started this attempt is gone
    end_processes(work)
    os._exit(1)


def main() -> None:
    """Started by `Attempt` in the attempt's folder, with a hold on standard input."""
    work = Path(os.environ[MARK])
    job = json.loads((work / "job.json").read_text(encoding="utf-8"))
    threading.Thread(target=_leave_with_parent, args=(work,), daemon=True).start()
    begin = time.perf_counter()
    error, traceback = execute(job)
    outcome = Outcome("failed" if error else "finished", time.perf_counter() - begin, error, traceback)
    outcome.write(work, job["parameters"])


if __name__ == "__main__":
    main()
