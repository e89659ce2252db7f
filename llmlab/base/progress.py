"""Progress bars that look right in a terminal, in a notebook and in the notebook's report."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def in_notebook() -> bool:
    """True under a Jupyter kernel (JupyterLab, papermill, nbconvert)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return type(shell).__name__ == "ZMQInteractiveShell"


def progress(total: int, description: str, unit: str) -> tqdm[Any]:
    """A tqdm bar of `total` steps.

    In a notebook it is plain text on stdout: live in JupyterLab, and its last state stays in reports, where a widget
    would be dead and stderr would look like an error. In a terminal it is on stderr, and silent when that is a file.
    """
    if in_notebook():
        return tqdm(total=total, desc=description, unit=unit, file=sys.stdout, ncols=88, mininterval=0.5)
    return tqdm(total=total, desc=description, unit=unit, disable=None, dynamic_ncols=True)
