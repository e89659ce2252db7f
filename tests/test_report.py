import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from llmlab import InputError
from llmlab.lab.report import check_parameters, find_notebooks, report


def write(folder, name, *cells, parameters="x = 1  # a number"):
    notebook = new_notebook(cells=[new_markdown_cell(f"# About {name}")])
    if parameters is not None:
        notebook.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook.cells += [new_code_cell(source) for source in cells]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = Path(folder) / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    return tmp_path


FIGURE = """
import matplotlib.pyplot as plt
from llmlab.lab import figures
figure, axes = plt.subplots()
axes.plot([x, 2])
figures.show(figure, "line", "A line from <x> to 2.")
"""


def test_notebooks_become_pages_and_a_failure_stops_nothing(home):
    ok = write(home / "notebooks", "00_fine", FIGURE, "print('<script>alert(1)</script>', x)")
    bad = write(home / "notebooks", "01_fails", "print('before')", "1 / 0", "print('after')")
    last = write(home / "notebooks", "02_last", "x + 1")
    ended = []
    runs = report([ok, bad, last], output=home / "report", parameters={"x": 7}, on_end=ended.append)
    assert [run.failed for run in runs] == [False, True, False]
    assert runs == ended
    assert "ZeroDivisionError" in runs[1].error
    failed = nbformat.read(home / "report" / "notebooks" / "01_fails.ipynb", as_version=4)
    outputs = [o for cell in failed.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any(o.output_type == "error" and o.ename == "ZeroDivisionError" for o in outputs)
    page = (home / "report" / "00_fine.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 7" in page
    assert "<script>alert" not in page
    assert 'alt="A line from &lt;x&gt; to 2."' in page
    index = (home / "report" / "index.html").read_text()
    assert "About 00_fine" in index
    assert "ZeroDivisionError" in index
    assert "x = 7" in index
    assert 'alt="A line from &lt;x&gt; to 2."' in index
    assert (home / "report" / "figures" / "line.png").exists()
    assert (home / "figures" / "line.svg").exists()
    for text in (page, index):
        assert 'src="http' not in text
        assert "cdnjs" not in text


def test_parameters_are_held_against_the_cell(home):
    path = write(home / "notebooks", "00_fine", "x")
    check_parameters(path, {"x": 3})
    with pytest.raises(InputError, match=r"00_fine\.ipynb has no parameter y: its parameters are x"):
        report([path], output=home / "report", parameters={"y": 3})
    untagged = write(home / "notebooks", "01_untagged", "y = 1", parameters=None)
    with pytest.raises(InputError, match="no cell tagged parameters"):
        check_parameters(untagged, {"y": 1})
    (home / "notebooks" / "02_broken.ipynb").write_text("{")
    with pytest.raises(InputError, match="cannot read the notebook"):
        check_parameters(home / "notebooks" / "02_broken.ipynb", {})
    assert not (home / "report").exists()


def test_a_kernel_that_dies_is_reported(home):
    path = write(home / "notebooks", "00_dies", "import os; os._exit(3)")
    runs = report([path, write(home / "notebooks", "01_fine", "x")], output=home / "report")
    assert "died" in runs[0].error.lower()
    assert not runs[1].failed


def test_notebooks_are_found_by_name_number_and_path(home):
    first, second = (write(home / "notebooks", name, "x") for name in ("00_a", "01_b"))
    assert find_notebooks() == [first, second]
    assert find_notebooks(["01", "00_a"]) == [second, first]
    assert find_notebooks([str(first)]) == [first]
    with pytest.raises(InputError, match=r"no notebook 'c': give the path of an \.ipynb file or one of 00_a, 01_b"):
        find_notebooks(["c"])


def test_the_command_says_by_its_status_that_a_notebook_failed(home, monkeypatch, capsys):
    from llmlab.cli import main

    write(home / "notebooks", "00_fails", "raise RuntimeError('on purpose')")
    monkeypatch.setattr(sys, "argv", ["llmlab", "report", "--output", str(home / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "on purpose" in capsys.readouterr().out
    assert (home / "out" / "index.html").exists()
