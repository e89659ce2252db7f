"""The NVIDIA GPUs of this machine, what keeps torch from using them, and the command that helps.

A build of torch has code for some compute capabilities and needs a driver of a certain age. Where either is missing,
torch fails late ("no kernel image is available") or goes on without the GPU. `problem` decides from values alone, so
that every case is tested without a GPU; `nvidia` reads those values here.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from llmlab.base.paths import PACKAGE

Capability = tuple[int, int]


@dataclass(frozen=True)
class Card:
    """A GPU: its name, its compute capability (None where nothing here can tell) and its memory in bytes."""

    name: str
    capability: Capability | None
    memory: int


@dataclass(frozen=True)
class Nvidia:
    """What decides whether torch can use the GPUs here.

    Attributes:
        cards: the GPUs, in torch's order where torch reaches them.
        cuda: CUDA version of this build of torch, as "13.0"; None for builds without CUDA.
        archs: what it has code for, as "sm_86" (machine code) or "compute_120" (PTX).
        driver: version of the NVIDIA driver, as "580.65.06"; None if unknown.
        failure: torch's words if it does not reach the GPUs that are there; None if it does, or if there are none.
    """

    cards: tuple[Card, ...] = ()
    cuda: str | None = None
    archs: tuple[str, ...] = ()
    driver: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Build:
    """A build of torch in PyTorch's own index: its CUDA version, what it has code for, the oldest driver branch."""

    cuda: str
    archs: tuple[str, ...]
    driver: int

    @property
    def index(self) -> str:
        """The address for pip's --index-url."""
        return f"https://download.pytorch.org/whl/cu{self.cuda.replace('.', '')}"


# Of torch 2.13 for x86-64, the one of the ordinary index first; a test compares them with torch's own table.
BUILDS = (
    Build("13.0", ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"), 580),
    Build("12.6", ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"), 525),
)
PROC = Path("/proc/driver/nvidia/version")
IN_CHECKOUT = "make setup TORCH_INDEX={index}"
# The oldest driver branch on which programs of a CUDA major version run.
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


def serves(archs: Sequence[str], capability: Capability) -> bool:
    """Whether code for `archs` runs on a card of this compute capability.

    Machine code ("sm_80") runs on the capabilities of its own major version from its own minor version on (8.0, 8.6,
    8.9), PTX ("compute_80") on every newer card, too. With the suffix "a" either runs on its own capability alone.
    """
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
        if match is None:
            continue
        built = (int(match[2]), int(match[3]))
        if match[4] == "a":
            fits = capability == built
        elif match[1] == "sm" or match[4] == "f":
            fits = capability[0] == built[0] and capability >= built
        else:
            fits = capability >= built
        if fits:
            return True
    return False


def usable(here: Nvidia) -> list[int]:
    """Indices of the cards on which this build of torch can compute."""
    if here.failure is not None:
        return []
    known = any(arch.startswith(("sm_", "compute_")) for arch in here.archs)  # AMD's are called otherwise
    return [
        index
        for index, card in enumerate(here.cards)
        if not known or card.capability is None or serves(here.archs, card.capability)
    ]


def problem(here: Nvidia, *, install: str = IN_CHECKOUT) -> str | None:
    """What keeps torch from using some GPU here and the command that helps, in a sentence; None if nothing does.

    `install` is that command; {index} and {cuda} in it stand for a build's address and its label ("cu126").
    """
    good = usable(here)
    unused = [card for index, card in enumerate(here.cards) if index not in good]
    if not unused:
        return None
    needs = _newer_driver(here)
    if here.failure is None:
        names = sorted({f"{card.name} has compute capability {dotted(card.capability)}" for card in unused})
        cause = f"{' and '.join(names)}, this torch (CUDA {here.cuda}) has code for {', '.join(here.archs)}"
    elif here.cuda is None:
        cause = f"this torch has no CUDA, so it does not use the {unused[0].name}"
    elif needs is not None:
        cause = f"the NVIDIA driver ({here.driver or 'version unknown'}) is too old for this torch (CUDA {here.cuda})"
    else:
        return f"torch does not reach the {unused[0].name} ({here.failure}): see whether nvidia-smi works."
    return f"{cause}: {_remedy(here, needs, install)}."


def dotted(capability: Capability | None) -> str | None:
    """A compute capability as NVIDIA writes it, "8.6"."""
    return None if capability is None else f"{capability[0]}.{capability[1]}"


def _newer_driver(here: Nvidia) -> int | None:
    """The driver branch that this build of torch needs, if the driver is older."""
    if here.failure is None or here.cuda is None:
        return None
    needs = OLDEST_DRIVER.get(int(here.cuda.split(".")[0]))
    old = "too old" in here.failure if here.driver is None else _branch(here.driver) < (needs or 0)
    return needs if old else None


def _remedy(here: Nvidia, needs: int | None, install: str) -> str:
    """What to do; `needs` is the driver branch for this build of torch if the driver is older."""

    def command(build: Build) -> str:
        return f"run `{install.format(index=build.index, cuda=build.index.rsplit('/', 1)[1])}`"

    def serves_all(archs: Sequence[str]) -> bool:
        return all(card.capability is None or serves(archs, card.capability) for card in here.cards)

    builds = [build for build in BUILDS if serves_all(build.archs)]
    driver = _branch(here.driver) if here.driver else None
    if driver is None and needs is not None:
        driver = 0  # of unknown version, but too old in torch's own words
    ways = [command(build) for build in builds if driver is None or driver >= build.driver][:1]
    if needs is not None and serves_all(here.archs):
        ways.append(f"upgrade the driver to {needs} or newer")
    if ways:
        return ", or ".join(ways)
    if builds:
        return f"upgrade the driver to {builds[-1].driver} or newer, then {command(builds[-1])}"
    return "no build of torch 2.13 has code for every GPU here, choose others with CUDA_VISIBLE_DEVICES or device='cpu'"


def _branch(driver: str) -> int:
    return int(driver.split(".")[0])


@functools.cache
def nvidia() -> Nvidia:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves visible, and this build of torch. Never raises."""
    cuda, archs = torch.version.cuda, tuple(torch.cuda.get_arch_list())
    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        cards = tuple(Card(p.name, (p.major, p.minor), p.total_memory) for p in properties)
        return Nvidia(cards, cuda, archs, _driver())
    if torch.version.hip or (cuda is not None and torch.cuda.device_count() == 0):
        return Nvidia((), cuda, archs)
    cards = _cards_by_smi()
    if cuda is not None and not cards:
        cards = (Card("NVIDIA GPU", None, 0),) * torch.cuda.device_count()
    return Nvidia(cards, cuda, archs, _driver(), _failure()) if cards else Nvidia((), cuda, archs)


def advice() -> str | None:
    """`problem` of this machine, with the command that fits this installation."""
    ours = Path(sys.prefix) == PACKAGE.parent / ".venv"
    pip = f"pip install 'torch=={torch.__version__.split('+')[0]}+{{cuda}}' --extra-index-url {{index}}"
    return problem(nvidia(), install=IN_CHECKOUT if ours else pip)


def _failure() -> str:
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]  # torch has no hints for it
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:200].removesuffix(".")
    return "torch.cuda.is_available() is False"


def _driver() -> str | None:
    if PROC.exists() and (match := re.search(r"\s(\d{3,}\.\d[\d.]*)\s", PROC.read_text())):
        return match[1]
    rows = _smi("driver_version")  # WSL2 has no /proc/driver/nvidia
    return rows[0][0] if rows else None


def _cards_by_smi() -> tuple[Card, ...]:
    """The GPUs as the driver's own tool names them, for a torch that does not reach them."""
    # Drivers before 510 do not know the field.
    rows = _smi("name,memory.total,compute_cap") or [[*row, ""] for row in _smi("name,memory.total")]
    cards = []
    for name, memory, capability in rows:
        match = re.fullmatch(r"(\d+)\.(\d)", capability)
        size = int(memory) * 2**20 if memory.isdecimal() else 0
        cards.append(Card(name, (int(match[1]), int(match[2])) if match else None, size))
    return tuple(cards)


def _smi(fields: str) -> list[list[str]]:
    """A row for every visible GPU; none where nvidia-smi is missing or fails."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    tool = shutil.which("nvidia-smi")
    if tool is None or visible in ("", "-1"):
        return []
    chosen = [f"--id={visible}"] if visible else []
    command = [tool, f"--query-gpu={fields}", "--format=csv,noheader,nounits", *chosen]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == fields.count(",") + 1] if done.returncode == 0 else []


def free_bytes(device: torch.device) -> int:
    """Memory of a GPU that nobody uses, and what torch keeps for itself without a use."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept
