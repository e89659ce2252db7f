"""Quantized models read from disk, in the format that AutoGPTQ began and GPTQModel, transformers and vLLM share.

A folder of transformers' (config.json, tokenizer, safetensors) in which a quantized Linear has `qweight`, `qzeros`,
`scales` and `g_idx` instead of `weight` (see `QuantLinear`), and `quantization_config` in config.json says how.
Zero points are stored minus one ("gptq"), or as they are ("gptq_v2"). `LM.save` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llmlab.base.errors import InputError
from llmlab.kernels.packed_linear import QuantLinear, prepare
from llmlab.kernels.packing import BITS, pack, unpack
from llmlab.model.fill import Tensors, empty_model, fill

PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GPTQSettings:
    """How a checkpoint is packed: `raw` is what config.json says, the rest what reading needs of it."""

    bits: int
    group_size: int
    zeros_as_they_are: bool
    raw: dict[str, object]

    @property
    def transformation(self) -> str:
        """As `LM.transformation` names it."""
        return f"gptq {self.bits} bits, group {self.group_size}"


def settings_of(config: PreTrainedConfig) -> GPTQSettings | None:
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
    return GPTQSettings(bits, settings["group_size"], layout == "gptq_v2", settings)


def read_model(
    folder: Path, config: PreTrainedConfig, settings: GPTQSettings, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The quantized model in a folder.

    Args:
        folder: with safetensors files.
        config: its transformers config.
        settings: the GPTQ settings in it.
        dtype: of the activations and of all that is not quantized.
        device: where it goes.

    Raises:
        InputError: a tensor is missing, superfluous, of a wrong shape, or holds what it must not; names the tensor.
    """
    model = empty_model(config, dtype)
    model.config.quantization_config = settings.raw
    tensors = Tensors(folder, model.base_model_prefix)
    packed = pack_empty(model, tensors, settings)
    # Some writers give every packed Linear a bias, of zeros where the model has none.
    known = {tensors.stored_name(name) for name in [*model.state_dict(), *(f"{name}.bias" for name in packed)]}
    if unknown := tensors.files.keys() - known:
        raise InputError(f"{folder}: the tensor {min(unknown)} has no place in a {config.model_type} model.")
    fill(model, tensors, device)
    for name, linear in packed.items():
        finish_packed(linear, f"{folder}: the tensor {name}", settings)
    prepare(model, dtype)
    return model


def pack_empty(model: PreTrainedModel, tensors: Tensors, settings: GPTQSettings) -> dict[str, QuantLinear]:
    """Put an empty QuantLinear in the place of every Linear of an empty model that is stored packed; those, by name."""
    packed = {}
    for name, module in list(model.named_modules()):
        if not any(tensors.has(f"{name}.{part}") for part in PARTS):
            continue
        if type(module) is not torch.nn.Linear:
            raise InputError(
                f"{tensors.folder}: {name}.qweight belongs to no Linear of a {model.config.model_type} model."
            )
        columns, rows = module.in_features, module.out_features
        size = columns if settings.group_size == -1 else settings.group_size
        with torch.device("meta"):
            linear = QuantLinear(columns, rows, settings.bits, -(-columns // size), module.bias is not None)
        if module.bias is not None:
            linear.bias = module.bias.detach()
        linear.g_idx = (torch.arange(columns) // size).int()  # what it is where the files leave it out
        packed[name] = linear
        model.set_submodule(name, linear)
    return packed


def finish_packed(linear: QuantLinear, what: str, settings: GPTQSettings) -> None:
    """Check what a filled QuantLinear holds, and store its zero points minus one.

    Raises InputError, which begins with `what`, for scales that are no numbers and groups that do not exist.
    """
    if not torch.isfinite(linear.scales).all():
        raise InputError(f"{what}.scales holds NaN or infinity.")
    if linear.bias is not None and not torch.isfinite(linear.bias).all():
        raise InputError(f"{what}.bias holds NaN or infinity.")
    if ((linear.g_idx < 0) | (linear.g_idx >= linear.groups)).any():
        raise InputError(f"{what}.g_idx names a group outside 0 .. {linear.groups - 1}.")
    if settings.zeros_as_they_are:
        zeros = unpack(linear.qzeros.T.contiguous(), linear.bits)
        linear.qzeros = pack((zeros - 1) & ((1 << linear.bits) - 1), linear.bits).T.contiguous()
