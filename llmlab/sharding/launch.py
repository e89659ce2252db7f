"""Ranks: processes that start together, report together and die together.

`Ranks` starts them from a notebook, a script or a test and speaks with each over a socket of its own; under `torchrun`
the processes exist already and `Joined` speaks through torch.distributed. Either way `run(function, ...)` calls
`function(rank, ...)` on every rank and returns the results in order of the ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, but not in __all__

from llmlab.base.errors import InputError, RankError
from llmlab.base.progress import progress
from llmlab.kernels.cuda import advice, nvidia, usable
from llmlab.model.lm import check_device
from llmlab.sharding.rank import Rank, give_back, join_check

GRACE = 3.0  # seconds to wait for the other ranks' reports when one fails, and for all to leave at the end
P = ParamSpec("P")
T = TypeVar("T")


class Failure(NamedTuple):
    """When a rank failed, which one, how ("death", "error", or "input" for an InputError), and what it says."""

    when: float
    rank: int
    kind: str
    text: str


class Ranks:
    """Processes started from here. `index` is this process's own number, 0: it is none of them.

    Raises:
        InputError: fewer than one rank, or more ranks than GPUs; ranks with different libraries.
        RankError: a rank ends while it starts.
    """

    def __init__(self, size: int, *, device: str | None = None, port: int = 0, timeout: float = 600) -> None:
        self.size, self.device, self.index = size, check_world(size, device), 0
        self.closed = False
        give_back()  # ranks work on this process's GPU, too
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []
        self._said: list[deque[str]] = []
        try:
            # The store listens here, so that no port has to be guessed; the ranks come as its clients.
            self._store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        except (RuntimeError, dist.DistNetworkError) as error:
            raise InputError(
                f"port {port} cannot be used ({str(error).splitlines()[0][:120]}): choose another."
            ) from None
        try:
            for index in range(size):
                self._start(index, self._store.port, timeout)
            self.run(join_check)
        except BaseException:
            self.kill()
            raise

    def _start(self, index: int, port: int, timeout: float) -> None:
        ours, theirs = socket.socketpair()
        settings = {"index": index, "size": self.size, "device": self.device, "port": port, "timeout": timeout}
        process = subprocess.Popen(
            [sys.executable, "-m", "llmlab.sharding.rank", str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the ranks
            env=os.environ | {"LLMLAB_PARENT": str(os.getpid()), "TQDM_DISABLE": "1"},
        )
        theirs.close()
        connection = Connection(ours.detach())
        self._processes.append(process)
        self._connections.append(connection)
        self._said.append(deque(maxlen=20))
        threading.Thread(target=self._relay, args=(index, process), daemon=True).start()
        with contextlib.suppress(BrokenPipeError):  # a rank that died at once is found by run()
            connection.send(settings)

    def _relay(self, index: int, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace").rstrip()
            self._said[index].append(text)
            if not self.closed:
                print(f"[rank {index}] {text}", file=sys.stderr, flush=True)

    def run(self, function: Callable[Concatenate[Rank, P], T], *args: P.args, **kwargs: P.kwargs) -> list[T]:
        """`function(rank, *args, **kwargs)` on every rank; `function` is found by its module and name.

        Raises:
            InputError: what the function raised as InputError, or the ranks have ended.
            RankError: a rank raised, died or was killed: its number and traceback. All ranks have ended then.
        """
        if self.closed:
            raise InputError("the ranks have ended: start new ones with llmlab.ranks(n).")
        if function.__module__ == "__main__" or "<" in function.__qualname__:
            raise InputError(f"ranks cannot import {function.__qualname__}: put it into a module of its own.")
        try:
            for connection in self._connections:
                with contextlib.suppress(BrokenPipeError):
                    connection.send((function.__module__, function.__qualname__, args, kwargs))
            return cast(list[T], self._collect())
        except BaseException:
            self.kill()  # also at Ctrl-C: nothing is left running
            raise

    def _collect(self) -> list[object]:
        results: dict[int, object] = {}
        failures: list[Failure] = []
        deadline: float | None = None
        waiting = dict(zip(self._connections, range(self.size), strict=True))
        bar = None
        while waiting and (deadline is None or time.monotonic() < deadline):
            for connection in cast(list[Connection], wait(list(waiting), timeout=0.2)):
                index = waiting[connection]
                try:
                    kind, *content = connection.recv()
                except (EOFError, ConnectionResetError):
                    kind, content = "death", [time.monotonic(), self._obituary(index)]
                if kind == "progress":
                    done, *about = content
                    bar = bar or progress(*about)
                    bar.update(done - bar.n)
                    continue
                del waiting[connection]
                if kind == "result":
                    results[index] = content[0]
                    continue
                failures.append(Failure(content[0], index, kind, content[1]))
                # The rank that failed first may not be the first to be heard.
                deadline = deadline or time.monotonic() + GRACE
        if bar is not None:
            bar.close()
        if failures:
            _raise(failures)
        return [results[index] for index in range(self.size)]

    def _obituary(self, index: int) -> str:
        code = self._processes[index].wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        if code == -signal.SIGKILL:
            how += " (by someone, or for want of memory)"
        said = "\n".join(self._said[index])
        return f"rank {index} {how}." + (f" Its last words:\n{said}" if said else "")

    def kill(self) -> None:
        """End all ranks at once."""
        self.closed = True
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        for connection in self._connections:
            connection.close()

    def close(self) -> None:
        """Let the ranks leave, then end those that did not."""
        if self.closed:
            return
        self.closed = True
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.send(None)
        deadline = time.monotonic() + GRACE
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()


def check_world(size: int, device: str | None) -> str:
    """The device type of `size` ranks on this machine. Raises InputError if it has too few."""
    if size < 1:
        raise InputError(f"{size} ranks: give a positive number.")
    device = device or check_device(None).type
    if device not in ("cpu", "cuda"):
        raise InputError(f"unknown device {device!r}: choose cpu or cuda.")
    good = usable(nvidia())
    if device == "cuda" and good[:size] != list(range(size)):
        helps = advice() or "use fewer ranks, or device='cpu'."
        raise InputError(f"{size} ranks need {size} GPUs, torch can use {len(good)}: {helps}")
    return device


def _raise(failures: list[Failure]) -> None:
    """Raise for the failure that caused the others: a death before an exception, then the earliest.

    When a rank dies, its neighbours' collectives fail, and they may report first.
    """
    cause = min([f for f in failures if f.kind == "death"] or failures)
    if cause.kind == "input":
        raise InputError(cause.text)
    raise RankError(cause.text if cause.kind == "death" else f"rank {cause.rank} failed:\n{cause.text}", cause.rank)
