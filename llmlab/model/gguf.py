"""GGUF files, converted once to safetensors.

The converted folder loads in a second, its tensors can be read one by one (sharding, quantization), and bitsandbytes
takes it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, modeling_gguf_pytorch_utils

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic_folder, cache_folder, check_writable
from llmlab.model.sources import Source, fingerprint, gguf_parts, read_config, read_tokenizer

if TYPE_CHECKING:
    from llmlab.model.gguf_file import ParsedFile

# The reader of GGUF files has a bar of its own: it shall obey transformers' switch, as all others do.
modeling_gguf_pytorch_utils.tqdm = transformers.utils.logging.tqdm


FORMAT = 2  # of the converted folders: until 2 one could hold random weights in the place of missing tensors


def converted(source: Source) -> Source:
    """The folder of fp32 weights, config and tokenizer that a .gguf source stands for; written if it is not there yet.

    Lossless: fp32 holds every value that a GGUF block (integers of at most 8 bits times fp16 scales) can mean. The
    folder takes its name, made of the file's name and fingerprint, only when complete: a killed conversion leaves
    nothing behind that could be taken for a model. At its peak it needs twice the fp32 model in memory.

    Args:
        source: of kind "gguf".

    Raises:
        InputError: the file is truncated, of an unknown architecture or no decoder, a part or a tensor is missing or
            would be left out, or the cache cannot be written.
    """
    target = _target(source)
    if not target.exists():
        check_writable(target.parent)
        _convert(source, target)
    return Source(source.name, "folder", str(target))


def config_alone(source: Source) -> PreTrainedConfig:
    """The config of a .gguf source, which is not converted for it."""
    from llmlab.model.gguf_file import parsed_once

    if (target := _target(source)).exists():
        return read_config(Source(source.name, "folder", str(target)))
    with parsed_once(gguf_parts(Path(source.location))):
        return read_config(source)


def _target(source: Source) -> Path:
    name = f"{Path(source.location).stem}-{str(fingerprint(source)).removeprefix('sha256:')}-{FORMAT}"
    return cache_folder() / name


def _convert(source: Source, target: Path) -> None:
    from llmlab.model.gguf_file import parsed_once

    with atomic_folder(target) as staging:
        try:
            with parsed_once(gguf_parts(Path(source.location))) as file:
                _read(source, file).save_pretrained(staging)
                read_tokenizer(source).save_pretrained(staging)
        except InputError:
            raise
        except Exception as error:  # gguf and transformers raise whatever they stumble over; all mean "unusable"
            reason = " ".join(str(error).split())[:160]
            raise InputError(f"cannot read the GGUF model {source.location}, it may be truncated: {reason}.") from error


def _read(source: Source, file: ParsedFile) -> PreTrainedModel:
    from llmlab.model.gguf_file import check_settings, set_rotary_scaling

    config = read_config(source)  # refuses what is no decoder before the weights are read
    check_settings(file, config)
    used = set_rotary_scaling(file, config)
    options: dict[str, object] = {}
    if hasattr(transformers, "GgufConfig"):  # newer transformers keep weights packed where they have a kernel
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model, report = AutoModelForCausalLM.from_pretrained(
        **source.transformers_args,
        config=config,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # not ignored: it is in the report
        output_loading_info=True,
        **options,
    )
    # The loader leaves markers that make save_pretrained refuse; the weights are plain by now.
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    _check_tensors(source, file, model, report, used)
    return model


def _check_tensors(
    source: Source, file: ParsedFile, model: PreTrainedModel, report: dict[str, Any], used: set[str]
) -> None:
    """Raise InputError if a tensor of the model is not in the file, or one of the file is not in the model."""
    for problem in ("missing", "mismatched", "unexpected"):
        if names := sorted(map(str, report[f"{problem}_keys"])):
            raise InputError(f"{source.location}: the tensor {names[0]} of this model is {problem} in the file.")
    stored = sum(int(tensor.n_elements) for tensor in file.tensors if tensor.name not in used)
    held = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}  # tied ones once
    if stored != sum(held.values()):  # transformers passes over names that it does not know
        known = modeling_gguf_pytorch_utils.get_gguf_hf_weights_map(
            model, modeling_gguf_pytorch_utils.TensorProcessor()
        )
        unknown = sorted({tensor.name for tensor in file.tensors} - known.keys() - used)
        raise InputError(
            f"{source.location}: its tensors hold {stored:,} numbers, the {model.config.model_type} model made of them "
            f"{sum(held.values()):,}; transformers has no place for {', '.join(unknown[:3]) or 'some'}."
        )
