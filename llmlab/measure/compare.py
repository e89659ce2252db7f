"""Two sets of records held against each other: what changed beyond noise, and for the better or the worse.

Records are matched by what was measured on what (`KEY`), not by when, with which code or on which machine: that is what
differs between the two sides. Runs of one protocol are matched first; the protocol's numbers (passes, tokens) do not
count, only its words. Where the sides share a key but no protocol, the newest ones are compared and a note says so.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from llmlab.base.errors import InputError
from llmlab.base.stats import Z95, Metric, median_interval
from llmlab.measure.record import read_records

KEY = ("task", "model", "transformation", "dtype", "data", "n", "device")
ENOUGH = 5  # the range of fewer runs covers their median less than 94 % of the time
LEVEL = 0.05
COLUMNS = (
    *("metric", "unit", "a", "a_low", "a_high", "b", "b_low", "b_high"),
    *("scale", "change", "change_low", "change_high", "p", "verdict"),
)
LOWER = re.compile(r"perplexity|nll|_over_|delta|error|seconds|bubble|joules|bytes|bits_per")
HIGHER = re.compile(r"^acc(_|$)|speedup|agreement|acceptance|mfu|mbu|per_second|tokens_per_pass")
LOWER_UNITS = {"s", "B", "nat", "nat/token", "J", "bit"}
HIGHER_UNITS = {"x", "1/s", "token/s", "FLOP/s", "B/s"}

Rows = list[dict[str, Any]]


def compare(a: str | Path, b: str | Path) -> pd.DataFrame:
    """What changed from A to B, one row a metric of records that both sides have.

    A side's value is the median over its records of a key; its interval the wider of the records' own (median bounds)
    and the spread among at least 5 of them (bootstrap). The change is log(B/A), or B-A where an interval reaches below
    zero, with the standard errors of the two intervals added in quadrature; its p-value (normal approximation) is
    corrected over all metrics of the table (Holm 1979). Sides count as independent: for accuracies on the same items
    that is cautious, and a paired test (`llmlab.base.stats.mcnemar`) is sharper.

    Args:
        a, b: a .jsonl store of records, a .json file that a command's --json wrote, or a folder of stores.

    Returns:
        Columns: the key, `metric`, `unit`, `a`, `a_low`, `a_high`, `b`, `b_low`, `b_high`, `change` (a share of A, or
        the difference where `scale` says so) with `change_low` and `change_high` (95 %), `p` (corrected) and
        `verdict`: "better", "worse", "changed" (which way is good is not known), "within noise", "equal", or
        "not judged" and why.
        `attrs["notes"]` says what else differs: hardware, versions, threads, protocols, records of one side only.

    Raises:
        InputError: a path that is missing or holds no record, or sides without a common key.
    """
    sides = [_by_key(_read(Path(path).expanduser())) for path in (a, b)]
    common = [key for key in sides[0] if key in sides[1]]
    if not common:
        mine, theirs = ("; ".join(f"({_name(key)})" for key in side) for side in sides)
        raise InputError(
            f"{a} and {b} have no record in common ({', '.join(KEY)} must be equal): A has {mine}; B has {theirs}."
        )
    notes = _differences(*([row for key in common for row in side[key]] for side in sides))
    rows = []
    for key in common:
        for left, right, note in _same_protocol(sides[0][key], sides[1][key]):
            notes += [f"{_name(key)}: {note}"] if note else []
            rows += [dict(zip(KEY, key, strict=True)) | row for row in _metrics(left, right)]
    notes += [f"only in A: {_name(key)}" for key in sides[0] if key not in sides[1]]
    notes += [f"only in B: {_name(key)}" for key in sides[1] if key not in sides[0]]
    _verdicts(rows)
    table = pd.DataFrame(rows).reindex(columns=[*KEY, *COLUMNS])
    table.attrs["notes"] = notes
    return table


def direction(name: str, unit: str) -> int:
    """1 where more is better, -1 where less is, 0 where it is not known; the name counts before the unit."""
    if HIGHER.search(name):
        return 1
    if LOWER.search(name):
        return -1
    return (unit in HIGHER_UNITS) - (unit in LOWER_UNITS)


def pooled(metrics: Sequence[Metric]) -> Metric:
    """One metric of several runs: their median, with an interval if they have their own or are `ENOUGH`."""
    value, low, high = median_interval([metric.value for metric in metrics])
    lows = [metric.low for metric in metrics if metric.low is not None]
    highs = [metric.high for metric in metrics if metric.high is not None]
    if len(lows) == len(highs) == len(metrics):
        return Metric(value, metrics[0].unit, min(low, float(np.median(lows))), max(high, float(np.median(highs))))
    return Metric(value, metrics[0].unit, low, high) if len(metrics) >= ENOUGH else Metric(value, metrics[0].unit)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given: the chance of any false alarm stays below the level."""
    corrected, worst = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        worst = max(worst, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = worst
    return corrected


def _read(path: Path) -> Rows:
    if path.is_dir():
        files = sorted(path.rglob("*.jsonl"))
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"no file or folder {path}: give a .jsonl file of records or a folder of such files.")
    found = [row for file in files for row in (_read_json(file) if file.suffix == ".json" else read_records(file))]
    needed = {*KEY, "metrics", "protocol", "time", "hardware", "libraries", "threads"}
    if not found:
        raise InputError(f"{path} holds no record: give a .jsonl file that llmlab wrote, or a folder of them.")
    if not all(isinstance(row, dict) and needed <= row.keys() for row in found):
        raise InputError(f"{path} holds lines that are no records: give a .jsonl file that llmlab wrote.")
    return sorted(found, key=lambda row: str(row["time"]))


def _read_json(path: Path) -> Rows:
    try:
        return [json.loads(path.read_text(encoding="utf-8"))["record"]]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no file of a command's --json: it has no record.") from None


def _by_key(rows: Rows) -> dict[tuple[Any, ...], Rows]:
    found: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in KEY)].append(row)
    return dict(found)


def _same_protocol(left: Rows, right: Rows) -> list[tuple[Rows, Rows, str]]:
    """Pairs of runs measured alike, oldest first, each with a note if it is not quite so."""
    shapes: list[dict[str, Rows]] = [defaultdict(list), defaultdict(list)]
    for side, rows in zip(shapes, (left, right), strict=True):
        for row in rows:
            side[re.sub(r"\d[\d.,]*", "#", row["protocol"])].append(row)
    pairs = [(shapes[0][shape], shapes[1][shape], "") for shape in shapes[0] if shape in shapes[1]]
    if pairs:
        return pairs
    mine, theirs = (next(reversed(side.values())) for side in shapes)
    note = f"the protocols differ, {mine[-1]['protocol']!r} in A and {theirs[-1]['protocol']!r} in B"
    return [(mine, theirs, note)]


def _metrics(left: Rows, right: Rows) -> Rows:
    found = []
    for name in dict.fromkeys(name for row in [*left, *right] for name in row["metrics"]):
        pools = [[Metric(**row["metrics"][name]) for row in side if name in row["metrics"]] for side in (left, right)]
        result: dict[str, Any] = {"metric": name}
        if all(pools):
            a, b = map(pooled, pools)
            result |= {"unit": b.unit, "a": a.value, "a_low": a.low, "a_high": a.high}
            result |= {"b": b.value, "b_low": b.low, "b_high": b.high} | _change(a, b)
        else:
            result |= {"verdict": f"not judged: only in {'A' if pools[0] else 'B'}"}
        found.append(result)
    return found


def _change(a: Metric, b: Metric) -> dict[str, Any]:
    """The change with its interval and its uncorrected p-value, as far as the two metrics allow."""
    if a.unit != b.unit:
        return {"verdict": f"not judged: the unit is {a.unit or 'none'} in A and {b.unit or 'none'} in B"}
    values = np.array([[m.value, m.low, m.high] for m in (a, b)], dtype=float)  # a missing bound becomes NaN
    ratio = bool(np.nanmin(values) > 0)
    scale, back = (np.log, np.expm1) if ratio else (np.positive, np.positive)
    scaled = scale(values)
    delta = scaled[1, 0] - scaled[0, 0]
    error = np.hypot(*(scaled[:, 2] - scaled[:, 1])) / (2 * Z95)
    found = {"scale": "ratio" if ratio else "difference", "change": float(back(delta))}
    if np.isnan(error):
        missing = " and ".join(side for side, m in (("A", a), ("B", b)) if m.low is None or m.high is None)
        return found | {"verdict": f"not judged: no interval in {missing}" if delta else "equal"}
    z = 0.0 if delta == 0 else abs(delta) / error if error else math.inf  # a count that never varies has no error
    low, high = (float(back(delta + side * Z95 * error)) for side in (-1, 1))
    return found | {"change_low": low, "change_high": high, "p": math.erfc(z / math.sqrt(2))}


def _verdicts(rows: Rows) -> None:
    """Correct the p-values over all of them and say what each means."""
    judged = [row for row in rows if "p" in row]
    for row, p in zip(judged, holm([row["p"] for row in judged]), strict=True):
        row["p"] = p
        good = direction(row["metric"], row["unit"]) * (row["b"] - row["a"])
        sure = "better" if good > 0 else "worse" if good < 0 else "changed"
        row["verdict"] = sure if p < LEVEL else "within noise"


def _differences(left: Rows, right: Rows) -> list[str]:
    """What else is not alike: a sentence for each fact of the machine or the software."""
    facts = [[_facts(row) for row in side] for side in (left, right)]
    notes = []
    for what in dict.fromkeys(name for side in facts for fact in side for name in fact):
        a, b = (sorted({fact.get(what, "none") for fact in side}) for side in facts)
        if a != b:
            notes.append(f"{what} differs: {', '.join(a)} in A, {', '.join(b)} in B")
    return notes


def _facts(row: dict[str, Any]) -> dict[str, str]:
    machine = row["hardware"]
    facts = {name: machine.get(key) for name, key in _HARDWARE.items()}
    facts["GPUs"] = ", ".join(gpu["name"] for gpu in machine.get("gpus", [])) or "none"
    return {name: str(value) for name, value in (facts | {"threads": row["threads"]} | row["libraries"]).items()}


_HARDWARE = {"processor": "cpu", "CPU capability": "cpu_capability", "cores": "cores", "system": "system"}


def _name(key: tuple[Any, ...]) -> str:
    named = dict(zip(KEY, key, strict=True))
    changed = "" if named["transformation"] == "none" else f" {named['transformation']}"
    what = f"{named['task']}, {named['model']}{changed} {named['dtype']}"
    return f"{what} on {named['device']}, data {named['data']}, n {named['n']}"
