"""GGUF files, converted once to safetensors.

transformers parses a GGUF file's metadata anew for the config, the tokenizer and the weights, in Python: 25 s for the
built-in model of 98 MB. The converted folder loads in a second, its tensors can be read one by one (sharding,
quantization), and bitsandbytes takes it too.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, modeling_gguf_pytorch_utils

from llmlab.base.errors import InputError
from llmlab.base.paths import cache_folder, check_writable
from llmlab.model.sources import Source, fingerprint, read_config

# The reader of GGUF files has a bar of its own: it shall obey transformers' switch, as all others do.
modeling_gguf_pytorch_utils.tqdm = transformers.utils.logging.tqdm


def converted(source: Source, *, create: bool = True) -> Source:
    """The folder of fp32 weights, config and tokenizer that a .gguf source stands for.

    Lossless: fp32 holds every value that a GGUF block (integers of at most 8 bits times fp16 scales) can mean. The
    folder takes its name, made of the file's name and fingerprint, only when complete: a killed conversion leaves
    nothing behind that could be taken for a model.

    Args:
        source: of kind "gguf".
        create: convert if that has not been done; else return `source` unchanged.

    Raises:
        InputError: the file is truncated, of an unknown architecture or no decoder, or the cache cannot be written.
    """
    name = f"{Path(source.location).stem}-{str(fingerprint(source)).removeprefix('sha256:')}"
    target = cache_folder() / name
    if not target.exists():
        if not create:
            return source
        check_writable(target.parent)
        _convert(source, target)
    return Source(source.name, "folder", str(target))


def _convert(source: Source, target: Path) -> None:
    read_config(source)  # refuses what is no decoder before the weights are read
    staging = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        try:
            _read(source).save_pretrained(staging)
            AutoTokenizer.from_pretrained(**source.transformers_args).save_pretrained(staging)
        except (ValueError, KeyError, IndexError, RuntimeError, EOFError) as error:
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"cannot read the GGUF model {source.location}, it may be truncated: {reason}.") from error
        staging.chmod(0o755)
        try:
            staging.rename(target)
        except OSError:  # another process was faster: its folder is the same
            if not target.exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _read(source: Source) -> PreTrainedModel:
    options: dict[str, object] = {}
    if hasattr(transformers, "GgufConfig"):  # newer transformers keep weights packed where they have a kernel
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**source.transformers_args, dtype=torch.float32, **options)
    # The loader leaves markers that make save_pretrained refuse; the weights are plain by now.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    return model
