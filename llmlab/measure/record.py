"""Records: one row per measurement, appended durably, read back as a DataFrame."""

from __future__ import annotations

import datetime
import json
import os
import re
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import pandas as pd
import torch
from filelock import FileLock

from llmlab.base.errors import InputError
from llmlab.base.paths import check_writable, home
from llmlab.base.stats import Metric
from llmlab.measure.environment import git_commit, hardware, versions
from llmlab.model.lm import LM

SCHEMA = 2  # 1 had neither settings nor memory_bytes

Row = dict[str, Any]  # a record as its line of JSON holds it


class Result(Protocol):
    """What every job returns, as far as a record needs it: its members are those of `Record`."""

    @property
    def task(self) -> str: ...
    @property
    def data(self) -> str: ...
    @property
    def n(self) -> int: ...
    @property
    def protocol(self) -> str: ...
    @property
    def settings(self) -> dict[str, str]: ...
    @property
    def seed(self) -> int | None: ...
    @property
    def memory_bytes(self) -> int | None: ...
    def metrics(self) -> dict[str, Metric]: ...


@dataclass(frozen=True)
class Measurement:
    """A Result of your own: numbers with units, what they are of and how they came about (see `Record`)."""

    task: str
    values: dict[str, Metric]
    n: int
    protocol: str
    data: str = "synthetic"
    settings: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    memory_bytes: int | None = None

    def metrics(self) -> dict[str, Metric]:
        """The measurements with their units."""
        return self.values


@dataclass(frozen=True)
class Record:
    """One measurement with everything needed to trust and repeat it.

    Attributes:
        task: what was measured ("hellaswag", "perplexity", "generate", ...).
        metrics: name to value with unit and interval.
        n: items, tokens or prompts behind the metrics.
        model, revision, transformation: what ran.
        track: "exact" (the model's own arithmetic) or "open" (accuracy may pay for speed).
        protocol: how it was measured, in one line for people.
        data: fingerprint or name of the data.
        settings: how it ran, such as {"batch_size": "8", "draft": "lookup"}: runs with other settings are other runs.
        weight_bytes: of the model's weights.
        memory_bytes: of all that the process held for the model: weights, an engine's own copies of them, its cache;
            None means the weights alone.
        seed, warmup, repeats: of the measurement; repeats 1 means one run, no spread.
    """

    task: str
    metrics: dict[str, Metric]
    n: int
    model: str
    revision: str | None
    transformation: str
    dtype: str
    device: str
    threads: int
    track: Literal["exact", "open"]
    protocol: str
    data: str
    settings: dict[str, str] = field(default_factory=dict)
    weight_bytes: int | None = None
    memory_bytes: int | None = None
    seed: int | None = None
    warmup: int = 0
    repeats: int = 1
    hardware: dict[str, object] = field(default_factory=hardware)
    libraries: dict[str, str] = field(default_factory=versions)
    commit: str | None = field(default_factory=git_commit)
    time: str = field(default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    schema: int = SCHEMA

    def as_dict(self) -> Row:
        """Plain values, ready for JSON."""
        return asdict(self)


def describe(
    lm: LM,
    result: Result,
    *,
    seed: int | None = None,
    warmup: int = 0,
    repeats: int = 1,
    joules_per_1000_tokens: Metric | None = None,
) -> Record:
    """The Record of a result on a model. Untransformed weights are the exact track, anything else the open track.

    `seed`: if the result does not know it. `joules_per_1000_tokens`: from `measure.energy`; left out where energy was
    not measured.
    """
    energy = {"joules_per_1000_tokens": joules_per_1000_tokens} if joules_per_1000_tokens else {}
    return Record(
        task=result.task,
        metrics=result.metrics() | energy,
        n=result.n,
        model=lm.name,
        revision=lm.revision,
        transformation=lm.transformation,
        dtype=lm.dtype,
        device=torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        track="exact" if lm.transformation == "none" else "open",
        protocol=result.protocol,
        data=result.data,
        settings=result.settings,
        weight_bytes=lm.weight_bytes,
        memory_bytes=result.memory_bytes,
        seed=result.seed if seed is None else seed,
        warmup=warmup,
        repeats=repeats,
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
    half-written line is taken back, every earlier record stays, and the error is raised.
    """
    path = check_store(path)
    with FileLock(f"{path}.lock"):
        _write(path, [record.as_dict()])
    return record


def merge(sources: Sequence[Path], path: Path | None = None) -> int:
    """Append those records of other stores whose ids this one lacks, as durably as `append`; how many.

    May be repeated: a second time it appends nothing.
    """
    path = check_store(path)
    with FileLock(f"{path}.lock"):
        known = {row["id"] for row in read_records(path)}
        missing = [row for source in sources for row in read_records(source) if row["id"] not in known]
        _write(path, missing)
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
    flat, units = [], {}
    for record in rows:
        row = record["settings"] | {name: record.get(name) for name in _COLUMNS}
        row["gpu"] = ", ".join(gpu["name"] for gpu in record["hardware"]["gpus"]) or None
        row["cpu"] = record["hardware"]["cpu"]
        for name, metric in record["metrics"].items():
            row[name] = metric["value"]
            units[name] = metric["unit"]
            if metric["low"] is not None:
                row[f"{name}_low"], row[f"{name}_high"] = metric["low"], metric["high"]
        flat.append(row)
    frame = pd.DataFrame(flat, columns=None if flat else [*_COLUMNS, "gpu", "cpu"])
    frame["time"] = pd.to_datetime(frame["time"], utc=True)
    frame.attrs["units"] = units
    return frame


_COLUMNS = [f.name for f in fields(Record) if f.name not in {"metrics", "settings", "hardware", "libraries", "schema"}]
# What protocols of schema 1 told of settings, by the names that these have today.
_TOLD = (
    r"precision (?P<precision>[^;]+); method (?P<method>[^;]+); sharding (?P<sharding>[^;]+); draft (?P<draft>[^;]+);",
    r"(greedy|temperature (?P<temperature>\S+), top-p (?P<top_p>\S+)), batch size (?P<batch_size>\d+), "
    r"(static )?KV cache(, draft: (?P<draft>.+))?, tokens counted",
    r"log p\(.+; (?P<method>shared|reference)(, (?P<layout>.+))? path, "
    r"longest first(, batch size (?P<batch_size>\d+))?",
    r"(?P<ranks>\d+) ranks",
)


def current(row: Row) -> Row:
    """A stored record as of today's schema. One of schema 1 gets the settings that its protocol tells, maybe not all.

    The only place that takes facts from a protocol, and for old records alone: results tell their settings.
    Raises ValueError for a newer schema.
    """
    if row["schema"] > SCHEMA:
        raise ValueError(f"its schema {row['schema']} is newer than {SCHEMA}")
    if row["schema"] == SCHEMA:
        return row
    match = next(filter(None, (re.match(pattern, row.get("protocol", "")) for pattern in _TOLD)), None)
    settings = {name: value for name, value in match.groupdict().items() if value} if match else {}
    if row.get("task") == "generate":
        settings = {"temperature": "0", "draft": ""} | settings
    elif settings.get("draft") == "none":
        settings["draft"] = ""
    return row | {"settings": settings}


def _write(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a store that this process has locked: all of them or, if the disk refuses, none."""
    lines = b"".join(json.dumps(row, allow_nan=False).encode() + b"\n" for row in rows)
    # Unbuffered: a buffer would try again to write what the disk refused when the file is closed.
    with path.open("ab+", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        if lines and file.read(1) not in (b"", b"\n"):
            lines = b"\n" + lines
        try:
            while lines:
                lines = lines[file.write(lines) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, end)
            raise
