"""CUDA code walked without a GPU: what it would launch, wait for and hold.

Tensors on "cuda" are fake: shapes, dtypes and devices without numbers (torch's FakeTensorMode; among them a tensor of
the CPU raises). Tensors on the CPU are real, so that tries, masks and slots are what they would be.

Memory is that of live storages in blocks of 512 bytes, as torch's allocator hands them out; what it cannot use between
them, and the workspaces of libraries, are not in it. Of Triton's kernels only the launch is seen.
"""

import gc
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from llmlab.base.paths import PACKAGE
from llmlab.kernels import packed_linear, replay, triton_packed

aten = torch.ops.aten
MEMORY = 32 * 2**30  # of the card that is stood in for
LARGE = 2**20  # elements of a new CPU tensor from which on it is fake, too: nobody draws random weights here
ROWS = 16  # up to which packed kernels serve, as if measured
# Operations that are one kernel on a GPU, though torch can compose them of others.
WHOLE = {aten.scaled_dot_product_attention.default, aten.rms_norm.default, aten.linear.default, aten.item.default,
         aten.allclose.default, aten.isfinite.default}  # fmt: skip
# Operations that launch nothing: views, questions, and memory without a value.
VIEWS = {"_unsafe_view", "alias", "as_strided", "detach", "device", "diagonal", "empty", "empty_like", "empty_strided",
         "expand", "lift_fresh", "narrow", "new_empty", "new_empty_strided", "permute", "reshape", "select", "set_",
         "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"}  # fmt: skip


class Walk(TorchDispatchMode):
    """Counts what would happen on a GPU.

    Attributes:
        launches: operations that start a kernel or a collective, by name.
        layers: of each call of a decoder layer how many kernels it launched.
        waits: lines of llmlab at which the host waits for work that the GPU has not done.
        held, peak: bytes on the device now and at most.
        graphs: of each captured pass the storages from before it that it reads, and those that it writes.
        alive: storages on the device.
        reads, writes: all that the pass now captured touches; `writes` is None outside of a capture.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode()
        self.fake.__deepcopy__ = lambda memo: self.fake  # copies of its tensors stay its own
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.held = self.peak = 0
        self.layers: list[int] = []
        self._in_layer = False
        self.writes: set[int] | None = None
        self.reads: set[int] = set()
        self.graphs: list[tuple[set[int], set[int]]] = []
        self._pending = False  # whether the GPU has work that nobody waited for
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        """One operation: for real among CPU tensors, else without numbers."""
        if func is torch.ops.prim.device.default:
            return args[0].device
        kwargs = dict(kwargs or {})
        tensors = _tensors((*args, *kwargs.values()))
        gpu = [tensor for tensor in tensors if tensor.device.type == "cuda"]
        device = torch.device(kwargs.get("device") or (gpu[0].device if gpu else "cpu"))
        real = (tensors or _elements(args) <= LARGE) and not any(isinstance(t, FakeTensor) for t in tensors)
        if device.type == "cpu" and real:
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if _composed(func):
            with self:  # inference mode hands them over in one piece
                return func.decompose(*args, **kwargs)
        if gpu and func in (aten.equal.default, aten.allclose.default):
            self.wait()
            return True  # as on a right path
        if gpu and func in (aten._local_scalar_dense.default, aten.item.default):
            return self._read(gpu[0], scalar=True)
        if gpu and device.type == "cpu" and func is aten._to_copy.default:
            return self._read(gpu[0], kwargs.get("dtype"))
        indexed = gpu and func in (aten.index.Tensor, aten.index_put_.default, aten.copy_.default)
        blocking = indexed or (func is aten._to_copy.default and not kwargs.get("non_blocking"))
        from_host = device.type == "cuda" and any(t.device.type == "cpu" and t.dim() for t in tensors)
        if blocking and from_host:
            self.wait()  # torch waits for a copy from the host, and so for all before it
        if func is aten.bincount.default:  # its size is a number of the GPU
            self.wait()
            return torch.empty(kwargs.get("minlength") or args[-1], dtype=torch.int64, device=device)
        kwargs |= {"generator": None} if "generator" in kwargs else {}  # nothing is drawn
        if any(not isinstance(tensor, FakeTensor) for tensor in tensors):
            args, kwargs = tree_map_only(torch.Tensor, self._faked, (args, kwargs))
        self._note(func, args)
        run = _attention if func is aten.scaled_dot_product_attention.default else func
        result = run(*args, **kwargs)  # `fake` is the mode below this one
        copied = from_host and func is aten._to_copy.default
        if device.type == "cuda" and not copied and str(func).split(".")[1] not in VIEWS:
            self.launch(str(func))
        for tensor in _tensors((result,)):
            if tensor.device.type == "cuda":
                self._hold(tensor.untyped_storage())
        return result

    def launch(self, name: str) -> None:
        """Count a kernel or a collective."""
        self.launches[name] += 1
        if self._in_layer and not name.startswith("c10d"):
            self.layers[-1] += 1
        self._pending = True

    def layer(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A decoder layer's forward pass, with its kernels counted in `layers`."""

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._in_layer = True
            self.layers.append(0)
            try:
                return forward(*args, **kwargs)
            finally:
                self._in_layer = False

        return counted

    def wait(self, *_: object) -> None:
        """The host waits: counted where there is something to wait for. In a capture CUDA would refuse it."""
        if self.writes is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {place()}")
        if self._pending:
            self.waits[place()] += 1
        self._pending = False

    def capture(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """As a CUDA graph: notes which storages from before it are read and written. Its kernels are not counted."""
        before = self.launches.copy(), self.layers.copy(), set(self.alive)
        self.writes, self.reads = set(), set()
        try:
            output = run()
            self.graphs.append((self.reads & before[2], self.writes & before[2]))
        finally:
            self.writes, (self.launches, self.layers, _) = None, before
        return output

    def during(self, work: Callable[[], object]) -> tuple[int, int, int]:
        """Run a piece of work: its launches, waits, and bytes at the peak above those held before."""
        gc.collect()
        self._pending, before = False, (self.launches.total(), self.waits.total(), self.held)
        self.peak = self.held
        work()
        return self.launches.total() - before[0], self.waits.total() - before[1], self.peak - before[2]

    def _note(self, func: Any, args: Any) -> None:
        """Inside of a capture: what is read and what is written."""
        if self.writes is None:
            return
        for given, said in zip(args, func._schema.arguments, strict=False):
            storages = {t.untyped_storage()._cdata for t in _tensors((given,))}
            self.reads |= storages
            if said.alias_info is not None and said.alias_info.is_write:
                self.writes |= storages

    def _faked(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)

    def _read(self, tensor: torch.Tensor, dtype: torch.dtype | None = None, *, scalar: bool = False) -> Any:
        """What the host reads of the GPU: zeros, but True where it asks what is finite, and one where it counts."""
        self.wait()
        with unset_fake_temporarily():
            right = (tensor.dtype == torch.bool and "finite" in place()) or "tokens = int(" in place()
            values = torch.full(tensor.shape, right, dtype=dtype or tensor.dtype)
            return values.item() if scalar else values

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // 512) * 512
        if key in self.alive:
            return

        def gone(_: object) -> None:
            self.held -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.held += size
        self.peak = max(self.peak, self.held)


def _tensors(values: Iterable[Any]) -> list[torch.Tensor]:
    """Those among the arguments of an operation, or in a list that is one."""
    nested = (value if isinstance(value, list | tuple) else (value,) for value in values)
    return [item for value in nested for item in value if isinstance(item, torch.Tensor)]


@cache
def _composed(func: Any) -> bool:
    """Whether an operation is made of others."""
    if func in WHOLE or func.namespace == "prim":
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None,
    dropout: float = 0.0, causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """As the memory-efficient kernel lays out what it computes: [batch, tokens, heads, d], so that heads join as they
    are. A V100 has no other one but the math kernel of grouped heads."""
    if enable_gqa or query.shape[1] != key.shape[1]:
        raise NotImplementedError("attention of grouped heads would be torch's math kernel here")
    attend = aten._scaled_dot_product_efficient_attention.default
    return attend(query, key, value, mask, False, dropout, causal, scale=scale)[0]


def _elements(args: Any) -> int:
    """Of the tensor that a factory is asked for."""
    sizes = next((a for a in args if isinstance(a, list | tuple) and all(isinstance(n, int) for n in a)), ())
    return torch.Size(sizes).numel() if sizes else 0


def place() -> str:
    """The innermost line of the package that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(str(PACKAGE)):
            return f"{frame.filename.removeprefix(str(PACKAGE.parent) + '/')}:{frame.lineno} {frame.line}"
    return "elsewhere"


class Kernels:
    """In the place of one of Triton's kernels: `kernel[grid](...)` is a launch."""

    def __init__(self, walk: Walk, name: str) -> None:
        self.walk, self.name = walk, name

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: self.walk.launch(self.name)


class Graph:
    """In the place of CudaGraph."""

    def __init__(self, walk: Walk, *_: object) -> None:
        self.walk, self.capture = walk, walk.capture

    def replay(self) -> None:
        """One launch."""
        self.walk.launch("graph")


class Event:
    """In the place of torch.cuda.Event."""

    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self, stream: object) -> None:
        """Nothing is timed."""

    def elapsed_time(self, other: object) -> float:
        """Milliseconds."""
        return 1.0


@contextmanager
def fake_card(walk: Walk) -> Iterator[None]:
    """A V100 of 32 GB as far as the package asks for one, and the walk's modes."""
    stream = SimpleNamespace(synchronize=walk.wait)
    patches: list[tuple[Any, str, object]] = [
        (torch.cuda, "get_device_name", lambda device=None: "fake V100"),
        (torch.cuda, "get_device_capability", lambda device=None: (7, 0)),
        (torch.cuda, "mem_get_info", lambda device=None: (MEMORY - walk.held, MEMORY)),
        (torch.cuda, "memory_reserved", lambda device=None: 0),
        (torch.cuda, "memory_allocated", lambda device=None: 0),
        (torch.cuda, "current_stream", lambda device=None: stream),
        (torch.cuda, "graph_pool_handle", lambda: None),
        (torch.cuda, "synchronize", walk.wait),
        (torch.cuda, "Event", Event),
        (torch, "Generator", lambda device=None, of_cpu=torch.Generator: of_cpu()),
        (replay, "CudaGraph", partial(Graph, walk)),
        (packed_linear, "agrees", lambda *kind: True),
        (packed_linear, "crossover", lambda *shape: ROWS),
        (triton_packed, "few_rows", lambda *shape: ROWS // 2),
        (triton_packed, "_processors", lambda device: 80),
        (triton_packed, "_on", lambda tensor: nullcontext()),
    ]
    names = ("gemv_kernel", "tile_kernel", "sum_kernel", "dequantize_kernel")
    patches += [(triton_packed, name, Kernels(walk, name)) for name in names]
    with ExitStack() as patched:
        for owner, name, value in patches:
            patched.enter_context(mock.patch.object(owner, name, value))
        patched.enter_context(walk.fake)
        patched.enter_context(walk)
        yield
