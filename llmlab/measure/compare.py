"""Two sets of records held against each other: what changed beyond noise, and for the better or the worse.

Records are matched by what was measured on what and how it was set (`KEY`), not by when, with which code or on which
machine: that is what differs between the two sides. A run in batches of 8 is never held against one in batches of 1,
nor a number against one that another protocol or another warm-up brought.
"""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from llmlab.base.errors import InputError
from llmlab.base.stats import Z95, Metric, median_interval
from llmlab.measure.record import SCHEMA, Row, current, read_records

WORK = ("task", "model", "transformation", "dtype", "data", "n", "device")
KEY = (*WORK, "settings")
ENOUGH = 5  # the range of fewer runs covers their median less than 94 % of the time
LEVEL = 0.05
OWN = ("metric", "unit", "a", "a_low", "a_high", "b", "b_low", "b_high")  # what each side says for itself
COLUMNS = (*OWN, "scale", "change", "change_low", "change_high", "p", "verdict")
REFUSED = "not judged: the protocols differ"
NUMBERS = str.maketrans("", "", "0123456789.,")  # passes and tokens, say: they differ from run to run

# Which way a metric is good: its name counts before its unit.
LOWER = re.compile(r"perplexity|nll|_over_|delta|error|seconds|bubble|joules|bytes|bits_per")
HIGHER = re.compile(r"^acc(_|$)|speedup|agreement|acceptance|mfu|mbu|per_second|tokens_per_pass|equal|kept")
COSTS = {"s", "B", "J", "nat", "bit"}  # less is better of them, alone or for each of something: nat/token

Key = tuple[object, ...]
Side = dict[Key, list[Row]]


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
        Columns: the key (its settings as text), `metric`, `unit`, `a`, `a_low`, `a_high`, `b`, `b_low`, `b_high`,
        `change` (a share of A, or the difference where `scale` says so) with `change_low` and `change_high` (95 %),
        `p` (corrected) and `verdict`: "better", "worse", "changed" (which way is good is not known), "within noise",
        "equal", or "not judged" and why: no interval, another unit, another protocol.
        `attrs["notes"]` says what else differs: hardware, versions, threads, revisions, protocols, and which runs were
        not compared because their settings differ or one side lacks them.

    Raises:
        InputError: a path that is missing or holds no record, or sides without a common key.
    """
    left, right = (_read(Path(path).expanduser()) for path in (a, b))
    notes = _complete(left, right, "A") + _complete(right, left, "B")
    sides = [_by_key(left), _by_key(right)]
    common = [key for key in sides[0] if key in sides[1]]
    if not common:
        in_a, in_b = ("; ".join(f"({title(key)})" for key in side) for side in sides)
        asked = [[{k: str(row[k]) for k in WORK} | row["settings"] for row in side] for side in (left, right)]
        why = "; ".join([*_differences(*asked), f"{', '.join(KEY)} must be equal"])
        raise InputError(f"{a} and {b} have no record in common ({why}): A has {in_a}; B has {in_b}.")
    notes += _differences(*([_facts(row) for key in common for row in side[key]] for side in sides))
    rows: list[Row] = []
    for key in common:
        pair = [side[key] for side in sides]
        results, apart = _metrics(*pair), _protocols(*pair)
        notes += [f"{title(key)}: {note}" for note in apart]
        if apart and all(row["schema"] == SCHEMA for side in pair for row in side):  # older ones had other words
            results = [{k: v for k, v in row.items() if k in OWN} | {"verdict": REFUSED} for row in results]
        rows += [dict(zip(KEY, key, strict=True)) | row for row in results]
    judged = [row for row in rows if "p" in row]
    for row, p in zip(judged, holm([row["p"] for row in judged]), strict=True):
        good = direction(row["metric"], row["unit"]) * (row["b"] - row["a"])
        sure = "better" if good > 0 else "worse" if good < 0 else "changed"
        row |= {"p": p, "verdict": sure if p < LEVEL else "within noise"}
    table = pd.DataFrame(rows).reindex(columns=[*KEY, *COLUMNS])
    table.attrs["notes"] = notes + _alone(*sides)
    return table


def direction(name: str, unit: str = "") -> int:
    """1 where more is better, -1 where less is, 0 where it is not known; the name counts before the unit.

    Rates ("token/s", "B/s") and factors ("x") are gains, amounts of time, memory, energy and loss are costs.
    """
    if HIGHER.search(name):
        return 1
    if LOWER.search(name):
        return -1
    amount, _, per = unit.partition("/")
    if unit == "x" or per == "s":
        return 1
    return -1 if amount in COSTS else 0


def pooled(metrics: Sequence[Metric]) -> Metric:
    """One metric of several runs: their median, with an interval if they have their own or are `ENOUGH`."""
    value, low, high = median_interval([metric.value for metric in metrics])
    own = [(m.low, m.high) for m in metrics if m.low is not None and m.high is not None]
    if len(own) == len(metrics):
        middle_low, middle_high = np.median(own, axis=0).tolist()
        return Metric(value, metrics[0].unit, min(low, middle_low), max(high, middle_high))
    return Metric(value, metrics[0].unit, *((low, high) if len(metrics) >= ENOUGH else ()))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given: the chance of any false alarm stays below the level."""
    values = np.asarray(p, dtype=float)
    order, corrected = values.argsort(kind="stable"), np.empty_like(values)
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return [float(value) for value in corrected]


def _read(path: Path) -> list[Row]:
    if not path.exists():
        raise InputError(f"no file or folder {path}: give a .jsonl file of records or a folder of such files.")
    rows = []
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        try:
            rows += [current(json.loads(file.read_text())["record"])] if file.suffix == ".json" else read_records(file)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file} is no file of a command's --json: it has no record.") from None
    needed = {*KEY, "metrics", "protocol", "warmup", "revision", "schema", "time", "hardware", "libraries", "threads"}
    if not rows:
        raise InputError(f"{path} holds no record: give a .jsonl file that llmlab wrote, or a folder of them.")
    if not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise InputError(f"{path} holds lines that are no records: give a .jsonl file that llmlab wrote.")
    return sorted(rows, key=lambda row: str(row["time"]))


def _complete(rows: list[Row], others: list[Row], side: str) -> list[str]:
    """Old records tell fewer settings: each takes those of the other side's newest run that it does not
    contradict. What was taken, a note for each kind of run."""
    notes = []
    for row in (row for row in rows if row["schema"] < SCHEMA):
        known = [
            other["settings"]
            for other in others
            if other["schema"] == SCHEMA and all(row[name] == other[name] for name in WORK)
            if all(row["settings"].get(name, value) == value for name, value in other["settings"].items())
        ]
        if known and known[-1] != row["settings"]:
            row["settings"] = known[-1]
            notes.append(f"{title(_key(row))}: an old record in {side} does not tell all these settings")
    return list(dict.fromkeys(notes))


def _by_key(rows: list[Row]) -> Side:
    groups: Side = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    return groups


def _key(row: Row) -> Key:
    settings = ", ".join(f"{name} {value}" for name, value in sorted(row["settings"].items()) if value)
    return *(row[name] for name in WORK), settings


def _protocols(left: list[Row], right: list[Row]) -> list[str]:
    """What differs in how two sides measured, if no run of one was measured as a run of the other was."""
    ways = [{(row["protocol"].translate(NUMBERS), row["warmup"]) for row in side} for side in (left, right)]
    if ways[0] & ways[1]:
        return []
    newest = [{"protocol": repr(row["protocol"]), "warm-up": f"{row['warmup']} runs"} for row in (left[-1], right[-1])]
    return _differences(*([told] for told in newest))


def _alone(left: Side, right: Side) -> list[str]:
    """The runs that only one side has, and which settings keep them apart from runs that are alike but for these."""
    lone = [{key: rows for key, rows in a.items() if key not in b} for a, b in ((left, right), (right, left))]
    notes = []
    for work in dict.fromkeys(key[:-1] for key in lone[0]):
        told = [[row["settings"] for key, rows in side.items() if key[:-1] == work for row in rows] for side in lone]
        notes += [f"{title((*work, ''))}: not compared, {note}" for note in _differences(*told)] if all(told) else []
    return notes + [f"only in {label}: {title(key)}" for label, side in zip("AB", lone, strict=True) for key in side]


def _metrics(left: list[Row], right: list[Row]) -> list[Row]:
    """A row a metric: both values, and the change as far as they allow one."""
    results = []
    for name in dict.fromkeys(name for row in [*left, *right] for name in row["metrics"]):
        pools = [[Metric(**row["metrics"][name]) for row in side if name in row["metrics"]] for side in (left, right)]
        if not all(pools):
            results.append({"metric": name, "verdict": f"not judged: only in {'A' if pools[0] else 'B'}"})
            continue
        a, b = map(pooled, pools)
        values = {"a": a.value, "a_low": a.low, "a_high": a.high, "b": b.value, "b_low": b.low, "b_high": b.high}
        results.append({"metric": name, "unit": b.unit} | values | _change(a, b))
    return results


def _change(a: Metric, b: Metric) -> Row:
    """The change with its interval and its uncorrected p-value, as far as the two metrics allow."""
    if a.unit != b.unit:
        return {"verdict": f"not judged: the unit is {a.unit or 'none'} in A and {b.unit or 'none'} in B"}
    values = np.array([[m.value, m.low, m.high] for m in (a, b)], dtype=float)  # a missing bound becomes NaN
    ratio = bool(np.nanmin(values) > 0)
    scale, back = (np.log, np.expm1) if ratio else (np.positive, np.positive)
    scaled = scale(values)
    delta = scaled[1, 0] - scaled[0, 0]
    error = np.hypot(*(scaled[:, 2] - scaled[:, 1])) / (2 * Z95)
    result: Row = {"scale": "ratio" if ratio else "difference", "change": float(back(delta))}
    if np.isnan(error):
        missing = " and ".join(side for side, m in (("A", a), ("B", b)) if m.low is None or m.high is None)
        return result | {"verdict": f"not judged: no interval in {missing}" if delta else "equal"}
    z = 0.0 if delta == 0 else abs(delta) / error if error else math.inf  # a count that never varies has no error
    low, high = (float(back(delta + side * Z95 * error)) for side in (-1, 1))
    return result | {"change_low": low, "change_high": high, "p": math.erfc(z / math.sqrt(2))}


def _differences(left: Sequence[dict[str, str]], right: Sequence[dict[str, str]]) -> list[str]:
    """What is not alike among facts or settings: a sentence for each."""
    notes = []
    for what in dict.fromkeys(name for side in (left, right) for facts in side for name in facts):
        a, b = (", ".join(sorted({facts.get(what, "") or "none" for facts in side})) for side in (left, right))
        notes += [f"{what} differs: {a} in A, {b} in B"] if a != b else []
    return notes


def _facts(row: Row) -> dict[str, str]:
    """What may differ between two runs that are compared: the machine, the software, the model's revision."""
    machine = row["hardware"]
    named = {"processor": "cpu", "CPU capability": "cpu_capability", "cores": "cores", "system": "system"}
    facts = {what: machine.get(name) for what, name in named.items()}
    facts["GPUs"] = ", ".join(gpu["name"] for gpu in machine.get("gpus", [])) or "none"
    facts |= {"threads": row["threads"], f"revision of {row['model']}": row["revision"] or "none"}
    return {name: str(value) for name, value in (facts | row["libraries"]).items()}


def title(key: Key) -> str:
    """The values of `KEY` in a line for people."""
    task, model, transformation, dtype, data, n, device, settings = key
    changed = "" if transformation == "none" else f" {transformation}"
    return f"{task}, {model}{changed} {dtype} on {device}, data {data}, n {n}" + (f", {settings}" if settings else "")
