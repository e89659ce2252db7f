"""A model's modules made fast for few rows.

A decode step multiplies every matrix by one row, or by k + 1 rows when it verifies a draft: its work is to read the
weights once, and the rest is overhead. So, in a copy of the module tree that shares all weights:

* matrices with the same input (q, k, v; gate, up) become one, which is read at a better rate than its parts;
* on CPU the weights of a plain Linear are laid out in oneDNN's blocks, too. On two AMD EPYC cores one fp32 row then
  takes half the time of torch's default, and five rows cost no more than one. On two Intel Xeon cores five fp32 rows
  take 0.7 of the time, but one takes 1.2 of it: so up to how many rows torch's layout serves is measured;
* half precision that oneDNN does not take on this processor is widened to fp32 on the way, from as many rows on as that
  pays (measured, too);
* an RMSNorm becomes few operations, where that gives the same numbers.

Lossless up to rounding: a sum may run in another order.
"""

import copy
from abc import ABC, abstractmethod
from functools import partial
from types import MethodType
from typing import Any, ClassVar, Optional, cast

import torch

from llmlab.base.clock import faster
from llmlab.kernels.plain import onednn_takes, slow_on_cpu, widened_linear

TOGETHER = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
FEW = (1, 2, 3, 5)  # rows at which the two layouts are compared
ENOUGH = 2**30  # bytes of weights to compare them on: more than a cache holds


def shared_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module tree: modules of its own, the tensors and hooks of the original."""
    new = copy.copy(module)
    new.__dict__ = dict(module.__dict__)
    new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
    new._modules = {name: None if child is None else shared_copy(child) for name, child in module._modules.items()}
    if isinstance(forward := new.__dict__.get("forward"), MethodType):  # a pipeline stage's, bound to the original
        new.__dict__["forward"] = MethodType(forward.__func__, new)
    return new


def prepare(model: torch.nn.Module, dtype: torch.dtype, *, pack: bool = True) -> None:
    """Make the modules of a `shared_copy` fast for few rows of `dtype`, in place.

    `pack` False leaves plain Linears in torch's layout, which torch.compile knows.
    """
    for parent in list(model.modules()):
        for names in TOGETHER:
            children = [parent._modules.get(name) for name in names]
            if all(type(child) is torch.nn.Linear or hasattr(child, "joined") for child in children):
                for name, joined in zip(names, _join(cast(Any, children), dtype), strict=True):
                    setattr(parent, name, joined)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if pack and type(child) is torch.nn.Linear and _packs(child):
                setattr(parent, name, PackedLinear(child))
            elif pack and type(child) is torch.nn.Linear and _widens(child):
                setattr(parent, name, WidenedRows(child))
            elif type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _rms_norm(child))
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


def multiply(x: torch.Tensor, packed: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:  # noqa: UP045
    """x W^T + b by oneDNN; TorchScript compiles it, too (see `record`): it knows this spelling of the types alone."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


class TwoWays(torch.nn.Module, ABC):
    """y = x W^T + b: up to `rows_of_torch` rows as torch does it, above them by `other`, which a subclass gives."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._forward_hooks = linear._forward_hooks  # tensor parallelism's all-reduce
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

    multiply: ClassVar[Any] = None  # set below: `multiply`, or while a pass is recorded its compiled twin

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear)
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().contiguous(), 8)
        self.register_buffer("packed", packed, persistent=False)

    def other(self, x: torch.Tensor) -> torch.Tensor:
        """By oneDNN."""
        product: torch.Tensor = PackedLinear.multiply(x, self.packed, self.bias)
        return product


PackedLinear.multiply = multiply


class WidenedRows(TwoWays):
    """The other way for a half precision that this processor is slow at: by fp32."""

    def other(self, x: torch.Tensor) -> torch.Tensor:
        """By fp32 products."""
        return widened_linear(x, self.weight, self.bias)


_measured: dict[Any, int] = {}


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


class First(torch.nn.Module):
    """The first of several Linears with the same input: multiplies by all of them at once."""

    def __init__(self, joined: torch.nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.joined, self.sizes = joined, sizes
        self.found: tuple[torch.Tensor, ...] = ()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Its own product; the others' are kept for them."""
        self.found = self.joined(x).split(self.sizes, dim=-1)
        return self.found[0]


class Later(torch.nn.Module):
    """One of the other Linears: takes what the first one found for the same input."""

    def __init__(self, first: First, index: int) -> None:
        super().__init__()
        self.__dict__["first"] = first  # not a child: the tree has it once
        self.index = index

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Its product."""
        first = cast(First, self.__dict__["first"])
        return first.found[self.index]


def _join(linears: list[Any], dtype: torch.dtype) -> list[torch.nn.Module]:
    """Modules to stand in the places of Linears with the same input; themselves if they cannot be joined."""
    first = linears[0]
    if len({type(linear) for linear in linears}) > 1 or any(m._forward_hooks for m in linears):
        return linears
    joined: Any = None
    if hasattr(first, "joined"):  # packed weights know how
        joined = first.joined(linears[1:])
        if joined is not None:
            joined.prepare(dtype)
    elif all(_packs(m) for m in linears) and len({m.bias is None for m in linears}) == 1:
        # On CPU alone: on a GPU the second copy would cost memory, and CUDA graphs hide what it saves.
        joined = torch.nn.Linear(first.in_features, sum(m.out_features for m in linears), device="meta")
        joined.weight = torch.nn.Parameter(torch.cat([m.weight.detach() for m in linears]), requires_grad=False)
        biases = [m.bias for m in linears if m.bias is not None]
        joined.bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    if joined is None:
        return linears
    leader = First(joined, [m.out_features for m in linears])
    return [leader, *(Later(leader, index) for index in range(1, len(linears)))]


class FewOpsRMSNorm(torch.nn.Module):
    """RMSNorm, x / sqrt(|x|^2 / n + eps) * w, in few operations: torch's own is one on a GPU but a dozen on CPU."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps
        self.epsilon = torch.tensor([eps], device=weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same."""
        if x.device.type != "cpu":
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self.epsilon, norm, norm, value=1 / len(self.weight)).rsqrt()
        return (wide * scale).to(x.dtype) * self.weight


def _rms_norm(norm: Any) -> torch.nn.Module:
    """The RMSNorm of few operations if it computes what `norm` does (Gemma's, for one, adds 1 to the weights)."""
    eps = getattr(norm, "variance_epsilon", None)
    weight = getattr(norm, "weight", None)
    if eps is None or weight is None or weight.dim() != 1:
        return cast(torch.nn.Module, norm)
    other = FewOpsRMSNorm(weight, eps)
    x = torch.randn(4, len(weight), device=weight.device, generator=torch.Generator(weight.device).manual_seed(0))
    x = x.to(weight.dtype)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 2e-2
    return other if torch.allclose(other(x), norm(x), rtol=tolerance, atol=tolerance) else norm
