"""The combinations of the trade-off grid: which make sense, how they stand in records, which one to use."""

import re
from dataclasses import dataclass, fields

import pandas as pd

from llmlab.base.errors import InputError
from llmlab.sharding.cuts import Cuts

METHODS = {
    "fp32": ("none",),
    "bf16": ("none",),
    "fp16": ("none",),
    "8 bits": ("rtn", "gptq", "rotated gptq", "int8"),
    "4 bits": ("rtn", "gptq", "rotated gptq", "rotated qronos", "nf4"),
    "3 bits": ("rtn", "gptq", "rotated gptq", "rotated qronos"),
}
DRAFTS = ("", "lookup", "suffix, recycling", "self-4bit", "lookup, self-4bit", "suffix, recycling, self-4bit")
SHARDING = re.compile(r"(data|tensor|pipeline) (\d+)")
SPEED, DECODE, KEPT, RATIO = "questions_per_second", "decode_tokens_per_second", "answers_kept", "perplexity_ratio"


@dataclass(frozen=True)
class Combination:
    """One point of the grid; activations below fp32 are what is fast on the machine (its record says in `dtype`)."""

    precision: str = "fp32"  # of the weights, see METHODS
    method: str = "none"  # how they came to it; "int8" and "nf4" are bitsandbytes', "rotated qronos" the best grid, too
    sharding: str = "1"  # or a layout such as "data 2", "pipeline 2", "tensor 2", "data 2 x pipeline 2"
    draft: str = ""  # what speculates, see DRAFTS; "self-4bit" is the model's own 4-bit copy

    def check(self) -> None:
        """Raise InputError for a combination that makes no sense or cannot run."""
        if self.precision not in METHODS:
            raise InputError(f"unknown precision {self.precision!r}: choose one of {', '.join(METHODS)}.")
        if self.method not in (methods := METHODS[self.precision]):
            raise InputError(f"method {self.method!r} does not give {self.precision}: choose {' or '.join(methods)}.")
        if self.draft not in DRAFTS:
            raise InputError(f"unknown draft {self.draft!r}: choose one of {', '.join(map(repr, DRAFTS))}.")
        if "self-4bit" in self.draft and self.method != "none":
            raise InputError(f"a model of {self.precision} gains nothing from its own 4-bit copy: draft with lookup.")
        if self.cuts.ranks > 1 and self.draft:
            raise InputError(f"drafts are measured on one device: leave out the draft or the sharding {self.sharding}.")
        if self.cuts.ranks > 1 and self.method in ("int8", "nf4"):
            raise InputError("ranks take no bitsandbytes models: shard one in floating point, or of GPTQ or RTN.")

    @property
    def cuts(self) -> Cuts:
        """The layout. Raises InputError for one that cannot be read."""
        parts = [] if self.sharding == "1" else self.sharding.split(" x ")
        sizes = {m[1]: int(m[2]) for m in map(SHARDING.fullmatch, parts) if m}
        if len(sizes) != len(parts) or 0 in sizes.values():
            raise InputError(f"unknown sharding {self.sharding!r}: write 1, data 2, tensor 2, pipeline 2 or a product.")
        return Cuts(**sizes)

    @property
    def name(self) -> str:
        """In short, such as "4 bits gptq, draft lookup"."""
        method = "" if self.method == "none" else f" {self.method}"
        sharding = "" if self.sharding == "1" else f", {self.sharding}"
        draft = f", draft {self.draft.replace(', ', ' + ')}" if self.draft else ""
        return f"{self.precision}{method}{sharding}{draft}"


BASELINE = Combination()
# What must be equal for two speeds to be comparable.
MACHINE = ["model", "data", "n", "device", "cpu", "cpu_capability", "threads"]


def combinations(frame: pd.DataFrame) -> pd.DataFrame:
    """The trade-off records of `llmlab.records()`, with columns `precision`, `method`, `sharding`, `draft` and `name`.

    Of one combination on one machine, model and question set the newest record stands.
    """
    rows = frame[frame["task"] == "trade-off"].dropna(axis="columns", how="all")
    points = rows.reindex(columns=[f.name for f in fields(Combination)])
    rows = rows.assign(name=[Combination(*point).name for point in points.itertuples(index=False)])
    return rows.drop_duplicates(["name", *MACHINE], keep="last").reset_index(drop=True)


def comparable(frame: pd.DataFrame) -> pd.DataFrame:
    """The most rows of `combinations` that share model, questions and machine. Raises InputError if there are none."""
    if frame.empty:
        raise InputError("there are no trade-off records: run llmlab sweep notebooks/points/trade_offs.yaml first.")
    part = frame.groupby(MACHINE, dropna=False).ngroup()
    rows = pd.DataFrame(frame[part == part.value_counts().index[0]]).reset_index(drop=True)
    rows.attrs = frame.attrs  # units, by which figures know what is better
    return rows


def speedups(frame: pd.DataFrame) -> pd.DataFrame:
    """Combinations with `scoring_speedup` and `decode_speedup` over plain fp32: as measured beside each, or, where an
    old record lacks them, over the plain fp32 row of the same frame.

    Raises InputError if that row is missing then: speeds of different machines must not be divided.
    """
    paired = ["scoring_speedup", "decode_speedup"]
    if set(paired) <= set(frame) and frame[paired].notna().all(axis=None):
        return frame
    plain = frame[frame["name"] == BASELINE.name]
    if len(plain) != 1:
        raise InputError(f"there are {len(plain)} plain fp32 rows: speeds need exactly one, of the same machine.")
    base = plain.iloc[0]
    return frame.assign(scoring_speedup=frame[SPEED] / base[SPEED], decode_speedup=frame[DECODE] / base[DECODE])


def recommended(frame: pd.DataFrame, losses: tuple[float, ...] = (0.0, 0.01, 0.03)) -> pd.DataFrame:
    """The fastest combination of `speedups` for each allowed loss (a share), judged by what is paired with fp32.

    No loss means fp32's own arithmetic, however it is run. Scoring: at most that share of the choices may differ, which
    bounds what accuracy can lose; drafts play no part. Writing: perplexity may grow by at most that share.
    """
    rows = []
    exact, undrafted = frame["precision"] == "fp32", frame["draft"] == ""
    for loss in losses:
        for job, speed, allowed in (
            ("scoring", "scoring_speedup", undrafted & (exact | (loss > 0) & (frame[KEPT] >= 1 - loss))),
            ("writing", "decode_speedup", exact | (loss > 0) & (frame[RATIO] <= 1 + loss)),
        ):
            best = frame[allowed].sort_values(speed).iloc[-1]
            shown = {name: best[name] for name in (KEPT, f"{KEPT}_low", RATIO, "bytes") if name in frame}
            rows.append({"job": job, "allowed_loss": loss, "use": best["name"], "speedup": best[speed]} | shown)
    return pd.DataFrame(rows)
