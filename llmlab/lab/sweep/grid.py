"""What a sweep runs: a notebook and combinations of its parameters, read from a YAML file or a dictionary."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

from llmlab.base.errors import InputError
from llmlab.base.paths import PACKAGE, home
from llmlab.lab.report.report import check_parameters, find_notebooks
from llmlab.lab.sweep.run import Run
from llmlab.sharding.plan import parse_bytes

KEYS = ("notebook", "grid", "list", "exclude", "fixed", "timeout", "memory", "cores", "gpus")


@dataclass(frozen=True)
class Grid:
    """A notebook, the parameters of its runs, and what each run may use (see `Run`)."""

    name: str
    notebook: Path
    combinations: list[dict[str, Any]]
    cores: int
    gpus: int
    timeout: float | None
    memory: int | None

    @property
    def varying(self) -> list[str]:
        """Parameters that are not the same in all runs."""
        names = dict.fromkeys(name for combination in self.combinations for name in combination)
        return [n for n in names if len({_canonical(c.get(n, KeyError)) for c in self.combinations}) > 1]

    def folder(self, output: str | Path | None = None) -> Path:
        """Where the results go: `output`, by default data/runs/sweeps/NAME."""
        return Path(output or home() / "data" / "runs" / "sweeps" / self.name).expanduser().resolve()

    def runs(self, output: Path) -> list[Run]:
        """One run a combination. Its id holds the notebook's source, the parameters and the code of llmlab."""
        cells = [(cell.cell_type, cell.source) for cell in self.source().cells]
        content = _hash(_canonical(cells))
        copy = output / f"{self.notebook.stem}-{content[:12]}.ipynb"
        code, folder = code_version(), self.notebook.resolve().parent
        how = {"cores": self.cores, "gpus": self.gpus, "timeout": self.timeout, "memory": self.memory}
        runs = {}
        for parameters in self.combinations:
            id = _hash(_canonical([content, parameters, code]))[:16]
            runs[id] = Run(id, copy, folder, output, parameters, **how)  # type: ignore[arg-type]  # by name, above
        return list(runs.values())

    def source(self) -> Any:
        """The notebook without its outputs."""
        notebook = nbformat.read(self.notebook, as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        return notebook


def code_version() -> str:
    """Hash of the code and tables of this package as they are on disk, so that changes without a commit count."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".json")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_grid(grid: str | Path | Mapping[str, Any]) -> Grid:
    """Read and check a grid: a YAML file, or the same as a dictionary.

    Its keys: `notebook` (name, number or path), `grid` (parameter to list of values; all combinations), `list`
    (further combinations, written out), `exclude` (combinations that agree with one of these are dropped), `fixed`
    (parameters of every run); for each run `timeout` (seconds), `memory` ("4GiB"), `cores` (1) and `gpus` (0).

    Raises:
        InputError: an unreadable file, an unknown key, no combination, a parameter that the notebook's cell tagged
            `parameters` lacks, a value that is no JSON.
    """
    where, base = ("the grid", Path()) if isinstance(grid, Mapping) else (str(grid), Path(grid).parent)
    content = dict(grid) if isinstance(grid, Mapping) else _read_yaml(Path(grid))
    if unknown := sorted(map(str, set(content) - set(KEYS))):
        raise InputError(f"{where} has unknown keys {', '.join(unknown)}: known are {', '.join(KEYS)}.")
    name = content.get("notebook")
    if name is None:
        raise InputError(f"{where} names no notebook: write notebook: 00_start_here, for example.")
    name = f"{name:02d}" if isinstance(name, int) else str(name)  # YAML reads 00 as a number
    beside = base / name
    notebook = beside if beside.suffix == ".ipynb" and beside.is_file() else find_notebooks([name])[0]
    combinations, excluded = _combinations(content, where), _dictionaries(content, "exclude", where)
    names = {name: None for each in [*combinations, *excluded] for name in each}
    if odd := [name for name in names if not isinstance(name, str)]:
        raise InputError(f"{where} has a parameter {odd[0]!r}: a parameter's name is text; put it in quotes.")
    check_parameters(notebook, names)
    kept = [c for c in combinations if not any(_agrees(c, each) for each in excluded)]
    if not kept:
        raise InputError(f"{where} holds no combination of parameters: give `grid` or `list`, and exclude fewer.")
    memory = content.get("memory")
    return Grid(
        name=notebook.stem if isinstance(grid, Mapping) else Path(grid).stem,
        notebook=notebook,
        combinations=list({_canonical(c): c for c in kept}.values()),
        cores=_whole(content.get("cores", 1), 1, "cores"),
        gpus=_whole(content.get("gpus", 0), 0, "gpus"),
        timeout=_timeout(content.get("timeout")),
        memory=None if memory is None else parse_bytes(memory),
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no UTF-8 text"
        raise InputError(f"cannot read the grid {path} ({reason}): give a YAML file.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no grid: write keys such as notebook: and grid:, one a line.")
    return content


def _combinations(content: dict[str, Any], where: str) -> list[dict[str, Any]]:
    grid, fixed = content.get("grid") or {}, content.get("fixed") or {}
    for key, value in (("grid", grid), ("fixed", fixed)):
        if not isinstance(value, dict):
            raise InputError(f"`{key}` of {where} is no mapping: write parameter names, each with a colon and values.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"`grid` of {where}: {name} needs a list of values such as [1, 2], got {values!r}.")
    product = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    found = product + _dictionaries(content, "list", where)
    for combination in found:
        if twice := sorted(map(str, set(fixed) & set(combination))):
            raise InputError(f"{where}: {', '.join(twice)} is both fixed and varied: remove one of the two.")
        for name, value in (fixed | combination).items():
            _check_value(name, value, where)
    return [fixed | combination for combination in found]


def _dictionaries(content: dict[str, Any], key: str, where: str) -> list[dict[str, Any]]:
    found = content.get(key) or []
    if not isinstance(found, list) or not all(isinstance(each, dict) and each for each in found):
        raise InputError(f"`{key}` of {where} is no list of parameters: write - {{name: value}}, one a line.")
    return found


def _check_value(name: Any, value: Any, where: str) -> None:
    try:
        _canonical(value)
    except (TypeError, ValueError):
        value_of = f"{name} of {where} has the value {value!r}"
        raise InputError(f"{value_of}: a parameter is a number, text, true, false, null or a list of these.") from None


def _agrees(combination: dict[str, Any], partial: dict[str, Any]) -> bool:
    """Whether all that `partial` says holds; 1 and 1.0 are equal, 1 and true are not."""
    return all(
        name in combination
        and combination[name] == value
        and isinstance(combination[name], bool) == isinstance(value, bool)
        for name, value in partial.items()
    )


def _whole(value: Any, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{what} {value!r}: give a whole number, at least {least}.")
    return value


def _timeout(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"timeout {value!r}: give a positive number of seconds.")
    return float(value)


def _canonical(value: Any) -> str:
    return "" if value is KeyError else json.dumps(value, sort_keys=True, allow_nan=False)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
