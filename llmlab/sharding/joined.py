"""Ranks that exist already: the processes that torchrun started."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Concatenate, ParamSpec, TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from llmlab.base.errors import InputError
from llmlab.sharding.launch import check_world
from llmlab.sharding.rank import BACKENDS, Rank, gather, join_check, own_device

# What torchrun sets for each process. Its run's id tells it from a torch.distributed cell that set the others by hand.
TORCHRUN = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
MEETING = 60.0  # seconds that its processes wait for one another at the start
P = ParamSpec("P")
T = TypeVar("T")


def launched(size: int | None) -> bool:
    """Whether torchrun started this process: all of its variables are set.

    A few of them may be left over from a scheduler's prologue or an earlier torch.distributed cell: they are ignored,
    with a warning that names them if `size` says that ranks are to be started here.

    Raises InputError for a set of which a number makes no sense.
    """
    given = {name: os.environ[name] for name in TORCHRUN if os.environ.get(name)}
    if len(given) < len(TORCHRUN):
        if size is not None and {"RANK", "WORLD_SIZE"} & given.keys():
            lacking = ", ".join(name for name in TORCHRUN if name not in given)
            warnings.warn(
                f"{' and '.join(given)} are set, but not torchrun's {lacking}: {size} ranks are started here.",
                stacklevel=3,
            )
        return False
    numbers = [given[name] for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_PORT")]
    if not all(number.isdigit() for number in numbers) or int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        said = ", ".join(f"{name}={value}" for name, value in given.items())
        raise InputError(f"torchrun's variables make no sense ({said}): unset them, or start the script with torchrun.")
    return True


class Joined:
    """The processes that torchrun started, this one among them: every process runs the same script."""

    def __init__(self, device: str | None = None, timeout: float = 600) -> None:
        self.size = int(os.environ["WORLD_SIZE"])
        self.device = check_world(int(os.environ.get("LOCAL_WORLD_SIZE", self.size)), device)
        self.index = int(os.environ["RANK"])
        own = own_device(self.device, int(os.environ["LOCAL_RANK"]))
        self.rank = Rank(self.index, self.size, own, timeout=timeout)
        if not dist.is_initialized():
            _meet(BACKENDS[self.device], timeout)
        self.run(join_check)

    def run(self, function: Callable[Concatenate[Rank, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """As `Ranks.run`; what raises here ends this process, and torchrun ends the others."""
        return gather(self.size, function(self.rank, *args, **kwargs))

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(backend: str, timeout: float) -> None:
    """Join the process group of all ranks. Raises InputError if they do not come."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, index, size = next(rendezvous("env://", timeout=timedelta(seconds=min(timeout, MEETING))))
        dist.init_process_group(backend, store=store, rank=index, world_size=size, timeout=timedelta(seconds=timeout))
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the ranks do not meet at {where} ({str(error).splitlines()[0][:120]}): start all of them with torchrun, "
            f"or unset {', '.join(TORCHRUN[1:3])} to start ranks here."
        ) from None
