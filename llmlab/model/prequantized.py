"""Checkpoints of other quantizers (AWQ, fp8, bitsandbytes, ...), which transformers reads where their library is."""

from __future__ import annotations

import copy

from transformers import PreTrainedConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AutoHfQuantizer

from llmlab.base.errors import InputError


def quantizer_of(config: PreTrainedConfig) -> str | None:
    """How a model's weights were quantized, by its config, as `LM.transformation` names it; None if they were not."""
    raw = getattr(config, "quantization_config", None)
    if raw is None:
        return None
    settings = raw if isinstance(raw, dict) else raw.to_dict()
    method = str(settings.get("quant_method") or "").lower()
    if settings.get("load_in_8bit"):
        return "bitsandbytes-int8"
    if settings.get("load_in_4bit"):
        return f"bitsandbytes-{settings.get('bnb_4bit_quant_type', 'fp4')}"
    bits = settings.get("bits") or settings.get("w_bit")
    return f"{method or 'unknown quantizer'}{f' {bits} bits' if bits else ''}"


def check_readable(config: PreTrainedConfig, name: str, device: str) -> None:
    """Raise InputError, before weights are read, if transformers cannot run this quantizer's weights here."""
    raw = config.quantization_config
    settings = raw if isinstance(raw, dict) else raw.to_dict()
    how, method = quantizer_of(config), str(settings.get("quant_method") or "").lower()
    bitsandbytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
    if not bitsandbytes and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise InputError(
            f"{name} is quantized with {how}, which transformers cannot read: take the original model, or a GPTQ one."
        )
    try:
        quantizer = AutoHfQuantizer.from_config(copy.deepcopy(raw), pre_quantized=True)
        quantizer.validate_environment(device_map={"": device})
    except Exception as error:  # a missing package, a GPU that is not here, settings of another version
        reason = " ".join(str(error).split())[:240]
        raise InputError(f"{name} is quantized with {how}, which cannot run here: {reason}") from None
