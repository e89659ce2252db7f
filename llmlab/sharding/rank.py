"""The life of one rank: join the others, then do what the parent asks until it says stop or is gone."""

from __future__ import annotations

import importlib
import operator
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from llmlab.base.errors import InputError


@dataclass
class Rank:
    """One process among `size`.

    Attributes:
        index: 0 .. size - 1.
        size: number of ranks.
        device: where this rank computes.
        kept: what is kept between calls, such as a loaded shard.
    """

    index: int
    size: int
    device: torch.device
    kept: dict[str, object] = field(default_factory=dict)
    connection: Connection | None = None

    def progress(self, done: int, total: int, what: str, unit: str) -> None:
        """Move the caller's progress bar; one rank of all should do it."""
        if self.connection is not None:
            self.connection.send(("progress", done, total, what, unit))


def join(index: int, size: int, device: str, port: int, timeout: float, connection: Connection | None = None) -> Rank:
    """Meet the other ranks at the parent's store."""
    on_gpu = device == "cuda"
    own = torch.device("cuda", index) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(own)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // size))
    patience = timedelta(seconds=timeout)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=patience)
    backend = "nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=store, rank=index, world_size=size, timeout=patience)
    return Rank(index, size, own, connection=connection)


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
    os._exit(0)  # no waiting for peers that may be gone


if __name__ == "__main__":
    main()
