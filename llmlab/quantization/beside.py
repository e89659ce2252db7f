"""The exact model beside the one that is being quantized: how far this one's activations are off."""

from __future__ import annotations

import torch
from torch.utils.hooks import RemovableHandle

from llmlab.kernels.plain import fastest_matmuls
from llmlab.model.matrices import Experts
from llmlab.quantization.calibration import Call


class Beside:
    """The exact model's rows on their way through the layers, each before it is quantized.

    Attributes:
        hidden_states: [rows, tokens, hidden], behind the last layer.
        inputs: of this layer's Linears, by name, until they are solved. Experts have none: the quantized model routes
            other tokens to them.
        residual: what the outputs of the two Linears are added to that write to the residual stream, by name, where the
            layer is no more than that: h + first(...) + last(...).
        own_residual: the same in the quantized model.
    """

    def __init__(self, hidden_states: torch.Tensor) -> None:
        self.hidden_states = hidden_states
        self.inputs: dict[str, torch.Tensor] = {}
        self.residual: dict[str, torch.Tensor] = {}
        self.own_residual: dict[str, torch.Tensor] = {}

    def pass_through(self, layer: torch.nn.Module, call: Call, linears: dict[str, torch.nn.Linear]) -> None:
        """All rows through a layer that is not quantized yet; keeps what these Linears get."""
        self.inputs, before, outputs = {}, self.hidden_states, dict[str, torch.Tensor]()
        experts = tuple(f"{name}." for name, module in layer.named_modules() if isinstance(module, Experts))

        def keep(name: str, inputs: torch.Tensor, output: torch.Tensor) -> None:
            self.inputs.setdefault(name, inputs)  # the first call's, for which it will be solved
            if output.numel() == before.numel():
                outputs.setdefault(name, output.view(before.shape))  # OPT's MLP has all tokens in one dimension

        hooks = [
            linear.register_forward_hook(lambda _, args, output, name=name: keep(name, args[0], output))
            for name, linear in linears.items()
            if not name.startswith(experts)
        ]
        try:
            with fastest_matmuls(layer):
                self.hidden_states = call(layer, before)
        finally:
            for hook in hooks:
                hook.remove()
        self.residual = _residual(before, outputs, self.hidden_states)

    def watch(self, hidden_states: torch.Tensor, linears: dict[str, torch.nn.Linear]) -> list[RemovableHandle]:
        """Note the residual stream of the quantized model in its pass through the same layer, from these on."""
        if not self.residual:
            return []
        first, last = self.residual
        self.own_residual = {first: hidden_states}

        def note(output: torch.Tensor) -> None:
            self.own_residual[last] = hidden_states + output.view(hidden_states.shape)

        return [linears[first].register_forward_hook(lambda _, __, output: note(output))]

    def off(self, name: str, inputs: torch.Tensor | None) -> list[torch.Tensor]:
        """How far off the exact model's are the inputs of a Linear, and the residual stream it writes to, if known."""
        exact = self.inputs.pop(name, None)
        if exact is None or inputs is None:
            return []
        residual = self.residual.get(name)
        return [exact - inputs, *([] if residual is None else [residual - self.own_residual[name]])]


def _residual(before: torch.Tensor, outputs: dict[str, torch.Tensor], after: torch.Tensor) -> dict[str, torch.Tensor]:
    """The first and the last Linear whose outputs make `before` into `after`, with what each is added to."""
    *names, last = outputs or [""]
    for first in names:
        total = before[:1] + outputs[first][:1] + outputs[last][:1]
        if torch.allclose(total, after[:1], rtol=1e-3, atol=1e-3 * float(after[:1].abs().mean())):
            return {first: before, last: before + outputs[first]}
    return {}
