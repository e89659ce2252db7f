"""Fuse a recorded pass: what is small around the matrices becomes one C++ operation where it was a dozen of torch's.

A recording holds what transformers wrote: a rotation of positions is slices, a negation, a concatenation and sums, and
each shape that the code asked for is operations, too. Patterns are matched in TorchScript's graph, so it does not
matter in which model's file they stand. See `step.h` for the operations.
"""

from __future__ import annotations

import torch

from llmlab.kernels.graphs import Run

# silu(a) b, the gate of an MLP.
GATED = (
    """graph(%a, %b):
  %gate = aten::silu(%a)
  %y = aten::mul(%gate, %b)
  return (%y)""",
    """graph(%a, %b):
  %y = llmlab::gated(%a, %b)
  return (%y)""",
)
# x cos + [-x2, x1] sin, x1 the first half of each head. A pattern cannot say which numbers it wants (constants are
# shared by all of a graph), so what is fused is compared with what is not.
ROTATE = (
    """graph(%x, %cos, %sin, %half : int, %zero : int, %one : int, %dim : int, %last : int, %end : int):
  %first = aten::mul(%x, %cos)
  %x1 = aten::slice(%x, %dim, %zero, %half, %one)
  %x2 = aten::slice(%x, %dim, %half, %end, %one)
  %negative = aten::neg(%x2)
  %parts : Tensor[] = prim::ListConstruct(%negative, %x1)
  %turned = aten::cat(%parts, %last)
  %second = aten::mul(%turned, %sin)
  %y = aten::add(%first, %second, %one)
  return (%y)""",
    """graph(%x, %cos, %sin, %half : int, %zero : int, %one : int, %dim : int, %last : int, %end : int):
  %y = llmlab::rotate(%x, %cos, %sin, %half)
  return (%y)""",
)


def fused(plain: Run, graph: torch.Graph, inputs: int, arguments: list[torch.Tensor], coarse: bool) -> Run:
    """The function of a recorded graph, fused in place; `plain` if that gives other numbers.

    Args:
        plain: the function of the graph as it was traced; what it writes into its inputs is the same each time.
        graph: a copy of its graph.
        inputs: how many of its first inputs may have other shapes when it is replayed (a mask grows with the past).
        arguments: to compare the two with.
        coarse: see `alike`.
    """
    for value in list(graph.inputs())[:inputs]:
        value.setType(torch._C.TensorType.get())
    torch._C._jit_pass_peephole(graph)  # sizes become numbers: all other shapes are what they were
    torch._C._jit_pass_constant_propagation(graph)
    torch._C._jit_pass_constant_pooling(graph)  # type: ignore[attr-defined]  # torch's hints lack it
    torch._C._jit_pass_cse(graph)
    for pattern, operation in (GATED, ROTATE):
        torch._C._jit_pass_custom_pattern_based_rewrite_graph(pattern, operation, graph)
    torch._C._jit_pass_dce(graph)
    function = torch._C._create_function_from_graph("forward", graph)
    try:
        same = alike(function(*arguments), plain(*arguments), coarse)
    except RuntimeError:  # matched, but not what the operation takes
        same = False
    return function if same else plain


def alike(result: torch.Tensor, expected: torch.Tensor, coarse: bool) -> bool:
    """Whether logits are the same up to the order of sums.

    In half precision to 2 % of the largest: a compiled or fused pass keeps more bits between operations. `coarse`:
    activations are rounded to int8, where the last bit of a sum moves some by a whole step; then only a pass that does
    something else is told apart, by a root mean square difference of a quarter.
    """
    difference = (result - expected).float()
    if coarse:
        return bool(difference.square().mean() <= expected.float().square().mean() / 16)
    tolerance = 1e-3 if expected.dtype == torch.float32 else 2e-2 * float(expected.abs().max())
    return bool((difference.abs() <= tolerance + 1e-3 * expected.abs()).all())
