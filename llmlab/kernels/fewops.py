"""What stands between a model's matrices, in few operations.

One token's norm, rotation of positions or gate is a dozen of torch's operations, whose launches take longer than their
work. On CPU each is one operation of the C++ kernels (see `step.h`). Which module computes what is not guessed from its
name: a kind of module is tried once on random numbers, and one that gives other numbers stays as it is.

Lossless up to rounding: a sum may run in another order.
"""

import copy
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Protocol, cast

import torch

from llmlab.kernels.native import native

ROTATION = "apply_rotary_pos_emb"  # what transformers' attention calls, by this name in the file of each model
TOLERANCE = {torch.float32: 1e-5}  # of numbers about 1; half precision rounds to 2 ** -8 at best
HALF_TOLERANCE = 2e-2

Rotation = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def shared_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy of a module tree: modules of its own, the tensors and hooks of the original."""
    new = copy.copy(module)
    new.__dict__ = dict(module.__dict__)
    new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
    new._modules = {name: None if child is None else shared_copy(child) for name, child in module._modules.items()}
    if isinstance(forward := new.__dict__.get("forward"), MethodType):  # a pipeline stage's, bound to the original
        new.__dict__["forward"] = MethodType(forward.__func__, new)
    return new


def few_ops(model: torch.nn.Module, dtype: torch.dtype, *, compiled: bool = False) -> None:
    """Put them into the modules of a `shared_copy`, in place.

    Args:
        model: whose tensors are on one device.
        dtype: of its hidden states.
        compiled: leaves gates and rotations to torch.compile, which fuses them itself.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    whole = on_cpu and not compiled and not native().problem
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child is not None and type(child).__name__.endswith("RMSNorm"):
                setattr(module, name, rms_norm(child))
        if whole and _is_gated(module, dtype):
            module.__dict__["forward"] = MethodType(_gated, module)
        elif whole and "forward" not in vars(module) and (forward := _with_rotation(type(module), dtype)):
            module.__dict__["forward"] = MethodType(forward, module)


def close(result: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether numbers about 1 are the same up to rounding."""
    tolerance = TOLERANCE.get(expected.dtype, HALF_TOLERANCE)
    return result.dtype == expected.dtype and torch.allclose(result, expected, rtol=tolerance, atol=tolerance)


class GatedMLP(Protocol):
    """What such an MLP has."""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module


def _gated(mlp: GatedMLP, x: torch.Tensor) -> torch.Tensor:
    """W_down (silu(W_gate x) W_up x) (SwiGLU, Shazeer 2020, arXiv 2002.05202); [..., hidden] to the same."""
    down: torch.Tensor = mlp.down_proj(torch.ops.llmlab.gated(mlp.gate_proj(x), mlp.up_proj(x)))
    return down


_gates: dict[tuple[object, ...], bool] = {}  # of each kind of module, whether it computes what `_gated` does


def _is_gated(mlp: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Whether a module computes what `_gated` does: tried on one of its kind that has small matrices."""
    names = {name for name in mlp._modules if "+" not in name}  # without those that were joined
    if names != {"gate_proj", "up_proj", "down_proj", "act_fn"} or "forward" in vars(mlp) or mlp._forward_hooks:
        return False
    kind = (type(mlp).forward, type(mlp.act_fn), dtype)
    if kind not in _gates:
        small = copy.copy(mlp)
        *weights, x = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        matrices = dict(zip(("gate_proj", "up_proj", "down_proj"), map(_linear, weights), strict=True))
        small.__dict__ = dict(mlp.__dict__, _modules={**matrices, "act_fn": mlp.act_fn})
        try:
            _gates[kind] = close(_gated(cast(GatedMLP, small), x), small(x))
        except (AttributeError, TypeError, RuntimeError):  # a forward pass that wants other modules or arguments
            _gates[kind] = False
    return _gates[kind]


def _linear(weight: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return linear


_forwards: dict[tuple[object, torch.dtype], FunctionType | None] = {}  # by the forward pass that it replaces


def _with_rotation(kind: type[torch.nn.Module], dtype: torch.dtype) -> FunctionType | None:
    """The forward pass of a kind of module with the rotation as one operation; None if it has none, or another one."""
    forward = kind.forward
    if (forward, dtype) not in _forwards:
        new = None
        plain: Rotation | None = getattr(forward, "__globals__", {}).get(ROTATION)
        calls = isinstance(forward, FunctionType) and ROTATION in forward.__code__.co_names
        if plain is not None and calls and _rotates(plain, dtype):
            # The same code, in which the name means another function: the model's file stays as it is for all others.
            names = forward.__globals__ | {ROTATION: _rotation(plain)}
            new = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
            new.__kwdefaults__ = forward.__kwdefaults__
        _forwards[forward, dtype] = new
    return _forwards[forward, dtype]


def _rotation(plain: Rotation) -> Rotation:
    """x cos + [-x2, x1] sin of queries and keys [batch, heads, width, d]; what differs from that is left to `plain`."""

    def rotate(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if unsqueeze_dim != 1 or cos.dim() != 3 or not q.shape[-1] == k.shape[-1] == cos.shape[-1]:
            return plain(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        if not q.dtype == k.dtype == cos.dtype == sin.dtype:
            return plain(q, k, cos, sin)
        rotated: tuple[torch.Tensor, torch.Tensor] = torch.ops.llmlab.rotate(q, k, cos, sin)
        return rotated

    return rotate


def _rotates(plain: Rotation, dtype: torch.dtype) -> bool:
    """Whether a model's rotation takes these arguments and gives these numbers."""
    if list(inspect.signature(plain).parameters) != ["q", "k", "cos", "sin", "unsqueeze_dim"]:
        return False
    random = torch.randn(4, 2, 3, 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, cos, sin = random[0], random[1, :, :1], random[2, :, 0], random[3, :, 0]
    try:
        return all(map(close, _rotation(plain)(q, k, cos, sin), plain(q, k, cos, sin)))
    except RuntimeError:  # cosines of another shape: gpt-oss has one for each pair
        return False


class FewOpsRMSNorm(torch.nn.Module):
    """RMSNorm, x / sqrt(|x|^2 / n + eps) * w, in one operation; of torch's, on CPU, in four."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps
        self.epsilon = torch.tensor([eps])  # for the CPU alone
        self.native = weight.device.type == "cpu" and not native().problem

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same."""
        if x.device.type != "cpu":
            return torch.nn.functional.rms_norm(x, self.weight.shape, self.weight, self.eps)
        if self.native:
            normed: torch.Tensor = torch.ops.llmlab.rms_norm(x, self.weight, self.eps)
            return normed
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self.epsilon, norm, norm, value=1 / len(self.weight)).rsqrt()
        return (wide * scale).to(x.dtype) * self.weight


_plain: dict[tuple[object, ...], bool] = {}  # of each kind of norm, whether it computes what FewOpsRMSNorm does


def rms_norm(norm: torch.nn.Module) -> torch.nn.Module:
    """The RMSNorm of few operations if it computes what `norm` does (Gemma's, for one, adds 1 to the weights).

    Tried once for each kind of norm, on a copy on the CPU: to ask a GPU for every norm would wait for it every time.
    """
    eps = getattr(norm, "variance_epsilon", None)
    weight = getattr(norm, "weight", None)
    if eps is None or weight is None or weight.dim() != 1:
        return norm
    settings = tuple((k, v) for k, v in vars(norm).items() if isinstance(v, bool | int | float | str))
    hooks = len(norm._forward_hooks) + len(norm._forward_pre_hooks)
    kind = (type(norm).forward, weight.dtype, len(weight), settings, hooks)
    if kind not in _plain:
        x, random = torch.randn(2, 4, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        other, tried = FewOpsRMSNorm(random[0], eps), shared_copy(norm)
        tried._parameters["weight"] = torch.nn.Parameter(random[0], requires_grad=False)
        _plain[kind] = close(other(x), tried(x))
    return FewOpsRMSNorm(weight, eps) if _plain[kind] else norm
