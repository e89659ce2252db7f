"""The house itself: its floors, its committed notebooks."""

import ast
import json
import tomllib

import pytest
from conftest import CHECKOUT

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]

# The rooms of the house by floor, lowest first. A module may import from its own room and from floors below.
FLOORS = [
    {"base"},
    {"kernels"},
    {"model", "data"},
    {"scoring", "quantization", "sharding", "decoding"},  # know one another only through LM and plain tensors
    {"jobs"},
    {"measure"},
    {"bench"},
    {"lab"},
    {"cli"},
]
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
SOURCES = sorted((CHECKOUT / "llmlab").rglob("*.py"))
LOOSE = {"__init__.py", "data.py"}  # modules at the root


def imported(path):
    """Modules of llmlab that a file imports, deferred imports and imports for types alone included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "llmlab":
            known = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if is_module(name) else node.module for name in known)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "llmlab")


def is_module(name):
    path = CHECKOUT.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def room(module):
    return module.split(".")[1] if "." in module else ""


def name_of(path):
    return ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__init__")


def test_no_import_runs_upward_or_to_a_neighbour():
    for path in SOURCES:
        here = name_of(path)
        if here == "llmlab":
            continue
        for target in imported(path):
            there = room(target)
            assert there, f"{here} imports the public face"
            below = FLOOR[there] < FLOOR[room(here)]
            assert below or there == room(here), f"{here} imports {target}, which is not below it"


def test_no_circle_of_imports():
    graph = {name_of(path): set(imported(path)) for path in SOURCES}
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"a circle: {' > '.join([*open_[open_.index(module) :], module])}"
        if module in done or module not in graph:
            return
        open_.append(module)
        for target in sorted(graph[module]):
            visit(target)
        open_.pop()
        done.add(module)

    for module in sorted(graph.keys() - {"llmlab"}):
        visit(module)


def test_loose_modules_and_sizes():
    assert {p.name for p in (CHECKOUT / "llmlab").glob("*.py")} <= LOOSE
    long = {name_of(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 300}
    assert not long, "one idea a file, under 300 lines"


def test_the_public_face_is_whole():
    import llmlab

    for name in llmlab.__all__:
        assert getattr(llmlab, name) is not None
    assert llmlab.__version__ == PROJECT["version"]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = llmlab.nothing


NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_executed_and_clean(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert "parameters" in code[0]["metadata"].get("tags", [])
    lines = "".join(code[0]["source"]).splitlines()
    assert all("#" in line for line in lines), "each parameter says what it is"
    assert all(cell["execution_count"] for cell in code)
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert not [o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})]
    assert not [o for o in outputs if "\r" in "".join(o.get("text", ""))]  # a progress bar leaves one line
    images = [o for o in outputs if "image/png" in o.get("data", {})]
    assert images
    assert all(o["metadata"]["image/png"]["alt"] for o in images)
    assert "/home/" not in path.read_text()
    assert "Try this next" in "".join(cells[-1]["source"])


def test_the_readme_lists_every_notebook():
    readme = (CHECKOUT / "README.md").read_text()
    assert NOTEBOOKS
    assert all(f"notebooks/{path.name}" in readme for path in NOTEBOOKS)
