"""How long a layout takes, and what it uses: compute, communication, bubbles, energy, each by one formula."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmlab.base.errors import InputError
from llmlab.data import ENDING_TOKENS, FULL_SET, QUESTION_TOKENS
from llmlab.model.card import ModelCard
from llmlab.sharding.costs import FUSED, STREAM, Device, Kernels, head_seconds, layer_seconds, unpack_seconds
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.pipeline import layers_of

MOST_DEVICES = 4096
NETWORK_LATENCY = 20e-6  # seconds a message from node to node


@dataclass(frozen=True)
class Workload:
    """What is to be computed, and by which program.

    Attributes:
        name: "hellaswag" or "decode".
        nodes: tokens through the model (scoring); or sequences that a replica decodes together.
        asked: positions at which the output head works.
        attended: mean number of earlier tokens that a token attends to.
        per_pass: tokens of a forward pass.
        kernels: what the program runs in a layer.
        naive: whether a pass enters the pipeline when the one before it has left.
    """

    name: str
    nodes: int
    asked: int
    attended: int
    per_pass: int = 4096
    kernels: Kernels = FUSED
    naive: bool = False


@dataclass(frozen=True)
class Nodes:
    """How devices stand together: `size` of them in a node, `network` bytes/s one way from a node to the others."""

    size: int = MOST_DEVICES
    network: float = 25e9

    def misfit(self, cuts: Cuts) -> str | None:
        """Why a layout cannot be placed with its tensor ranks side by side; None where it can."""
        if cuts.ranks > self.size and cuts.tensor % self.size and self.size % cuts.tensor:
            return f"tensor {cuts.tensor} does not fill nodes of {self.size} devices"
        return None


@dataclass(frozen=True)
class Prediction:
    """What a layout costs.

    Attributes:
        seconds: of the whole job; of one step of decoding.
        flops: FLOPs of the job.
        bytes_moved: over links, of all devices.
        bubble: share of the pipeline's time in which a stage waits.
        mfu: FLOPs over what all devices could have done in that time.
        kwh: electricity of all devices.
    """

    seconds: float
    flops: float
    bytes_moved: float
    bubble: float
    mfu: float
    kwh: float

    def price(self, devices: int, an_hour: float) -> float:
        """Of `devices` devices at a price an hour each."""
        return self.seconds / 3600 * devices * an_hour


def workload(name: str, batch: int = 1, context: int = 512, questions: int = FULL_SET) -> Workload:
    """ "hellaswag": its questions, shared prefixes. "decode": one step of `batch` sequences after `context` tokens."""
    if name == "hellaswag":
        endings = 4 * (ENDING_TOKENS.mean - 1)  # an ending's last token predicts nothing that is asked for
        nodes = questions * (1 + QUESTION_TOKENS.mean + endings)  # with the BOS token
        return Workload(name, nodes, questions * (1 + endings), QUESTION_TOKENS.mean)
    if name == "decode":
        return Workload(name, batch, batch, context, per_pass=batch)
    raise InputError(f"unknown workload {name!r}: choose hellaswag or decode.")


def predict(
    card: ModelCard, cuts: Cuts, on: Device, job: Workload, *, bits: int = 16, nodes: Nodes | None = None
) -> Prediction:
    """Seconds and energy of a job.

    Scoring goes pass by pass: a stage takes what its layers take (see `costs`); the first pass goes through all stages,
    and behind it the slowest sets the pace; in a naive schedule every pass goes through alone. Decoding reads the
    weights at the memory's bandwidth, stage after stage. Tensor parallelism adds two ring all-reduces a layer,
    2 (t - 1) / t of the hidden states each, which nothing overlaps; a pipeline's sends are overlapped unless they take
    longer than a stage. Tensor ranks stand side by side in a node, then the stages of a replica. A device draws its
    idle power while it waits and its TDP while it works.

    Args:
        card: the model.
        cuts: the layout.
        on: the device.
        job: what is computed.
        bits: of the weights.
        nodes: how the devices stand together; by default in one node.
    """
    how = _decoding if job.name == "decode" else _scoring
    return how(card, cuts, on, job, bits, nodes or Nodes())


def _scoring(card: ModelCard, cuts: Cuts, on: Device, job: Workload, bits: int, place: Nodes) -> Prediction:
    tensor, stages = cuts.tensor, cuts.pipeline
    share = job.nodes / cuts.data
    passes = math.ceil(share / job.per_pass)
    rows = share / passes
    layer = layer_seconds(card, on, rows, job.attended, tensor, job.kernels) + unpack_seconds(card, on, bits, tensor)
    layer += _reduces(card, cuts, on, rows, place)
    head = head_seconds(card, on, rows * job.asked / job.nodes, tensor)
    bounds = layers_of(card, stages)
    slowest = max(end - first + (head / layer if end == card.layers else 0) for first, end in bounds) * layer
    work = card.layers * layer + head  # of one pass, on all stages
    hops = _hops(card, cuts, on, rows, place)
    through = work + sum(hops)  # of one pass that waits for no other
    seconds = passes * through if job.naive else through + (passes - 1) * max([slowest, *hops])
    flops = job.nodes * card.flops_per_token(job.attended, head=False) + 2 * job.asked * card.head_parameters
    return _prediction(cuts, on, seconds, flops, _moved(card, cuts, share), passes * work / stages / seconds)


def _decoding(card: ModelCard, cuts: Cuts, on: Device, job: Workload, bits: int, place: Nodes) -> Prediction:
    rows, stages = job.nodes, cuts.pipeline
    read = (card.weight_bytes(bits) + rows * job.attended * card.kv_bytes_per_token) / cuts.tensor
    seconds = read / (on.bandwidth * STREAM) + card.layers * _reduces(card, cuts, on, rows, place)
    seconds += sum(_hops(card, cuts, on, rows, place))
    flops = cuts.data * (rows * card.flops_per_token(job.attended, head=False) + 2 * job.asked * card.head_parameters)
    return _prediction(cuts, on, seconds, flops, _moved(card, cuts, rows), 1 / stages)


def _prediction(cuts: Cuts, on: Device, seconds: float, flops: float, moved: float, busy: float) -> Prediction:
    """`busy`: share of its time in which a device works."""
    watts = on.idle + (on.tdp - on.idle) * busy
    mfu = flops / (cuts.ranks * on.flops * seconds)
    return Prediction(seconds, flops, moved, max(0.0, 1 - busy), mfu, cuts.ranks * watts * seconds / 3.6e6)


def _reduces(card: ModelCard, cuts: Cuts, on: Device, rows: float, place: Nodes) -> float:
    """Seconds of a layer's two all-reduces; over the slowest link of the ring."""
    ring = 2 * (cuts.tensor - 1) / cuts.tensor
    within = cuts.tensor <= place.size
    link, latency = (on.link, on.latency) if within else (min(on.link, place.network), NETWORK_LATENCY)
    return 2 * ring * (2 * card.hidden_size * rows / link + cuts.tensor * latency)


def _hops(card: ModelCard, cuts: Cuts, on: Device, rows: float, place: Nodes) -> list[float]:
    """Seconds from each stage to the next one, where a replica has the longest way."""
    sent, stages = 2 * card.hidden_size * rows, cuts.pipeline
    near = sent / on.pair + on.latency
    far = max(near, sent * min(cuts.tensor, place.size) / place.network + NETWORK_LATENCY)  # each tensor rank sends it

    def leaves(stage: int) -> bool:
        first = [(replica * stages + stage) * cuts.tensor for replica in range(min(cuts.data, place.size))]
        return any(rank // place.size != (rank + cuts.tensor) // place.size for rank in first)

    return [far if leaves(stage) else near for stage in range(stages - 1)]


def _moved(card: ModelCard, cuts: Cuts, share: float) -> float:
    """Bytes over links, of all devices; `share`: tokens of a replica."""
    hidden = 2 * card.hidden_size * share
    return cuts.data * hidden * (4 * card.layers * (cuts.tensor - 1) + (cuts.pipeline - 1))
