"""GGUF files: read as a plain model, and converted once to safetensors for libraries that read nothing else."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from llmlab.sources import Source, fingerprint


def cache_folder() -> Path:
    """LLMLAB_CACHE, else ~/.cache/llmlab."""
    return Path(os.environ.get("LLMLAB_CACHE", "~/.cache/llmlab")).expanduser()


def read_gguf(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """The model of a .gguf file with its weights dequantized to `dtype`: plain Linears, like any other model."""
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # newer transformers keep weights packed where they have a kernel
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **source.transformers_args, dtype=dtype, device_map={"": device}, **options
    )
    # The loader leaves markers that make save_pretrained refuse; the weights are plain by now.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    return model


def as_safetensors(source: Source) -> Path:
    """The folder with the dequantized fp32 weights of a .gguf source; written on first use, then reused.

    Lossless: fp32 holds every value that a GGUF block of at most 8-bit integers and fp16 scales can mean. The folder
    appears under its name only when complete, so a killed conversion leaves nothing half-written behind.
    """
    target = cache_folder() / f"{Path(source.location).stem}-{str(fingerprint(source)).removeprefix('sha256:')}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    model = read_gguf(source, torch.float32, torch.device("cpu"))
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        model.save_pretrained(staging)
        staging.chmod(0o755)
        try:
            staging.rename(target)
        except OSError:  # another process was faster: its folder is the same
            if not target.exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target
