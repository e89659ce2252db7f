"""A rank's shard of a model: read slice by slice, so that no rank ever holds more than its part plus one tensor."""

from __future__ import annotations

import gc
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from llmlab.base.errors import InputError
from llmlab.model.card import ModelCard, card_from_config
from llmlab.model.fill import Slices, Tensors, empty_model, local_folder
from llmlab.model.gptq_checkpoint import pack_empty, settings_of
from llmlab.model.lm import DTYPES, LM
from llmlab.model.matrices import stored_names
from llmlab.model.prequantized import quantizer_of
from llmlab.model.sources import Source, fingerprint, read_config, read_tokenizer, resolve
from llmlab.sharding import tensor
from llmlab.sharding.assemble import Place, assemble
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.peers import RankPeers
from llmlab.sharding.pipeline import Stage, stage_layers
from llmlab.sharding.rank import Rank
from llmlab.sharding.rehearsal import random_model, rehearse, small_copy
from llmlab.sharding.tensor import Cut


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

    Only its slices are read from the weight files, tensor by tensor: no rank ever holds more than its part plus
    one tensor. `random:SHAPE` models get random parts.

    Raises InputError for a layout that does not fit.
    """
    key = f"{name} {cuts.name} {dtype}"
    kept = rank.kept.get(key)
    if isinstance(kept, Shard):
        return kept
    rank.kept.clear()  # one model at a time
    gc.collect()  # modules and their hooks are circles
    begin = time.perf_counter()
    source = resolve(name)
    revision = fingerprint(source)
    folder, config = _folder_and_config(source)
    card = card_from_config(config, name, dtype)
    settings = settings_of(config)
    place = _place(rank, cuts, card, max(32, settings.group_size or 0) if settings else 1)
    model = empty_model(config, DTYPES[dtype])
    tensors = Tensors(folder, model.base_model_prefix, stored_names(model)) if folder else RandomTensors()
    if settings:
        pack_empty(model, tensors, settings)
    tensors.place(model)
    assemble(model, tensors, rank.device, place, settings)
    tokenizer = None
    if folder is not None:
        tokenizer = read_tokenizer(Source(name, "folder", str(folder)))
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
    config = _folder_and_config(resolve(name))[1]
    if settings_of(config) is None and (how := quantizer_of(config)):
        raise InputError(f"{name} is quantized with {how}: ranks read plain and GPTQ weights, load it in one process.")
    cuts.check(size, config.num_hidden_layers, tensor.kv_heads(config))
    if cuts.tensor * cuts.pipeline > 1:
        rehearse(config, cuts, layers_of(card_from_config(config, name, "fp32"), cuts.pipeline))


def small_model(name: str) -> LM:
    """A small copy of a model's family (see `rehearsal.small_copy`), to check fast paths with before ranks start."""
    small = small_copy(_folder_and_config(resolve(name))[1], tensor=1)
    card = card_from_config(small, f"a small {small.model_type}", "fp32")
    return LM(random_model(small), None, card, card.name)


def _folder_and_config(source: Source) -> tuple[Path | None, PreTrainedConfig]:
    folder = None if source.kind == "random" else local_folder(source)
    return folder, read_config(source if folder is None else Source(source.name, "folder", str(folder)))


def _place(rank: Rank, cuts: Cuts, card: ModelCard, unit: int) -> Place:
    names = ("data", "pipeline", "tensor")
    mesh = init_device_mesh(rank.device.type, (cuts.data, cuts.pipeline, cuts.tensor), mesh_dim_names=names)
    data, index, part = mesh.get_coordinate() or (0, 0, 0)
    stages, parts = (RankPeers(mesh[name].get_group()) for name in ("pipeline", "tensor"))
    return Place(data, Stage(stages), layers_of(card, cuts.pipeline)[index], Cut(part, cuts.tensor, unit), parts)


def layers_of(card: ModelCard, stages: int) -> list[tuple[int, int]]:
    """First and end layer of each stage; the output head, which 0.6 of a trie's nodes ask, weighs on the last one."""
    head = card.head_parameters / (card.linear_parameters / card.layers)
    return stage_layers(card.layers, stages, 0.6 * head)


class RandomTensors(Tensors):
    """Random weights under every name: norms 1, biases 0, matrices normal with standard deviation 0.02."""

    def __init__(self) -> None:
        self.largest = 0

    def place(self, model: PreTrainedModel) -> None:
        """Nothing is stored."""

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
