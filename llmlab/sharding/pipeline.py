"""Pipeline parallelism: stages of whole layers, hidden states from one to the next (GPipe, arXiv 1811.06965).

`attach` makes a stage's forward pass take part in the whole model's: every rank of the pipeline calls the model with
the same arguments, receives the hidden states before its layers, sends those after them, and gets the logits. So
everything that runs on one device runs on a pipeline, one batch at a time: the *naive* schedule, in which one stage
works and the others wait. `stream` sends many batches through: while stage 1 computes batch 1, stage 0 is at batch 2.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from transformers.modeling_outputs import CausalLMOutputWithPast


@dataclass
class Stage:
    """This rank's place in a pipeline.

    Attributes:
        index, size: stage number and how many there are.
        ranks: global rank of each stage.
        group: the process group of those ranks.
        busy: (start, end) of each computation, seconds on this machine's monotonic clock.
        bytes_sent: of hidden states, logits and all-reduces of layers.
    """

    index: int
    size: int
    ranks: list[int]
    group: Any
    busy: list[tuple[float, float]] = field(default_factory=list)
    bytes_sent: int = 0

    @property
    def first(self) -> bool:
        """Whether token ids come in here."""
        return self.index == 0

    @property
    def last(self) -> bool:
        """Whether logits go out here."""
        return self.index == self.size - 1


def stage_layers(layers: int, stages: int, head: float = 0.0) -> list[tuple[int, int]]:
    """First and end layer of each stage, so that the slowest stage is as fast as can be.

    `head` is the output head's cost in layers; it weighs on the last stage. At least one layer a stage.
    """
    best, cost = [(0, layers)], float("inf")
    # Earlier stages are equal up to one layer, the last takes what is best: try every size of it.
    for last in range(1, layers - stages + 2):
        rest = layers - last
        bounds = [(rest * s // max(1, stages - 1), rest * (s + 1) // max(1, stages - 1)) for s in range(stages - 1)]
        bounds.append((rest, layers))
        slowest = max([end - first for first, end in bounds[:-1]] + [last + head])
        if slowest < cost and (stages > 1 or rest == 0):
            best, cost = bounds, slowest
    return best


class NoPositions(torch.nn.Module):
    """In the place of OPT's learned positions on every stage but the first."""

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        """Nothing to add."""
        return torch.zeros(1, dtype=torch.uint8)  # moves to any device, adds to any dtype


def attach(model: Any, stage: Stage) -> None:
    """Make a model that holds this stage's layers alone compute as one of the pipeline."""
    body = getattr(model.base_model, "decoder", model.base_model)
    if not stage.first:
        for name in ("embed_positions", "project_in"):
            if getattr(body, name, None) is not None:
                setattr(body, name, NoPositions() if name == "embed_positions" else None)
    if not stage.last:
        for name in ("norm", "final_layer_norm", "project_out"):
            if getattr(body, name, None) is not None:
                setattr(body, name, None if name != "norm" else torch.nn.Identity())
    model.stage = stage
    model.forward = MethodType(_forward, model)


def _forward(model: Any, input_ids: torch.Tensor, logits_to_keep: int | torch.Tensor = 0, **kwargs: Any) -> Any:
    """The whole model's forward pass, on every rank of the pipeline."""
    stage: Stage = model.stage
    hidden = None if stage.first else _receive(model, input_ids.shape)
    output = compute(model, input_ids, hidden, logits_to_keep, kwargs)
    if not stage.last:
        stage.bytes_sent += output.nbytes
        dist.send(output, stage.ranks[stage.index + 1], group=stage.group)
        kept = _kept(input_ids.shape[1], logits_to_keep)
        output = torch.empty(len(input_ids), kept, model.config.vocab_size, dtype=model.dtype, device=model.device)
    else:
        stage.bytes_sent += output.nbytes * (stage.size - 1)
        output = output.contiguous()
    if stage.size > 1:
        dist.broadcast(output, stage.ranks[-1], group=stage.group)
    return CausalLMOutputWithPast(logits=output, past_key_values=kwargs.get("past_key_values"))


def compute(
    model: Any, input_ids: torch.Tensor, hidden: torch.Tensor | None, logits_to_keep: Any, kwargs: dict[str, Any]
) -> torch.Tensor:
    """This stage's share: hidden states [batch, tokens, hidden]; on the last stage logits [batch, kept, vocabulary]."""
    begin = time.monotonic()
    entry = {"input_ids": input_ids} if hidden is None else {"inputs_embeds": hidden}
    output: torch.Tensor = model.base_model(**entry, **kwargs).last_hidden_state
    if model.stage.last:
        where = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else logits_to_keep
        output = model.get_output_embeddings()(output[:, slice(None) if isinstance(where, int) else where])
    if output.is_cuda:
        torch.cuda.synchronize()
    model.stage.busy.append((begin, time.monotonic()))
    return output.contiguous()


def _kept(tokens: int, logits_to_keep: int | torch.Tensor) -> int:
    if isinstance(logits_to_keep, torch.Tensor):
        return len(logits_to_keep)
    return logits_to_keep or tokens


def _receive(model: Any, shape: torch.Size) -> torch.Tensor:
    hidden = torch.empty(*shape, model.config.hidden_size, dtype=model.dtype, device=model.device)
    dist.recv(hidden, model.stage.ranks[model.stage.index - 1], group=model.stage.group)
    return hidden


@torch.inference_mode()
def stream(
    model: Any,
    batches: list[dict[str, Any]],
    finish: Callable[[int, torch.Tensor], None],
    *,
    naive: bool = False,
    ahead: int = 2,
) -> None:
    """Send batches through the pipeline, each stage working on another one.

    Every rank of the pipeline calls it with the same batches. Receives are posted one batch ahead and sends are not
    waited for until `ahead` of them are on their way, so that transfers overlap computation.

    Args:
        model: prepared by `attach`.
        batches: keyword arguments of the model's forward pass, `input_ids` and `logits_to_keep` among them.
        finish: called on the last stage with each batch's number and logits, in order.
        naive: let a batch in only when the one before it has left, as accelerate's device_map runs.
        ahead: sends in flight.
    """
    stage: Stage = model.stage
    sending: list[tuple[Any, torch.Tensor]] = []
    token = torch.zeros(1, device=model.device)
    coming = _post(model, batches, 0)
    for number, batch in enumerate(batches):
        kwargs = dict(batch)
        input_ids, keep = kwargs.pop("input_ids"), kwargs.pop("logits_to_keep")
        hidden = None
        if naive and stage.size > 1 and number and stage.first:
            dist.recv(token, stage.ranks[-1], group=stage.group)
        if coming is not None:
            work, hidden = coming
            work.wait()
            coming = _post(model, batches, number + 1)
        output = compute(model, input_ids, hidden, keep, kwargs)
        if stage.last:
            finish(number, output)
            stage.busy[-1] = (stage.busy[-1][0], time.monotonic())  # what becomes of the logits is work, too
            if naive and stage.size > 1 and number + 1 < len(batches):
                dist.send(token, stage.ranks[0], group=stage.group)
            continue
        stage.bytes_sent += output.nbytes
        sending.append((dist.isend(output, stage.ranks[stage.index + 1], group=stage.group), output))
        while len(sending) > ahead:
            sending.pop(0)[0].wait()
    for work, _ in sending:
        work.wait()


def _post(model: Any, batches: list[dict[str, Any]], number: int) -> tuple[Any, torch.Tensor] | None:
    stage: Stage = model.stage
    if stage.first or number >= len(batches):
        return None
    shape = batches[number]["input_ids"].shape
    hidden = torch.empty(*shape, model.config.hidden_size, dtype=model.dtype, device=model.device)
    return dist.irecv(hidden, stage.ranks[stage.index - 1], group=stage.group), hidden
