"""A place's part of a model, put together from its slices of the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llmlab.base.errors import InputError
from llmlab.kernels.packed_linear import QuantLinear, prepare
from llmlab.model.fill import Rule, Slices, Tensors, fill
from llmlab.model.gptq_checkpoint import GPTQSettings, finish_packed
from llmlab.model.lm import decoder_layers
from llmlab.sharding import pipeline, tensor
from llmlab.sharding.peers import Peers
from llmlab.sharding.pipeline import Stage
from llmlab.sharding.tensor import Cut, Cutter, Part

LINEARS = (torch.nn.Linear, QuantLinear)


@dataclass(frozen=True)
class Place:
    """Where a rank stands in a layout: its replica, its stage with (first, end) layer, and its part of each layer."""

    data: int
    stage: Stage
    layers: tuple[int, int]
    cut: Cut
    cut_peers: Peers


def assemble(
    model: PreTrainedModel, tensors: Tensors, device: torch.device, place: Place, settings: GPTQSettings | None = None
) -> None:
    """Make an empty model this place's part of it, which computes the whole when all parts are called together.

    Args:
        model: an `empty_model`, packed Linears in their place.
        tensors: its weights.
        device: where they go.
        place: which part of them.
        settings: of a packed checkpoint.
    """
    cutter = tensor.Cutter(model, place.cut)
    fill(model, tensors, device, rule=_around_the_layers(model, place))
    head = model.get_output_embeddings()
    if isinstance(head, QuantLinear) and place.stage.last and settings:
        finish_packed(head, "the output head", tensors.folder, settings)
        head.out_features = head.scales.shape[1]
    parts = _fill_layers(model, tensors, device, place, cutter, settings)
    if place.cut.size > 1:
        tensor.attach(model, cutter, parts, place.cut_peers, place.stage)
    if place.stage.size * place.cut.size > 1:  # else it is a model like any other: its passes can be captured
        pipeline.attach(model, place.stage)
    prepare(model, model.dtype)


def _around_the_layers(model: PreTrainedModel, place: Place) -> Rule:
    """The rule for all but the layers: embedding and head are cut by vocabulary, and empty where nobody asks them."""
    path, _ = decoder_layers(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    needed = {embedding: place.stage.first or (place.stage.last and model.config.tie_word_embeddings)}
    needed[head] = place.stage.last
    rows = place.cut.of(len(embedding.weight), place.cut.unit)

    def rule(name: str, owner: torch.nn.Module, shape: torch.Size) -> Slices | None:
        if owner not in needed:
            return None if name.startswith(f"{path}.") else ()
        if not needed[owner]:
            return None if isinstance(owner, QuantLinear) else (slice(0, 0),)
        return () if place.cut.size == 1 else _slices(name, owner, shape, tensor.Part(tensor.OUTPUTS, *rows, shape[0]))

    return rule


def _fill_layers(
    model: PreTrainedModel, tensors: Tensors, device: torch.device, place: Place, cutter: Cutter,
    settings: GPTQSettings | None,
) -> dict[str, Part]:  # fmt: skip
    """Fill this stage's layers with this rank's part of them, and drop the others; the parts of Linears, by name."""
    path, stack = decoder_layers(model)
    first, end = place.layers
    parts: dict[str, Part] = {}
    for name, module in stack.named_modules(prefix=path):
        if isinstance(module, LINEARS) and (part := cutter.part(name, (module.out_features, module.in_features))):
            parts[name] = part

    def rule(name: str, owner: torch.nn.Module, shape: torch.Size) -> Slices:
        part = parts.get(name.rpartition(".")[0]) if isinstance(owner, LINEARS) else cutter.part(name, shape)
        return () if part is None or part.kind.blocks > 1 else _slices(name, owner, shape, part)

    for index in range(first, end):
        fill(stack[index], tensors, device, f"{path}.{index}", rule)
        if settings:
            finish_packed(stack[index], f"{path}.{index}", tensors.folder, settings)
        for name, module in stack[index].named_modules(prefix=f"{path}.{index}"):
            if name in parts:
                _fit(module, name, parts[name])
            elif not isinstance(module, LINEARS):
                _cut_blocks(module, name, cutter)
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = index - first  # its place in this stage's KV cache
    model.set_submodule(path, stack[first:end])
    _keep_layers(model.config, first, end)
    return parts


def _keep_layers(config: PreTrainedConfig, first: int, end: int) -> None:
    """What a config says of each layer, such as its type, it says of a stage's layers from now on."""
    layers = config.num_hidden_layers
    for name, value in vars(config).items():
        about_layers = not name.endswith("token_id") and name != "architectures"
        if isinstance(value, list | tuple) and len(value) == layers and about_layers:
            vars(config)[name] = value[first:end]
    config.num_hidden_layers = end - first


def _slices(name: str, owner: torch.nn.Module, shape: torch.Size, part: Part) -> Slices:
    """A rank's part of a tensor `name` of that shape, of a matrix of which it has `part`; of a packed one in groups."""
    matrix, _, what = name.rpartition(".")
    own, whole = slice(part.first, part.end), slice(None)
    outputs = part.kind.dimension == -2
    if not isinstance(owner, QuantLinear):  # [..., outputs, inputs], or a bias of all outputs
        before = max(0, len(shape) - (2 if outputs else 1))
        return () if what == "bias" and not outputs else (whole,) * before + (own,)
    if what == "bias":
        return (own,) if outputs else ()
    words = slice(part.first * owner.bits // 32, part.end * owner.bits // 32)
    slices: dict[str, Slices]
    if outputs:
        slices = {"qweight": (whole, own), "scales": (whole, own), "qzeros": (whole, words)}
    else:
        size = owner.in_features // owner.groups
        if owner.groups > 1 and (part.first % size or part.end % size):
            raise InputError(f"{matrix}: its groups of {size} inputs do not fit this layout: use another one.")
        grids = slice(part.first // size, part.end // size) if owner.groups > 1 else whole
        slices = {"qweight": (words,), "scales": (grids,), "qzeros": (grids,), "g_idx": (own,)}
    return slices.get(what, ())


def _fit(module: torch.nn.Module, name: str, part: Part) -> None:
    """Give a Linear whose tensors were cut its new sizes; the groups of a packed one count from 0 again."""
    if isinstance(module, QuantLinear):
        if part.kind.dimension == -1:
            size = module.in_features // module.groups
            runs = torch.arange(part.first, part.end, device=module.g_idx.device) // size
            if not torch.equal(module.g_idx.long(), runs):
                raise InputError(
                    f"{name}: its groups are not runs of inputs (desc_act): tensor parallelism cannot cut them."
                )
            module.g_idx = (runs - part.first // size).int()
        module.in_features, (module.groups, module.out_features) = len(module.g_idx), module.scales.shape
    elif isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _cut_blocks(module: torch.nn.Module, name: str, cutter: Cutter) -> None:
    """Cut parameters that hold several matrices side by side, which were read whole, within each of them."""
    for what, whole in list(module.named_parameters(recurse=False)):
        part = cutter.part(f"{name}.{what}", whole.shape)
        if part is not None and part.kind.blocks > 1 and part.kind.dimension is not None:
            blocks = torch.split(whole, part.total, dim=part.kind.dimension)
            own = [block.narrow(part.kind.dimension, part.first, part.end - part.first) for block in blocks]
            cut = torch.nn.Parameter(torch.cat(own, dim=part.kind.dimension), requires_grad=False)
            setattr(module, what, cut)
