"""A model whose decoder layers stay on disk: read one by one, never all in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from llmlab.base.errors import InputError
from llmlab.model.card import card_from_config
from llmlab.model.fill import Tensors, empty_model, fill, local_folder
from llmlab.model.lm import DTYPES, LM, decoder_layers
from llmlab.model.matrices import stored_names
from llmlab.model.sources import Source, fingerprint, read_config, read_tokenizer, resolve

ReadLayer = Callable[[int], torch.nn.Module]


def stream(name: str, *, dtype: str = "fp32", device: torch.device | None = None) -> tuple[LM, ReadLayer]:
    """A model without its decoder layers (they are on the meta device), and a function that reads layer i.

    Args:
        name: as for `llmlab.load`; random weights have no file to read.
        dtype: in which weights come into memory.
        device: where they go; CPU by default.

    Raises InputError if the name means nothing or the folder lacks a tensor.
    """
    where = device or torch.device("cpu")
    source = resolve(name)
    if source.kind == "random":
        raise InputError(f"{name} has no files: give a real model.")
    revision = fingerprint(source)
    folder = local_folder(source)
    local = Source(name, "folder", str(folder))
    config = read_config(local)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{name} is quantized already: give the original model.")
    model = empty_model(config, DTYPES[dtype])
    path, layers = decoder_layers(model)
    tensors = Tensors(folder, model.base_model_prefix, stored_names(model))
    tensors.place(model)

    def read_layer(index: int) -> torch.nn.Module:
        layer = copy.deepcopy(layers[index])
        fill(layer, tensors, where, name=f"{path}.{index}")
        return layer

    fill(model, tensors, where, rule=lambda tensor_name, *_: None if tensor_name.startswith(f"{path}.") else ())
    return LM(model, read_tokenizer(local), card_from_config(config, name, dtype), name, revision), read_layer
