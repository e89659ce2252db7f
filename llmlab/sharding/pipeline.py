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
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers.modeling_outputs import CausalLMOutputWithPast

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IN_FLIGHT = 2  # sends that are not waited for
Batch = dict[str, Any]  # keyword arguments of a model's forward pass, `input_ids` and `logits_to_keep` among them


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
    group: dist.ProcessGroup
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

    def forward(self, *_: object, **__: object) -> torch.Tensor:
        """Nothing to add."""
        return torch.zeros(1, dtype=torch.uint8)  # moves to any device, adds to any dtype


def attach(model: PreTrainedModel, stage: Stage) -> None:
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

    def forward(
        model: PreTrainedModel, input_ids: torch.Tensor, logits_to_keep: int | torch.Tensor = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """The whole model's forward pass, on every rank of the pipeline."""
        batch = {"input_ids": input_ids, "logits_to_keep": logits_to_keep, **kwargs}
        finished: list[torch.Tensor] = []
        stream(model, stage, [batch], lambda _, logits: finished.append(logits))
        if not stage.last:
            keep = logits_to_keep
            kept = len(keep) if isinstance(keep, torch.Tensor) else keep or input_ids.shape[1]
            finished.append(_empty(model, len(input_ids), kept, model.config.vocab_size))
        if stage.size > 1:
            dist.broadcast(finished[0], stage.ranks[-1], group=stage.group)
        if stage.last:
            stage.bytes_sent += finished[0].nbytes * (stage.size - 1)
        return CausalLMOutputWithPast(logits=finished[0], past_key_values=kwargs.get("past_key_values"))

    model.forward = MethodType(forward, model)  # bound, so that a copy of the model can bind it anew


def stream(
    model: PreTrainedModel,
    stage: Stage,
    batches: list[Batch],
    finish: Callable[[int, torch.Tensor], None],
    *,
    naive: bool = False,
) -> None:
    """Send batches through the pipeline, each stage working on another one.

    Every rank of the pipeline calls it with the same batches. Receives are posted one batch ahead and sends are not
    waited for until IN_FLIGHT of them are on their way, so that transfers overlap computation.

    Args:
        model: prepared by `attach`.
        stage: this rank's.
        batches: what the model is asked, one after the other.
        finish: called on the last stage with each batch's number and logits, in order.
        naive: let a batch in only when the one before it has left, as accelerate's device_map runs.
    """
    naive = naive and stage.size > 1
    sending: list[tuple[dist.Work, torch.Tensor]] = []
    coming = _receive(model, stage, batches[:1])
    for number, batch in enumerate(batches):
        if naive and number and stage.first:
            dist.recv(_empty(model, 1), stage.ranks[-1], group=stage.group)
        hidden_states = None
        if coming is not None:
            work, hidden_states = coming
            work.wait()
            coming = _receive(model, stage, batches[number + 1 : number + 2])
        output = _compute(model, stage, batch, hidden_states)
        if stage.last:
            finish(number, output)
            stage.busy[-1] = (stage.busy[-1][0], time.monotonic())  # what becomes of the logits is work, too
            if naive and number + 1 < len(batches):
                dist.send(_empty(model, 1), stage.ranks[0], group=stage.group)  # the word that a batch has left
            continue
        stage.bytes_sent += output.nbytes
        if sent := dist.isend(output, stage.ranks[stage.index + 1], group=stage.group):
            sending.append((sent, output))
        while len(sending) > IN_FLIGHT:
            sending.pop(0)[0].wait()
    for work, _ in sending:
        work.wait()


def _receive(model: PreTrainedModel, stage: Stage, batches: list[Batch]) -> tuple[dist.Work, torch.Tensor] | None:
    """Begin to receive the hidden states of a batch, if there is one and a stage before this one."""
    if stage.first or not batches:
        return None
    hidden_states = _empty(model, *batches[0]["input_ids"].shape, model.config.hidden_size)
    work = dist.irecv(hidden_states, stage.ranks[stage.index - 1], group=stage.group)
    return (work, hidden_states) if work else None


def _compute(model: PreTrainedModel, stage: Stage, batch: Batch, hidden_states: torch.Tensor | None) -> torch.Tensor:
    """This stage's share: hidden states [batch, tokens, hidden]; on the last stage logits [batch, kept, vocabulary]."""
    begin = time.monotonic()
    kwargs = dict(batch)
    input_ids, keep = kwargs.pop("input_ids"), kwargs.pop("logits_to_keep")
    entry = {"input_ids": input_ids} if hidden_states is None else {"inputs_embeds": hidden_states}
    output: torch.Tensor = model.base_model(**entry, **kwargs).last_hidden_state
    if stage.last:
        where = slice(-keep or None, None) if isinstance(keep, int) else keep
        output = model.get_output_embeddings()(output[:, where])
    if output.is_cuda:
        torch.cuda.synchronize()
    stage.busy.append((begin, time.monotonic()))
    return output.contiguous()


def _empty(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=model.dtype, device=model.device)
