"""CUDA graphs: a pass of the model captured once and launched as one from then on.

A decode step of 60 layers is over a thousand kernels, and to launch them one by one takes longer than a GPU works on
them. A graph holds the addresses that its kernels were captured with. So what goes in is copied to where the capture
found it, weights and the KV cache are written in place, never replaced, and what comes out is copied before the next
replay overwrites it. torch.compile's own graphs refuse a pass that writes into a cache ("mutated inputs").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from llmlab.base.clock import faster

if TYPE_CHECKING:
    from torch.cuda import _POOL_HANDLE

BEYOND_CACHES = 2**27  # bytes, of any GPU

Inputs = tuple[torch.Tensor | None, ...]
Run = Callable[..., torch.Tensor]


class Graph(Protocol):
    """What captures and replays: CudaGraph; in tests a stand-in that checks every address."""

    def capture(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Take down the kernels of `run`; the tensor returned is filled by each replay."""

    def replay(self) -> None:
        """Launch them."""


class CudaGraph:
    """torch.cuda.CUDAGraph on one device; graphs with the same `pool` share memory between kernels."""

    def __init__(self, device: torch.device, pool: _POOL_HANDLE | None = None) -> None:
        self.device, self.pool = device, pool
        self.graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """See Graph. Raises RuntimeError for a pass that waits for the GPU or needs a number from it."""
        # torch's own stream for captures is one of the GPU that captured first. What other threads do, such as a
        # widget's, does not end a capture of this one.
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch has no hints for it
        captured = torch.cuda.graph(self.graph, pool=self.pool, stream=stream, capture_error_mode="thread_local")
        with torch.cuda.device(self.device), captured:
            return run()

    def replay(self) -> None:
        """See Graph."""
        self.graph.replay()


def capture(graph: Graph, run: Run, inputs: Inputs) -> Run:
    """Capture `run(*inputs)`, which has run before; the replay is a function of inputs of the same shapes."""
    places = [None if tensor is None else tensor.clone() for tensor in inputs]
    output = graph.capture(lambda: run(*places))

    def replay(*now: torch.Tensor | None) -> torch.Tensor:
        for place, tensor in zip(places, now, strict=True):
            if place is not None and tensor is not None:
                place.copy_(tensor)
        graph.replay()
        return output.clone()

    return replay


def copies(nbytes: int) -> int:
    """How many matrices of so many bytes to time a kernel on: when one's turn comes again, no cache holds it."""
    return min(16, 1 + BEYOND_CACHES // nbytes)


def rows_up_to(
    rows: Sequence[int], kernel: Callable[[int], torch.Tensor], other: Callable[[int], torch.Tensor],
    device: torch.device,
) -> int:  # fmt: skip
    """Up to which of these numbers of rows a kernel beats another one, measured; 0 if at none.

    On a GPU both are replayed: what it takes to launch them is not what decoding waits for.
    """
    best = 0
    for count in rows:
        if faster(_launched(partial(kernel, count), device), _launched(partial(other, count), device), counted=5) < 1:
            break
        best = count
    return best


def _launched(run: Callable[[], torch.Tensor], device: torch.device) -> Callable[[], object]:
    if device.type == "cpu":
        return run
    run()  # compiles
    graph = CudaGraph(device)
    graph.capture(run)
    return graph.replay
