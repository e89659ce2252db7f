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
from llmlab.lab.attempt import Job
from llmlab.lab.notebooks import check_parameters, find_notebooks
from llmlab.sharding.plan import parse_bytes

KEYS = ("notebook", "grid", "list", "exclude", "fixed", "timeout", "memory", "cores", "gpus")
Content = Mapping[str, Any]  # of a grid before it is checked
Parameters = dict[str, object]


@dataclass(frozen=True)
class Grid:
    """A notebook, the parameters of its runs, and what each run may use: threads are set to `cores`, see `Job`."""

    name: str
    notebook: Path
    combinations: list[Parameters]
    cores: int
    gpus: int
    timeout: float | None
    memory: int | None

    @property
    def varying(self) -> list[str]:
        """Parameters that are not the same in all runs."""
        names = dict.fromkeys(name for combination in self.combinations for name in combination)
        values = {name: {_canonical([c[name]]) if name in c else "" for c in self.combinations} for name in names}
        return [name for name in names if len(values[name]) > 1]

    def folder(self, output: str | Path | None = None) -> Path:
        """Where the results go: `output`, by default data/runs/sweeps/NAME."""
        return Path(output or home() / "data" / "runs" / "sweeps" / self.name).expanduser().resolve()

    def runs(self, output: Path) -> list[Job]:
        """One job a combination, on a copy of the notebook in `output` that no edit changes.

        Its id is a hash of the notebook's source, the parameters and the code of llmlab.
        """
        source = _hash([(cell.cell_type, cell.source) for cell in nbformat.read(self.notebook, as_version=4).cells])
        copy, folder = output / f"{self.notebook.stem}-{source[:12]}.ipynb", self.notebook.resolve().parent
        code, jobs = code_version(), {}
        for parameters in self.combinations:
            id = _hash([source, parameters, code])[:16]
            jobs[id] = Job(copy, parameters, output / id, folder, True, self.timeout, self.memory)
        return list(jobs.values())


def code_version() -> str:
    """Hash of the code and tables of this package as they are on disk, so that changes without a commit count."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".json")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_grid(grid: str | Path | Content) -> Grid:
    """Read and check a grid: a YAML file, or the same as a dictionary.

    Its keys: `notebook` (name, number or path), `grid` (parameter to list of values; all combinations), `list`
    (further combinations, written out), `exclude` (combinations that agree with one of these are dropped), `fixed`
    (parameters of every run); for each run `timeout` (seconds), `memory` ("4GiB"), `cores` (1) and `gpus` (0).

    Raises:
        InputError: an unreadable file, an unknown key, no combination, a parameter that the notebook's cell tagged
            `parameters` lacks, a value that is no JSON.
    """
    file = None if isinstance(grid, Mapping) else Path(grid)
    where, content = str(file or "the grid"), grid if isinstance(grid, Mapping) else _read_yaml(Path(grid))
    if unknown := sorted(map(str, set(content) - set(KEYS))):
        raise InputError(f"{where} has unknown keys {', '.join(unknown)}: known are {', '.join(KEYS)}.")
    notebook = _notebook(content.get("notebook"), file.parent if file else Path(), where)
    combinations, excluded = _combinations(content, where), _dictionaries(content, "exclude", where)
    names = dict.fromkeys(name for parameters in [*combinations, *excluded] for name in parameters)
    if odd := [name for name in names if not isinstance(name, str)]:
        raise InputError(f"{where} has a parameter {odd[0]!r}: a parameter's name is text; put it in quotes.")
    check_parameters(notebook, names)
    kept = {_canonical(c): c for c in combinations if not any(_agrees(c, partial) for partial in excluded)}
    if not kept:
        raise InputError(f"{where} holds no combination of parameters: give `grid` or `list`, and exclude fewer.")
    memory = content.get("memory")
    return Grid(
        name=file.stem if file else notebook.stem,
        notebook=notebook,
        combinations=list(kept.values()),
        cores=_whole(content.get("cores", 1), 1, "cores"),
        gpus=_whole(content.get("gpus", 0), 0, "gpus"),
        timeout=_timeout(content.get("timeout")),
        memory=None if memory is None else parse_bytes(memory),
    )


def _read_yaml(path: Path) -> Content:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeError:
        raise InputError(f"cannot read the grid {path} (it is no UTF-8 text): give a YAML file.") from None
    except OSError as error:
        raise InputError(f"cannot read the grid {path} ({error.strerror}): give a YAML file.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no grid: write keys such as notebook: and grid:, one a line.")
    return content


def _notebook(name: str | int | None, base: Path, where: str) -> Path:
    if name is None:
        raise InputError(f"{where} names no notebook: write notebook: 00_start_here, for example.")
    name = f"{name:02d}" if isinstance(name, int) else str(name)  # YAML reads 00 as a number
    beside = base / name
    return beside if beside.suffix == ".ipynb" and beside.is_file() else find_notebooks([name])[0]


def _combinations(content: Content, where: str) -> list[Parameters]:
    grid, fixed = content.get("grid") or {}, content.get("fixed") or {}
    for key, value in (("grid", grid), ("fixed", fixed)):
        if not isinstance(value, dict):
            raise InputError(f"`{key}` of {where} is no mapping: write parameter names, each with a colon and values.")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"`grid` of {where}: {name} needs a list of values such as [1, 2], got {values!r}.")
    product = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    varied = product + _dictionaries(content, "list", where)
    if twice := sorted({str(name) for combination in varied for name in combination if name in fixed}):
        raise InputError(f"{where}: {', '.join(twice)} is both fixed and varied: remove one of the two.")
    combinations = [fixed | combination for combination in varied]
    for name, value in (item for combination in combinations for item in combination.items()):
        try:
            _canonical(value)
        except (TypeError, ValueError):
            said = f"{name} of {where} has the value {value!r}"
            raise InputError(f"{said}: a parameter is a number, text, true, false, null or a list of these.") from None
    return combinations


def _dictionaries(content: Content, key: str, where: str) -> list[Parameters]:
    listed = content.get(key) or []
    if not isinstance(listed, list) or not all(isinstance(item, dict) and item for item in listed):
        raise InputError(f"`{key}` of {where} is no list of parameters: write - {{name: value}}, one a line.")
    return listed


def _agrees(combination: Parameters, partial: Parameters) -> bool:
    """Whether all that `partial` says holds; 1 and 1.0 are equal, 1 and true are not."""

    def same(a: object, b: object) -> bool:
        return a == b and isinstance(a, bool) == isinstance(b, bool)

    return all(name in combination and same(combination[name], value) for name, value in partial.items())


def _whole(value: object, least: int, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{what} {value!r}: give a whole number, at least {least}.")
    return value


def _timeout(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"timeout {value!r}: give a positive number of seconds.")
    return float(value)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _hash(value: object) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()
