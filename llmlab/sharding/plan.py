"""What fits where: memory of every layout of data x tensor x pipeline parallelism."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace

import pandas as pd

from llmlab.base.errors import InputError
from llmlab.data import FULL_SET
from llmlab.model.card import ModelCard
from llmlab.sharding.costs import LAUNCH, STREAM, Device
from llmlab.sharding.costs import device as find_device
from llmlab.sharding.cuts import Cuts, all_cuts
from llmlab.sharding.memory import fullest
from llmlab.sharding.predict import MOST_DEVICES, NETWORK_LATENCY, Nodes, Prediction, Workload, predict
from llmlab.sharding.predict import workload as find_workload
from llmlab.sharding.tensor import plan_of

UNITS = {"B": 1, "MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
RESERVE = 2**30  # CUDA context, library workspaces and what the allocator cannot use
BITS = (16, 8, 4, 3, 2)


@dataclass(frozen=True, kw_only=True)
class Layout(Cuts):
    """One way to spread a model over devices; bytes are those of the fullest device.

    `data` replicas, each cut into `pipeline` stages of whole layers, each layer cut `tensor` ways. `problem` says why
    the layout cannot be used; None means it fits.
    """

    weights: int
    kv_cache: int
    activations: int
    reserve: int = RESERVE
    problem: str | None = None
    predicted: Prediction | None = None

    @property
    def bytes(self) -> int:
        """Memory needed on the fullest device."""
        return self.weights + self.kv_cache + self.activations + self.reserve

    @property
    def fits(self) -> bool:
        """Whether the layout can be used."""
        return self.problem is None


@dataclass(frozen=True)
class Plan:
    """All layouts of a model over `devices` devices of `memory` bytes.

    Usable ones first: the fastest where a device and a workload are given, else the one with the least communication.
    """

    card: ModelCard
    devices: int
    memory: int
    bits: int
    batch: int
    context: int
    layouts: list[Layout]
    assumptions: str = ""
    price: float | None = None  # of a device an hour

    @property
    def best(self) -> Layout:
        """The first usable layout.

        Raises InputError if nothing fits; says what the smallest one lacks.
        """
        if self.layouts[0].fits:
            return self.layouts[0]
        nearest = min(self.layouts, key=lambda layout: layout.bytes)
        raise InputError(
            f"{self.card.name} at {self.bits} bits fits on no layout of {self.devices} devices: "
            f"{nearest.name} {nearest.problem}; use more devices, more memory or fewer bits."
        )

    @property
    def title(self) -> str:
        """What was planned, in one line."""
        return (
            f"{self.card.name}, {self.bits}-bit weights, on {self.devices} x {self.memory / 2**30:.4g} GiB; a replica "
            f"holds {self.batch} x {self.context} tokens"
        )

    def table(self) -> pd.DataFrame:
        """A row per layout with GiB of the fullest device by part."""
        rows = []
        for layout in self.layouts:
            parts = ("weights", "kv_cache", "activations", "reserve", "bytes")
            row: dict[str, object] = {"layout": layout.name}
            row |= {part: getattr(layout, part) / 2**30 for part in parts}
            if self.assumptions:
                costs = layout.predicted
                row["seconds"] = round(costs.seconds, 4) if costs else ""
                row["MFU"] = f"{costs.mfu:.0%}" if costs else ""
                row["bubble"] = f"{costs.bubble:.1%}" if costs else ""
                row["GB moved"] = costs.bytes_moved / 1e9 if costs else ""
                row["kWh"] = f"{costs.kwh:.3g}" if costs else ""
                if self.price is not None:
                    row["price"] = f"{costs.price(self.devices, self.price):,.2f}" if costs else ""
            rows.append(row | {"verdict": layout.problem or "fits"})
        return pd.DataFrame(rows).rename(columns={"bytes": "needed", "kv_cache": "KV cache"})

    def __str__(self) -> str:
        notes = f"\n{self.assumptions}" if self.assumptions else ""
        return f"{self.title}\nGiB on the fullest device{notes}\n" + self.table().round(2).to_string(index=False)

    def _repr_html_(self) -> str:
        """The table, for notebooks; its caption says what was planned."""
        return str(self.table().style.format(precision=2).hide(axis="index").set_caption(self.title).to_html())

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        layouts = [
            asdict(layout) | {"name": layout.name, "bytes": layout.bytes, "fits": layout.fits}
            for layout in self.layouts
        ]
        best = self.layouts[0].name if self.layouts[0].fits else None
        settings = {name: getattr(self, name) for name in ("devices", "memory", "bits", "batch", "context", "price")}
        about = {"best": best, "assumptions": self.assumptions}
        return {"model": self.card.as_dict(), **settings, **about, "layouts": layouts}


def plan(
    card: ModelCard,
    *,
    devices: int = 4,
    memory: str | int | None = None,
    bits: int = 16,
    batch: int = 1,
    context: int | None = None,
    device: str | None = None,
    workload: str | None = None,
    questions: int = FULL_SET,
    matmul: float | None = None,
    per_node: int | None = None,
    network: str | int = "25GB",
    price: float | None = None,
) -> Plan:
    """Enumerate every layout and what its fullest device must hold.

    Memory of a device = weights of its stage + KV cache + activations of a pass at its widest point + 1 GiB reserve:
    weights are cut `tensor` ways and in whole layers over `pipeline` stages, embedding on the first stage and head on
    the last; the KV cache is cut the same way; activations are those of `batch` x `context` tokens in a layer, or of
    the logits that scoring asks of them (see `memory`).

    Usable layouts come first. With a device and a workload they are ordered by predicted seconds (see `predict`); else
    by communication: replicas need none, a pipeline sends hidden states between stages, tensor parallelism reduces them
    twice in every layer.

    Args:
        card: the model.
        devices: how many equal devices, all of them used.
        memory: of each device: "32GiB", "24GB" or bytes; by default the device's, or 32 GiB.
        bits: of the decoder layers' matrices; below 16 in groups of 64 with a scale and a zero point.
        batch: sequences that a replica holds at once.
        context: tokens of each; by default the model's context length, at most 2,048.
        device: "v100", "a100", "h100", "h200", "rtx4090" or "cpu": figures with their source in devices.json.
        workload: "hellaswag" (questions of its lengths, shared prefixes) or "decode" (one step of `batch` sequences).
        questions: how many, for "hellaswag"; by default the full set.
        matmul: share of its peak that the device reaches in large matmuls, if you measured it.
        per_node: devices of a node; by default all stand in one.
        network: bytes a second, one way, from a node to the others: "25GB" is one port of 200 Gbit/s.
        price: of a device an hour, in your currency.

    Raises:
        InputError: a number that makes no sense.
    """
    on = find_device(device) if device else None
    if workload and not on:
        raise InputError("a workload needs a device: give device='v100' or another one of devices.json.")
    context = min(2048, card.context_length) if context is None else context
    nodes = Nodes(per_node or devices, parse_bytes(network))
    _check(card, devices, bits, batch, context)
    _check_job(devices, nodes, questions, matmul, price)
    memory = parse_bytes(memory or (on.memory if on else "32GiB"))
    layouts = [_layout(card, cuts, memory, bits, batch * context, nodes) for cuts in all_cuts(devices)]
    layouts.sort(key=lambda x: (not x.fits, -x.data, -x.pipeline) if x.fits else (True, x.bytes, 0))
    if on is None or workload is None:
        return Plan(card, devices, memory, bits, batch, context, layouts)
    on = on if matmul is None else replace(on, matmul=matmul)
    job = find_workload(workload, batch, context, questions)
    layouts = [
        replace(x, predicted=predict(card, x, on, job, bits=bits, nodes=nodes)) if x.fits else x for x in layouts
    ]
    layouts.sort(key=lambda x: (not x.fits, x.predicted.seconds if x.predicted else 0.0))
    told = assumptions(on, job, devices, nodes, price)
    return Plan(card, devices, memory, bits, batch, context, layouts, told, price)


def _check(card: ModelCard, devices: int, bits: int, batch: int, context: int) -> None:
    """Raise InputError for a number that makes no sense."""
    if not 1 <= devices <= MOST_DEVICES:
        raise InputError(f"{devices} devices: give a number from 1 to {MOST_DEVICES}.")
    if bits not in BITS:
        raise InputError(f"{bits} bits: choose one of {', '.join(map(str, BITS))}.")
    if not card.attention_layers:
        raise InputError(f"{card.name} ({card.model_type}) has no attention heads that devices could share: no plan.")
    if batch < 1 or not 1 <= context <= card.context_length:
        raise InputError(
            f"batch {batch} x context {context}: give positive numbers, the context at most {card.context_length}."
        )


def _check_job(devices: int, nodes: Nodes, questions: int, matmul: float | None, price: float | None) -> None:
    if matmul is not None and not 0 < matmul <= 1:
        raise InputError(f"matmul {matmul}: give the share of the peak that is reached, above 0 and at most 1.")
    if nodes.size < 1 or devices % nodes.size:
        raise InputError(f"{devices} devices in nodes of {nodes.size}: give a number that divides them.")
    if questions < 1 or (price or 0) < 0:
        raise InputError(f"{questions} questions at a price of {price}: give a positive number, and no negative price.")


def assumptions(on: Device, job: Workload, devices: int, nodes: Nodes, price: float | None = None) -> str:
    """All that a prediction takes for given, in one line."""
    if job.name == "decode":
        what = f"one step of {job.nodes} sequences a replica; {STREAM:.0%} of {on.bandwidth / 1e9:,.0f} GB/s"
    else:
        what = (
            f"{job.nodes:,} tokens in passes of {job.per_pass:,}, output head at {job.asked:,}; matmuls reach "
            f"{on.matmul:.0%} of {on.flops / 1e12:g} TFLOP/s in full waves of {on.sms} multiprocessors; "
            f"{job.kernels.name} ({job.kernels.launches} launches a layer of {LAUNCH * 1e6:g} µs) at {STREAM:.0%} of "
            f"{on.bandwidth / 1e9:,.0f} GB/s"
        )
    link = f"links {on.link / 1e9:g} GB/s one way, {on.pair / 1e9:g} between two, {on.latency * 1e6:g} µs a message"
    if devices > nodes.size:
        link += f"; {nodes.size} devices a node, {nodes.network / 1e9:g} GB/s and {NETWORK_LATENCY * 1e6:g} µs between"
    power = f"{on.idle:g} W waiting ({on.idle_source}), {on.tdp:g} W at work (assumed: its limit), devices alone"
    cost = "" if price is None else f"; {price:g} a device an hour"
    return f"assumed: {what}, on {on.name}; {link}; {power}{cost} ({on.source}). Not in it: loading, tokenization"


def parse_bytes(text: str | int) -> int:
    """ "32GiB", "24 GB" or a number of bytes to bytes. Raises InputError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?i?B)?\s*", str(text), re.IGNORECASE)
    unit = (match.group(2) or "B").upper() if match else ""
    if match is None or unit not in UNITS or float(match.group(1)) <= 0:
        raise InputError(f"unknown amount of memory {text!r}: write it like 32GiB, 24GB or a number of bytes.")
    return int(float(match.group(1)) * UNITS[unit])


def _layout(card: ModelCard, cuts: Cuts, memory: int, bits: int, tokens: int, nodes: Nodes) -> Layout:
    """What the fullest device holds, and whether it has the memory for it."""
    weights, kv_cache, activations = fullest(card, cuts, bits, tokens)
    layout = Layout(cuts.data, cuts.tensor, cuts.pipeline, weights=weights, kv_cache=kv_cache, activations=activations)
    problem = cuts.misfit(card.layers, card.kv_heads) or nodes.misfit(cuts)
    if cuts.tensor > 1 and not plan_of(card.model_type):
        problem = f"cuts layers, for which transformers has no plan in {card.model_type}"
    if problem is None and layout.bytes > memory:
        problem = f"needs {layout.bytes / 2**30:.1f} GiB a device, has {memory / 2**30:.1f}"
    return replace(layout, problem=problem)
