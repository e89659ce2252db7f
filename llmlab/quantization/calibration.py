"""Calibration text as rows of tokens, and what a model makes of them before its first layer."""

from __future__ import annotations

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
    ids = torch.tensor(lm.encode(text))
    whole = min(rows, len(ids) // context)
    if whole < 1:
        raise InputError(f"the calibration text has {len(ids)} tokens: give at least one row of {context}.")
    return ids[: whole * context].view(whole, context)


class _Reached(Exception):  # no error: how a forward pass ends when its inputs are known
    pass


@torch.no_grad()
def first_inputs(lm: LM, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, object]]:
    """Hidden states [rows, tokens, hidden] and keyword arguments with which the model calls its first layer."""
    caught: dict[str, object] = {}

    def catch(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        caught.update(kwargs | ({"hidden_states": args[0]} if args else {}))
        raise _Reached

    hook = decoder_layers(lm.model)[1][0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        lm.model(input_ids=rows.to(lm.device), use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    hidden_states = caught.pop("hidden_states")
    assert isinstance(hidden_states, torch.Tensor)
    return hidden_states, caught
