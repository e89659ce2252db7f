"""The README's figures, drawn again from the recorded runs in data/reference/: `make figures`. Nothing is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from llmlab.base.errors import InputError
from llmlab.base.paths import PACKAGE
from llmlab.base.stats import Metric
from llmlab.bench.combination import combinations, comparable
from llmlab.lab.figures import common as figures
from llmlab.lab.figures import tradeoffs as tradeoff_figures
from llmlab.measure.record import as_frame, read_records
from llmlab.measure.roofline import Peaks

REFERENCE = PACKAGE.parent / "data" / "reference"
TRACKED = PACKAGE.parent / "figures"

Rows = list[dict[str, Any]]


def redraw(reference: Path = REFERENCE, folder: Path = TRACKED) -> list[Path]:
    """Draw every figure of `FIGURES` from its file in `reference` into `folder`; their PNGs.

    Raises InputError if a file is missing or lacks the records that a figure needs.
    """
    drawn = []
    for name, file, alt, draw in FIGURES:
        records = read_records(reference / file)
        if not records:
            raise InputError(f"there are no records in {reference / file}: run in a checkout with its data/reference.")
        figure = draw(records)
        drawn.append(figures.save(figure, name, alt, folder))
        plt.close(figure)
    return drawn


def roofline(records: Rows) -> Figure:
    """The roofline of notebook 01. A phase's record holds what it reached and its shares of both limits, so
    peak FLOP/s = FLOP/s / MFU and peak bytes/s = FLOP/s / intensity / MBU."""
    newest = {}
    for record in records:
        if {"flops", "intensity", "mfu", "mbu"} <= record["metrics"].keys():
            newest[record["dtype"], record["task"]] = record
    if not newest:
        raise InputError("the reference has no record of a phase with flops, intensity, mfu and mbu: run notebook 01.")
    peaks, points = {}, []
    for (dtype, task), record in newest.items():
        flops, intensity, mfu, mbu = (record["metrics"][name]["value"] for name in ("flops", "intensity", "mfu", "mbu"))
        limits = Metric(flops / mfu, "FLOP/s"), Metric(flops / intensity / mbu, "B/s")
        peaks[dtype] = Peaks(record["device"], dtype, *limits, matmul=(0, 0, 0))  # its shape is not in the record
        label = "prefill" if task.startswith("prefill") else "decode"
        points.append({"label": label, "dtype": dtype, "intensity": intensity, "flops": flops})
    return figures.roofline(
        list(peaks.values()), pd.DataFrame(points), "Decode sits under the slope, prefill under the roof"
    )


def trade_offs(records: Rows) -> Figure:
    """The front of notebook 06: what speed of writing costs in perplexity, over the whole grid."""
    points = comparable(combinations(as_frame(records)))
    return tradeoff_figures.pareto_front(
        points, "decode_tokens_per_second", "perplexity_ratio", "What speed costs: every combination, and the best ones"
    )


# Name, file of data/reference/, alt text, function of that file's records.
FIGURES: list[tuple[str, str, str, Callable[[Rows], Figure]]] = [
    (
        "roofline",
        "cpu-2-cores.jsonl",
        "Roofline of a 2-core machine: attainable GFLOP/s over arithmetic intensity for each dtype; prefill and decode "
        "step are points with the share of the limit that they reach.",
        roofline,
    ),
    (
        "trade_offs",
        "trade-offs-cpu-2-cores.jsonl",
        "Perplexity over fp32 against decode tokens per second for every combination of precision, method, sharding "
        "and draft; the Pareto front is numbered and named, dominated combinations are grey.",
        trade_offs,
    ),
]


if __name__ == "__main__":
    for path in redraw():
        print(f"drawn: {path.name}")
