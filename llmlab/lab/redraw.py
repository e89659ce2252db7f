"""The README's figures, drawn again from the recorded runs in data/reference/: `make figures`. Nothing is measured."""

from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from llmlab.base.errors import InputError
from llmlab.base.paths import PACKAGE
from llmlab.base.stats import Metric
from llmlab.bench.combination import combinations, comparable, speedups
from llmlab.lab.figures import save, speed, tradeoffs
from llmlab.measure.record import records as read_records
from llmlab.measure.roofline import Peaks

REFERENCE = PACKAGE.parent / "data" / "reference"
TRACKED = PACKAGE.parent / "figures"


def redraw(reference: Path = REFERENCE, folder: Path = TRACKED) -> list[Path]:
    """Draw every figure of `FIGURES` from its file in `reference` into `folder`; their PNGs.

    Raises InputError if a file is missing or lacks the records that a figure needs.
    """
    drawn = []
    for name, file, draw, alt in FIGURES:
        records = read_records(reference / file)
        if records.empty:
            raise InputError(f"there are no records in {reference / file}: run in a checkout with its data/reference.")
        figure = draw(records)
        drawn.append(save(figure, name, alt, folder))
        plt.close(figure)
    return drawn


def roofline(records: pd.DataFrame) -> Figure:
    """The roofline of notebook 01. A phase's record holds what it reached and its shares of both limits, so
    peak FLOP/s = FLOP/s / MFU and peak bytes/s = FLOP/s / intensity / MBU."""
    phases = records.reindex(columns=["device", "dtype", "task", "flops", "intensity", "mfu", "mbu"]).dropna()
    newest = phases.drop_duplicates(["dtype", "task"], keep="last")
    if newest.empty:
        raise InputError("the reference has no record of a phase with flops, intensity, mfu and mbu: run notebook 01.")
    limits = newest.drop_duplicates("dtype", keep="last").assign(
        peak=lambda row: row["flops"] / row["mfu"], bytes=lambda row: row["flops"] / row["intensity"] / row["mbu"]
    )
    peaks = [
        Peaks(device, dtype, Metric(peak, "FLOP/s"), Metric(read, "B/s"), (0, 0, 0))  # its shape is not recorded
        for device, dtype, peak, read in limits[["device", "dtype", "peak", "bytes"]].itertuples(index=False)
    ]
    points = newest.assign(label=np.where(newest["task"].str.startswith("prefill"), "prefill", "decode"))
    return speed.roofline(peaks, points, "Decode sits under the slope, prefill under the roof")


def trade_offs(records: pd.DataFrame) -> Figure:
    """The front of notebook 06: what speed of writing costs in perplexity, over the whole grid."""
    title = "What speed costs: every combination, and the best ones"
    points = speedups(comparable(combinations(records)))
    return tradeoffs.pareto_front(points, "decode_speedup", "perplexity_ratio", title)


# Name, file of data/reference/, function of that file's records, alt text.
FIGURES: list[tuple[str, str, Callable[[pd.DataFrame], Figure], str]] = [
    ("roofline", "cpu-2-cores.jsonl", roofline,
     "Roofline of a 2-core machine: attainable GFLOP/s over arithmetic intensity for each dtype; prefill and decode "
     "step are points with the share of the limit that they reach."),
    ("trade_offs", "trade-offs-amx-2-cores.jsonl", trade_offs,
     "Perplexity over fp32 against speed of writing over plain fp32 for every combination of precision, method, "
     "sharding and draft; all are numbered and named, the Pareto front blue."),
]  # fmt: skip


if __name__ == "__main__":
    for path in redraw():
        print(f"drawn: {path.name}")
