"""A rank's shard of a model: read slice by slice, so that no rank ever holds more than its part plus one tensor."""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from llmlab.base.errors import InputError
from llmlab.kernels.packed_linear import QuantLinear, prepare
from llmlab.model.card import ModelCard, card_from_config
from llmlab.model.fill import Rule, Slices, Tensors, empty_model, fill, local_folder
from llmlab.model.gptq_checkpoint import GPTQSettings, finish_packed, pack_empty, settings_of
from llmlab.model.lm import DTYPES, LM, decoder_layers
from llmlab.model.sources import Source, fingerprint, read_config, resolve
from llmlab.sharding import pipeline, tensor
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.pipeline import Stage, stage_layers
from llmlab.sharding.rank import Rank
from llmlab.sharding.tensor import Cut, part_of


@dataclass
class Shard:
    """A rank's part of a model, ready to run.

    Attributes:
        lm: its `model` computes the whole when all ranks of the replica call it together.
        stage: its place in the replica's pipeline.
        data: this replica's number.
        answers: whether this rank reports what its replica found.
        seconds: that loading took.
        weight_bytes: of this part.
        largest_tensor: bytes of the largest piece that was read at once.
    """

    lm: LM
    stage: Stage
    data: int
    answers: bool
    seconds: float
    weight_bytes: int
    largest_tensor: int


def load_shard(rank: Rank, name: str, cuts: Cuts, dtype: str) -> Shard:
    """Load this rank's part; kept between calls.

    Only its slices are read from the safetensors files, tensor by tensor: no rank ever holds more than its part plus
    one tensor. `random:SHAPE` models get random parts.

    Raises InputError for a layout that does not fit.
    """
    key = f"{name} {cuts.name} {dtype}"
    kept = rank.kept.get(key)
    if isinstance(kept, Shard):
        return kept
    rank.kept.clear()  # one model at a time
    begin = time.perf_counter()
    revision = fingerprint(resolve(name))
    folder, config = _folder_and_config(name)
    card = card_from_config(config, name, dtype)
    settings = settings_of(config)
    place = _place(rank, cuts, card, max(32, settings.group_size) if settings else 1)
    model = empty_model(config, DTYPES[dtype])
    tensors = Tensors(folder, model.base_model_prefix) if folder else RandomTensors()
    if settings:
        pack_empty(model, tensors, settings)
    fill(model, tensors, rank.device, rule=_around_the_layers(model, place))
    _fill_layers(model, tensors, rank.device, place, settings)
    prepare(model, DTYPES[dtype])
    if cuts.tensor > 1:
        _cut_ends(model, place)
        tensor.attach(model, place.cut, place.cut_group, place.stage)
    pipeline.attach(model, place.stage)
    tokenizer = None
    if folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    transformation = settings.transformation if settings else "none"
    lm = LM(model, tokenizer, card, name, revision or "seed:0", transformation)
    answers = place.stage.last and place.cut.index == 0
    seconds = time.perf_counter() - begin
    shard = Shard(lm, place.stage, place.data, answers, seconds, lm.weight_bytes, tensors.largest)
    rank.kept[key] = shard
    return shard


def check_layout(name: str, cuts: Cuts, size: int) -> None:
    """Raise InputError, before any rank works on it, for a layout that fits neither `size` ranks nor the model."""
    config = _folder_and_config(name)[1]
    heads = config.num_attention_heads
    cuts.check(size, config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads)


def _folder_and_config(name: str) -> tuple[Path | None, PreTrainedConfig]:
    source = resolve(name)
    folder = None if source.kind == "random" else local_folder(source)
    return folder, read_config(source if folder is None else Source(name, "folder", str(folder)))


@dataclass(frozen=True)
class _Place:
    """Where a rank stands in a layout: its replica, its stage with (first, end) layer, and its part of each layer."""

    data: int
    stage: Stage
    layers: tuple[int, int]
    cut: Cut
    cut_group: dist.ProcessGroup


def _place(rank: Rank, cuts: Cuts, card: ModelCard, unit: int) -> _Place:
    names = ("data", "pipeline", "tensor")
    mesh = init_device_mesh(rank.device.type, (cuts.data, cuts.pipeline, cuts.tensor), mesh_dim_names=names)
    data, index, part = mesh.get_coordinate() or (0, 0, 0)
    head = card.head_parameters / (card.linear_parameters / card.layers)
    layers = stage_layers(card.layers, cuts.pipeline, 0.6 * head)[index]  # 0.6 of a trie's nodes ask the head
    group = mesh["pipeline"].get_group()
    stage = Stage(index, cuts.pipeline, dist.get_process_group_ranks(group), group)
    return _Place(data, stage, layers, Cut(part, cuts.tensor, unit), mesh["tensor"].get_group())


class RandomTensors(Tensors):
    """Random weights under every name: norms 1, biases 0, matrices normal with standard deviation 0.02."""

    def __init__(self) -> None:
        self.largest = 0

    def has(self, name: str) -> bool:
        """Always."""
        return True

    def read(self, name: str, like: torch.Tensor, part: Slices) -> torch.Tensor:
        """The same numbers for the same name and shape."""
        sizes = [len(range(*piece.indices(n))) for piece, n in zip(part, like.shape, strict=False)]
        sizes += like.shape[len(part) :]
        if len(sizes) == 1:
            return torch.full(sizes, float(name.endswith("weight")))
        return torch.randn(sizes, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).mul_(0.02)


def _around_the_layers(model: PreTrainedModel, place: _Place) -> Rule:
    """The rule for all but the layers: embedding and head are cut by vocabulary, and empty where nobody asks them."""
    path, _ = decoder_layers(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    needed = {embedding: place.stage.first or (place.stage.last and model.config.tie_word_embeddings)}
    needed[head] = place.stage.last
    rows = slice(*place.cut.of(model.config.vocab_size))

    def rule(name: str, owner: torch.nn.Module, shape: torch.Size) -> Slices | None:
        if owner in needed:
            return (rows if needed[owner] else slice(0, 0),)
        return None if name.startswith(f"{path}.") else ()

    return rule


def _fill_layers(
    model: PreTrainedModel, tensors: Tensors, device: torch.device, place: _Place, settings: GPTQSettings | None
) -> None:
    """Fill this stage's layers with this rank's part of them, and drop the others."""
    path, stack = decoder_layers(model)
    first, end = place.layers

    def rule(name: str, owner: torch.nn.Module, shape: torch.Size) -> Slices:
        return _part_of_layer(name, owner, model.config, place.cut)

    for index in range(first, end):
        fill(stack[index], tensors, device, f"{path}.{index}", rule)
        for name, module in stack[index].named_modules(prefix=f"{path}.{index}"):
            if isinstance(module, QuantLinear) and settings:
                finish_packed(module, f"{tensors.folder}: the tensor {name}", settings)
            if place.cut.size > 1:
                _fit(module, name, model.config, place.cut)
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = index - first  # its place in this stage's KV cache
    model.set_submodule(path, stack[first:end])
    model.config.num_hidden_layers = end - first


def _part_of_layer(name: str, owner: torch.nn.Module, config: PreTrainedConfig, cut: Cut) -> Slices:
    """This rank's part of a tensor of a layer: of a Linear's along outputs or inputs (there in whole groups)."""
    linear, _, part = name.rpartition(".")
    if cut.size == 1 or not isinstance(owner, torch.nn.Linear | QuantLinear):
        return ()
    dimension, (first, end) = part_of(linear, config, cut)
    bits, groups = (owner.bits, owner.groups) if isinstance(owner, QuantLinear) else (0, 1)
    own, words, whole = slice(first, end), slice(first * bits // 32, end * bits // 32), slice(None)
    parts: dict[str, Slices]
    if dimension == 0:
        parts = {"weight": (own,), "bias": (own,), "qweight": (whole, own), "scales": (whole, own)}
        parts |= {"qzeros": (whole, words)}
    else:
        size = owner.in_features // groups
        if groups > 1 and (first % size or end % size):
            raise InputError(f"{linear}: its groups of {size} inputs do not fit tensor {cut.size}: use another layout.")
        grids = slice(first // size, end // size) if groups > 1 else whole
        parts = {"weight": (whole, own), "qweight": (words,), "scales": (grids,), "qzeros": (grids,), "g_idx": (own,)}
    slices: Slices = parts.get(part, ())
    return slices


def _fit(module: torch.nn.Module, name: str, config: PreTrainedConfig, cut: Cut) -> None:
    """Give a Linear whose tensors were cut its new sizes; the groups of a packed one count from 0 again."""
    if isinstance(module, QuantLinear):
        dimension, (first, _) = part_of(name, config, cut)
        if dimension == 1:
            size = module.in_features // module.groups
            runs = torch.arange(first, first + len(module.g_idx), device=module.g_idx.device) // size
            if not torch.equal(module.g_idx.long(), runs):
                raise InputError(
                    f"{name}: its groups are not runs of inputs (desc_act): tensor parallelism cannot cut them."
                )
            module.g_idx = (runs - first // size).int()
        module.in_features, (module.groups, module.out_features) = len(module.g_idx), module.scales.shape
    elif isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = module.weight.shape


def _cut_ends(model: PreTrainedModel, place: _Place) -> None:
    """Embedding and head, which hold this rank's rows of the vocabulary, compute the whole."""
    embedding, head, size = model.get_input_embeddings(), model.get_output_embeddings(), model.config.vocab_size
    if place.stage.first:
        first = place.cut.of(size)[0]
        model.set_input_embeddings(tensor.VocabularyEmbedding(embedding.weight, first, place.cut_group))
    if place.stage.last:
        model.set_output_embeddings(tensor.VocabularyHead(head.weight, size, place.cut, place.cut_group))
