"""A model whose decoder layers stay on disk: read one by one from safetensors, never all in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlab.card import card_from_config
from llmlab.errors import InputError
from llmlab.gguf import converted
from llmlab.model import DTYPES, LM, decoder_layers
from llmlab.sources import Source, fingerprint, read_config, resolve

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
    places = _places(folder, model)

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


def local_folder(source: Source) -> Path:
    """The folder of a source's files on this machine; downloads a Hub model, converts a GGUF file."""
    if source.kind == "gguf":
        source = converted(source)
    if source.kind == "hub":
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model"]
        return Path(snapshot_download(source.location, allow_patterns=patterns, local_files_only=source.offline))
    return Path(source.location)


def _places(folder: Path, model: torch.nn.Module) -> dict[str, tuple[Path, str]]:
    """Where each of the model's tensors is: its file and its name there (some files leave the "model." out)."""
    expected = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    places = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for stored in opened.keys():  # noqa: SIM118  # no mapping
                for name in (stored, f"{model.base_model_prefix}.{stored}"):
                    if name in expected:
                        places[name] = (file, stored)
    if not places:
        raise InputError(f"{folder} holds no safetensors weights, and llmlab unpickles nothing.")
    return places
