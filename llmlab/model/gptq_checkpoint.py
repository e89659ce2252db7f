"""Quantized models read from disk, in the format that AutoGPTQ began and GPTQModel, transformers and vLLM share.

A folder of transformers' (config.json, tokenizer, safetensors) in which a quantized Linear has `qweight`, `qzeros`,
`scales` and `g_idx` instead of `weight` (see `QuantLinear`), and `quantization_config` in config.json says how.
Zero points are stored minus one ("gptq"), or as they are ("gptq_v2"). `LM.save` writes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM

from llmlab.base.errors import InputError
from llmlab.kernels.packed_linear import QuantLinear, prepare, replace_linears
from llmlab.kernels.packing import BITS, pack, unpack

PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


def settings_of(config: Any) -> dict[str, Any] | None:
    """The GPTQ settings in a transformers config; None if the model is not quantized with GPTQ.

    Raises InputError for settings that llmlab cannot run.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    settings = settings if isinstance(settings, dict) else settings.to_dict()
    if settings.get("quant_method") != "gptq":
        return None
    bits, layout = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    if bits not in BITS:
        raise InputError(f"the checkpoint has {bits!r} bits: llmlab reads {', '.join(map(str, BITS))}.")
    if layout not in ("gptq", "gptq_v2"):
        raise InputError(f"the checkpoint's format is {layout!r}: llmlab reads 'gptq' and 'gptq_v2'.")
    return settings


def read_model(folder: Path, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The quantized model in a folder.

    Args:
        folder: with safetensors files.
        config: its transformers config, with GPTQ settings.
        dtype: of the activations and of all that is not quantized.
        device: where it goes.

    Raises:
        InputError: a tensor is missing, superfluous, of a wrong shape, or holds what it must not; names the tensor.
    """
    settings = settings_of(config)
    assert settings is not None
    del config.quantization_config  # or transformers would look for a quantizer of its own
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    config.quantization_config = settings
    expected = dict(model.named_parameters(remove_duplicate=False))
    seen: set[str] = set()
    packed: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in _tensors(folder):
        owner, _, part = name.rpartition(".")
        if part in PARTS and f"{owner}.weight" in expected and name not in expected:
            packed.setdefault(owner, {})[part] = tensor
        elif part == "bias" and name in expected:
            _check_shape(folder, name, tensor, expected[name].shape)
            packed.setdefault(owner, {})[part] = tensor
            _assign(model, name, tensor, dtype, device)
        elif name in expected:
            _check_shape(folder, name, tensor, expected[name].shape)
            _assign(model, name, tensor, dtype, device)
        else:
            raise InputError(f"{folder}: the tensor {name} has no place in a {config.model_type} model.")
        seen.add(name)
    linears = {}
    for owner, parts in packed.items():
        if set(parts) == {"bias"}:
            continue  # of a Linear that is not quantized
        linear = model.get_submodule(owner)
        if type(linear) is not torch.nn.Linear:
            raise InputError(f"{folder}: {owner}.qweight belongs to no Linear of a {config.model_type} model.")
        linears[owner] = _quant_linear(folder, owner, parts, linear, settings, dtype).to(device)
    replace_linears(model, linears)
    if config.tie_word_embeddings:
        model.tie_weights()
    missing = [name for name, p in model.named_parameters() if p.is_meta]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: the tensor {missing[0]} is missing{more}.")
    model.to(device).eval().requires_grad_(False)
    prepare(model, dtype)
    return model


def _quant_linear(
    folder: Path, owner: str, parts: dict[str, torch.Tensor], plain: Any, settings: dict[str, Any], dtype: torch.dtype
) -> QuantLinear:
    bits, size = settings["bits"], settings["group_size"]
    columns, rows = plain.in_features, plain.out_features
    groups = 1 if size == -1 else -(-columns // size)
    linear = QuantLinear(columns, rows, bits, groups, plain.bias is not None)
    parts.setdefault("g_idx", (torch.arange(columns) // (columns if size == -1 else size)).int())
    for part in PARTS[: 5 if plain.bias is not None else 4]:
        name, buffer = f"{owner}.{part}", getattr(linear, part)
        if part not in parts:
            raise InputError(f"{folder}: the tensor {name} is missing.")
        tensor = parts[part]
        _check_shape(folder, name, tensor, buffer.shape)
        if tensor.is_floating_point() != buffer.is_floating_point():
            raise InputError(f"{folder}: the tensor {name} is {tensor.dtype}, expected {buffer.dtype}.")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{folder}: the tensor {name} holds NaN or infinity.")
        if part == "g_idx" and not (int(tensor.min()) >= 0 and int(tensor.max()) < groups):
            raise InputError(f"{folder}: the tensor {name} names a group outside 0 .. {groups - 1}.")
        setattr(linear, part, tensor.to(dtype if part == "bias" else buffer.dtype))
    if settings.get("checkpoint_format") == "gptq_v2":
        zeros = unpack(linear.qzeros.T.contiguous(), bits)
        linear.qzeros = pack((zeros - 1) & ((1 << bits) - 1), bits).T.contiguous()
    return linear


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of every safetensors file of a folder, one after another."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no safetensors file.")
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # no mapping
                    yield name, opened.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"cannot read {file}, it may be truncated: {error}.") from None


def _check_shape(folder: Path, name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise InputError(f"{folder}: the tensor {name} is {list(tensor.shape)}, expected {list(shape)}.")


def _assign(model: torch.nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
    owner, _, part = name.rpartition(".")
    parameter = torch.nn.Parameter(tensor.to(device, dtype), requires_grad=False)
    setattr(model.get_submodule(owner), part, parameter)
