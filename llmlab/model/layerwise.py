"""A model whose decoder layers stay on disk: read one by one from safetensors, never all in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlab.base.errors import InputError
from llmlab.model.card import card_from_config
from llmlab.model.lm import DTYPES, LM, decoder_layers
from llmlab.model.sources import Source, fingerprint, read_config, resolve
from llmlab.model.weights import local_folder, tensor_places

ReadLayer = Callable[[int], torch.nn.Module]


def stream(name: str, *, dtype: str = "fp32", device: torch.device | None = None) -> tuple[LM, ReadLayer]:
    """A model without its decoder layers (they are on the meta device), and a function that reads layer i.

    Args:
        name: as for `llmlab.load`; random weights have no file to read.
        dtype: in which weights come into memory.
        device: where they go; CPU by default.

    Raises InputError if the name means nothing or the folder lacks a tensor.
    """
    device = device or torch.device("cpu")
    source = resolve(name)
    if source.kind == "random":
        raise InputError(f"{name} has no files: give a real model.")
    revision = fingerprint(source)
    folder = local_folder(source)
    config = read_config(Source(name, "folder", str(folder)))
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{name} is quantized already: give the original model.")
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()
    path, layers = decoder_layers(model)
    expected = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    places = tensor_places(folder, expected, model.base_model_prefix)

    def read(tensor_name: str) -> torch.nn.Parameter:
        if tensor_name not in places:
            raise InputError(f"{folder}: the tensor {tensor_name} is missing.")
        file, stored = places[tensor_name]
        with safe_open(file, framework="pt") as opened:
            tensor = opened.get_tensor(stored)
        return torch.nn.Parameter(tensor.to(device, DTYPES[dtype]), requires_grad=False)

    def read_layer(index: int) -> torch.nn.Module:
        layer = copy.deepcopy(layers[index])
        for tensor_name, _ in list(layer.named_parameters()):
            owner, _, part = tensor_name.rpartition(".")
            setattr(layer.get_submodule(owner), part, read(f"{path}.{index}.{tensor_name}"))
        return layer.to(device)

    for tensor_name, _ in list(model.named_parameters(remove_duplicate=False)):
        tied = config.tie_word_embeddings and tensor_name not in places
        if not tensor_name.startswith(f"{path}.") and not tied:
            owner, _, part = tensor_name.rpartition(".")
            setattr(model.get_submodule(owner), part, read(tensor_name))
    if config.tie_word_embeddings:
        model.tie_weights()
    for module in model.modules():  # buffers, such as the frequencies of rotary positions
        for buffer_name, buffer in module.named_buffers(recurse=False):
            module.register_buffer(buffer_name, buffer.to(device), persistent=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return LM(model, tokenizer, card_from_config(config, name, dtype), name, revision), read_layer
