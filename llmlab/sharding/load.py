"""A rank's shard of a model: read slice by slice, so that no rank ever holds more than its part plus one tensor."""

from __future__ import annotations

import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from llmlab.base.errors import InputError
from llmlab.model.card import ModelCard, card_from_config
from llmlab.model.fill import Slices, Tensors, empty_model, fill, local_folder
from llmlab.model.gptq_checkpoint import GPTQSettings, pack_empty, settings_of
from llmlab.model.lm import DTYPES, LM
from llmlab.model.load import check_layers
from llmlab.model.matrices import stored_names
from llmlab.model.prequantized import quantizer_of
from llmlab.model.sources import Source, fingerprint, read_config, read_tokenizer, resolve
from llmlab.sharding import tensor
from llmlab.sharding.assemble import Place, assemble
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.peers import RankPeers
from llmlab.sharding.pipeline import Stage, layers_of
from llmlab.sharding.rank import Rank
from llmlab.sharding.rehearsal import random_model, rehearse, small_copy
from llmlab.sharding.tensor import Cut


@dataclass
class Shard:
    """A rank's part of a model, ready to run.

    Attributes:
        lm: its `model` computes the whole when all ranks of the replica call it together.
        place: where this rank stands.
        seconds: that loading took.
        weight_bytes: of this part.
        largest_tensor: bytes of the largest piece that was read at once.
    """

    lm: LM
    place: Place
    seconds: float
    weight_bytes: int
    largest_tensor: int

    @property
    def answers(self) -> bool:
        """Whether this rank reports what its replica found."""
        return self.place.stage.last and self.place.cut.index == 0

    def agree(self, numbers: Sequence[float]) -> list[float]:
        """The numbers that the replica's first rank has: ranks whose clocks differ must not decide differently."""
        shared = torch.tensor(numbers, dtype=torch.float64, device=self.lm.device)
        self.place.cut_peers.spread(shared, 0)
        self.place.stage.peers.spread(shared, 0)
        agreed: list[float] = shared.tolist()
        return agreed


def load_shard(rank: Rank, name: str, cuts: Cuts, dtype: str, layers: int | None = None) -> Shard:
    """Load this rank's part; kept between calls.

    Only its slices are read from the weight files, tensor by tensor, each straight onto its device: no rank ever holds
    more than its part plus one tensor. `random:SHAPE` models get random parts, of `layers` layers if that is given.

    Raises InputError for a layout that does not fit.
    """
    key = f"{name} {layers} {cuts.name} {dtype}"
    kept = rank.kept.get(key)
    if isinstance(kept, Shard):
        return kept
    rank.let_go()  # one model at a time
    begin = time.perf_counter()
    lm, tensors, settings = _empty(name, dtype, rank.device, layers)
    place = _place(rank, cuts, lm.card, max(32, settings.group_size or 0) if settings else 1)
    assemble(lm.model, tensors, rank.device, place, settings)
    seconds = time.perf_counter() - begin
    shard = Shard(lm, place, seconds, lm.weight_bytes, tensors.largest)
    rank.kept[key] = shard
    return shard


def outline(name: str, dtype: str, device: torch.device, layers: int | None = None) -> LM:
    """A model of which the embedding alone is in memory: what ranks work on, for the process that asks them.

    It encodes texts and has the model's card, sizes and revision; arguments as for `load_shard`.
    """
    lm, tensors, _ = _empty(name, dtype, device, layers)
    embedding = lm.model.get_input_embeddings()
    fill(lm.model, tensors, device, rule=lambda _, owner, shape: () if owner is embedding else None)
    return lm


def _empty(name: str, dtype: str, device: torch.device, layers: int | None) -> tuple[LM, Tensors, GPTQSettings | None]:
    """A model without memory for its weights, where they come from, and how they are packed."""
    source = resolve(name)
    folder, config = _folder_and_config(source, layers)
    settings = settings_of(config)
    model = empty_model(config, DTYPES[dtype])
    tensors = Tensors(folder, model.base_model_prefix, stored_names(model)) if folder else RandomTensors(device)
    if settings:
        pack_empty(model, tensors, settings)
    tensors.place(model)
    tokenizer = None
    if folder is not None:
        tokenizer = read_tokenizer(Source(name, "folder", str(folder)))
        if (folder / "generation_config.json").exists():
            model.generation_config = GenerationConfig.from_pretrained(folder)
    transformation = settings.transformation if settings else "none"
    card = card_from_config(config, name, dtype)
    return LM(model, tokenizer, card, name, fingerprint(source) or "seed:0", transformation), tensors, settings


def check_layout(name: str, cuts: Cuts, size: int, layers: int | None = None) -> None:
    """Raise InputError, before any rank works on it, for a layout that fits neither `size` ranks nor the model."""
    config = _folder_and_config(resolve(name), layers)[1]
    if settings_of(config) is None and (how := quantizer_of(config)):
        raise InputError(f"{name} is quantized with {how}: ranks read plain and GPTQ weights, load it in one process.")
    cuts.check(size, config.num_hidden_layers, tensor.kv_heads(config))
    if cuts.tensor * cuts.pipeline > 1:
        rehearse(config, cuts, layers_of(card_from_config(config, name, "fp32"), cuts.pipeline))


def small_model(name: str, layers: int | None = None) -> LM:
    """A small copy of a model's family (see `rehearsal.small_copy`), to check fast paths with before ranks start."""
    small = small_copy(_folder_and_config(resolve(name), layers)[1], tensor=1)
    card = card_from_config(small, f"a small {small.model_type}", "fp32")
    return LM(random_model(small), None, card, card.name)


def _folder_and_config(source: Source, layers: int | None) -> tuple[Path | None, PreTrainedConfig]:
    folder = None if source.kind == "random" else local_folder(source)
    config = read_config(source if folder is None else Source(source.name, "folder", str(folder)))
    if folder is None and getattr(config, "quantization_config", None):
        raise InputError(
            f"{source.name}: its config.json says that it is quantized, but ranks make plain random weights: take "
            "quantization_config out of a copy of it."
        )
    if layers is not None:
        check_layers(source, layers)
        config.num_hidden_layers = layers
    return folder, config


def _place(rank: Rank, cuts: Cuts, card: ModelCard, unit: int) -> Place:
    """Where this rank stands: the ranks of a tensor-parallel group are neighbours, replicas are furthest apart."""
    grid = torch.arange(cuts.ranks).view(cuts.data, cuts.pipeline, cuts.tensor)
    data, index, part = (grid == rank.index).nonzero()[0].tolist()
    stages = RankPeers(rank.join(grid.transpose(1, 2).reshape(-1, cuts.pipeline).tolist()))
    parts = RankPeers(rank.join(grid.reshape(-1, cuts.tensor).tolist()))
    return Place(data, Stage(stages), layers_of(card, cuts.pipeline)[index], Cut(part, cuts.tensor, unit), parts)


class RandomTensors(Tensors):
    """Random weights under every name: norms 1, biases 0, matrices normal with standard deviation 0.02."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.largest = device, 0
        self.folder = Path("random weights")  # what a sentence about one of them begins with

    def place(self, model: PreTrainedModel) -> None:
        """Nothing is stored."""

    def has(self, name: str) -> bool:
        """Always."""
        return True

    def read(self, name: str, like: torch.Tensor, part: Slices) -> torch.Tensor:
        """The same numbers for the same name, shape and kind of device, where they are made."""
        sizes = [len(range(*piece.indices(n))) for piece, n in zip(part, like.shape, strict=False)]
        tensor = torch.empty([*sizes, *like.shape[len(part) :]], dtype=like.dtype, device=self.device)
        self.largest = max(self.largest, tensor.nbytes)
        if tensor.dim() == 1:
            return tensor.fill_(float(name.endswith("weight")))
        seed = zlib.crc32(name.encode())
        return tensor.normal_(0, 0.02, generator=torch.Generator(self.device).manual_seed(seed))
