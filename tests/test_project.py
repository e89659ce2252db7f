"""The house itself: its floors, its committed notebooks."""

import ast
import json
import tomllib

import pytest
from conftest import CHECKOUT

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]

# The floors of the house, lowest first. A module may import from its own floor and from those below.
FLOORS = [
    {
        "errors",
        "paths",
        "stats",
        "progress",
        "hub",
        "card",
        "cuda",
        "sources",
        "gguf",
        "base",
        "kernels",
        "model",
        "data",
        "weights",
    },
    {"scoring", "quantization", "sharding", "decoding"},
    {"loading", "shard", "sharded", "drafting"},
    {"measure"},
    {"lab"},
    {"terminal", "options", "cli_bench", "cli_lab", "cli_compare", "cli"},
]
SIDE_BY_SIDE = FLOORS[1]  # know one another only through LM and plain tensors


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("llmlab"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("llmlab."))


def test_no_import_runs_upward():
    floor = {name: level for level, names in enumerate(FLOORS) for name in names}
    for path in (CHECKOUT / "llmlab").rglob("*.py"):
        module = path.relative_to(CHECKOUT / "llmlab").parts[0].removesuffix(".py")
        if module == "__init__":
            continue
        for target in imports(path):
            if target.startswith("__"):
                continue
            assert floor[target] <= floor[module], f"{path.name} imports {target} from a floor above"
            if module in SIDE_BY_SIDE and target in SIDE_BY_SIDE:
                assert target == module, f"{module} imports its neighbour {target}"


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
