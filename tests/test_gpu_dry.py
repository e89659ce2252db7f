"""What `make gpu-dry` counts is so: waits, launches, memory, wrong devices; a small model's rank."""

import importlib
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import CHECKOUT

from llmlab.decoding import loop
from llmlab.model.load import model_card
from llmlab.sharding.plan import plan

PYTHON = CHECKOUT / ".venv-cuda" / "bin" / "python"
HERE = torch.version.cuda is not None  # the CPU build has no fake tensors on "cuda"
with_cuda_build = pytest.mark.skipif(not HERE, reason="in this environment torch is no CUDA build")


@pytest.mark.slow
@pytest.mark.skipif(HERE or not PYTHON.exists(), reason="there is no .venv-cuda: `make gpu-dry` makes it (5.6 GB)")
def test_in_an_environment_with_the_cuda_build():
    done = subprocess.run([PYTHON, "-m", "pytest", "-x", "-q", __file__], capture_output=True, text=True, cwd=CHECKOUT)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture
def walk(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "gpu_dry")
    return importlib.import_module("walk")


@with_cuda_build
def test_launches_waits_and_memory_are_counted(walk):
    card = walk.Walk()
    with walk.fake_card(card), torch.inference_mode():
        x = torch.zeros(1000, 512, device="cuda")
        y = torch.nn.functional.linear(x, x[:10]).view(-1).cpu()  # a view launches nothing
        assert (y.device.type, card.held, card.peak) == ("cpu", 2_048_000, 2_048_000 + 79 * 512)
        assert card.launches == {"aten.zeros.default": 1, "aten.linear.default": 1}
        torch.ones(3).to("cuda")  # nothing is left to wait for
        assert card.waits.total() == 1
        assert loop._best(x, None) == [0] * 1000
        (line,) = card.waits.keys() - {"elsewhere"}
        assert line.startswith("llmlab/decoding/loop.py:") and card.waits[line] == 1
        del x
        assert card.held == 0


@with_cuda_build
def test_a_tensor_of_the_wrong_device_raises(walk):
    with walk.fake_card(walk.Walk()), pytest.raises(Exception, match="same device, but found at least two"):
        torch.zeros(3, device="cuda") + torch.zeros(3)


@with_cuda_build
def test_a_capture_refuses_to_wait_and_tells_what_it_writes(walk):
    card = walk.Walk()
    with walk.fake_card(card):
        x, cache = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
        card.capture(lambda: cache.add_(x * 2))
        keys = [tensor.untyped_storage()._cdata for tensor in (x, cache)]
        assert card.graphs == [(set(keys), {keys[1]})] and card.launches == Counter(
            {"aten.ones.default": 1, "aten.zeros.default": 1}
        )
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            card.capture(lambda: x.sum().item())


@pytest.mark.slow
@with_cuda_build
@pytest.mark.parametrize(("name", "bits"), [("tensor 4", 16), ("data 4", 4)])
def test_a_rank_of_a_small_model(walk, name, bits):
    ranks = importlib.import_module("ranks")
    card = model_card("random:opt-125m")
    planned = plan(card, devices=4, bits=bits, batch=ranks.BATCH, context=ranks.CONTEXT)
    layout = next(layout for layout in planned.layouts if layout.name == name)
    report = ranks.walk_rank("opt-125m", layout, 0, bits)
    assert report.problems() == [] and report.kv_cache == layout.kv_cache
    assert report.kernels["scoring"] == (15 if bits == 16 else 21)
    assert ("writes 24" in report.graphs) == (bits == 4)  # replicas alone are captured: keys and values of 12 layers
