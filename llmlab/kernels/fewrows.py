"""A model's modules made fast for few rows.

A decode step multiplies every matrix by one row, or by k + 1 rows when it verifies a draft: its work is to read the
weights once, and the rest is overhead. So, in a copy of the module tree that shares all weights:

* matrices with the same input (q, k, v; gate, up) become one, which is read at a better rate than its parts. The
  model's own become views of it, with the same numbers in another place, so that no weight is held twice;
* on CPU a plain Linear has two ways, one for few rows and one for more, and up to how many rows the first one serves is
  measured. Few rows go through the C++ kernels (see `dense.h`): on two Intel Xeon cores five fp32 rows cost what one
  costs, with torch twice as much. Where those are not there it is torch's way, and the other one has a second copy of
  the weights in oneDNN's blocks: on two AMD EPYC cores one fp32 row then takes half the time;
* what stands between the matrices becomes few operations (see `fewops`).

Lossless up to rounding: a sum may run in another order.
"""

from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Optional

import torch

from llmlab.base.clock import faster
from llmlab.kernels.fewops import few_ops
from llmlab.kernels.native import native
from llmlab.kernels.native_packed import NativeProduct
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.kernels.plain import HALF, onednn_takes, slow_on_cpu, widened_linear
from llmlab.kernels.replay import whole
from llmlab.kernels.stacking import in_a_row, stacked

TOGETHER = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
FEW = (1, 2, 3, 5, 9, 17)  # rows at which the two ways are compared
ENOUGH = 2**28  # bytes of weights to compare them on: more than a cache holds


def prepare(model: torch.nn.Module, dtype: torch.dtype, *, pack: bool = True) -> None:
    """Make the modules of a `shared_copy` fast for few rows of `dtype`, in place.

    `pack` False leaves plain Linears in torch's layout, which torch.compile knows.
    """
    products = _products(model)
    for name in ("codes", "scales", "zeros"):
        in_a_row([getattr(product, name) for product in products])
    for parent in list(model.modules()):
        for names in TOGETHER:
            _join(parent, names, dtype)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if pack and type(child) is torch.nn.Linear:
                if _packs(child):
                    setattr(parent, name, PackedLinear(child))
                elif _widens(child):
                    setattr(parent, name, WidenedRows(child))
                elif _read_once(child.weight):
                    setattr(parent, name, TwoWays(child))
    few_ops(model, dtype, compiled=not pack)
    laid_out = [module for module in model.modules() if isinstance(module, TwoWays)]
    if laid_out:
        rows = _few_rows(laid_out)
        for module in laid_out:
            module.few_rows = rows


def _products(model: torch.nn.Module) -> list[NativeProduct]:
    """The C++ kernels' matrices in the order in which a pass reads them, those that will be joined side by side."""
    order = {name: place for place, name in enumerate(name for names in TOGETHER for name in names)}
    products = []
    for parent in model.modules():
        for name in sorted(parent._modules, key=lambda name: order.get(name, len(order))):
            child = parent._modules[name]
            if isinstance(child, QuantLinear) and isinstance(child.fast, NativeProduct):
                products.append(child.fast)
    return products


def _packs(linear: torch.nn.Linear) -> bool:
    """Whether oneDNN's blocks help: it takes the dtype, and for fp32 there are no C++ kernels, which need no copy."""
    weight = linear.weight
    known = weight.dtype == torch.bfloat16 or (weight.dtype == torch.float32 and not _read_once(weight))
    return weight.device.type == "cpu" and known and weight.numel() > 0 and onednn_takes(weight.dtype)


def _widens(linear: torch.nn.Linear) -> bool:
    weight = linear.weight
    return weight.device.type == "cpu" and weight.numel() > 0 and slow_on_cpu(weight.dtype)


def _read_once(weight: torch.Tensor) -> bool:
    """Whether the C++ kernels multiply by this matrix."""
    known = weight.dtype in (torch.float32, *HALF) and weight.numel() > 0 and weight.is_contiguous()
    return weight.device.type == "cpu" and known and not native().problem


@whole
def multiply(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: Optional[torch.Tensor],  # noqa: UP045  # as TorchScript spells it
) -> torch.Tensor:
    """x W^T + b by oneDNN."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


class TwoWays(torch.nn.Module):
    """y = x W^T + b: one way up to `few_rows` rows, another one above. Here: the C++ kernels', torch's."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # Tensor parallelism's: a rank's part of the inputs, the all-reduce of the outputs.
        self._forward_pre_hooks, self._forward_hooks = linear._forward_pre_hooks, linear._forward_hooks
        self.few_rows = 0
        self.read_once = _read_once(linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        if x.shape[:-1].numel() > self.few_rows:
            return self.many(x)
        if self.read_once:
            product: torch.Tensor = torch.ops.llmlab.dense_rows(x, self.weight, self.bias)
            return product
        return torch.nn.functional.linear(x, self.weight, self.bias)

    def many(self, x: torch.Tensor) -> torch.Tensor:
        """The same for more rows."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


class PackedLinear(TwoWays):
    """More rows with W in oneDNN's blocked layout, a second copy."""

    packed: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear)
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), 8)
        self.register_buffer("packed", packed, persistent=False)

    def many(self, x: torch.Tensor) -> torch.Tensor:
        """By oneDNN."""
        return multiply(x, self.packed, self.bias)


class WidenedRows(TwoWays):
    """More rows for a half precision that this processor is slow at: by fp32."""

    def many(self, x: torch.Tensor) -> torch.Tensor:
        """By fp32 products."""
        return widened_linear(x, self.weight, self.bias)


_measured: dict[tuple[object, ...], int] = {}


def _few_rows(linears: list[TwoWays]) -> int:
    """Up to how many rows the way of few rows serves these matrices best; measured once for their shapes.

    The C++ kernels serve up to the most rows at which they are not slower: one row waits for memory in any way. torch's
    must be the faster one from one row on, for the other one's layout is there already.
    """
    weight = linears[0].weight
    key = (weight.dtype, frozenset(m.weight.shape for m in linears), torch.get_num_threads())
    if key not in _measured:
        some, size = [], 0
        for module in reversed(linears):  # the output head, the largest, comes first
            if size < ENOUGH:
                some.append(module)
                size += module.weight.numel() * module.weight.element_size()

        def gain(rows: int) -> float:
            many, few = (partial(_multiply_all, some, rows, limit) for limit in (0, rows))
            return faster(few, many, counted=3)

        if linears[0].read_once:
            _measured[key] = next((rows for rows in reversed(FEW) if gain(rows) >= 0.95), 0)
        else:
            _measured[key] = max(takewhile(lambda rows: gain(rows) >= 1 / 0.95, FEW), default=0)
    return _measured[key]


@torch.inference_mode()
def _multiply_all(linears: list[TwoWays], rows: int, limit: int) -> None:
    """Rows times all of them, in the way of few rows up to `limit` rows."""
    for module in linears:
        module.few_rows = limit
        x = torch.zeros(rows, module.weight.shape[1], dtype=module.weight.dtype)
        module.forward(x)  # without hooks: the all-reduce of other ranks would wait


class Joined(torch.nn.Module):
    """Several Linears with the same input as one matrix: the first that is asked multiplies by all of them."""

    def __init__(self, matrix: torch.nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.matrix, self.sizes = matrix, sizes
        self.waiting: dict[int, torch.Tensor] = {}  # products that have not been asked for yet
        self.x: torch.Tensor | None = None  # of which these are

    def product(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What the Linear of this number makes of x; all of them get the same in turn."""
        if index not in self.waiting or x is not self.x:
            self.waiting, self.x = dict(enumerate(self.matrix(x).split(self.sizes, dim=-1))), x
        product = self.waiting.pop(index)
        if not self.waiting:
            self.x = None
        return product


class Part(torch.nn.Module):
    """Stands in the place of a Linear that was joined."""

    def __init__(self, product: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The product of the Linear whose place this is."""
        return self.product(x)


def _join(parent: torch.nn.Module, names: tuple[str, ...], dtype: torch.dtype) -> None:
    """Put one matrix into the place of a module's Linears of these names, if it has them and they can be joined."""
    linears = [parent._modules.get(name) for name in names]
    plain = [m for m in linears if type(m) is torch.nn.Linear and (_packs(m) or _read_once(m.weight))]
    packed = [m for m in linears if isinstance(m, QuantLinear)]
    matrix: torch.nn.Linear | QuantLinear | None = None
    if any(m is None or m._forward_hooks for m in linears):
        return
    if len(packed) == len(names):
        matrix = _joined(packed)
        if matrix is not None:
            matrix.prepare(dtype)
    elif len(plain) == len(names) and len({m.bias is None for m in plain}) == 1:
        # On CPU alone: on a GPU CUDA graphs hide what it saves.
        biases: list[torch.Tensor] = [m.bias for m in plain if m.bias is not None]
        outputs = sum(m.out_features for m in plain)
        matrix = torch.nn.Linear(plain[0].in_features, outputs, bias=bool(biases), device="meta")
        matrix.weight = torch.nn.Parameter(stacked([m.weight for m in plain]), requires_grad=False)
        if biases:
            matrix.bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False)
    if matrix is not None:
        joined = Joined(matrix, [m.out_features for m in plain or packed])
        parent.add_module("+".join(names), joined)
        for index, name in enumerate(names):
            setattr(parent, name, Part(partial(joined.product, index)))


def _joined(parts: list[QuantLinear]) -> QuantLinear | None:
    """One packed matrix that computes the outputs of several with the same input; None if none can."""
    first, outputs = parts[0], [m.out_features for m in parts]
    alike = len({(m.bits, m.qzeros.dtype) for m in parts}) == 1
    alike = alike and all(torch.equal(m.g_idx, first.g_idx) for m in parts)
    features = torch.arange(first.in_features, device=first.g_idx.device)
    orders = [features if m.order is None else m.order for m in parts]
    alike = alike and all(torch.equal(order, orders[0]) for order in orders)
    if not alike or len({m.bias is None for m in parts}) > 1 or any(n * first.bits % 32 for n in outputs):
        return None
    with torch.device("meta"):
        joined = QuantLinear(first.in_features, sum(outputs), first.bits, first.groups, first.bias is not None)
    joined.g_idx, joined.order = first.g_idx, first.order
    products = [m.fast for m in parts if isinstance(m.fast, NativeProduct)]
    if len(products) == len(parts):
        joined.kernel, joined.fast = first.kernel, NativeProduct.joined(products)
        if joined.fast is None:
            return None
    for name in ("qweight", "qzeros", "scales"):
        setattr(joined, name, stacked([getattr(m, name) for m in parts], dim=1))
    joined.bias = None if first.bias is None else torch.cat([m.bias for m in parts if m.bias is not None])
    return joined
