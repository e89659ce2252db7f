"""Calibration text as rows of tokens, and what a model makes of them before its first layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llmlab.base.errors import InputError
from llmlab.model.lm import LM, decoder_layers

ROWS, CONTEXT = 64, 512  # calibration rows and their tokens


def calibration_rows(lm: LM, text: str, *, rows: int = ROWS, context: int = CONTEXT) -> torch.Tensor:
    """The first `rows` x `context` tokens of a text, [rows, context]; fewer rows if the text is shorter, and shorter
    ones where the model has fewer positions.

    Raises InputError if the text has not a single full row.
    """
    context = min(context, lm.card.context_length)
    ids = torch.tensor(lm.input_ids(text))
    whole = min(rows, len(ids) // context)
    if whole < 1:
        raise InputError(f"the calibration text has {len(ids)} tokens: give at least one row of {context}.")
    return ids[: whole * context].view(whole, context)


class _Reached(Exception):  # no error: how a forward pass ends when its inputs are known
    pass


class _Passed(torch.Tensor):
    """What a model takes for a layer's output, whether it expects a tensor or a tuple of which that is the first."""

    def __getitem__(self, index: Any) -> Any:
        return self if isinstance(index, int) and index == 0 else super().__getitem__(index)


@dataclass(frozen=True)
class Call:
    """What a model calls a layer with, beside the hidden states: masks and positions may differ from layer to layer."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """The layer's output for hidden states [rows, tokens, hidden]."""
        output = layer(hidden_states, *self.args, **self.kwargs)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


@torch.no_grad()
def layer_calls(lm: LM, rows: torch.Tensor) -> tuple[torch.Tensor, list[Call]]:
    """Hidden states [rows, tokens, hidden] that the first layer gets, and how the model calls each of its layers.

    No layer computes anything: each hands on what it gets, so they may be on the meta device.

    Raises InputError for a model that does not call its layers once each, in order.
    """
    layers = decoder_layers(lm.model)[1]
    calls: list[Call] = []
    first: list[torch.Tensor] = []
    own = [vars(layer).get("forward") for layer in layers]

    def stand_in(index: int) -> Callable[..., torch.Tensor]:
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            if index != len(calls):
                raise InputError(f"{lm.name} does not call its layers once each, in order: it cannot be quantized.")
            hidden_states = args[0] if args else kwargs.pop("hidden_states")
            calls.append(Call(args[1:], kwargs))
            first.append(hidden_states)
            if len(calls) == len(layers):
                raise _Reached
            return hidden_states.as_subclass(_Passed)  # type: ignore[no-any-return]  # untyped in torch

        return forward

    try:
        for index, layer in enumerate(layers):
            vars(layer)["forward"] = stand_in(index)
        lm.model(input_ids=rows.to(lm.device), use_cache=False)
    except _Reached:
        pass
    finally:
        for layer, forward in zip(layers, own, strict=True):
            vars(layer).pop("forward") if forward is None else vars(layer).update(forward=forward)
    return first[0], calls
