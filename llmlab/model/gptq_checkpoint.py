"""Quantized models read from disk, in the format that AutoGPTQ began and GPTQModel, transformers and vLLM share.

A folder of transformers' (config.json, tokenizer, safetensors) in which a quantized Linear has `qweight`, `qzeros`,
`scales` and `g_idx` instead of `weight` (see `QuantLinear`), and `quantization_config` in config.json says how; in old
folders `quantize_config.json` alone does (see `sources.read_config`). Zero points are stored minus one ("gptq"), or as
they are ("gptq_v2"). `LM.save` writes it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llmlab.base.errors import InputError
from llmlab.kernels.packed_linear import QuantLinear, prepare
from llmlab.kernels.packing import BITS, pack, unpack
from llmlab.model.fill import Tensors, empty_model, fill
from llmlab.model.matrices import expert_names, is_matrix, matrix_of, split_experts, stored_names

PARTS = ("qweight", "qzeros", "scales", "g_idx")
FORMATS = ("gptq", "gptq_v2")
LABEL_ROWS = 512  # of a matrix from which the mean of its weights is taken


@dataclass(frozen=True)
class GPTQSettings:
    """How a checkpoint is packed.

    Attributes:
        bits: of a weight.
        group_size: input columns that share a grid; -1 is a whole row, None is what the shapes of the scales say.
        zeros_as_they_are: the zero points are stored so, not minus one.
        scattered: groups may not be runs of columns (act-order), so that g_idx cannot be left out.
        dynamic: GPTQModel's exceptions: pattern of modules to other settings; None for modules left as they were.
        raw: what the checkpoint says.
    """

    bits: int
    group_size: int | None
    zeros_as_they_are: bool
    scattered: bool
    raw: dict[str, object]
    dynamic: dict[str, dict[str, object] | None] = field(default_factory=dict)

    @property
    def transformation(self) -> str:
        """As `LM.transformation` names it."""
        groups = "" if self.group_size is None else f", group {self.group_size}"
        return f"gptq {self.bits} bits{groups}{', mixed' if self.dynamic else ''}"

    def of(self, module: str) -> GPTQSettings:
        """The settings of one module. Raises InputError if it should have been left as it was."""
        for pattern, other in self.dynamic.items():
            if re.match(pattern, module):
                if other is None:
                    raise InputError(f"{module} is packed, but the checkpoint's settings say that it is not.")
                return _settings({**self.raw, **other, "dynamic": None})
        return self


def settings_of(config: PreTrainedConfig) -> GPTQSettings | None:
    """The GPTQ settings in a transformers config; None if the model is not quantized with GPTQ.

    Raises InputError for settings that llmlab cannot run.
    """
    raw = getattr(config, "quantization_config", None)
    if raw is None:
        return None
    raw = raw if isinstance(raw, dict) else raw.to_dict()
    if str(raw.get("quant_method", "")).lower() != "gptq":
        return None
    return _settings({key.lower(): value for key, value in raw.items()})


def _settings(raw: dict[str, object]) -> GPTQSettings:
    bits, size = _whole(raw, "bits", "wbits"), _whole(raw, "group_size", "groupsize")
    if bits not in BITS:
        raise InputError(f"the checkpoint has {bits!r} bits: llmlab reads {', '.join(map(str, BITS))}.")
    named = {str(raw[key]).lower() for key in ("checkpoint_format", "format") if raw.get(key)} or {"gptq"}
    if raw.get("is_marlin_format"):
        named = {"marlin"}
    if not named <= set(FORMATS) or len(named) > 1:
        formats = " and ".join(map(repr, sorted(named)))
        raise InputError(f"the checkpoint's format is {formats}: llmlab reads 'gptq' and 'gptq_v2'.")
    if str(raw.get("pack_dtype") or "int32").lower() != "int32":
        raise InputError(f"the checkpoint is packed in {raw['pack_dtype']} words: llmlab reads int32.")
    dynamic: dict[str, dict[str, object] | None] = {}
    given = raw.get("dynamic")
    for pattern, other in given.items() if isinstance(given, dict) else ():
        dynamic[pattern.removeprefix("+:").removeprefix("-:")] = None if pattern.startswith("-:") else other
    scattered = bool(raw.get("desc_act")) and size != -1  # with static groups, too: some writers ignore that setting
    return GPTQSettings(bits, size, named == {"gptq_v2"}, scattered, raw, dynamic)


def _whole(raw: dict[str, object], *names: str) -> int | None:
    """The whole number under the first of several names that is there."""
    value = next((raw[name] for name in names if raw.get(name) is not None), None)
    try:
        return None if value is None else int(str(value))
    except ValueError:
        raise InputError(f"the checkpoint's {names[0]} is {value!r}: expected a whole number.") from None


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
    tensors = Tensors(folder, model.base_model_prefix, stored_names(model))
    pack_empty(model, tensors, settings)
    tensors.place(model)
    fill(model, tensors, device)
    finish_packed(model, "", folder, settings)
    prepare(model, dtype)
    return model


def pack_empty(model: PreTrainedModel, tensors: Tensors, settings: GPTQSettings) -> dict[str, QuantLinear]:
    """Put an empty QuantLinear in the place of every matrix of an empty model that is stored packed; those, by name.

    Raises InputError, which names the module, for what cannot be read as it was meant.
    """
    split_experts(model, expert_names(model))
    packed = {}
    for name, module in list(model.named_modules()):
        if not any(tensors.has(f"{name}.{part}") for part in PARTS):
            continue
        if not is_matrix(module):
            raise InputError(
                f"{tensors.folder}: {name}.qweight belongs to no Linear of a {model.config.model_type} model."
            )
        if module is model.get_output_embeddings():  # a packed head is not the embedding
            model.config.tie_word_embeddings = False
        packed[name] = _empty(name, module, tensors, settings.of(tensors.rename(name)))
        model.set_submodule(name, packed[name])
    return packed


def _empty(name: str, module: torch.nn.Linear, tensors: Tensors, settings: GPTQSettings) -> QuantLinear:
    rows, columns = matrix_of(module).shape
    size, bias = settings.group_size, cast("torch.Tensor | None", module.bias)
    if size is None:
        groups = tensors.shape(f"{name}.scales")[0] if tensors.has(f"{name}.scales") else 1
        size = -(-columns // groups)
    size = columns if size == -1 else size
    if size < 1 or columns * settings.bits % 32 or rows * settings.bits % 32:
        raise InputError(f"{tensors.folder}: {name}, {rows} x {columns}, cannot be packed in groups of {size}.")
    with torch.device("meta"):
        linear = QuantLinear(columns, rows, settings.bits, -(-columns // size), bias is not None)
    if bias is not None:
        linear.bias = bias.detach()
    elif tensors.has(f"{name}.bias"):
        # Some writers give every packed Linear a bias, of zeros where the model has none.
        place = torch.empty(rows, dtype=torch.float16, device="meta")
        if tensors.read(f"{name}.bias", place, ()).any():
            raise InputError(
                f"{tensors.folder}: {name}.bias is not zero, but a {name.rpartition('.')[2]} of this architecture has "
                "no bias: the checkpoint is of another model."
            )
    if settings.scattered and linear.groups > 1 and not tensors.has(f"{name}.g_idx"):
        raise InputError(
            f"{tensors.folder}: {name}.g_idx is missing, but the checkpoint was quantized in act-order (desc_act): "
            "which column belongs to which group is lost."
        )
    linear.g_idx = (torch.arange(columns) // size).int()  # what it is where the files leave it out
    return linear


def finish_packed(module: torch.nn.Module, name: str, folder: Path, settings: GPTQSettings) -> None:
    """Check what the filled QuantLinears of a module of this name hold, and store their zero points minus one.

    Raises InputError, which names the tensor, for scales that are no numbers, groups that do not exist, and zero points
    of another format than the settings say.
    """
    modules = module.named_modules(prefix=name)
    packed = {path: m for path, m in modules if isinstance(m, QuantLinear) and m.qweight.numel()}
    for path, linear in packed.items():
        what = f"{folder}: the tensor {path}"
        if not torch.isfinite(linear.scales).all():
            raise InputError(f"{what}.scales holds NaN or infinity.")
        if linear.bias is not None and not torch.isfinite(linear.bias).all():
            raise InputError(f"{what}.bias holds NaN or infinity.")
        if ((linear.g_idx < 0) | (linear.g_idx >= linear.groups)).any():
            raise InputError(f"{what}.g_idx names a group outside 0 .. {linear.groups - 1}.")
        if settings.zeros_as_they_are:
            zeros = unpack(linear.qzeros.T.contiguous(), linear.bits)
            linear.qzeros = pack((zeros - 1) & ((1 << linear.bits) - 1), linear.bits).T.contiguous()
    _check_label(list(packed.values()), folder, settings)


def _check_label(packed: list[QuantLinear], folder: Path, settings: GPTQSettings) -> None:
    """Raise InputError if the zero points are those of the other format.

    Under the wrong label every weight is off by one step of its grid: by -1 for "gptq", +1 for "gptq_v2". A symmetric
    grid shows it in its zero point. In others the mean of the weights does: it is near zero in every trained matrix,
    and a step is not small against their spread below 8 bits.
    """
    wrong = 1 if settings.zeros_as_they_are else -1
    means, shifted = [], []
    for linear in packed[:: max(1, len(packed) // 16)]:
        zeros = linear.zeros[:LABEL_ROWS]  # [rows, groups]
        shifted.append(bool((zeros == (1 << (linear.bits - 1)) - wrong).all()))
        if linear.bits < 8 and zeros.shape[1] == linear.groups:  # else a rank's part of the inputs
            codes = linear.codes[:, :LABEL_ROWS]
            means.append(float(codes.float().mean() - zeros[:, linear.g_idx.long()].float().mean()))
    mean = sum(means) / max(1, len(means))  # weight, in steps
    if (shifted and all(shifted)) or abs(mean - wrong) < 0.4:
        stored, label = ("gptq_v2", "gptq") if wrong < 0 else ("gptq", "gptq_v2")
        raise InputError(
            f"{folder}: the zero points are stored as in the format {stored!r}, but the settings say {label!r}: set "
            f"checkpoint_format to {stored!r} in its config.json."
        )
