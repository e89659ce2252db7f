"""A model's weights written anew as safetensors, with its config and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic_folder, new_folder
from llmlab.model.files import STANDARD, WeightFile, weight_files
from llmlab.model.fill import check_tensors, finite, local_folder
from llmlab.model.harmless import BY_NAME
from llmlab.model.sources import Source, read_config, read_tokenizer, resolve

SHARD_BYTES = 2**31
BESIDE = (".json", ".txt", ".model", ".jinja", ".py")  # config, tokenizer, template, code


def convert(name: str, folder: str | Path) -> Path:
    """Write a model of .bin files, as OPT is published, or of a .gguf file as safetensors, once.

    Every tensor keeps its name, dtype and values. .bin files are unpickled without running code. In memory are at most
    two shards of 2 GiB, however large the model is (and one whole .bin file if it is from before torch 1.6, the fp32
    model if it is a new .gguf file).

    Args:
        name: as for `llmlab.load`.
        folder: a new folder; it appears when it is complete.

    Raises InputError if the name means no model with files, a tensor is missing, superfluous or no number, or the
    folder exists already.
    """
    target = new_folder(folder)
    source = resolve(name)
    if source.kind == "random":
        raise InputError(f"{name} has no files: give a real model.")
    origin = local_folder(source)
    _check(Source(name, "folder", str(origin)))
    with atomic_folder(target) as staging:
        for file in origin.iterdir():
            if file.suffix in BESIDE and not file.name.endswith(".index.json"):
                shutil.copy(file, staging)
        _write(weight_files(origin), staging)
    return target


def _check(local: Source) -> None:
    """Refuse before anything is written what `load` would refuse afterwards."""
    config = read_config(local)
    read_tokenizer(local)
    if getattr(config, "quantization_config", None) is None:  # else its tensors have names of their own
        check_tensors(Path(local.location), config)


def _write(files: list[Path], staging: Path) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}

    def close() -> None:
        save_file(pending, staging / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    total = 0
    for path in files:
        file = WeightFile(path)
        for name in file.names():
            if BY_NAME.search(name):
                continue
            tensor = file.read(name)
            if not finite(tensor):
                raise InputError(f"{path}: the tensor {name} holds NaN or infinity.")
            if pending and sum(other.nbytes for other in pending.values()) + tensor.nbytes > SHARD_BYTES:
                close()
            pending[name] = tensor
            total += tensor.nbytes
    close()
    single, index = STANDARD[0]
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else single
        (staging / f"{number}.safetensors").rename(staging / file_name)
        places |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        (staging / index).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": places}, indent=2))
