import math
import warnings
from xml.etree import ElementTree

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

import llmlab
from llmlab import InputError, Metric
from llmlab.decoding.loop import Step
from llmlab.decoding.result import Completion
from llmlab.lab import figures, widgets
from llmlab.lab.figures import tradeoffs
from llmlab.lab.figures.decoding import Pass
from llmlab.measure.record import Measurement, append, describe, records

EVIL = "<script>alert(1)</script> $x$ & \"'"


@pytest.fixture
def frame():
    return pd.DataFrame(
        {
            "model": "smollm2", "transformation": ["none", "gptq", "rtn", EVIL],
            "dtype": ["fp32", "bf16", "bf16", "bf16"],
            "acc": [0.40, 0.38, 0.30, 0.35], "acc_low": [0.37, 0.35, 0.27, np.nan],
            "acc_high": [0.43, 0.41, 0.33, np.nan],
            "tokens_per_second": [20.0, 60.0, 65.0, 30.0], "peak_memory": [4e8, 1e8, 1e8, 2e8],
            "perplexity": [27.0, 29.0, np.nan, 40.0], "threads": 2, "id": ["a", "b", "c", "d"],
        }
    ).pipe(with_units, tokens_per_second="token/s", peak_memory="B")  # fmt: skip


def with_units(frame, **units):
    frame.attrs["units"] = units
    return frame


# Pareto fronts


values = st.sampled_from([1.0, 2.0, 3.0, 4.0, math.nan])


@settings(max_examples=300, deadline=None)
@given(
    points=st.lists(st.tuples(values, values), max_size=12),
    units=st.tuples(st.sampled_from(["s", "token/s"]), st.sampled_from(["B", ""])),
)
def test_the_front_is_what_brute_force_finds(points, units):
    frame = pd.DataFrame(points, columns=["x", "y"], index=[10 - k for k in range(len(points))], dtype=float)
    frame = with_units(frame, x=units[0], y=units[1])
    signs = [-1 if unit in ("s", "B") else 1 for unit in units]

    def dominates(a, b):
        pairs = [(sign * u, sign * v) for sign, u, v in zip(signs, a, b, strict=True)]
        return all(u >= v for u, v in pairs) and any(u > v for u, v in pairs)

    expected = [
        not any(map(math.isnan, point)) and not any(dominates(other, point) for other in points) for point in points
    ]
    front = tradeoffs.pareto(frame, "x", "y")
    assert list(front) == expected
    assert list(front.index) == list(frame.index)


def test_budgets_count_from_the_best(frame):
    assert tradeoffs.worst_allowed(frame, "acc", 0.1) == pytest.approx(0.36)
    assert tradeoffs.worst_allowed(frame, "perplexity", 0.1) == pytest.approx(29.7)
    kept = tradeoffs.within(frame, {"acc": 0.36, "peak_memory": 1e8})
    assert list(kept) == [False, True, False, False]


def test_real_records_can_be_explored(smollm2, tmp_path):
    for quality, speed in ((0.4, 20.0), (0.3, 30.0)):
        metrics = {
            "acc": Metric(quality, "", quality - 0.1, quality + 0.1),
            "tokens_per_second": Metric(speed, "token/s"),
        }
        append(describe(smollm2, Measurement("everyday", metrics, 40, "for a test")), tmp_path / "records.jsonl")
    frame = records(tmp_path / "records.jsonl")
    assert tradeoffs.metrics(frame) == ["acc", "tokens_per_second"]
    view = widgets.tradeoff_explorer(frame)
    assert view.controls["y"].value == "acc"
    assert "token/s" in view.picture.value


# The views


def titles(view):
    svg = view.picture.value
    root = ElementTree.fromstring(svg[svg.index("<svg") : svg.index("</svg>") + 6])
    return {element.text for element in root.iter("{http://www.w3.org/2000/svg}title")}


def test_tradeoff_explorer(frame):
    view = widgets.tradeoff_explorer(frame)
    assert set(view.controls) == {"x", "y", "x_budget", "y_budget", "transformation", "dtype"}
    assert (view.controls["x"].value, view.controls["y"].value) == ("tokens_per_second", "acc")
    first = view.picture.value
    assert len(titles(view)) == 4
    assert any("acc: 0.38 [0.35, 0.41]" in title for title in titles(view))
    assert any(EVIL in title for title in titles(view))
    assert "<script" not in first
    view.controls["y_budget"].value = 0.05
    assert "2 of 4 records within the budget" in view.picture.value
    view.controls["dtype"].value = "bf16"
    assert len(titles(view)) == 3
    view.controls["y"].value = "perplexity"
    assert len(titles(view)) == 2
    view.controls["y"].value = view.controls["x"].value
    assert "<svg" in view.picture.value
    with pytest.raises(InputError, match="unknown metric 'speed': the records have acc, tokens_per_second"):
        widgets.tradeoff_explorer(frame, x="speed")
    with pytest.raises(InputError, match="no record has two metrics"):
        widgets.tradeoff_explorer(frame[["model", "acc"]])


def test_a_filter_that_leaves_nothing_says_so(frame):
    view = widgets.tradeoff_explorer(frame)
    view.controls["y"].value = "perplexity"
    view.controls["transformation"].value = "rtn"
    assert "<svg" not in view.picture.value
    assert "no record has both tokens_per_second and perplexity" in view.picture.value


def test_plan_explorer():
    view = widgets.plan_explorer(["opt-125m", llmlab.model_card("llama-7b")])
    changes = {"devices": 8, "bits": 4, "memory": "8GiB", "device": "h100", "workload": "decode", "model": "llama-7b"}
    seen = {view.picture.value}
    for name, value in changes.items():
        view.controls[name].value = value
        seen.add(view.picture.value)
    assert len(seen) == 1 + len(changes)
    assert "llama-7b, 4 bits, on 8 x 8 GiB" in view.picture.value
    view.controls["bits"].value, view.controls["devices"].value = 16, 1
    assert "nothing fits" in view.picture.value
    with pytest.raises(InputError):
        widgets.plan_explorer(["no-such-model"])


def test_trie_viewer(smollm2):
    odd = llmlab.Question(f"A formula: {EVIL}", ("is 数 one 😀 $y$.", "is two $."), 0)
    long = llmlab.Question("word " * 9000, ("a", "b"), 0)
    view = widgets.trie_viewer(smollm2, [*llmlab.data.everyday(limit=2), odd, long])
    seen = []
    for number in range(4):
        view.controls["question"].value = number
        seen.append(view.picture.value)
    assert len(set(seen)) == 4
    assert all(html.count("<svg") == 2 for html in seen[:3])
    assert "<script" not in seen[2]
    assert "more than the context" in seen[3]
    with pytest.raises(InputError, match="no questions"):
        widgets.trie_viewer(smollm2, [])


# Figures in their place


def test_twins_have_alt_text_and_draw_whatever_text_there_is(smollm2, frame, tmp_path):
    ids = smollm2.encode(f"{EVIL} 数 😀")
    completion = Completion("p", "", ids, False, [Step("$draft$", ids, list(range(-1, len(ids) - 1)), 3, ids[:4])])
    views = [
        widgets.tradeoff_explorer(frame), widgets.plan_explorer(["opt-125m"]),
        widgets.trie_viewer(smollm2, [llmlab.Question(EVIL, ("数 $a", "😀 $b"), 0)]),
        widgets.step_viewer(completion, smollm2),
    ]  # fmt: skip
    twins = [twin for view in views for twin in view.twins]
    assert [twin.name for twin in twins] == [
        "trade_offs",
        "plan",
        "question_trie",
        "question_mask",
        "speculation_steps",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for twin in twins:
            path = figures.save(twin.draw(), twin.name, twin.alt, tmp_path)
            with Image.open(path) as image:
                assert image.info["Description"] == twin.alt
                assert len(twin.alt) > 40


def test_the_figures_take_plain_data(frame):
    plan = llmlab.plan(llmlab.model_card("opt-125m"), devices=2, memory="1GiB", device="v100", workload="decode")
    assert figures.sharding.layouts(plan, "t").axes
    assert figures.decoding.steps([Pass("", ["a"] * 90, [["\n"]], None)], "t").axes
    front = tradeoffs.pareto_front(frame, "peak_memory", "acc", "t", {"acc": 0.36, "peak_memory": 2e8})
    assert front.axes[0].get_xlabel() == "peak memory (B), less is better"
    with pytest.raises(InputError, match="no record has both acc and nothing"):
        tradeoffs.pareto_front(frame, "acc", "nothing", "t")


def test_drawable():
    assert figures.drawable("a$b\n数") == r"a\$b⏎□"


CELL = """
from llmlab.lab import widgets
widgets.plan_explorer(["opt-125m"])
"""
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path))
    made = new_notebook(cells=[new_code_cell(CELL.strip())])
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, tmp_path / "in.ipynb")
    return tmp_path / "in.ipynb"


@pytest.mark.slow
def test_papermill_gets_the_figure_and_no_widget(notebook, monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "a kernel of JupyterLab from which the run was started")
    out = notebook.with_name("out.ipynb")
    papermill.execute_notebook(str(notebook), str(out), progress_bar=False)
    executed = nbformat.read(out, as_version=4)
    (output,) = executed.cells[0].outputs
    assert WIDGET not in output.data
    assert output.metadata["image/png"]["alt"].startswith("Memory of the fullest device")
    assert "widgets" not in executed.metadata
    assert (notebook.parent / "report" / "figures" / "plan.png").exists()


@pytest.mark.slow
def test_a_front_end_that_names_its_cells_gets_the_widget_and_the_figure(notebook):
    content = nbformat.read(notebook, as_version=4)
    client = NotebookClient(content)
    with client.setup_kernel():
        send = client.kc.session.msg

        def as_jupyterlab_does(kind, *args, **kwargs):
            message = send(kind, *args, **kwargs)
            if kind == "execute_request":
                message["metadata"]["cellId"] = content.cells[0].id
            return message

        client.kc.session.msg = as_jupyterlab_does
        client.execute_cell(content.cells[0], 0)
    (output,) = content.cells[0].outputs
    assert {WIDGET, "image/png", "text/plain"} <= set(output.data)
    assert output.metadata["image/png"]["alt"] == output.data["text/plain"]
