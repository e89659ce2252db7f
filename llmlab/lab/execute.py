"""One notebook run by papermill, and what went wrong in one line: for reports and for sweeps."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError, strip_color


def execute(
    notebook: Path, executed: Path, parameters: dict[str, Any], cwd: Path, environment: Mapping[str, str] | None = None
) -> tuple[str | None, str | None]:
    """Run a notebook with parameters in the folder `cwd` and write it, outputs included, to `executed`.

    Args:
        notebook, executed: files.
        parameters: values for its cell tagged `parameters`.
        cwd: the kernel's folder.
        environment: variables of the kernel, beside this process's own.

    Returns:
        Its error in one line and its traceback; both None if it ran through. Nothing is raised, so that other notebooks
        go on, but KeyboardInterrupt: then the kernel has ended.
    """
    try:
        with _environment(environment or {}):  # which the kernel inherits
            papermill.execute_notebook(
                str(notebook),
                str(executed),
                parameters=parameters,
                cwd=str(cwd),
                progress_bar=False,
                coalesce_streams=True,  # a progress bar leaves its last state, not a line per refresh
                extra_arguments=["--IPKernelApp.log_level=ERROR"],
                shutdown_kernel="immediate",  # its children with it, and without last words when interrupted
            )
    except PapermillExecutionError as failure:
        text = strip_color("\n".join(failure.traceback))
        return f"cell {failure.exec_count} raised {failure.ename}: {' '.join(str(failure.evalue).split())}", text
    except DeadKernelError:
        return "its kernel died: the process of a cell ended (crashed, left or was killed).", _last_cell(executed)
    except Exception as failure:  # a kernel that cannot start, a notebook that cannot be written
        return f"{type(failure).__name__}: {' '.join(str(failure).split())}", None
    return None, None


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _last_cell(executed: Path) -> str | None:
    """The cell in which a kernel died; there is no traceback of that."""
    cells = json.loads(executed.read_text(encoding="utf-8"))["cells"] if executed.exists() else []
    begun = [cell for cell in cells if cell["metadata"].get("papermill", {}).get("start_time")]
    return "In the cell:\n" + "".join(begun[-1]["source"]) if begun else None
