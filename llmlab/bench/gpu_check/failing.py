"""A rank that fails, the others waiting for it: a module of its own, for each rank imports what it is asked to run."""

import os
import signal

import torch
import torch.distributed as dist

from llmlab.sharding.rank import Rank


def meet(rank: Rank) -> None:
    """A barrier: all ranks are there, and connected."""
    dist.barrier()


def fail(rank: Rank, index: int, how: str) -> None:
    """Rank `index` fails while the others wait: it raises, is killed ("kill"), or asks for too much ("memory")."""
    if rank.index == index and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank.index == index and how == "memory":
        torch.empty(2**50, device=rank.device)
    if rank.index == index:
        raise RuntimeError("a rank of gpu-check fails on purpose")
    dist.barrier()
