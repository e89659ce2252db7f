"""Notebooks as a report and a sweep take them: found by name, checked for parameters, named again in a command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import papermill

from llmlab.base.errors import InputError
from llmlab.base.paths import home


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """The lab's notebooks in order, or those named (by path, or by name or number: "01_where_time_goes", "01").

    Raises InputError for a name that is no notebook.
    """
    folder = home() / "notebooks"
    known = sorted(folder.glob("[0-9]*.ipynb"))
    if not names and not known:
        raise InputError(f"there are no notebooks in {folder}: run from a checkout, or name a notebook.")
    return [_find(name, known) for name in names] or known


def _find(name: str, known: Sequence[Path]) -> Path:
    path = Path(name)
    if path.suffix == ".ipynb" and path.is_file():
        return path
    for notebook in known:
        if name in (notebook.stem, notebook.stem.split("_")[0]):
            return notebook
    stems = ", ".join(notebook.stem for notebook in known) or "none"
    raise InputError(f"no notebook {name!r}: give the path of an .ipynb file or one of {stems}.")


def check_parameters(notebook: Path, names: Iterable[str]) -> None:
    """Hold parameter names against the notebook's cell tagged `parameters`.

    Papermill only warns about a name that the cell lacks, and the run silently uses defaults; here it is an InputError.
    """
    try:
        known = papermill.inspect_notebook(str(notebook))
    except Exception as error:  # papermill and nbformat raise many kinds; all mean "no usable notebook"
        raise InputError(f"cannot read the notebook {notebook}: {' '.join(str(error).split())[:200]}.") from None
    if unknown := sorted(set(names) - set(known)):
        expected = ", ".join(known) or "none: it has no cell tagged parameters"
        raise InputError(f"{notebook.name} has no parameter {', '.join(unknown)}: its parameters are {expected}.")


def command(notebooks: Sequence[str | Path], parameters: Mapping[str, object]) -> str:
    """The command line that runs notebooks with parameters and reports on them; it can be pasted into a shell."""
    parts = ["llmlab", "report", *map(_named, notebooks)]
    for name, value in parameters.items():
        parts += ["-p", f"{name}={_as_argument(value)}"]
    return shlex.join(parts)


def _named(notebook: str | Path) -> str:
    """What `find_notebooks` finds a notebook by: its name if it is one of the lab's, else its path."""
    path = Path(notebook)
    return path.stem if path.resolve().parent == (home() / "notebooks").resolve() else str(path)


def _as_argument(value: object) -> str:
    """A value as -p reads it back: text as it is unless it would be read as JSON, everything else as JSON."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)
