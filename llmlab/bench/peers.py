"""Libraries whose pins conflict with ours, in environments of their own (`make peers`), as subprocesses that speak
JSON: a request on standard input, an answer as the last line of standard output. See peers/*_worker.py."""

import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llmlab.base.errors import InputError
from llmlab.base.paths import PACKAGE
from llmlab.model.lm import LM
from llmlab.quantization.grid import Scheme

Answer = dict[str, Any]  # JSON, see the workers
TIMEOUT = 2 * 3600.0  # seconds


def missing(peer: str) -> str | None:
    """Why a peer ("gptqmodel", "autogptq", "llamacpp") cannot be called here, and what to run; None if it can."""
    if not _worker(peer).exists():
        return f"{peer} is called from a checkout of llmlab: clone it and run make peers."
    if not _python(peer).exists():
        return f"{peer} is not here: run make peers (minutes; it gets an environment of its own)."
    return None


def call(peer: str, request: Mapping[str, object], *, timeout: float = TIMEOUT) -> Answer:
    """Send one request (see peers/*_worker.py) to a peer and return its answer; `timeout` in seconds.

    Raises InputError where the peer is not installed, RuntimeError where it failed; says with what.
    """
    if reason := missing(peer):
        raise InputError(reason)
    command = [str(_python(peer)), str(_worker(peer))]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{peer} did not answer within {timeout:.0f} s.") from None
    lines = done.stdout.strip().splitlines()
    died = done.stderr.strip()[-1000:] or f"it ended with status {done.returncode} and without a word"
    answer: Answer = json.loads(lines[-1]) if lines else {"error": died}
    if "error" in answer:
        raise RuntimeError(f"{peer} failed on {request.get('job')}: {answer['error']}")
    return answer


def peer_quantize(
    peer: str,
    lm: LM,
    calibration: torch.Tensor,
    scheme: Scheme,
    folder: Path,
    options: Mapping[str, object] | None = None,
) -> Answer:
    """Quantize a plain model with a peer's GPTQ on the same rows into `folder`; returns its `seconds` and `versions`.

    `scheme` gives bits, group size, order and symmetry; `options` are more arguments of GPTQModel's QuantizeConfig.
    """
    settings = {"bits": scheme.bits, "group_size": scheme.group_size, "options": dict(options or {})}
    settings |= {"desc_act": scheme.act_order, "sym": scheme.symmetric}
    with tempfile.TemporaryDirectory() as temporary:
        model = lm.save(Path(temporary) / "model")
        folders = {"model": str(model), "output": str(folder)}
        answer = call(peer, {"job": "quantize", "ids": calibration.tolist(), **folders, **settings})
    lm.tokenizer.save_pretrained(folder)  # AutoGPTQ leaves it to the caller
    return answer


def _worker(peer: str) -> Path:
    return PACKAGE.parent / "peers" / f"{peer}_worker.py"


def _python(peer: str) -> Path:
    return PACKAGE.parent / ".peers" / peer / "bin" / "python"
