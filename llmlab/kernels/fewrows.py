"""A model's modules made fast for few rows.

A decode step multiplies every matrix by one row, or by k + 1 rows when it verifies a draft: its work is to read the
weights once, and the rest is overhead. So, in a copy of the module tree that shares all weights:

* matrices with the same input (q, k, v; gate, up) become one, which is read at a better rate than its parts. The
  model's own become views of it, with the same numbers in another place, so that no weight is held twice;
* on CPU the weights of a plain Linear are laid out in oneDNN's blocks, too. On two AMD EPYC cores one fp32 row then
  takes half the time of torch's default, and five rows cost no more than one. On two Intel Xeon cores five fp32 rows
  take 0.7 of the time, but one takes 1.2 of it: so up to how many rows torch's layout serves is measured;
* half precision that oneDNN does not take on this processor is widened to fp32 on the way, from as many rows on as that
  pays (measured, too);
* what stands between the matrices becomes few operations (see `fewops`).

Lossless up to rounding: a sum may run in another order.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Optional

import torch

from llmlab.base.clock import faster
from llmlab.kernels.fewops import few_ops
from llmlab.kernels.native_packed import NativeProduct
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.kernels.plain import onednn_takes, slow_on_cpu, widened_linear
from llmlab.kernels.replay import whole
from llmlab.kernels.stacking import stacked

TOGETHER = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
FEW = (1, 2, 3, 5)  # rows at which the two layouts are compared
ENOUGH = 2**30  # bytes of weights to compare them on: more than a cache holds


def prepare(model: torch.nn.Module, dtype: torch.dtype, *, pack: bool = True) -> None:
    """Make the modules of a `shared_copy` fast for few rows of `dtype`, in place.

    `pack` False leaves plain Linears in torch's layout, which torch.compile knows.
    """
    for parent in list(model.modules()):
        for names in TOGETHER:
            _join(parent, names, dtype)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if pack and type(child) is torch.nn.Linear and _packs(child):
                setattr(parent, name, PackedLinear(child))
            elif pack and type(child) is torch.nn.Linear and _widens(child):
                setattr(parent, name, WidenedRows(child))
    few_ops(model, dtype, compiled=not pack)
    laid_out = [module for module in model.modules() if isinstance(module, TwoWays)]
    if laid_out:
        rows = _rows_of_torch(laid_out)
        for module in laid_out:
            module.rows_of_torch = rows


def _packs(linear: torch.nn.Linear) -> bool:
    weight = linear.weight
    known = weight.dtype in (torch.float32, torch.bfloat16) and weight.numel() > 0
    return weight.device.type == "cpu" and known and onednn_takes(weight.dtype)


def _widens(linear: torch.nn.Linear) -> bool:
    weight = linear.weight
    return weight.device.type == "cpu" and weight.numel() > 0 and slow_on_cpu(weight.dtype)


@whole
def multiply(
    x: torch.Tensor,
    packed: torch.Tensor,
    bias: Optional[torch.Tensor],  # noqa: UP045  # as TorchScript spells it
) -> torch.Tensor:
    """x W^T + b by oneDNN."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


class TwoWays(torch.nn.Module, ABC):
    """y = x W^T + b: up to `rows_of_torch` rows as torch does it, above them by `other`, which a subclass gives."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        # Tensor parallelism's: a rank's part of the inputs, the all-reduce of the outputs.
        self._forward_pre_hooks, self._forward_hooks = linear._forward_pre_hooks, linear._forward_hooks
        self.rows_of_torch = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        if x.shape[:-1].numel() <= self.rows_of_torch:
            return torch.nn.functional.linear(x, self.weight, self.bias)
        return self.other(x)

    @abstractmethod
    def other(self, x: torch.Tensor) -> torch.Tensor:
        """The same for more rows."""


class PackedLinear(TwoWays):
    """The other way: W in oneDNN's blocked layout, a second copy."""

    packed: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear)
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), 8)
        self.register_buffer("packed", packed, persistent=False)

    def other(self, x: torch.Tensor) -> torch.Tensor:
        """By oneDNN."""
        return multiply(x, self.packed, self.bias)


class WidenedRows(TwoWays):
    """The other way for a half precision that this processor is slow at: by fp32."""

    def other(self, x: torch.Tensor) -> torch.Tensor:
        """By fp32 products."""
        return widened_linear(x, self.weight, self.bias)


_measured: dict[tuple[object, ...], int] = {}


def _rows_of_torch(linears: list[TwoWays]) -> int:
    """Up to how many rows torch's own way beats the other one on these matrices; measured once for their shapes."""
    weight = linears[0].weight
    key = (weight.dtype, frozenset(m.weight.shape for m in linears), torch.get_num_threads())
    if key not in _measured:
        some, size = [], 0
        for module in reversed(linears):  # the output head, the largest, comes first
            if size < ENOUGH:
                some.append(module)
                size += module.weight.numel() * module.weight.element_size()
        _measured[key] = 0
        for rows in FEW:
            other, plain = (partial(_multiply_all, some, rows, limit) for limit in (0, rows))
            if faster(plain, other, counted=3) < 1 / 0.95:
                break
            _measured[key] = rows
    return _measured[key]


@torch.inference_mode()
def _multiply_all(linears: list[TwoWays], rows: int, limit: int) -> None:
    """Rows times all of them, in torch's way up to `limit` rows."""
    for module in linears:
        module.rows_of_torch = limit
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
    plain = [m for m in linears if type(m) is torch.nn.Linear and _packs(m)]
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
    alike = all(m.bits == first.bits and torch.equal(m.g_idx, first.g_idx) for m in parts)
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
