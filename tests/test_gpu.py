"""What runs on GPUs alone: `llmlab gpu-check`, in a process that sees them (conftest hides them from this one)."""

import json
import os
import subprocess
import sys

import pytest


def test_gpu_check(tmp_path):
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": os.environ["VISIBLE_GPUS"]}
    if os.environ["VISIBLE_GPUS"] == "all":
        del environment["CUDA_VISIBLE_DEVICES"]
    asks = "import torch; print(torch.cuda.is_available())"
    answer = subprocess.run([sys.executable, "-c", asks], env=environment, capture_output=True, text=True, check=True)
    if "True" not in answer.stdout:
        pytest.skip("no GPU here: on a server with GPUs this is llmlab gpu-check, all of it")
    out = tmp_path / "check.json"
    command = [sys.executable, "-m", "llmlab.cli.main", "gpu-check", "--json", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert out.exists(), done.stderr
    failed = [
        f"{row['step']}: {row['said']}" for row in json.loads(out.read_text())["steps"] if row["state"] == "FAILED"
    ]
    assert not failed and done.returncode == 0, "\n".join(failed)
