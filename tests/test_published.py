"""The published tables are whole, and their formulas are what our timeline computes."""

import re

import pandas as pd
import pytest

from llmlab import InputError
from llmlab.bench.published import STATUS, TABLES, UNITS, published
from llmlab.sharding.timeline import simulate, tasks


@pytest.mark.parametrize("table", TABLES)
def test_no_value_is_missing_and_every_paper_is_known(table):
    rows = published(table)
    whole = rows.drop(columns=["bits", "group"], errors="ignore")
    assert len(rows) and not whole.isna().any(axis=None)
    assert set(rows["status"]) <= set(STATUS)
    assert rows["year"].between(2017, 2026).all()
    for arxiv, year in zip(rows["arxiv"], rows["year"], strict=True):
        assert re.fullmatch(r"\d{4}\.\d{5}", arxiv) and int(arxiv[:2]) == year % 100
    assert not rows.duplicated(rows.columns.difference(["value", "formula"]).tolist()).any()


@pytest.mark.parametrize("table", ["quantization", "speculation"])
def test_figures_have_units_and_sensible_sizes(table):
    rows = published(table)
    assert rows["metric"].isin(UNITS).all() and (rows["unit"] == rows["metric"].map(UNITS)).all()
    assert rows["value"].dtype == float and (rows["value"] > 0).all()
    rates = rows[rows["metric"] == "acceptance rate"]["value"]
    assert rates.between(0, 1).all()
    if table == "quantization":
        assert rows["bits"].notna().all() and rows["bits"].isin([1, 2, 3, 4, 16]).all()
        quantized = rows[(rows["bits"] < 16) & (rows["metric"] == "perplexity")]
        assert quantized["group"].isin([-1, 32, 64, 128]).all()
        exact = rows[rows["method"] == "fp16"].groupby(["model", "metric"])["value"]
        assert (exact.nunique() == 1).all(), "papers agree on the unquantized model"
        best = exact.first().rename("exact").reset_index()
        beside = quantized.merge(best, on=["model", "metric"])
        assert len(beside) == len(quantized) and (beside["value"] > beside["exact"]).all()


def test_rows_are_chosen_by_column():
    rows = published("quantization", paper="GPTQ", model="OPT-125M", method="GPTQ")
    assert dict(zip(rows["bits"], rows["value"], strict=True)) == {4: 31.12, 3: 53.85}
    assert rows["arxiv"].unique().tolist() == ["2210.17323"]
    with pytest.raises(InputError, match="unknown table 'x'"):
        published("x")
    with pytest.raises(InputError, match="no column 'y'"):
        published("quantization", y=1)


def bubble(quantity, **sizes):
    """A published bubble for these sizes."""
    (formula,) = published("formulas", quantity=quantity)["formula"]
    return float(pd.eval(formula, local_dict=sizes))


@pytest.mark.parametrize("stages, batches", [(2, 2), (4, 4), (4, 32), (8, 3)])
def test_the_bubbles_are_those_of_a_timeline(stages, batches):
    run = simulate(tasks([[1.0] * stages] * batches, "micro-batches"))
    assert run.bubble == pytest.approx(bubble("bubble over all time", K=stages, M=batches))
    ideal = run.seconds / batches - 1
    assert ideal == pytest.approx(bubble("bubble over ideal time", p=stages, m=batches))


@pytest.mark.parametrize("ranks, rounds, batches", [(2, 2, 4), (4, 2, 8), (4, 3, 4)])
def test_the_interleaved_bubble_is_that_of_a_timeline(ranks, rounds, batches):
    run = simulate(tasks([[1 / rounds] * (ranks * rounds)] * batches, "interleaved", ranks))
    expected = bubble("bubble over ideal time when interleaved", p=ranks, v=rounds, m=batches)
    assert run.seconds / batches - 1 == pytest.approx(expected)
