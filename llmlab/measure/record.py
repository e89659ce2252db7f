"""Records: one row per measurement, appended durably, read back as a DataFrame."""

from __future__ import annotations

import datetime
import json
import os
import re
import uuid
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, fields
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import pandas as pd
import torch

from llmlab.base.errors import InputError
from llmlab.base.lock import locked
from llmlab.base.paths import check_writable, home
from llmlab.base.stats import Metric
from llmlab.measure.environment import git_commit, hardware, versions
from llmlab.model.lm import LM

if TYPE_CHECKING:
    from llmlab.decoding.result import GenerateResult
    from llmlab.jobs.evaluate import EvalResult
    from llmlab.scoring.perplexity import PerplexityResult
    from llmlab.scoring.score import ScoreResult

SCHEMA = 3  # 1 had neither settings nor memory_bytes, 2 no token_ids among the settings

Row = dict[str, Any]  # a record as its line of JSON holds it


@dataclass(frozen=True)
class Measurement:
    """A result of your own: numbers with units, what they are of and how they came about (see `Record`).

    `details`: what else the command line's --json tells; not recorded.
    """

    task: str
    values: dict[str, Metric]
    n: int
    protocol: str
    data: str = "synthetic"
    settings: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    memory_bytes: int | None = None
    details: Row = field(default_factory=dict)

    def metrics(self) -> dict[str, Metric]:
        """The measurements with their units."""
        return self.values

    def as_dict(self) -> Row:
        """What --json tells."""
        return self.details


Result: TypeAlias = "Measurement | ScoreResult | PerplexityResult | GenerateResult | EvalResult"


@dataclass(frozen=True)
class Record:
    """One measurement with everything needed to trust and repeat it.

    `memory_bytes` is all that the process held for the model: weights, an engine's own copies of them, its cache; None
    means the weights alone. `attempt` is the run of a notebook that measured it, in a report or a sweep.
    """

    task: str
    metrics: dict[str, Metric]
    n: int  # items, tokens or prompts behind the metrics
    model: str
    revision: str | None
    transformation: str
    dtype: str
    device: str
    threads: int
    track: Literal["exact", "open"]  # the model's own arithmetic, or accuracy may pay for speed
    protocol: str  # how it was measured, in one line for people; numbers that were chosen stand in `settings`, too
    data: str  # fingerprint or name
    settings: dict[str, str] = field(default_factory=dict)  # {"batch_size": "8"}, say: with others it is another run
    weight_bytes: int | None = None
    memory_bytes: int | None = None
    seed: int | None = None
    warmup: int = 0
    repeats: int = 1  # counted runs; 1 means no spread
    hardware: dict[str, object] = field(default_factory=hardware)
    libraries: dict[str, str] = field(default_factory=versions)
    commit: str | None = field(default_factory=git_commit)
    time: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    attempt: str | None = field(default_factory=lambda: Path(os.environ.get("LLMLAB_ATTEMPT", "")).name or None)
    schema: int = SCHEMA

    def as_dict(self) -> Row:
        """Plain values, ready for JSON."""
        return asdict(self)


def describe(lm: LM, result: Result, *, joules_per_1000_tokens: Metric | None = None, **how: Any) -> Record:
    """The Record of a result on a model. Untransformed weights are the exact track, anything else the open track.

    `how`: `warmup`, `repeats`, and `seed` if the result does not know it. `joules_per_1000_tokens`: left out where
    energy was not measured.
    """
    energy = {"joules_per_1000_tokens": joules_per_1000_tokens} if joules_per_1000_tokens else {}
    told = {name: getattr(result, name) for name in ("task", "n", "protocol", "data", "settings", "memory_bytes")}
    own = {name: getattr(lm, name) for name in ("revision", "transformation", "dtype", "weight_bytes")}
    return Record(
        **told,
        **own,
        **({"seed": result.seed} | how),
        model=lm.name,
        metrics=result.metrics() | energy,
        threads=torch.get_num_threads(),
        device=torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else lm.device.type,
        track="exact" if lm.transformation == "none" else "open",
    )


def runs_file() -> Path:
    """Where records go unless said otherwise: data/runs/records.jsonl of the lab's home."""
    return home() / "data" / "runs" / "records.jsonl"


def check_store(path: Path | None = None) -> Path:
    """Prove that records can be written before the measurement is made. Raises InputError."""
    path = path or runs_file()
    check_writable(path.parent)
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"cannot append to {path}: make it writable, or set LLMLAB_HOME to another folder.")
    return path


def append(record: Record, path: Path | None = None) -> Record:
    """Append a record as one line of JSON, whole and on disk when this returns. Safe among processes.

    A line that an earlier crash left torn is closed first, so that it spoils nothing else. If the disk is full the
    half-written line is taken back, every earlier record stays, and InputError is raised.
    """
    with _alone(check_store(path)) as store:
        _write(store, [record.as_dict()])
    return record


def merge(sources: Sequence[Path], path: Path | None = None) -> int:
    """Append those records of other stores whose ids this one lacks, as durably as `append`; how many.

    May be repeated: a second time it appends nothing.
    """
    path = check_store(path)
    with _alone(path) as store:
        known = {row["id"] for row in read_records(path)}
        missing = [row for source in sources for row in read_records(source) if row["id"] not in known]
        _write(store, missing)
    return len(missing)


def read_records(path: Path | None = None) -> list[Row]:
    """All records of a store, oldest first. Lines that are torn or of a newer schema are reported and skipped."""
    path = path or runs_file()
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], start=1):
        if not line.strip():
            continue
        try:
            rows.append(current(json.loads(line)))
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{path}, line {number} is no whole record and was skipped: {error}", stacklevel=2)
    return rows


def records(path: Path | None = None) -> pd.DataFrame:
    """Every record as a row, oldest first.

    A metric `acc` becomes the columns `acc`, `acc_low`, `acc_high` (95 % interval, where there is one), a setting the
    column of its name, as text; units stand in `DataFrame.attrs["units"]`.
    """
    return as_frame(read_records(path))


def as_frame(rows: Sequence[Row]) -> pd.DataFrame:
    """What `records` returns, of rows that are read already."""
    apart = {"metrics", "settings", "hardware", "libraries", "schema", "attempt"}
    columns = [f.name for f in fields(Record) if f.name not in apart]
    flat, units = [], {}
    for record in rows:
        gpus = ", ".join(gpu["name"] for gpu in record["hardware"]["gpus"]) or None
        row = record["settings"] | {name: record.get(name) for name in columns}
        row |= {"gpu": gpus} | {name: record["hardware"].get(name) for name in ("cpu", "cpu_capability")}
        for name, metric in record["metrics"].items():
            row[name], units[name] = metric["value"], metric["unit"]
            if metric["low"] is not None:
                row |= {f"{name}_low": metric["low"], f"{name}_high": metric["high"]}
        flat.append(row)
    frame = pd.DataFrame(flat, columns=None if flat else [*columns, "gpu", "cpu", "cpu_capability"])
    frame["time"] = pd.to_datetime(frame["time"], utc=True)
    frame.attrs["units"] = units
    return frame


# What protocols of schema 1 told of settings, by the names that these have today.
TOLD = (
    r"precision (?P<precision>[^;]+); method (?P<method>[^;]+); sharding (?P<sharding>[^;]+); draft (?P<draft>[^;]+);",
    r"(greedy|temperature (?P<temperature>\S+), top-p (?P<top_p>\S+)), batch size (?P<batch_size>\d+), "
    r"(static )?KV cache(, draft: (?P<draft>.+))?, tokens counted",
    r"log p\(.+; (?P<method>shared|reference)(, (?P<layout>.+))? path, "
    r"longest first(, batch size (?P<batch_size>\d+))?",
    r"(?P<ranks>\d+) ranks",
)


def current(row: Row) -> Row:
    """A stored record as of today's schema; one of schema 1 gets the settings that its protocol tells, maybe not all.

    Raises ValueError for a newer schema.
    """
    if row["schema"] > SCHEMA:
        raise ValueError(f"its schema {row['schema']} is newer than {SCHEMA}")
    if row["schema"] > 1:
        return row
    match = next(filter(None, (re.match(pattern, row.get("protocol", "")) for pattern in TOLD)), None)
    settings = {name: value for name, value in match.groupdict().items() if value} if match else {}
    plain = {"temperature": "0", "draft": ""} if row.get("task") == "generate" else {}
    return row | {"settings": plain | settings | ({"draft": ""} if settings.get("draft") == "none" else {})}


def _alone(path: Path) -> AbstractContextManager[FileIO]:
    # The lock is the store's own: no second file beside it can stay behind, or belong to somebody else.
    return locked(path, f"another process holds {path}: wait for it or end it, then record again.")


def _write(store: FileIO, rows: Sequence[Row]) -> None:
    """Append rows to a store: all of them or, if the disk refuses, none."""
    lines = b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
    end = store.seek(0, os.SEEK_END)
    store.seek(max(0, end - 1))
    if lines and store.read(1) not in (b"", b"\n"):
        lines = b"\n" + lines
    try:
        while lines:
            lines = lines[store.write(lines) :]
        os.fsync(store.fileno())
    except OSError as error:
        store.truncate(end)
        why = f"cannot append to {store.name} ({error.strerror})"
        raise InputError(f"{why}: the earlier records stand; make room there and record again.") from error
