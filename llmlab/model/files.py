"""Which files of a folder hold a model's tensors, and their tensors read one by one."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from llmlab.base.errors import InputError

# transformers' names of one file, and of the index that says which files stand for it; the first kind that is there.
STANDARD = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
# Files that lie beside a model's own and count only when an index names them: Mistral's second copy, adapters.
ASIDE = re.compile(r"consolidated|adapter|.*\.(fp16|bf16|fp32)\.safetensors$")
LFS_POINTER = b"version https://git-lfs"
AGAIN = "download it again"


def weight_names(names: Collection[str], folder: Path) -> list[str]:
    """Which of the names in a folder or repository are the files of a model's weights.

    The index decides, so shards that an earlier save left beside it do not count. Without one it is the file of the
    usual name, or the only .safetensors file (as GPTQ checkpoints of 2023 have).

    Args:
        names: of the files.
        folder: where those that end in .index.json can be read.

    Raises InputError if there are none, or several and nothing says which count.
    """
    for single, index in STANDARD:
        if index in names:
            if index.startswith("pytorch") and single in names:  # transformers reads the one, its index tells the other
                raise InputError(f"{folder} holds both {single} and {index}: delete the one that is out of date.")
            return sorted(set(_weight_map(folder / index).values()))
        if single in names:
            return [single]
    others = sorted(name for name in names if name.endswith(".safetensors") and not ASIDE.match(name))
    if len(others) > 1:
        raise InputError(
            f"{folder} holds {', '.join(others[:3])} and no {STANDARD[0][1]} that says which count: {AGAIN}."
        )
    if not others:
        raise InputError(f"{folder} holds no safetensors file, no pytorch_model.bin and no index of either.")
    return others


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold the model's tensors (see `weight_names`).

    Raises InputError if one that the index names is not there, or is a Git LFS pointer.
    """
    files = [folder / name for name in weight_names([file.name for file in folder.iterdir()], folder)]
    for file in files:
        if not file.is_file():
            raise InputError(f"{folder} lacks {file.name}, which its index names: {AGAIN}.")
        refuse_pointer(file)
    return files


def refuse_pointer(file: Path) -> None:
    """Raise InputError if a file is the note that Git leaves where git-lfs did not run."""
    with file.open("rb") as stream:
        if stream.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(f"{file} is a Git LFS pointer, not the file itself: run git lfs pull in {file.parent}.")


def refuse_pointers(folder: Path) -> None:
    """Raise InputError if any file of a folder is a Git LFS pointer: a tokenizer may be one, too."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size < 1024:
            refuse_pointer(file)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, as an index says."""
    refuse_pointer(index)
    try:
        said = json.loads(index.read_text())
        places, metadata = said["weight_map"], said.get("metadata")
        outside = [file for file in places.values() if Path(file).name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot read {index}, it may be truncated: {AGAIN} ({type(error).__name__}).") from None
    if outside or not places:
        raise InputError(f"{index} names {outside[0] if outside else 'no file'}: expected files of its own folder.")
    if metadata is None:  # transformers reads no index without it
        raise InputError(f'{index} has no "metadata": add "metadata": {{}} beside its "weight_map".')
    return dict(places)


class WeightFile:
    """One file of tensors: .safetensors, or torch's .bin.

    A .bin file is unpickled with `weights_only`, which runs no code, and mapped into memory, so that only what is read
    of it is fetched; the format from before torch 1.6 cannot be mapped and is in memory as long as this object lives.

    Raises InputError if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors = None if path.suffix == ".safetensors" else _unpickled(path)

    def names(self) -> list[str]:
        """The tensors' names."""
        if self._tensors is not None:
            return list(self._tensors)
        try:
            with safe_open(self.path, framework="pt") as opened:
                return list(opened.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"cannot read {self.path}, it may be truncated: {AGAIN} ({_short(error)}).") from None

    def shape(self, name: str) -> list[int]:
        """A tensor's shape, without reading it."""
        if self._tensors is not None:
            return list(self._tensors[name].shape)
        with safe_open(self.path, framework="pt") as opened:
            return list(opened.get_slice(name).get_shape())

    def read(self, name: str, part: tuple[slice, ...] = ()) -> torch.Tensor:
        """A tensor, or a part of it in memory of its own; a .safetensors file is open for it alone."""
        if self._tensors is not None:
            return self._tensors[name][part].clone(memory_format=torch.contiguous_format)
        with safe_open(self.path, framework="pt") as opened:
            if part:  # a view would keep the whole tensor in memory, and slow kernels down
                whole: torch.Tensor = opened.get_slice(name)[part]
                return whole.clone(memory_format=torch.contiguous_format)
            tensor: torch.Tensor = opened.get_tensor(name)
        return tensor


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"cannot read {path}: it is truncated ({AGAIN}), or holds more than tensors ({_short(error)})."
        ) from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise InputError(f"{path} is no checkpoint that transformers wrote: expected tensors by name and nothing else.")
    return tensors


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120].rstrip(".")
