"""Where a model's tensors lie on this machine: its folder, and the safetensors file of each tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import safe_open

from llmlab.base.errors import InputError
from llmlab.model.gguf import converted
from llmlab.model.sources import Source


def local_folder(source: Source) -> Path:
    """The folder of a source's files on this machine; downloads a Hub model, converts a GGUF file."""
    if source.kind == "gguf":
        source = converted(source)
    if source.kind == "hub":
        patterns = ["*.safetensors", "*.json", "*.txt", "*.model"]
        return Path(snapshot_download(source.location, allow_patterns=patterns, local_files_only=source.offline))
    return Path(source.location)


def tensor_places(folder: Path, expected: Iterable[str], prefix: str) -> dict[str, tuple[Path, str]]:
    """Each expected tensor's file and its name there (some files leave `prefix`, such as "model", out).

    Raises InputError if none is there.
    """
    wanted, places = set(expected), {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for stored in opened.keys():  # noqa: SIM118  # no mapping
                for name in (stored, f"{prefix}.{stored}"):
                    if name in wanted:
                        places[name] = (file, stored)
    if not places:
        raise InputError(f"{folder} holds no safetensors weights, and llmlab unpickles nothing.")
    return places
