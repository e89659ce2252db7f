"""Pipeline parallelism: stages of whole layers, hidden states from one to the next (GPipe, arXiv 1811.06965).

`attach` makes a stage's forward pass take part in the whole model's: every rank of the pipeline calls the model with
the same arguments, receives the hidden states before its layers, sends those after them, and gets the logits. So
everything that runs on one device runs on a pipeline, one batch at a time: the *naive* schedule, in which one stage
works and the others wait. `stream` sends many batches through: while stage 1 computes batch 1, stage 0 is at batch 2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput

from llmlab.base.errors import InputError
from llmlab.model.lm import decoder_layers
from llmlab.sharding.busy import Busy
from llmlab.sharding.peers import Peers, Wait

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmlab.model.card import ModelCard

IN_FLIGHT = 2  # sends that are not waited for
ASKED = 0.6  # of a trie's nodes ask the output head
Batch = dict[str, Any]  # keyword arguments of a model's forward pass, `input_ids` and `logits_to_keep` among them


@dataclass
class Stage:
    """This rank's place in a pipeline.

    Attributes:
        peers: the stages of this pipeline.
        hidden_states: what this stage received, and then what it sends.
        output: of the family's forward pass here.
        busy: takes the time of each computation, on the last stage with what becomes of the logits; None: nobody does.
        bytes_sent: of hidden states, logits and all-reduces of layers.
    """

    peers: Peers
    hidden_states: torch.Tensor | None = None
    output: ModelOutput | None = None
    busy: Busy | None = None
    bytes_sent: int = 0

    @property
    def index(self) -> int:
        """Its number."""
        return self.peers.index

    @property
    def size(self) -> int:
        """How many stages there are."""
        return self.peers.size

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


def layers_of(card: ModelCard, stages: int) -> list[tuple[int, int]]:
    """The `stage_layers` of a model: what ranks load and what the planner counts."""
    return stage_layers(card.layers, stages, ASKED * card.head_parameters / (card.linear_parameters / card.layers))


class NoEmbedding(torch.nn.Module):
    """In the place of the embedding on every stage but the first: zeros of its width, which nobody reads."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight  # [0, width]; it says where this stage computes

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] to zeros [..., width]."""
        return self.weight.new_zeros(*ids.shape, self.weight.shape[-1])


class NoHead(torch.nn.Module):
    """In the place of the output head on every stage but the last: logits of no token."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight  # [0, width]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to [..., 0]."""
        return hidden_states[..., :0]


def attach(model: PreTrainedModel, stage: Stage) -> None:
    """Make a model whose stack holds this stage's layers alone compute as one of the pipeline.

    Every stage runs the family's own forward pass, so whatever the family does around its layers (positions, norms,
    scales, caps, projections) is done by its own code. Two hooks join the stages: what comes into the first layer of
    a later stage is replaced by what the stage before sent, and what leaves the last layer is caught. Before the
    first and behind the last stage's layers nothing but the last stage's logits counts.
    """
    stack = decoder_layers(model)[1]
    embedding = model.get_input_embeddings().weight
    empty = torch.nn.Parameter(embedding.new_empty(0, embedding.shape[-1]), requires_grad=False)
    if not stage.first:
        model.set_input_embeddings(NoEmbedding(empty))
        stack[0].register_forward_pre_hook(functools.partial(_enter, stage), with_kwargs=True)
    if not stage.last:
        model.set_output_embeddings(NoHead(empty))
        stack[-1].register_forward_hook(functools.partial(_leave, stage))

    def forward(
        model: PreTrainedModel, input_ids: torch.Tensor, logits_to_keep: int | torch.Tensor = 0, **kwargs: Any
    ) -> ModelOutput:
        """The whole model's forward pass, on every rank of the pipeline."""
        batch = {"input_ids": input_ids, "logits_to_keep": logits_to_keep, **kwargs}
        finished: list[torch.Tensor] = []
        stream(model, stage, [batch], lambda _, logits: finished.append(logits.to(model.dtype)))
        if not stage.last:
            keep = logits_to_keep
            kept = len(keep) if isinstance(keep, torch.Tensor) else keep or input_ids.shape[1]
            finished.append(_empty(model, len(input_ids), kept, model.config.vocab_size))
        if stage.size > 1:
            stage.peers.spread(finished[0], stage.size - 1)
        if stage.last:
            stage.bytes_sent += finished[0].nbytes * (stage.size - 1)
        output, stage.output = stage.output, None
        assert output is not None
        output.logits = finished[0]  # beside it stands what the family's own output says of this stage, such as a cache
        return output

    model.forward = MethodType(forward, model)  # bound, so that a copy of the model can bind it anew


def _enter(stage: Stage, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: Batch) -> tuple[tuple[Any, ...], Batch]:
    """What the stage before sent goes into this stage's first layer."""
    if args:
        return (stage.hidden_states, *args[1:]), kwargs
    if "hidden_states" not in kwargs:
        raise InputError(f"{type(layer).__name__} takes no hidden states that a stage could hand on.")
    return args, kwargs | {"hidden_states": stage.hidden_states}


def _leave(stage: Stage, layer: torch.nn.Module, args: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
    """What this stage's last layer computed goes to the next stage."""
    stage.hidden_states = output[0] if isinstance(output, tuple) else output


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

    NCCL carries out what two ranks send one another, in both directions, in the order in which each of them posts it.
    In the naive schedule the first stage's next send hangs on a word of the last one, so nothing is posted ahead of it:
    between two stages that word would wait behind the receive of a batch which waits for that word. For the same reason
    nothing here waits for a whole GPU (`torch.cuda.synchronize`), receives that were posted ahead among it.

    Args:
        model: prepared by `attach`.
        stage: this rank's.
        batches: what the model is asked, one after the other.
        finish: called on the last stage with each batch's number and logits, in order.
        naive: let a batch in only when the one before it has left, as accelerate's device_map runs.
    """
    naive = naive and stage.size > 1
    peers = stage.peers
    sending: list[Wait] = []
    coming = None if naive else _receive(model, stage, batches[:1])
    for number, batch in enumerate(batches):
        if naive:
            if number and stage.first:
                peers.receive(_empty(model, 1), stage.size - 1)()
            coming = _receive(model, stage, [batch])
        if coming is not None:
            wait, stage.hidden_states = coming
            wait()
            coming = None if naive else _receive(model, stage, batches[number + 1 : number + 2])
        with stage.busy.working() if stage.busy else nullcontext():
            output = _compute(model, stage, batch)
            if stage.last:
                finish(number, output)
        if stage.last:
            del output  # logits are large: the next pass needs their memory
            if naive and number + 1 < len(batches):
                peers.send(_empty(model, 1), 0)()  # the word that a batch has left
            continue
        stage.bytes_sent += output.nbytes
        sending.append(peers.send(output, stage.index + 1))
        while len(sending) > IN_FLIGHT:
            sending.pop(0)()
    for wait in sending:
        wait()


def _receive(model: PreTrainedModel, stage: Stage, batches: list[Batch]) -> tuple[Wait, torch.Tensor] | None:
    """Begin to receive the hidden states of a batch, if there is one and a stage before this one."""
    if stage.first or not batches:
        return None
    hidden_states = _empty(model, *batches[0]["input_ids"].shape, model.config.hidden_size).to(_stream_dtype(model))
    return stage.peers.receive(hidden_states, stage.index - 1), hidden_states


def _compute(model: PreTrainedModel, stage: Stage, batch: Batch) -> torch.Tensor:
    """This stage's share: hidden states [batch, tokens, hidden]; on the last stage logits [batch, kept, vocabulary]."""
    stage.output = None  # the pass before this one's
    stage.output = type(model).forward(model, **batch)
    output: torch.Tensor = stage.output.logits
    if not stage.last:
        assert stage.hidden_states is not None
        output = stage.hidden_states.to(_stream_dtype(model))
    return output.contiguous()


def _stream_dtype(model: PreTrainedModel) -> torch.dtype:
    """Of the hidden states between layers: Mamba and its like may keep them in fp32."""
    return torch.float32 if getattr(model.config, "residual_in_fp32", False) else model.dtype


def _empty(model: PreTrainedModel, *shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=model.dtype, device=model.device)
