"""NCCL's order on threads: what ranks send one another, carried out as NCCL would, or found never to end.

NCCL carries out the operations of a communicator in the order in which each rank posts them. torch gives every pair of
ranks in a group one of their own, with both directions of it, and the group's collectives another one. A send ends when
the receive that belongs to it is the other rank's next operation there, a collective when it is everyone's. The first
operation holds its rank up until the communicator exists, that is until all its members came. Here a thread also waits
wherever a GPU would (for a transfer that the next kernel needs), so that what ends here ends on GPUs, which may run on.
When every thread waits and nothing can be carried out, all of them get a `Deadlock`: no patience, no clock.
"""

import threading
from collections import defaultdict, deque
from dataclasses import dataclass, field

import torch


class Deadlock(Exception):
    """What the ranks wait for never comes."""


@dataclass
class Operation:
    """One rank's part of an exchange: "send" and "receive" of a pair, or a collective."""

    kind: str
    tensor: torch.Tensor
    source: int = 0
    done: bool = False
    result: list = field(default_factory=list)


class Network:
    """Threads, one a rank, and their communicators."""

    def __init__(self):
        self.changed = threading.Condition()
        self.queues = defaultdict(deque)  # (communicator, rank) -> operations that are not done
        self.joined = defaultdict(set)  # communicator -> ranks that came to it
        self.posted = defaultdict(list)  # thread -> its operations
        self.size = self.working = 0
        self.waiting, self.broken = {}, False
        self.here = threading.local()

    def run(self, function, *arguments):
        """`function(*of_rank)` on a thread for each rank's arguments; the results. Raises the first rank's error."""
        results, errors = [None] * len(arguments), []

        def work(index):
            self.here.rank = index
            try:
                results[index] = function(*arguments[index])
            except Exception as error:
                errors.append(error)
                self._break()
            with self.changed:
                self.working -= 1
                self._look()

        self.queues.clear()
        self.joined.clear()
        self.posted.clear()
        self.size = self.working = len(arguments)
        self.broken = False
        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(arguments))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, Deadlock)), errors[0])
        return results

    def post(self, communicator, members, rank, operation):
        """Queue an operation, and carry out what can be."""
        with self.changed:
            self.joined[communicator].add(rank)
            self.changed.notify_all()
        self.until(lambda: len(self.joined[communicator]) == len(members))
        with self.changed:
            self.posted[threading.get_ident()].append(operation)
            self.queues[communicator, rank].append(operation)
            queues = [self.queues[communicator, member] for member in members]
            while all(queues) and carried_out([queue[0] for queue in queues]):
                for queue in queues:
                    queue.popleft().done = True
                self.changed.notify_all()

    def until(self, ready):
        """Wait. Raises Deadlock if it is for ever."""
        with self.changed:
            self.waiting[threading.get_ident()] = ready
            self._look()
            while not self.broken and not ready():
                self.changed.wait()
            del self.waiting[threading.get_ident()]
            if self.broken:
                raise Deadlock

    def synchronize(self):
        """torch.cuda.synchronize: wait for all that this rank has posted."""
        own = self.posted[threading.get_ident()]
        self.until(lambda: all(operation.done for operation in own))

    def barrier(self):
        """torch.distributed.barrier, of all ranks of this run."""
        Peers(self, "world", self.size, self.here.rank).add_up(torch.zeros(1))

    def _look(self):
        if self.working and len(self.waiting) == self.working and not any(ready() for ready in self.waiting.values()):
            self._break()

    def _break(self):
        with self.changed:
            self.broken = True
            self.changed.notify_all()


def carried_out(operations):
    """Carry out one operation of each member, if they belong together."""
    kinds, tensors = sorted(operation.kind for operation in operations), [o.tensor for o in operations]
    if len({(tensor.shape, tensor.dtype) for tensor in tensors}) > 1:
        return False
    if kinds == ["receive", "send"]:
        send, receive = sorted(operations, key=lambda operation: operation.kind, reverse=True)
        receive.tensor.copy_(send.tensor)
        return True
    if len(set(kinds)) > 1 or kinds[0] in ("send", "receive"):
        return False
    total = torch.stack(tensors).sum(0)
    copies = [tensor.clone() for tensor in tensors]
    for operation in operations:
        if operation.kind == "add up":
            operation.tensor.copy_(total)
        elif operation.kind == "spread":
            operation.tensor.copy_(copies[operation.source])
        operation.result = copies
    return True


class Peers:
    """The ranks of one group, as `llmlab.sharding.peers.Peers`, over a network."""

    def __init__(self, network, group, size, index):
        self.network, self.group, self.size, self.index = network, group, size, index

    def add_up(self, tensor):
        self._together("add up", tensor)

    def gather(self, tensor):
        return self._together("gather", tensor).result

    def spread(self, tensor, source):
        self._together("spread", tensor, source)

    def send(self, tensor, to):
        return self._with(to, Operation("send", tensor))

    def receive(self, tensor, source):
        return self._with(source, Operation("receive", tensor))

    def _with(self, other, operation):
        pair = tuple(sorted((self.index, other)))
        self.network.post((self.group, pair), pair, self.index, operation)
        return lambda: self.network.until(lambda: operation.done)

    def _together(self, kind, tensor, source=0):
        operation = Operation(kind, tensor, source)
        self.network.post((self.group, "all"), range(self.size), self.index, operation)
        self.network.until(lambda: operation.done)
        return operation
