"""gpu-check on CPU ranks, and that each of its steps can fail."""

import json
import sys

import pytest
import torch

from llmlab.base.errors import InputError
from llmlab.bench.gpu_check import check, exact, software
from llmlab.bench.gpu_check.check import STEPS, gpu_check
from llmlab.bench.gpu_check.given import LAYERS, Finding, Given, Step
from llmlab.cli.main import main
from llmlab.kernels.cuda import nvidia
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.kernels.packing import BITS
from llmlab.measure.record import read_records
from llmlab.quantization.grid import rtn

GIB = 2**30
ALL_FREE = [(31 * GIB, 32 * GIB)] * 4


@pytest.mark.slow
def test_every_step_that_is_not_about_cuda_passes_on_four_cpu_ranks():
    lm, measured = gpu_check("cpu", 4)
    states = {row["step"]: row["state"] for row in measured.details["steps"]}
    assert states == {step.name: "not here" if step.cuda else "ok" for step in STEPS}, measured.details
    assert lm.name == "smollm2"
    assert measured.details["failed"] == 0
    assert {"mfu 256", "tokens_per_second 4 bits"} <= {name.split(": ")[-1] for name in measured.values}


def test_one_device_is_asked_nothing_about_several(monkeypatch):
    monkeypatch.setattr(
        check, "STEPS", (STEPS[0], Step("links", print, cuda=True, several=True), Step("x", print, several=True))
    )
    _, measured = gpu_check("cpu")
    assert [row["state"] for row in measured.details["steps"]] == ["not here"] * 3
    assert measured.n == 0


def broken(given):
    raise RuntimeError("CUDA error: no kernel image is available")


def test_what_fails_is_told_and_the_status_is_one(monkeypatch, capsys, tmp_path):
    steps = (
        Step("good", lambda given: Finding(True, "fine")),
        Step("broken", broken),
        Step("after", lambda given: Finding(None, "?")),
    )
    monkeypatch.setattr(check, "STEPS", steps)
    out = tmp_path / "check.json"
    monkeypatch.setattr(sys, "argv", ["llmlab", "gpu-check", "--device", "cpu", "--json", str(out)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "broken: RuntimeError: CUDA error: no kernel image is available" in capsys.readouterr().out
    told = json.loads(out.read_text())
    assert [row["state"] for row in told["steps"]] == ["ok", "FAILED", "not here"]
    assert told["failed"] == 1 and told["record"] == read_records()[-1]
    assert told["record"]["metrics"]["steps_failed"]["value"] == 1


def test_without_its_first_step_nothing_else_is_tried(monkeypatch):
    monkeypatch.setattr(check, "STEPS", (Step("driver", broken), Step("never", lambda given: pytest.fail("was tried"))))
    lm, measured = gpu_check("cpu")
    assert lm is None
    assert [row["state"] for row in measured.details["steps"]] == ["FAILED"]


@pytest.mark.parametrize(
    "triton, memory, shared, helps",
    [
        (("3.7.1", "3.7.1"), ALL_FREE, GIB, None),
        ((None, "3.7.1"), ALL_FREE[:1], None, None),
        (("3.7.1", "3.9.0"), ALL_FREE, GIB, "run `pip install 'triton==3.7.1'`"),
        (("3.7.1", None), ALL_FREE, GIB, "run `pip install 'triton==3.7.1'`"),
        ((None, None), ALL_FREE, GIB, "run `pip install 'triton'`"),
        (("3.7.1", "3.7.1"), [*ALL_FREE[:3], (3 * GIB, 32 * GIB)], GIB, "GPU 3 has 3.0 of 32.0 GiB free"),
        (("3.7.1", "3.7.1"), ALL_FREE, 2**26, "--shm-size=1g"),
    ],
)
def test_what_would_spoil_the_check_is_said_first(triton, memory, shared, helps):
    said = software.trouble(triton, memory, shared)
    assert said is None if helps is None else helps in said


def test_torch_says_which_triton_it_wants(monkeypatch):
    requirements = ["filelock", 'triton==3.7.1; platform_system == "Linux"', 'optree>=0.13.0; extra == "optree"']
    monkeypatch.setattr(software.importlib.metadata, "requires", lambda name: requirements)
    assert software.triton_of_torch() == "3.7.1"
    monkeypatch.setattr(software.importlib.metadata, "requires", lambda name: None)
    assert software.triton_of_torch() is None


def test_a_wrong_product_is_found(monkeypatch):
    given = Given(torch.device("cpu"), 1)
    right = exact.kernels(given)
    assert right.passed and right.said.startswith(f"{len(BITS) * 4 * 2 * 3 * 6} products")
    plain = QuantLinear.forward
    monkeypatch.setattr(QuantLinear, "forward", lambda self, x: plain(self, x) * (1.05 if len(x) == 17 else 1))
    assert exact.kernels(given).passed is False


def test_codes_that_are_not_gptqs_are_found(smollm2, monkeypatch):
    given = Given(torch.device("cpu"), 1)
    given.lm = smollm2
    assert exact.quantizing(given).passed
    monkeypatch.setattr(exact, "gptq", lambda weight, factor, scheme: rtn(weight, scheme))
    assert exact.quantizing(given).passed is False


def test_what_decodes_on_a_cpu_is_the_models_first_layers(smollm2):
    given = Given(torch.device("cpu"), 1)
    given.lm = smollm2
    ids = torch.tensor([smollm2.encode("one two three")])
    with torch.inference_mode():
        states = smollm2.model(ids, output_hidden_states=True).hidden_states[LAYERS]
        right = smollm2.model.lm_head(smollm2.model.model.norm(states))
        torch.testing.assert_close(given.writer.model(ids).logits, right)
    assert len(smollm2.model.model.layers) == smollm2.model.config.num_hidden_layers == 30


def test_operations_are_counted():
    x = torch.randn(4, 4)
    assert exact.calls(lambda: [x @ x for _ in range(3)])["aten::mm"] == 3


@pytest.mark.skipif(bool(nvidia().cards), reason="there are GPUs here")
def test_without_a_gpu_the_sentence_says_what_runs_here():
    with pytest.raises(InputError, match="--device cpu"):
        gpu_check("cuda")
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        gpu_check("tpu")
