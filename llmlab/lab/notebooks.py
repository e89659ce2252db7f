"""Notebooks as a report and a sweep take them: found by name, checked before they run, named again in a command."""

import ast
import json
import shlex
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from llmlab.base.errors import InputError
from llmlab.base.paths import home


def find_notebooks(names: Sequence[str] = ()) -> list[Path]:
    """The lab's notebooks in order, or those named (by path, or by name or number: "01_where_time_goes", "01"), once.

    Raises InputError for a name that is no notebook.
    """
    known = _known()
    if not names and not known:
        raise InputError(f"there are no notebooks in {home() / 'notebooks'}: run from a checkout, or name a notebook.")
    chosen = [_find(name, known) for name in names] or known
    return list({path.resolve(): path for path in chosen}.values())


def _known() -> list[Path]:
    return sorted((home() / "notebooks").glob("[0-9]*.ipynb"))


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
    """Hold a notebook against what is asked of it: in Python, readable, each name assigned in its cell `parameters`.

    Papermill reads that cell line by line: it misses a parameter whose default or comment holds "=", and only warns of
    an unknown one. A kernel other than python3 is not used; a warning says so.

    Raises InputError for everything else.
    """
    try:
        content = nbformat.read(notebook, as_version=4)
        cell = next((c.source for c in content.cells if "parameters" in (c.metadata.get("tags") or ())), "")
        kernel, info = (content.metadata.get(key) or {} for key in ("kernelspec", "language_info"))
        language = str(kernel.get("language") or info.get("name") or "python")
        python = language.lower().startswith(("python", "ipython"))
        parsed = ast.parse(TransformerManager().transform_cell(cell if python else ""))  # IPython's magics included
    except Exception as error:  # nbformat raises many kinds; all mean "no usable notebook"
        raise InputError(f"cannot read the notebook {notebook}: {' '.join(str(error).split())[:200]}.") from None
    if not python:
        raise InputError(f"the notebook {notebook} is in {language}: only Python notebooks can run here.")
    if unknown := sorted(set(names) - set(known := _assigned(parsed))):
        expected = ", ".join(known) or "none: it has no cell tagged parameters"
        raise InputError(f"{notebook.name} has no parameter {', '.join(unknown)}: its parameters are {expected}.")
    if (name := kernel.get("name")) != "python3":
        asked = f"asks for the kernel {name!r}" if name else "names no kernel"
        warnings.warn(f"{notebook.name} {asked}: it runs in the Python of this environment.", stacklevel=2)


def _assigned(cell: ast.Module) -> list[str]:
    """Names that a cell's own statements assign to, in order."""
    plain = [target for node in cell.body if isinstance(node, ast.Assign) for target in node.targets]
    typed = [node.target for node in cell.body if isinstance(node, ast.AnnAssign)]
    names = [node for target in plain + typed for node in ast.walk(target) if isinstance(node, ast.Name)]
    return [node.id for node in sorted(names, key=lambda node: node.lineno) if isinstance(node.ctx, ast.Store)]


def command(notebooks: Sequence[str | Path], parameters: Mapping[str, object]) -> str:
    """The command line that runs notebooks with parameters and reports on them; it can be pasted into a shell."""
    known = {path.resolve() for path in _known()}
    named = [path.stem if path.resolve() in known else str(path) for path in map(Path, notebooks)]
    given = [part for name, value in parameters.items() for part in ("-p", f"{name}={_as_argument(value)}")]
    return shlex.join(["llmlab", "report", *named, *given])


def _as_argument(value: object) -> str:
    """A value as -p reads it back: text as it is unless it would be read as JSON, everything else as JSON."""
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError:
            return value
    return json.dumps(value)
