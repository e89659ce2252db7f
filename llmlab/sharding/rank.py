"""The life of one rank: join the others, then do what the parent asks until it says stop or is gone."""

from __future__ import annotations

import gc
import importlib
import operator
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata
from multiprocessing.connection import Connection
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from llmlab.base.clock import synchronize
from llmlab.base.errors import InputError
from llmlab.base.version import __version__

T = TypeVar("T")
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass
class Rank:
    """One process among `size`.

    Attributes:
        index: 0 .. size - 1.
        size: number of ranks.
        device: where this rank computes.
        kept: what is kept between calls, such as a loaded shard.
        timeout: seconds that a collective operation may wait.
        groups: of this rank in its layout.
    """

    index: int
    size: int
    device: torch.device
    kept: dict[str, object] = field(default_factory=dict)
    connection: Connection | None = None
    timeout: float = 600
    groups: list[dist.ProcessGroup] = field(default_factory=list)

    def join(self, rows: list[list[int]]) -> dist.ProcessGroup:
        """This rank's group where ranks meet in such rows; all ranks call it with the same ones."""
        groups = [dist.new_group(row, timeout=timedelta(seconds=self.timeout)) for row in rows]
        own: dist.ProcessGroup = next(group for group, row in zip(groups, rows, strict=True) if self.index in row)
        self.groups.append(own)
        return own

    def let_go(self) -> None:
        """Free what is kept, and the groups of the layout it was kept for: before another one, so by all ranks."""
        synchronize()
        self.kept.clear()
        give_back()
        for group in self.groups:
            dist.destroy_process_group(group)
        self.groups.clear()

    def progress(self, done: int, total: int, what: str, unit: str) -> None:
        """Move the caller's progress bar; one rank of all should do it."""
        if self.connection is not None:
            self.connection.send(("progress", done, total, what, unit))


def own_device(kind: str, index: int) -> torch.device:
    """The device of a rank, number `index` on its machine; a GPU becomes the current one, on which NCCL talks."""
    if kind != "cuda":
        return torch.device("cpu")
    own = torch.device("cuda", index)
    torch.cuda.set_device(own)
    return own


def give_back() -> None:
    """Free what nobody refers to any more, and let other processes have its GPU memory.

    A rank's part of a model refers to itself (its forward pass is bound to it), so it needs the collector.
    """
    gc.collect()
    torch.cuda.empty_cache()


def join(index: int, size: int, device: str, port: int, timeout: float, connection: Connection | None = None) -> Rank:
    """Meet the other ranks at the parent's store."""
    own = own_device(device, index)
    if own.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // size))
    patience = timedelta(seconds=timeout)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=patience)
    dist.init_process_group(BACKENDS[own.type], store=store, rank=index, world_size=size, timeout=patience)
    return Rank(index, size, own, connection=connection, timeout=timeout)


def join_check(rank: Rank) -> None:
    """Raise InputError where ranks differ in what must be equal."""
    # Not by importing transformers, which takes a rank seconds that it may never need.
    own = {"llmlab": __version__, "torch": torch.__version__, "transformers": metadata.version("transformers")}
    everyone = gather(rank.size, own | {"device": rank.device.type})
    for index, other in enumerate(everyone):
        for what, value in other.items():
            if value != everyone[0][what]:
                raise InputError(f"rank {index} has {what} {value}, rank 0 has {everyone[0][what]}: make them equal.")


def gather(size: int, own: T) -> list[T]:
    """What every rank brings, by rank."""
    everyone: list[T | None] = [None] * size
    dist.all_gather_object(everyone, own)
    return cast(list[T], everyone)


def _leave_with_parent(parent: int) -> None:
    """A parent that was killed cannot say goodbye: look for it twice a second."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main() -> None:
    """`python -m llmlab.sharding.rank FD`: started by `launch.Ranks`."""
    connection = Connection(int(sys.argv[1]))
    threading.Thread(target=_leave_with_parent, args=(int(os.environ["LLMLAB_PARENT"]),), daemon=True).start()
    rank: Rank | None = None
    settings = connection.recv()
    while (request := connection.recv()) is not None:
        module, name, args, kwargs = request
        try:
            rank = rank or join(**settings, connection=connection)
            function = operator.attrgetter(name)(importlib.import_module(module))
            connection.send(("result", function(rank, *args, **kwargs)))
        except InputError as error:
            connection.send(("input", time.monotonic(), str(error)))
        except Exception:
            connection.send(("error", time.monotonic(), traceback.format_exc()))
    if rank is not None:
        dist.destroy_process_group()
    os._exit(0)  # no waiting for peers that may be gone


if __name__ == "__main__":
    main()
