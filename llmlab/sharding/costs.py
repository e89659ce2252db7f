"""What a decoder layer costs on a device: its matmuls by their shapes, the kernels beside them, and their launches.

    seconds = max(matmuls + traffic / bandwidth, launches x LAUNCH)

A matmul [M, K] x [K, N] is cut into tiles that the multiprocessors work at in waves: a last wave that is not full costs
as much as a full one. Of full waves a device reaches the share of its peak that is measured on large random matrices.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from llmlab.base.errors import InputError
from llmlab.model.card import ModelCard

DEVICES: dict[str, dict[str, float | str]] = json.loads((Path(__file__).parent / "devices.json").read_text())
STREAM = 0.83  # of the memory's bandwidth, which streaming kernels reach: on a V100 (Jia et al., arXiv 1804.06826)
LAUNCH = 10e-6  # seconds in which Python and torch launch one kernel
TILES = ((128, 128), (128, 256), (256, 128))  # of cuBLAS's large matmuls; it takes the one that suits a shape


@dataclass(frozen=True)
class Device:
    """A device of devices.json.

    Attributes:
        flops: FLOP/s dense in 16 bits, by the data sheet.
        matmul: share of them that large matmuls of random numbers reach, as measured.
        sms: multiprocessors; 0 where matmuls are not cut into waves.
        bandwidth: bytes/s of the memory.
        link, pair: bytes/s one way, over all links of a device together (rings use them all), and to one other device.
        latency: seconds a message.
        idle, tdp: watts while it waits and at full work.
        idle_source: of the first, which no data sheet states.
        source: of all else.
    """

    name: str
    memory: str
    flops: float
    matmul: float
    sms: int
    bandwidth: float
    link: float
    pair: float
    latency: float
    idle: float
    tdp: float
    idle_source: str
    source: str


def device(name: str) -> Device:
    """A device of devices.json. Raises InputError for an unknown one."""
    if name not in DEVICES:
        raise InputError(f"unknown device {name!r}: choose one of {', '.join(DEVICES)}, or give memory alone.")
    return Device(**DEVICES[name])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Kernels:
    """What a program runs in a layer; counted on LLaMA's, and by a test again.

    Attributes:
        name: of the program.
        launches: kernels of a layer, matmuls among them.
        hidden, intermediate: values of the hidden width, and of the MLP's, that they read and write for a token beside
            the matmuls.
        scores: the same for each head and key: 0 where attention is one kernel.
    """

    name: str
    launches: int
    hidden: float
    intermediate: float
    scores: float = 0.0


FUSED = Kernels("attention and norms of one kernel each", 24, 34, 5)
FAMILY = Kernels("transformers' own norms", 38, 66, 5)
EAGER = Kernels("transformers' eager attention and norms", 44, 68, 5, 12)


def layer_seconds(card: ModelCard, on: Device, rows: float, attended: float, tensor: int, kernels: Kernels) -> float:
    """Of one decoder layer, cut `tensor` ways, over `rows` tokens that attend to `attended` earlier ones each."""
    flops = 2 * card.active_parameters / card.layers * rows / tensor
    matmuls = flops / (on.flops * on.matmul * _efficiency(card, on, rows, tensor))
    attention = card.attention_flops / card.layers * (attended + 1) * rows / tensor / (on.flops * on.matmul)
    values = kernels.hidden * card.hidden_size
    values += (kernels.intermediate * card.intermediate_size + kernels.scores * card.heads * attended) / tensor
    return max(matmuls + attention + 2 * rows * values / (on.bandwidth * STREAM), kernels.launches * LAUNCH)


def unpack_seconds(card: ModelCard, on: Device, bits: int, tensor: int) -> float:
    """Of a layer's packed weights, which every pass reads and writes as 16 bits before it multiplies."""
    traffic = card.linear_parameters / card.layers / tensor * (bits / 8 + 2)
    return 0.0 if bits >= 16 else traffic / (on.bandwidth * STREAM)


def head_seconds(card: ModelCard, on: Device, rows: float, tensor: int) -> float:
    """Of the output head at `rows` positions."""
    return 2 * card.head_parameters * rows / tensor / (on.flops * on.matmul)


def wave_efficiency(rows: float, columns: float, sms: int) -> float:
    """Share of the multiprocessors' time that goes into a matmul's outputs [rows, columns], the best tiles taken."""
    if not sms:
        return 1.0
    waves = (math.ceil(math.ceil(rows / m) * math.ceil(columns / n) / sms) * m * n for m, n in TILES)
    return rows * columns / (min(waves) * sms)


def matrices_into_mlp(card: ModelCard) -> float:
    """How many there are: two where it has a gate."""
    attention = 2 * card.hidden_size * (card.heads + card.kv_heads) * card.head_dim
    rest = card.active_parameters / card.layers - attention
    return max(0.0, rest / (card.hidden_size * card.intermediate_size) - 1)


def _efficiency(card: ModelCard, on: Device, rows: float, tensor: int) -> float:
    """The same of a layer's matmuls together: FLOPs over what the time of all their waves could have done."""
    hidden, mlp = card.hidden_size, card.intermediate_size / tensor
    query, key = card.heads * card.head_dim / tensor, card.kv_heads * card.head_dim / tensor
    attention = [(hidden, query), (hidden, key), (hidden, key), (query, hidden)]
    into = matrices_into_mlp(card)
    work = [(k * n, n) for k, n in attention] + [(into * hidden * mlp, mlp), (mlp * hidden, hidden)]
    return sum(w for w, _ in work) / sum(w / wave_efficiency(rows, n, on.sms) for w, n in work)
