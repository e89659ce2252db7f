"""What depends on the processor, again as an older one sees it: fresh processes limited to AVX2, and without bf16.

A process reads its limits when torch loads, hence processes of their own. On a machine with AVX2 alone the suite itself
is that test; on ARM the limits mean nothing. There only bf16 is reported absent.
"""

import os
import subprocess
import sys

import pytest
import torch
from conftest import CHECKOUT

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
WITHOUT_BF16 = {"LLMLAB_WITHOUT_BF16": "1"}
SUITE = ["test_fast.py", "test_plain.py", "test_kernels.py", "test_engine.py", "test_precisions.py"]
REST = ["test_checkpoint.py", "test_quantize.py", "test_generate.py", "test_bench.py"]
NOTEBOOKS = ["test_notebooks.py::test_notebook[00_start_here]", "test_notebooks.py::test_notebook[03_quantization]"]


def run(names, limits, *options):
    """These tests in a fresh process with these limits; what pytest said."""
    places = [str(CHECKOUT / "tests" / name) for name in names]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *places]
    environment = {name: value for name, value in os.environ.items() if name not in ("LLMLAB_HOME",)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment | limits, cwd=CHECKOUT)
    report = f"{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
    assert done.returncode == 0, report
    return report


if "AVX512" in torch.backends.cpu.get_cpu_capability():  # elsewhere the suite itself is this test

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "names, which", [(SUITE, ""), (REST, "not slow"), (NOTEBOOKS, "")], ids=["kernels", "rest", "notebooks"]
    )
    def test_a_process_limited_to_avx2(names, which):
        assert "passed" in run(names, AVX2, "-o", "addopts=-q --strict-markers", "-m", which)


@pytest.mark.slow
def test_a_process_that_reports_no_bf16():
    assert "passed" in run(SUITE, WITHOUT_BF16, "-o", "addopts=-q --strict-markers", "-m", "not slow")
