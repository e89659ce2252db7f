"""A rank's shard of a model: read slice by slice, so that no rank ever holds more than its part plus one tensor."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from llmlab.base.errors import InputError
from llmlab.kernels.packed_linear import QuantLinear, prepare
from llmlab.model.card import card_from_config
from llmlab.model.gptq_checkpoint import settings_of
from llmlab.model.lm import DTYPES, LM, decoder_layers
from llmlab.model.sources import Source, fingerprint, read_config, resolve
from llmlab.model.weights import local_folder, tensor_places
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


def load_shard(rank: Rank, name: str, cuts: Cuts, dtype: str, seed: int = 0) -> Shard:
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
    mesh = init_device_mesh(
        rank.device.type, (cuts.data, cuts.pipeline, cuts.tensor), mesh_dim_names=("data", "pipeline", "tensor")
    )
    place = dict(zip(("data", "pipeline", "tensor"), mesh.get_coordinate() or (), strict=True))
    settings = settings_of(config)
    if settings:
        del config.quantization_config
    unit = max(32, settings["group_size"]) if settings else 1
    cut = Cut(place["tensor"], cuts.tensor, unit)
    head = config.vocab_size * config.hidden_size / (card.linear_parameters / config.num_hidden_layers)
    bounds = stage_layers(config.num_hidden_layers, cuts.pipeline, 0.6 * head)  # 0.6 of a trie's nodes ask the head
    group = mesh["pipeline"].get_group()
    stage = Stage(place["pipeline"], cuts.pipeline, dist.get_process_group_ranks(group), group)
    model, largest = _build(config, folder, bounds[stage.index], stage, cut, settings, DTYPES[dtype], rank.device, seed)
    if cuts.tensor > 1:
        _cut_ends(model, stage, cut, mesh["tensor"].get_group())
        tensor.attach(model, cut, mesh["tensor"].get_group(), stage)
    pipeline.attach(model, stage)
    if folder is not None and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    tokenizer = None if folder is None else AutoTokenizer.from_pretrained(folder, local_files_only=True)
    lm = LM(model, tokenizer, card, name, revision or f"seed:{seed}", "none")
    if settings:
        lm = replace(lm, transformation=f"gptq {settings['bits']} bits, group {settings['group_size']}")
    answers = stage.last and cut.index == 0
    shard = Shard(lm, stage, place["data"], answers, time.perf_counter() - begin, lm.weight_bytes, largest)
    rank.kept[key] = shard
    return shard


def check_layout(name: str, cuts: Cuts, size: int) -> None:
    """Raise InputError, before any rank works on it, for a layout that fits neither `size` ranks nor the model."""
    config = _folder_and_config(name)[1]
    heads = config.num_attention_heads
    cuts.check(size, config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads)


def _folder_and_config(name: str) -> tuple[Path | None, Any]:
    source = resolve(name)
    folder = None if source.kind == "random" else local_folder(source)
    return folder, read_config(source if folder is None else Source(name, "folder", str(folder)))


def _build(
    config: Any, folder: Path | None, layers: tuple[int, int], stage: Stage, cut: Cut, settings: dict[str, Any] | None,
    dtype: torch.dtype, device: torch.device, seed: int,
) -> tuple[Any, int]:  # fmt: skip
    """The model with this rank's layers and parts; also the bytes of the largest tensor that was read."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    path, stack = decoder_layers(model)
    expected = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    linears = {name: m for name, m in model.named_modules() if type(m) is torch.nn.Linear and name.startswith(path)}
    packed = [f"{name}.{part}" for name in linears for part in ("qweight", "qzeros", "scales", "g_idx")]
    places = tensor_places(folder, expected + packed, model.base_model_prefix) if folder else {}
    generator = torch.Generator().manual_seed(seed)
    largest = 0

    def read(name: str, where: tuple[slice, ...], shape: torch.Size) -> torch.Tensor:
        nonlocal largest
        if folder is None:
            sizes = [len(range(*w.indices(n))) for w, n in zip(where, shape, strict=True)]
            if len(sizes) == 1:
                return torch.ones(sizes, dtype=dtype) if name.endswith("weight") else torch.zeros(sizes, dtype=dtype)
            return torch.randn(sizes, generator=generator).mul_(0.02).to(dtype)
        if name not in places:
            raise InputError(f"{folder}: the tensor {name} is missing.")
        file, stored = places[name]
        with safe_open(file, framework="pt") as opened:
            found: torch.Tensor = opened.get_slice(stored)[where]
        if not found.is_contiguous():  # a view would keep the whole tensor in memory, and slow kernels down
            found = found.contiguous()
        largest = max(largest, found.nbytes)
        return found

    kept = torch.nn.ModuleList(stack[layers[0] : layers[1]])
    for local, layer in enumerate(kept):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                cast(Any, module).layer_idx = local  # its place in this stage's KV cache
    names = {id(m): name for name, m in model.named_modules()}
    for owner in [m for layer in kept for m in layer.modules()]:
        _fill(owner, names[id(owner)], read, places, config, cut, settings, dtype)
    parent = model.get_submodule(path.rpartition(".")[0])
    parent.layers = kept
    config.num_hidden_layers = len(kept)
    ends = [m for m in model.modules() if not any(m is inner for inner in kept.modules())]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for owner in ends:
        for part, parameter in list(owner.named_parameters(recurse=False)):
            full = tuple(slice(None) for _ in parameter.shape)
            name = f"{names[id(owner)]}.{part}"
            if owner is head and config.tie_word_embeddings:
                name = f"{names[id(embedding)]}.{part}"
            if owner is embedding or owner is head:
                first, end = cut.of(config.vocab_size)
                full = (slice(first, end), *full[1:])
                if owner is embedding and not (stage.first or (stage.last and config.tie_word_embeddings)):
                    full = (slice(0, 0), *full[1:])
                if owner is head and not stage.last:
                    full = (slice(0, 0), *full[1:])
                if owner is head and config.tie_word_embeddings:
                    continue
            owner.register_parameter(part, _parameter(read(name, full, parameter.shape), dtype))
    if config.tie_word_embeddings:
        head.weight = embedding.weight
    model.to(device).requires_grad_(False)
    prepare(model, dtype)
    return model, largest


def _parameter(tensor_: torch.Tensor, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor_.to(dtype), requires_grad=False)


def _fill(
    owner: torch.nn.Module, name: str, read: Callable[..., torch.Tensor], places: dict[str, Any], config: Any, cut: Cut,
    settings: dict[str, Any] | None, dtype: torch.dtype,
) -> None:  # fmt: skip
    """Read the parameters of one module of a layer; the parts of matrices that belong to this rank."""
    everything = slice(None)
    for child, linear in list(owner.named_children()):
        path = f"{name}.{child}"
        if settings and type(linear) is torch.nn.Linear and f"{path}.qweight" in places:
            setattr(owner, child, _packed(linear, path, read, config, cut, settings, dtype))
    if settings and f"{name}.qweight" in places:
        return  # replaced above, with its parent
    if type(owner) is torch.nn.Linear:
        dimension, (first, end) = (0, (0, owner.out_features)) if cut.size == 1 else part_of(name, config, cut)
        where = (slice(first, end), everything) if dimension == 0 else (everything, slice(first, end))
        shape = owner.weight.shape
        owner.weight = _parameter(read(f"{name}.weight", where, shape), dtype)
        owner.out_features, owner.in_features = owner.weight.shape
        if owner.bias is not None:
            whole = slice(first, end) if dimension == 0 else everything
            owner.bias = _parameter(read(f"{name}.bias", (whole,), owner.bias.shape), dtype)
        return
    for part, parameter in list(owner.named_parameters(recurse=False)):
        full = tuple(everything for _ in parameter.shape)
        owner.register_parameter(part, _parameter(read(f"{name}.{part}", full, parameter.shape), dtype))


def _packed(
    linear: torch.nn.Linear, name: str, read: Callable[..., torch.Tensor], config: Any, cut: Cut,
    settings: dict[str, Any], dtype: torch.dtype,
) -> QuantLinear:  # fmt: skip
    """A packed matrix, cut along its outputs, or along its inputs in whole groups."""
    bits, size = settings["bits"], settings["group_size"]
    columns = linear.in_features
    groups = 1 if size == -1 else columns // size
    dimension, (first, end) = (0, (0, linear.out_features)) if cut.size == 1 else part_of(name, config, cut)
    whole = slice(None)
    none = torch.Size([0, 0])
    if dimension == 0:
        outputs, words = slice(first, end), whole
        zeros = slice(first * bits // 32, end * bits // 32)
        inputs = grids = whole
        shape = (columns, end - first, groups)
    else:
        if size != -1 and (first % size or end % size):
            raise InputError(f"{name}: its groups of {size} inputs do not fit tensor {cut.size}: use another layout.")
        outputs = zeros = whole
        words, inputs = slice(first * bits // 32, end * bits // 32), slice(first, end)
        grids = whole if size == -1 else slice(first // size, end // size)
        shape = (end - first, linear.out_features, 1 if size == -1 else (end - first) // size)
    made = QuantLinear(shape[0], shape[1], bits, shape[2], linear.bias is not None)
    made.qweight = read(f"{name}.qweight", (words, outputs), none)
    made.qzeros = read(f"{name}.qzeros", (grids, zeros), none)
    made.scales = read(f"{name}.scales", (grids, outputs), none).half()
    made.g_idx = read(f"{name}.g_idx", (inputs,), none)
    if dimension == 1:
        expected = (torch.arange(columns) // (columns if size == -1 else size))[inputs]
        if cut.size > 1 and not torch.equal(made.g_idx.long(), expected):
            raise InputError(
                f"{name}: its groups are not runs of inputs (desc_act): tensor parallelism cannot cut them."
            )
        made.g_idx = (made.g_idx - int(expected[0])).int()
    if linear.bias is not None:
        made.bias = read(f"{name}.bias", (outputs,), none).to(dtype)
    return made


def _cut_ends(model: Any, stage: Stage, cut: Cut, group: Any) -> None:
    """Embedding and head, which hold this rank's rows of the vocabulary, compute the whole."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    first = cut.of(model.config.vocab_size)[0]
    if stage.first:
        model.set_input_embeddings(tensor.VocabularyEmbedding(embedding.weight, first, group))
    if stage.last:
        model.set_output_embeddings(tensor.VocabularyHead(head.weight, model.config.vocab_size, cut, group))
