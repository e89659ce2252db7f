"""Every notebook runs from start to end with small parameters."""

import pytest
from conftest import CHECKOUT

from llmlab.lab.report import report

pytestmark = pytest.mark.slow

SMALL = {
    "00_start_here": {"limit": 3, "max_new_tokens": 6},
    "02_sharding": {"limit": 4},
    "03_quantization": {"rows": 2, "windows": 2, "group_size": 32},
    "04_speculative_decoding": {"new_tokens": 6, "repeats": 1},
    "05_shared_prefix_scoring": {"limit": 2, "min_runs": 1},
    "06_trade_offs": {"live": [["fp32", "none", "1", ""]], "limit": 2, "new_tokens": 2},
    "07_challenge": {"limit": 1, "min_runs": 1},
    "08_why_papers_disagree": {"tokens": 256, "contexts": [64, 128], "limit": 2, "new_tokens": 6, "repeats": 1},
    "01_where_time_goes": {"prompt_tokens": 16, "widths": [1, 8], "min_runs": 3},
}


def test_small_parameters_cover_every_notebook():
    assert set(SMALL) == {path.stem for path in (CHECKOUT / "notebooks").glob("*.ipynb")}


@pytest.mark.parametrize("name", SMALL)
def test_notebook(name, tiny_folders, tmp_path, monkeypatch):
    parameters = dict(SMALL[name])
    if name == "03_quantization":  # quantizing the built-in model four times takes minutes
        parameters["model"] = str(tiny_folders["llama"])
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path))
    notebook = CHECKOUT / "notebooks" / f"{name}.ipynb"
    (run,) = report([notebook], output=tmp_path / "report", parameters=parameters)
    assert run.error is None
    page = (tmp_path / "report" / f"{name}.html").read_text()
    assert "No description has been provided" not in page
    assert 'src="http' not in page
    assert list((tmp_path / "report" / "figures").glob("*.svg"))
    index = (tmp_path / "report" / "index.html").read_text()
    assert index.count("<figure>") == len(list((tmp_path / "report" / "figures").glob("*.png")))
