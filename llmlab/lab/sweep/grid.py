"""What a sweep runs: a notebook and combinations of its parameters, read from a YAML file or a dictionary."""

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import yaml

from llmlab.base.errors import InputError
from llmlab.base.paths import PACKAGE, home
from llmlab.kernels.cuda import nvidia, usable
from llmlab.lab.attempt import Job
from llmlab.lab.notebooks import check_parameters, find_notebooks
from llmlab.sharding.plan import parse_bytes

Content = Mapping[str, Any]  # of a grid before it is checked
Parameters = dict[str, object]


def _whole(least: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and value >= least


def _combined(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) and item for item in value)


def _varied(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(each, list) and each for each in value.values())


KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {  # of a grid: what may stand there, in code and in words
    "notebook": (lambda value: type(value) in (int, str), "a name, number or path such as 00_start_here"),
    "grid": (_varied, "parameter names, each with a list of values such as [1, 2]"),
    "list": (_combined, "parameters as - {name: value}, one combination a line"),
    "exclude": (_combined, "parameters as - {name: value}, one combination a line"),
    "fixed": (lambda value: isinstance(value, dict), "parameter names, each with its value"),
    "timeout": (lambda value: type(value) in (int, float) and 0 < value < float("inf"), "a positive number of seconds"),
    "memory": (lambda value: type(value) in (int, str), "bytes such as 4GiB"),
    "cores": (_whole(1), "a whole number, at least 1"),
    "gpus": (_whole(0), "a whole number, at least 0"),
}


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
        code = code_version()
        ids = {_hash([source, parameters, code])[:16]: parameters for parameters in self.combinations}
        return [Job(copy, ids[id], output / id, folder, True, self.timeout, self.memory) for id in ids]


def code_version() -> str:
    """Hash of the code and tables of this package as they are on disk, so that changes without a commit count."""
    digest = hashlib.sha256()
    for path in sorted(p for p in PACKAGE.rglob("*") if p.suffix in (".py", ".json")):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def read_grid(grid: str | Path | Content) -> Grid:
    """Read and check a grid: a YAML file, or the same as a dictionary.

    Its keys: `notebook`, `grid` (all combinations of the values), `list` (further combinations), `exclude`
    (combinations that agree with one of these are dropped), `fixed` (parameters of every run); for each run
    `timeout` (seconds), `memory` ("4GiB"), `cores` (1) and `gpus` (1 where there are GPUs, else 0; others are hidden).

    Raises InputError: an unreadable file, an unknown key, a value that `KEYS` does not allow, no combination, a
    parameter that the notebook lacks or whose value is no JSON.
    """
    file = None if isinstance(grid, Mapping) else Path(grid)
    where, content = str(file or "the grid"), _read_yaml(file) if file else dict(grid)  # type: ignore[arg-type]
    if unknown := sorted(map(str, set(content) - set(KEYS))):
        raise InputError(f"{where} has unknown keys {', '.join(unknown)}: known are {', '.join(KEYS)}.")
    content = {key: value for key, value in content.items() if value is not None}
    if "notebook" not in content:
        raise InputError(f"{where} names no notebook: write notebook: 00_start_here, for example.")
    for key, value in content.items():
        allowed, words = KEYS[key]
        if not allowed(value):
            raise InputError(f"`{key}` of {where} is {value!r}: give {words}.")
    name = content["notebook"]
    name = f"{name:02d}" if isinstance(name, int) else name  # YAML reads 00 as a number
    beside = (file.parent if file else Path()) / name
    notebook = beside if beside.suffix == ".ipynb" and beside.is_file() else find_notebooks([name])[0]
    combinations, excluded = _combinations(content, where), content.get("exclude", [])
    check_parameters(notebook, dict.fromkeys(name for chosen in [*combinations, *excluded] for name in chosen))
    kept = {_canonical(c): c for c in combinations if not any(_agrees(c, partial) for partial in excluded)}
    if not kept:
        raise InputError(f"{where} holds no combination of parameters: give `grid` or `list`, and exclude fewer.")
    memory = parse_bytes(content["memory"]) if "memory" in content else None
    limits = content.get("cores", 1), content.get("gpus", int(bool(usable(nvidia())))), content.get("timeout"), memory
    return Grid(file.stem if file else notebook.stem, notebook, list(kept.values()), *limits)


def _read_yaml(path: Path) -> Content:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError) as error:
        reason = "it is no UTF-8 text" if isinstance(error, UnicodeError) else error.strerror
        raise InputError(f"cannot read the grid {path} ({reason}): give a YAML file.") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no grid: write keys such as notebook: and grid:, one a line.")
    return content


def _combinations(content: Content, where: str) -> list[Parameters]:
    grid, fixed = content.get("grid", {}), content.get("fixed", {})
    product = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())] if grid else []
    varied = product + content.get("list", [])
    if twice := sorted({str(name) for combination in varied for name in combination if name in fixed}):
        raise InputError(f"{where}: {', '.join(twice)} is both fixed and varied: remove one of the two.")
    combinations = [fixed | combination for combination in varied]
    for name, value in [item for chosen in [*combinations, *content.get("exclude", [])] for item in chosen.items()]:
        if not isinstance(name, str):
            raise InputError(f"{where} has a parameter {name!r}: a parameter's name is text; put it in quotes.")
        try:
            _canonical(value)
        except (TypeError, ValueError):
            said = f"{name} of {where} has the value {value!r}"
            raise InputError(f"{said}: a parameter is a number, text, true, false, null or a list of these.") from None
    return combinations


def _agrees(combination: Parameters, partial: Parameters) -> bool:
    """Whether all that `partial` says holds; 1 and 1.0 are equal, 1 and true are not."""
    pairs = [(combination[name], value) for name, value in partial.items() if name in combination]
    return len(pairs) == len(partial) and all(a == b and isinstance(a, bool) == isinstance(b, bool) for a, b in pairs)


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, allow_nan=False)


def _hash(value: object) -> str:
    return hashlib.sha256(_canonical(value).encode()).hexdigest()
