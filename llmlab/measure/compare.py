"""Two sets of records held against each other: what changed beyond noise, and for the better or the worse.

Records are matched by what was measured on what and how it was set (`KEY`), not by when, with which code or on which
machine: that is what differs between the two sides. A run in batches of 8 is never held against one in batches of 1.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from llmlab.base.errors import InputError
from llmlab.base.stats import Z95, Metric, median_interval
from llmlab.measure.direction import direction
from llmlab.measure.record import SCHEMA, Row, current, read_records

WORK = ("task", "model", "transformation", "dtype", "data", "n", "device")
KEY = (*WORK, "settings")
ENOUGH = 5  # the range of fewer runs covers their median less than 94 % of the time
LEVEL = 0.05
COLUMNS = (
    *("metric", "unit", "a", "a_low", "a_high", "b", "b_low", "b_high"),
    *("scale", "change", "change_low", "change_high", "p", "verdict"),
)
NUMBERS = str.maketrans("", "", "0123456789.,")  # passes and tokens, say: they differ from run to run

Rows = list[Row]
Key = tuple[object, ...]


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
        "equal", or "not judged" and why.
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
        raise InputError(
            f"{a} and {b} have no record in common ({', '.join(KEY)} must be equal): A has {in_a}; B has {in_b}."
        )
    notes += _differences(*([_facts(row) for key in common for row in side[key]] for side in sides))
    rows = []
    for key in common:
        notes += [f"{title(key)}: {note}" for note in _protocols(sides[0][key], sides[1][key])]
        rows += [dict(zip(KEY, key, strict=True)) | row for row in _metrics(sides[0][key], sides[1][key])]
    _verdicts(rows)
    table = pd.DataFrame(rows).reindex(columns=[*KEY, *COLUMNS])
    table.attrs["notes"] = notes + _alone(*sides)
    return table


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
    if not path.exists():
        raise InputError(f"no file or folder {path}: give a .jsonl file of records or a folder of such files.")
    rows = []
    for file in sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]:
        rows += [_record_of(file)] if file.suffix == ".json" else read_records(file)
    needed = {*KEY, "metrics", "protocol", "revision", "schema", "time", "hardware", "libraries", "threads"}
    if not rows:
        raise InputError(f"{path} holds no record: give a .jsonl file that llmlab wrote, or a folder of them.")
    if not all(isinstance(row, dict) and needed <= row.keys() for row in rows):
        raise InputError(f"{path} holds lines that are no records: give a .jsonl file that llmlab wrote.")
    return sorted(rows, key=lambda row: str(row["time"]))


def _record_of(json_file: Path) -> Row:
    try:
        return current(json.loads(json_file.read_text(encoding="utf-8"))["record"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{json_file} is no file of a command's --json: it has no record.") from None


def _complete(rows: Rows, others: Rows, side: str) -> list[str]:
    """Old records (schema 1) tell few settings: each takes those of the other side's newest run that it does not
    contradict. What was taken, a note for each kind of run."""
    notes = []
    for row in rows:
        for other in reversed(others if row["schema"] < SCHEMA else []):
            agrees = all(row["settings"].get(name, value) == value for name, value in other["settings"].items())
            if other["schema"] == SCHEMA and agrees and all(row[name] == other[name] for name in WORK):
                if other["settings"] != row["settings"]:
                    row["settings"] = other["settings"]
                    notes.append(f"{title(_key(row))}: an old record in {side} does not tell all these settings")
                break
    return list(dict.fromkeys(notes))


def _by_key(rows: Rows) -> dict[Key, Rows]:
    groups: dict[Key, Rows] = defaultdict(list)
    for row in rows:
        groups[_key(row)].append(row)
    return dict(groups)


def _key(row: Row) -> Key:
    settings = ", ".join(f"{name} {value}" for name, value in sorted(row["settings"].items()) if value)
    return *(row[name] for name in WORK), settings


def _protocols(left: Rows, right: Rows) -> list[str]:
    """A note where no two protocols have the same words."""
    words = [{row["protocol"].translate(NUMBERS) for row in side} for side in (left, right)]
    if words[0] & words[1]:
        return []
    return [f"the protocols differ, {left[-1]['protocol']!r} in A and {right[-1]['protocol']!r} in B"]


def _alone(left: dict[Key, Rows], right: dict[Key, Rows]) -> list[str]:
    """The runs that only one side has, and which settings keep them apart from runs that are alike but for these."""
    lone = [{key: rows for key, rows in a.items() if key not in b} for a, b in ((left, right), (right, left))]
    notes = []
    for work in dict.fromkeys(key[:-1] for key in lone[0]):
        settings = [
            [row["settings"] for key, rows in side.items() if key[:-1] == work for row in rows] for side in lone
        ]
        if all(settings):
            notes += [f"{title((*work, ''))}: not compared, {note}" for note in _differences(*settings)]
    for label, side in zip("AB", lone, strict=True):
        notes += [f"only in {label}: {title(key)}" for key in side]
    return notes


def _metrics(left: Rows, right: Rows) -> Rows:
    results = []
    for name in dict.fromkeys(name for row in [*left, *right] for name in row["metrics"]):
        pools = [[Metric(**row["metrics"][name]) for row in side if name in row["metrics"]] for side in (left, right)]
        result: Row = {"metric": name}
        if all(pools):
            a, b = map(pooled, pools)
            result |= {"unit": b.unit, "a": a.value, "a_low": a.low, "a_high": a.high}
            result |= {"b": b.value, "b_low": b.low, "b_high": b.high} | _change(a, b)
        else:
            result |= {"verdict": f"not judged: only in {'A' if pools[0] else 'B'}"}
        results.append(result)
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


def _verdicts(rows: Rows) -> None:
    """Correct the p-values over all of them and say what each means."""
    judged = [row for row in rows if "p" in row]
    for row, p in zip(judged, holm([row["p"] for row in judged]), strict=True):
        row["p"] = p
        good = direction(row["metric"], row["unit"]) * (row["b"] - row["a"])
        sure = "better" if good > 0 else "worse" if good < 0 else "changed"
        row["verdict"] = sure if p < LEVEL else "within noise"


def _differences(left: Sequence[dict[str, str]], right: Sequence[dict[str, str]]) -> list[str]:
    """What is not alike among facts or settings: a sentence for each."""
    notes = []
    for what in dict.fromkeys(name for side in (left, right) for facts in side for name in facts):
        a, b = (sorted({facts.get(what, "") or "none" for facts in side}) for side in (left, right))
        if a != b:
            notes.append(f"{what} differs: {', '.join(a)} in A, {', '.join(b)} in B")
    return notes


def _facts(row: Row) -> dict[str, str]:
    """What may differ between two runs that are compared: the machine, the software, the model's revision."""
    machine = row["hardware"]
    facts = {
        "processor": machine.get("cpu"),
        "CPU capability": machine.get("cpu_capability"),
        "cores": machine.get("cores"),
        "system": machine.get("system"),
        "GPUs": ", ".join(gpu["name"] for gpu in machine.get("gpus", [])) or "none",
        "threads": row["threads"],
        f"revision of {row['model']}": row["revision"] or "none",
    }
    return {name: str(value) for name, value in (facts | row["libraries"]).items()}


def title(key: Key) -> str:
    """The values of `KEY` in a line for people."""
    task, model, transformation, dtype, data, n, device, settings = key
    changed = "" if transformation == "none" else f" {transformation}"
    return f"{task}, {model}{changed} {dtype} on {device}, data {data}, n {n}" + (f", {settings}" if settings else "")
