"""How long a layout takes: compute, communication and bubbles, each by one formula."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llmlab.base.errors import InputError
from llmlab.data import ENDING_TOKENS, FULL_SET, QUESTION_TOKENS
from llmlab.model.card import ModelCard
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.pipeline import stage_layers

DEVICES: dict[str, dict[str, float | str]] = json.loads((Path(__file__).parent / "devices.json").read_text())
MOST_MFU = 0.7  # no projection assumes more of a busy device, whatever was measured here


@dataclass(frozen=True)
class Device:
    """FLOP/s dense in 16 bits, bytes/s of the memory and of the link one way, seconds a message; with their source."""

    name: str
    memory: str
    flops: float
    bandwidth: float
    link: float
    latency: float
    source: str


@dataclass(frozen=True)
class Workload:
    """What is to be computed.

    Attributes:
        name: "hellaswag" or "decode".
        nodes: tokens through the model (scoring); or sequences that a replica decodes together.
        asked: positions at which the output head works.
        attended: mean number of earlier tokens that a token attends to.
        per_pass: tokens of a forward pass.
    """

    name: str
    nodes: int
    asked: int
    attended: int
    per_pass: int = 4096


@dataclass(frozen=True)
class Prediction:
    """What a layout costs.

    Attributes:
        seconds: of the whole job; of one step of decoding.
        flops: FLOPs of the job.
        bytes_moved: over links, of all devices.
        bubble: share of the pipeline's time in which a stage waits.
        mfu: FLOPs over what all devices could have done in that time.
    """

    seconds: float
    flops: float
    bytes_moved: float
    bubble: float
    mfu: float


def device(name: str) -> Device:
    """A device of devices.json. Raises InputError for an unknown one."""
    if name not in DEVICES:
        raise InputError(f"unknown device {name!r}: choose one of {', '.join(DEVICES)}, or give memory alone.")
    return Device(**DEVICES[name])  # type: ignore[arg-type]


def workload(name: str, batch: int = 1, context: int = 512) -> Workload:
    """ "hellaswag": the full set, shared prefixes. "decode": one step of `batch` sequences after `context` tokens."""
    if name == "hellaswag":
        endings = 4 * (ENDING_TOKENS.mean - 1)  # an ending's last token predicts nothing that is asked for
        nodes = FULL_SET * (1 + QUESTION_TOKENS.mean + endings)  # with the BOS token
        return Workload(name, nodes, FULL_SET * (1 + endings), QUESTION_TOKENS.mean)
    if name == "decode":
        return Workload(name, batch, batch, context, per_pass=batch)
    raise InputError(f"unknown workload {name!r}: choose hellaswag or decode.")


def predict(
    card: ModelCard, cuts: Cuts, on: Device, job: Workload, *, bits: int = 16, mfu: float = MOST_MFU
) -> Prediction:
    """Seconds of a job.

    Scoring is bound by arithmetic: a busy device reaches `mfu` of its peak (at most MOST_MFU is assumed), the slowest
    stage sets the pace, and filling the pipeline costs (stages - 1) of its passes. Decoding is bound by memory: a
    device reads its weights at that share of its bandwidth, stage after stage. Tensor parallelism adds two ring
    all-reduces a layer, 2 (t - 1) / t of the hidden states each, which nothing overlaps; a pipeline's sends are
    overlapped.

    Args:
        card: the model.
        cuts: the layout.
        on: the device.
        job: what is computed.
        bits: of the weights, for decoding.
        mfu: share of the peak (scoring) or of the bandwidth (decoding) that one busy device reaches.
    """
    tensor, stages, decode = cuts.tensor, cuts.pipeline, job.name == "decode"
    mfu = min(mfu, MOST_MFU)
    layer_flops = (2 * card.active_parameters + card.attention_flops * (job.attended + 1)) / card.layers
    # Of one replica: scoring shares its nodes out, decoding gives each replica a batch of its own.
    nodes = job.nodes if decode else job.nodes / cuts.data
    passes = 1 if decode else max(1, round(nodes / job.per_pass))
    flops = job.nodes * card.layers * layer_flops + 2 * job.asked * card.head_parameters
    flops *= cuts.data if decode else 1
    hidden_bytes = 2 * card.hidden_size
    ring = 2 * (tensor - 1) / tensor
    reduced = 2 * card.layers * nodes * hidden_bytes * ring  # bytes a tensor rank sends, over all its stages
    moved = cuts.data * (tensor * reduced + (stages - 1) * nodes * hidden_bytes)
    wires = 0.0
    if tensor > 1:
        wires = reduced / stages / on.link + 2 * card.layers / stages * passes * ring * tensor * on.latency
    if decode:
        read = card.weight_bytes(bits) / tensor + nodes * job.attended * card.kv_bytes_per_token / tensor
        seconds = read / (on.bandwidth * mfu) + stages * wires + (stages - 1) * on.latency
        bubble = (stages - 1) / stages
    else:
        head = job.asked / job.nodes * 2 * card.head_parameters / layer_flops  # the head's cost in layers
        slowest = max(
            end - first + (head if end == card.layers else 0) for first, end in stage_layers(card.layers, stages, head)
        )
        layer_seconds = nodes * layer_flops / (tensor * on.flops * mfu)
        seconds = (slowest * layer_seconds + wires) * (passes + stages - 1) / passes
        bubble = 1 - ((card.layers + head) / stages * layer_seconds + wires) / seconds
    return Prediction(seconds, flops, moved, bubble, flops / (cuts.ranks * on.flops * seconds))
