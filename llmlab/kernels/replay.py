"""Record a pass once and replay it without Python: by CUDA graphs on a GPU (see `graphs`), here on CPU.

A decode step of a small model is 2,000 small operations, and Python between them costs as much as the work. On CPU the
pass is recorded by torch.jit.trace and replayed by its interpreter: the same kernels in the same order, so the numbers
are the same to the bit. For the built-in model with torch's 4-bit kernel on two cores a step took 15.2 ms eager, 12.7
ms by torch.compile (after 48 s of compiling) and 8.9 ms replayed (after 0.4 s of recording). TorchScript is deprecated,
but nothing that ships with torch does this on a CPU as well.
"""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch
from torch.nn.utils.stateless import _reparametrize_module  # what functional_call does, around a whole pass

from llmlab.base.paths import cache_folder
from llmlab.kernels.fast import machine
from llmlab.kernels.graphs import CudaGraph, Graph, Inputs, Run, capture
from llmlab.kernels.native import edition

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = 2  # passes of one shape before it is recorded

Trials = list[tuple[Inputs, torch.Tensor]]
Function = TypeVar("Function", bound=Run)


class Buffers(Protocol):
    """What a pass writes into: a KV cache's tensors by layer."""

    buffers: dict[int, tuple[torch.Tensor, torch.Tensor]]


class Recorder:
    """Runs passes; one whose shape comes often is recorded, captured or compiled, and replayed from then on.

    Args:
        model: that the passes are of.
        compile: by torch.compile, on a GPU captured then.
        graph: makes what captures a pass; by default a CUDA graph where the model is on a GPU, and nothing on CPU.

    Attributes:
        fixed: whether passes must read the whole cache, so that tensors of every step have the same shapes.
        replays: by shape.
        seconds: spent on recording or compiling, to be told apart from decoding.
    """

    def __init__(self, model: PreTrainedModel, *, compile: bool, graph: Callable[[], Graph] | None = None) -> None:
        self.model, self.compile = model, compile
        device, same = model.get_input_embeddings().weight.device, recordable(model)
        if graph is None and device.type == "cuda":
            graph = functools.partial(CudaGraph, device, torch.cuda.graph_pool_handle())
        self.graph = graph if same else None
        self.records = compile or same
        self.fixed = compile or self.graph is not None
        self.seconds = 0.0
        self.cache: Buffers | None = None
        self.replays: dict[object, Run] = {}
        self.uses: dict[object, int] = {}

    def run(self, run: Run, inputs: Inputs, cache: Buffers) -> torch.Tensor:
        """`run(*inputs)`, a pass of the model that writes into `cache`, or its replay."""
        if self.cache is not cache:  # recordings write into the buffers they were made with
            self.replays, self.uses, self.cache = {}, {}, cache
        shape = (inputs[0] if inputs[0] is None else inputs[0].shape, *(tensor is None for tensor in inputs))
        if shape in self.replays:
            return self.replays[shape](*inputs)
        result = run(*inputs)
        self.uses[shape] = self.uses.get(shape, 0) + 1
        if self.records and self.uses[shape] == RECORD:
            begin = time.perf_counter()
            replay = self._replay(run, inputs, cache, self._trials(run, inputs, result))
            if replay is not None:
                self.replays[shape] = replay
            else:
                run(*inputs)  # puts right what the trials left in the cache
            self.seconds += time.perf_counter() - begin
        return result

    def _replay(self, run: Run, inputs: Inputs, cache: Buffers, trials: Trials) -> Run | None:
        """A replay that gives what the trials say; None, with a warning, where there is none."""
        replay: Run | None = run
        if self.compile:
            with torch._dynamo.config.patch(recompile_limit=64):  # one for each batch and width
                replay = _checked(compiled(run), trials)
        elif self.graph is None:
            replay = _checked(record(self.model, cache, run, inputs), trials)
        if replay is None or self.graph is None:
            return replay
        try:
            replay = capture(self.graph(), replay, inputs)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            warnings.warn(f"passes run uncaptured, with Python between their kernels: {reason}", stacklevel=4)
            return None
        return _checked(replay, trials)

    def _trials(self, run: Run, inputs: Inputs, result: torch.Tensor) -> Trials:
        """What a replay must give: first for other tokens, which may go another way (to other experts), then these."""
        trials = [(inputs, result)] * 3  # the first runs of a recording profile and optimize it
        if inputs[0] is not None:
            size = self.model.get_input_embeddings().weight.shape[0]
            others = ((inputs[0] + 7919) % size, *inputs[1:])
            trials.insert(0, (others, run(*others)))
        return trials


def recordable(model: PreTrainedModel) -> bool:
    """Whether every pass of one shape runs the same operations, on one device.

    Not so where experts are routed by the data, positions are scaled by length, or ranks talk to one another; and the
    operations of bitsandbytes' int8 return what a recording cannot hold.
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_length = str(rope.get("rope_type", rope.get("type", ""))) in ("dynamic", "longrope", "yarn")
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    int8 = getattr(model, "is_loaded_in_8bit", False)
    return not (by_length or experts or sharded(model) or int8)


def sharded(model: torch.nn.Module) -> bool:
    """Whether this is a rank's part of a model: ranks put hooks on modules, or another forward pass on the model."""
    return "forward" in vars(model) or any(m._forward_hooks for m in model.modules())


def whole(function: Function) -> Function:
    """A function that a recording calls as a whole, so that its sizes stay variable. TorchScript must know its Python.

    Outside of a recording it is the function itself.
    """

    @functools.cache
    def script() -> Run:
        with _quiet():
            return cast(Run, torch.jit.script(function))

    @functools.wraps(function)
    def call(*inputs: object) -> torch.Tensor:
        recording = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # neither exported nor typed
        return (script() if recording else function)(*inputs)

    return cast(Function, call)


def record(model: torch.nn.Module, cache: Buffers, run: Run, inputs: Inputs) -> Run:
    """Record a pass.

    Every tensor that the pass uses becomes an input of the recording: it cannot hold oneDNN's.

    Args:
        model: what `run` uses.
        cache: which `run` writes into.
        run: the pass, a function of `inputs`.
        inputs: tensors; those that are None stay None.

    Returns:
        The replay, a function of inputs of the same shapes.
    """
    weights = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    buffers = cache.buffers
    given = [i for i, tensor in enumerate(inputs) if tensor is not None]
    tensors = [*weights.values(), *(tensor for pair in buffers.values() for tensor in pair)]

    def body(*traced: torch.Tensor) -> torch.Tensor:
        full: list[torch.Tensor | None] = [None] * len(inputs)
        for index, tensor in zip(given, traced, strict=False):
            full[index] = tensor
        traced_weights = dict(zip(weights, traced[len(given) :], strict=False))
        rest = traced[len(given) + len(weights) :]
        cache.buffers = dict(zip(buffers, zip(rest[::2], rest[1::2], strict=True), strict=True))
        with _reparametrize_module(model, traced_weights):
            return run(*full)

    def arguments(now: Inputs) -> list[torch.Tensor]:
        return [t for t in now if t is not None] + tensors

    try:
        with _quiet():
            # What torch.jit.trace does, but the function belongs to us alone: those of torch.jit.trace are never freed,
            # and each operation of theirs holds the text of its Python stack, 40 MB for a pass of 30 layers.
            graph, _ = torch._C._create_graph_by_tracing(
                body, tuple(arguments(inputs)), lambda _: "", True, False, None, []
            )
            traced = cast(Run, torch._C._create_function_from_graph("forward", graph))
    finally:
        cache.buffers = buffers
    return lambda *now: traced(*arguments(now))


def compiled(run: Run) -> Run:
    """The same by torch.compile, with inductor's kernels."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # inductor takes a second to import

    # Inductor's cache does not ask which processor a kernel was made for: one with fewer instructions, or limited to
    # fewer, gets NaN or dies of them; nor which layouts our operators return. So each has a folder of its own, unless
    # the user named one.
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default_cache_dir()) == default_cache_dir():
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache_folder() / "inductor" / f"{machine()}-{edition()}")
    return cast(Run, torch.compile(run, dynamic=False))


def _checked(replay: Run, trials: Trials) -> Run | None:
    """The replay; None, with a warning, if it does not give what the trials say."""
    for inputs, expected in trials:
        # In half precision a compiled pass keeps more bits between operations.
        tolerance = 1e-3 if expected.dtype == torch.float32 else 2e-2 * float(expected.abs().max())
        result = replay(*inputs)
        if not torch.allclose(result, expected, rtol=1e-3, atol=tolerance):
            worst = float((result - expected).detach().abs().max())
            shape = "x".join(map(str, expected.shape[:2]))
            warnings.warn(
                f"passes of {shape} tokens run unrecorded: replayed logits differ by {worst:.2g}", stacklevel=2
            )
            return None
    return replay


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*torch.jit")
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]  # not exported
        yield
