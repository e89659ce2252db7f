"""Which GPUs a build of torch and a driver serve, and what helps: from values, and with an nvidia-smi of our own."""

import os
import re
import warnings

import pytest
import torch

import llmlab
from llmlab.base import clock
from llmlab.base.errors import InputError
from llmlab.cli.main import doctor
from llmlab.cli.terminal import console
from llmlab.kernels import cuda, fast
from llmlab.kernels.choose import REFERENCE, choose_kernel
from llmlab.kernels.cuda import BUILDS, Card, Nvidia, problem, serves, usable
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.measure import environment
from llmlab.model.lm import check_device, check_dtype
from llmlab.sharding.launch import check_world

CUDA13 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
CUDA12 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
K80, V100, T4 = Card("Tesla K80", (3, 7), 1), Card("Tesla V100", (7, 0), 1), Card("Tesla T4", (7, 5), 1)
A100, H100, B200 = Card("A100", (8, 0), 1), Card("H100", (9, 0), 1), Card("B200", (10, 0), 1)
RUN_12 = "run `make setup TORCH_INDEX=https://download.pytorch.org/whl/cu126`"
RUN_13 = "run `make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130`"


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        (["sm_80"], [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        (["sm_86"], [(8, 6), (8, 9)], [(8, 0)]),
        (["compute_80"], [(8, 0), (8, 9), (9, 0), (12, 0)], [(7, 5)]),
        (["sm_90a"], [(9, 0)], [(9, 1), (10, 0)]),
        (["compute_90a"], [(9, 0)], [(10, 0)]),
        (["sm_100f"], [(10, 0), (10, 3)], [(11, 0)]),
        (CUDA13, [(7, 5), (8, 0), (8, 9), (9, 0), (10, 3), (12, 1), (13, 0)], [(7, 0), (6, 1), (11, 0)]),
        (CUDA12, [(5, 2), (6, 1), (7, 0), (7, 5), (8, 9), (9, 0)], [(3, 7), (10, 0), (12, 0)]),
        ([], [], [(8, 0)]),
    ],
    ids=str,
)
def test_code_runs_on_its_own_major_version_and_ptx_on_newer_cards(archs, runs, does_not):
    assert [c for c in [*runs, *does_not] if serves(archs, c)] == runs


def test_the_builds_are_those_of_torchs_own_table():
    table = torch.cuda.PYTORCH_RELEASES_CODE_CC
    assert torch.__version__.startswith("2.13."), "read the builds of the new version, and the text of `problem`"
    for build in BUILDS:
        assert {f"sm_{arch}" for arch in table[build.cuda]["x86_64"]} == set(build.archs)


def old_driver(driver, *cards, words="The NVIDIA driver on your system is too old (found version 12020)"):
    return Nvidia(cards, "13.0", CUDA13, driver, words)


NEEDS_NO_HELP = [Nvidia(), Nvidia((), "13.0", CUDA13), Nvidia((T4, A100, H100, B200), "13.0", CUDA13, "580.65.06")]
NEEDS_NO_HELP += [Nvidia((V100,) * 4, "12.6", CUDA12, "535.183.01")]
NEEDS_NO_HELP += [Nvidia((Card("MI300", (9, 4), 1),), None, ("gfx942",))]  # AMD: not ours to judge


@pytest.mark.parametrize("here", NEEDS_NO_HELP)
def test_where_all_is_well_nothing_is_said(here):
    assert problem(here) is None
    assert usable(here) == list(range(len(here.cards)))


@pytest.mark.parametrize(
    ("here", "cause", "helps"),
    [
        (Nvidia((V100,) * 4, "13.0", CUDA13, "580.65.06"), "Tesla V100 has compute capability 7.0, this torch", RUN_12),
        (Nvidia((B200,), "12.6", CUDA12, "580.65.06"), "B200 has compute capability 10.0", RUN_13),
        (
            Nvidia((B200,), "12.6", CUDA12, "570.26"),
            "B200 has compute capability 10.0",
            f"upgrade the driver to 580 or newer, then {RUN_13}",
        ),
        (
            old_driver("535.183.01", A100),
            "the NVIDIA driver (535.183.01) is too old for this torch (CUDA 13.0)",
            f"{RUN_12}, or upgrade the driver to 580 or newer",
        ),
        (old_driver("535.183.01", V100), "(535.183.01) is too old", RUN_12),
        (old_driver("535.183.01", B200), "(535.183.01) is too old", "upgrade the driver to 580 or newer"),
        (old_driver("470.57.02", H100), "(470.57.02) is too old", "upgrade the driver to 580 or newer"),
        (old_driver("470.57.02", V100), "is too old", f"upgrade the driver to 525 or newer, then {RUN_12}"),
        (old_driver(None, A100), "(version unknown) is too old", "upgrade the driver to 580 or newer"),
        (old_driver("470.57.02", K80), "is too old", "no build of torch 2.13 has code for every GPU here"),
        (Nvidia((V100, B200), "12.6", CUDA12, "580.65.06"), "B200 has", "choose others with CUDA_VISIBLE_DEVICES"),
        (Nvidia((A100,), None, (), "580.65.06", "x"), "this torch has no CUDA, so it does not use the A100", RUN_13),
        (Nvidia((V100,), None, (), "535.183.01", "x"), "this torch has no CUDA", RUN_12),
        (
            old_driver("580.65.06", A100, words="system not yet initialized"),
            "(system not yet initialized)",
            "nvidia-smi",
        ),
    ],
)
def test_the_sentence_names_the_cause_and_what_helps(here, cause, helps):
    said = problem(here)
    assert cause in said.split(": ")[0]
    assert helps in said
    assert ("run `" in said) == ("run `" in helps)
    assert ("upgrade" in said) == ("upgrade" in helps)
    assert len(usable(here)) < len(here.cards)


def test_outside_the_checkout_the_command_is_pips():
    here = Nvidia((V100,), "13.0", CUDA13, "580.65.06")
    said = problem(here, install="pip install 'torch==2.13.0+{cuda}' --extra-index-url {index}")
    command = "pip install 'torch==2.13.0+cu126' --extra-index-url https://download.pytorch.org/whl/cu126"
    assert said.endswith(f"run `{command}`.")


def test_one_card_that_is_not_served_leaves_the_others():
    here = Nvidia((V100, A100), "13.0", CUDA13, "580.65.06")
    assert usable(here) == [1]
    assert "Tesla V100 has" in problem(here)


SMI = """#!/bin/sh
case "$*" in
  *compute_cap*) {newer} ;;
  *driver_version*) echo 535.183.01 ;;
  *) echo "Tesla V100-SXM2-32GB, 32768" ; echo "Tesla V100-SXM2-32GB, 32768" ;;
esac
"""
TWO_V100 = 'echo "Tesla V100-SXM2-32GB, 32768, 7.0" ; echo "Tesla V100-SXM2-32GB, 32768, 7.0"'


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Two V100 with a driver too old for this torch: NVML counts them, CUDA does not start."""

    def make(newer=TWO_V100, archs=CUDA13, build="13.0"):
        tool = tmp_path / "nvidia-smi"
        tool.write_text(SMI.replace("{newer}", newer))
        tool.chmod(0o755)

        def start(*_):
            raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020).\nPlease update it.")

        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.version, "cuda", build)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2 if build else 0)
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: list(archs))
        for name in ("init", "get_device_properties", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, start)
        monkeypatch.setattr(cuda, "PROC", tmp_path / "none")
        cuda.nvidia.cache_clear()

    yield make
    cuda.nvidia.cache_clear()


def test_an_old_driver_stops_neither_doctor_nor_records(server):
    server()
    found = environment.inventory()
    card = {"name": "Tesla V100-SXM2-32GB", "capability": "7.0", "memory": 32 * 2**30, "usable": False}
    assert found["hardware"]["gpus"] == [card, card]
    assert found["hardware"]["cuda"]["driver"] == "535.183.01"
    assert "535.183.01" in found["hardware"]["cuda"]["problem"]
    with console.capture() as text:
        doctor()
    assert "Tesla V100-SXM2-32GB, capability" in text.get()
    assert "not usable" in text.get()
    assert text.get().splitlines()[-1] == found["hardware"]["cuda"]["problem"]  # in one line, to be copied
    assert text.get().rstrip().endswith("whl/cu126`.")
    assert not any(k["usable"] for k in found["kernels"] if "GPU" in k["kernel"])
    clock.synchronize()


def test_a_gpu_that_cannot_be_used_is_one_sentence(server):
    server()
    with pytest.raises(InputError, match=r"^the device 'cuda' cannot be used: the NVIDIA driver \(535"):
        llmlab.load("smollm2", device="cuda")
    with pytest.raises(InputError, match="no device 'cuda:2' here"):
        check_device("cuda:2")
    with pytest.raises(InputError, match="2 ranks need 2 GPUs, torch can use 0: the NVIDIA driver"):
        check_world(2, "cuda")
    with pytest.warns(UserWarning, match=r"^the NVIDIA driver .* Here llmlab runs on the CPU\.$"):
        assert check_device(None) == torch.device("cpu")
    with pytest.warns(UserWarning, match="runs on the CPU"):
        assert check_world(2, None) == "cpu"


def test_a_build_without_cuda_is_told_on_demand_alone(server):
    server(build=None, archs=())
    with warnings.catch_warnings(action="error", category=UserWarning):
        assert check_device(None) == torch.device("cpu")
    with pytest.raises(InputError, match=r"this torch has no CUDA, so it does not use the Tesla V100.*whl/cu126`"):
        check_device("cuda")


def test_drivers_that_do_not_know_the_capability(server):
    server(newer="echo 'Field \"compute_cap\" is not a valid field to query.' ; exit 2")
    (first, _) = cuda.nvidia().cards
    assert first == Card("Tesla V100-SXM2-32GB", None, 32 * 2**30)


def test_hidden_gpus_are_not_spoken_of(server, monkeypatch):
    server(build=None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda.nvidia().cards == ()


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC: 12\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (buildd@x)\n",
    ],
)
def test_the_driver_says_its_version(server, tmp_path, monkeypatch, text):
    server()
    (tmp_path / "version").write_text(text)
    monkeypatch.setattr(cuda, "PROC", tmp_path / "version")
    assert cuda.nvidia().driver == re.search(r"\d{3}\.\d+\.\d+", text).group()


def test_apples_gpu_is_a_device_of_fp32_and_fp16_alone(monkeypatch):
    metal = torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="there is no device 'mps' here"):
        check_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert check_device("mps") == metal
    assert check_device(None) == torch.device("cpu")  # nobody gets it unasked: it was not verified
    assert (check_dtype(None, metal), fast.half_dtype(metal), fast.packed_dtype(metal)) == ("fp32", "fp16", "fp16")
    with pytest.raises(InputError, match="choose fp16 or fp32"):
        check_dtype("bf16", metal)
    assert "not verified" in next(why for what, usable, why in environment.kernels() if "Apple" in what and usable)


def test_packed_weights_elsewhere_than_on_cpus_and_nvidias_gpus_have_the_reference_kernel():
    linear = QuantLinear(64, 64, 4, 2, bias=False).to("meta")  # as on Metal: neither torch's kernel nor Triton's
    assert choose_kernel(linear) == (REFERENCE, None)
