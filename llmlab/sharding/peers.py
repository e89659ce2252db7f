"""Those who compute together, as each of them sees the others: ranks over torch.distributed, or threads of one process.

Pipeline and tensor parallelism ask for these few exchanges alone, so that a rehearsal on threads runs the same code.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

Wait = Callable[[], object]  # returns when a transfer is done
PATIENCE = 60.0  # seconds that a thread waits for the others


class Peers(Protocol):
    """`size` peers, this one is number `index`; every one of them must make the same exchanges."""

    index: int
    size: int

    def add_up(self, tensor: torch.Tensor) -> None:
        """Put the sum of everyone's tensor into it."""

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Everyone's tensor, all of one shape, by index."""

    def spread(self, tensor: torch.Tensor, source: int) -> None:
        """Put the tensor of `source` into everyone's."""

    def send(self, tensor: torch.Tensor, to: int) -> Wait:
        """Begin to send."""

    def receive(self, tensor: torch.Tensor, source: int) -> Wait:
        """Begin to receive into `tensor`."""


class RankPeers:
    """Ranks of a process group of torch.distributed."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, dist.get_process_group_ranks(group)
        self.index, self.size = dist.get_rank(group), len(self.ranks)

    def add_up(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor, group=self.group)

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in self.ranks]
        dist.all_gather(parts, tensor, group=self.group)
        return parts

    def spread(self, tensor: torch.Tensor, source: int) -> None:
        dist.broadcast(tensor, self.ranks[source], group=self.group)

    def send(self, tensor: torch.Tensor, to: int) -> Wait:
        return _waiting(dist.isend(tensor, self.ranks[to], group=self.group))

    def receive(self, tensor: torch.Tensor, source: int) -> Wait:
        return _waiting(dist.irecv(tensor, self.ranks[source], group=self.group))


def _waiting(work: dist.Work | None) -> Wait:
    return work.wait if work is not None else lambda: None


class Meeting:
    """Where the threads of one group meet."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=PATIENCE)
        self.held: list[torch.Tensor] = [torch.empty(0)] * size
        self.mail: dict[tuple[int, int], queue.Queue[torch.Tensor]] = {
            (source, to): queue.Queue() for source in range(size) for to in range(size)
        }


class ThreadPeers:
    """Threads of this process. One that fails must `abort` its meetings, or the others wait for PATIENCE seconds."""

    def __init__(self, meeting: Meeting, index: int) -> None:
        self.meeting, self.index, self.size = meeting, index, len(meeting.held)

    def add_up(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self.gather(tensor)).sum(0))

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        self.meeting.held[self.index] = tensor.clone()
        self.meeting.barrier.wait()
        parts = list(self.meeting.held)
        self.meeting.barrier.wait()
        return parts

    def spread(self, tensor: torch.Tensor, source: int) -> None:
        tensor.copy_(self.gather(tensor)[source])

    def send(self, tensor: torch.Tensor, to: int) -> Wait:
        self.meeting.mail[self.index, to].put(tensor.clone())
        return lambda: None

    def receive(self, tensor: torch.Tensor, source: int) -> Wait:
        box = self.meeting.mail[source, self.index]
        return lambda: tensor.copy_(box.get(timeout=PATIENCE))

    def abort(self) -> None:
        """Let nobody wait any longer: a tensor of no use to a receiver ends it."""
        self.meeting.barrier.abort()
        for index in range(self.size):
            self.meeting.mail[self.index, index].put(torch.empty(0))
