"""An empty model filled with tensors by name: the reader of every way to load that is not transformers' own.

An empty model has names, shapes and dtypes, but no memory (torch's meta device). `fill` reads its tensors one by one,
whole or in part, and puts each on its device at once: no more than one tensor is in memory beside the model. Packed
checkpoints, decoder layers on demand and a rank's shard differ only in the modules they fill and in the `Rule` that
says which part of a tensor goes where.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from llmlab.base.errors import InputError
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.model.files import WeightFile, weight_files, weight_names
from llmlab.model.gguf import converted
from llmlab.model.harmless import BY_NAME, harmless
from llmlab.model.sources import Source

Slices = tuple[slice, ...]  # of a tensor's first dimensions; () is the whole tensor
# From a tensor's name, the module it belongs to and its whole shape to the part wanted; None leaves the place empty.
Rule = Callable[[str, torch.nn.Module, torch.Size], Slices | None]


def local_folder(source: Source) -> Path:
    """The folder of a source's files on this machine; downloads a Hub model, converts a GGUF file."""
    if source.kind == "gguf":
        return Path(converted(source).location)
    if source.kind == "folder":
        return Path(source.location)

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(
                source.location,
                revision=source.revision,
                allow_patterns=["*.json", "*.txt", "*.model", "*.jinja", *patterns],
                local_files_only=source.offline,
            )
        )

    code = ["*.py"] if source.trust_remote_code else []
    folder = fetch(*code)  # the index first: it says which weights to fetch
    return folder if source.offline else fetch(*code, *weight_names(source.files, folder))


class Tensors:
    """The tensors of a folder's weight files (see `files.weight_files`).

    Attributes:
        folder: that folder.
        files: stored name -> its file. Some files leave the model's prefix, such as "model.", out of the names; older
            ones have names that `rename` gives (see `matrices.stored_names`).
        largest: bytes of the largest piece that was read at once.

    Raises InputError if the folder holds no weights, or a file that cannot be read.
    """

    def __init__(self, folder: Path, prefix: str, rename: Callable[[str], str] = str) -> None:
        self.folder, self.prefix, self.rename, self.largest = folder, f"{prefix}.", rename, 0
        self.files: dict[str, Path] = {}
        self._opened: WeightFile | None = None  # one at a time: of a .bin file of old all tensors are in memory
        self._renamed: dict[str, str] = {}
        self._merged: dict[str, _Merge] = {}
        for file in weight_files(folder):
            self._opened = WeightFile(file)
            self.files |= dict.fromkeys((name for name in self._opened.names() if not BY_NAME.search(name)), file)
        if not self.files:
            raise InputError(f"the weight files of {folder} hold no tensor: download it again.")

    def stored_name(self, name: str) -> str:
        """How the files call what the model calls `name`."""
        names = (self._renamed.get(name), name, self.rename(name), name.removeprefix(self.prefix))
        return next((n for n in names if n in self.files), name.removeprefix(self.prefix))

    def has(self, name: str) -> bool:
        """Whether a tensor is stored, or is merged from some that are."""
        return name in self._merged or self.stored_name(name) in self.files

    def place(self, model: PreTrainedModel) -> None:
        """Find the place of every tensor in a model: as its name says, or as transformers renames, merges or splits it.

        Raises InputError, which names the tensor, if one has no place and is not `harmless`, or if a tied output head
        is stored and differs from the embedding.
        """
        mapping, state = get_model_conversion_mapping(model), model.state_dict()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        ignored = model._keys_to_ignore_on_load_unexpected or []
        own = {self.rename(name): name for name in state} | {name: name for name in state}
        for stored in sorted(self.files, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
            if name not in state and stored in own:
                name, pattern = own[stored], None
            if name not in state:
                if not harmless(name, partial(self.raw, stored), ignored):
                    raise InputError(
                        f"{self.folder}: the tensor {stored} has no place in a {model.config.model_type} model."
                    )
            elif pattern is None:
                self._renamed[name] = stored
            else:
                converter = next(entry for entry in converters if pattern in entry.source_patterns)
                merge = self._merged.get(name) or _Merge(name, converter, model)
                merge.parts.append((pattern, stored))
                self._merged |= dict.fromkeys(merge.targets(), merge)
        self._check_tied_head(model)

    def shape(self, name: str) -> list[int]:
        """Of a stored tensor."""
        return self._open(self.stored_name(name)).shape(self.stored_name(name))

    def read(self, name: str, like: torch.Tensor, part: Slices) -> torch.Tensor:
        """A part of a tensor that must be as `like` as a whole.

        Raises InputError, which names the tensor, if it has another shape, or integers for floats.
        """
        if merge := self._merged.get(name):
            try:
                whole = merge.read(name, self.raw)
            except Exception as error:  # transformers' converters raise what torch does
                stored = merge.parts[0][1]
                raise InputError(
                    f"{self.folder}: {stored} and {len(merge.parts) - 1} other tensors do not make up {name}: one is "
                    "missing or misshapen."
                ) from error
            shape, tensor = list(whole.shape), whole[part].clone(memory_format=torch.contiguous_format)
        else:
            stored = self.stored_name(name)
            opened = self._open(stored)
            shape = opened.shape(stored)
            tensor = opened.read(stored, part if shape == list(like.shape) else ())
        if shape != list(like.shape):
            raise InputError(f"{self.folder}: the tensor {name} is {shape}, expected {[*like.shape]}.")
        if tensor.is_floating_point() != like.is_floating_point():
            raise InputError(f"{self.folder}: the tensor {name} is {tensor.dtype}, expected {like.dtype}.")
        self.largest = max(self.largest, tensor.nbytes)
        return tensor

    def _open(self, stored: str) -> WeightFile:
        if self._opened is None or self._opened.path != self.files[stored]:
            self._opened = None  # lets go of the last one first
            self._opened = WeightFile(self.files[stored])
        return self._opened

    def raw(self, stored: str) -> torch.Tensor:
        """A whole tensor by its stored name."""
        return self._open(stored).read(stored)

    def _check_tied_head(self, model: PreTrainedModel) -> None:
        names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
        ends = [names.get(id(end), "") for end in (model.get_input_embeddings(), model.get_output_embeddings())]
        if model.config.tie_word_embeddings and all(self.has(end) for end in ends):
            embedding, head = (self.raw(self.stored_name(end)) for end in ends)
            if not torch.equal(embedding, head):
                raise InputError(untied(self.folder, ends[1]))


class _Merge:
    """Stored tensors that transformers makes one of (experts), or one that it splits, by its own converter."""

    def __init__(self, name: str, converter: WeightConverter, model: PreTrainedModel) -> None:
        self.name, self.converter, self.model = name, converter, model
        self.parts: list[tuple[str, str]] = []  # (the converter's pattern, stored name)

    def targets(self) -> list[str]:
        """The model's names of what comes out."""
        patterns = self.converter.target_patterns
        return [self.name.replace(patterns[0], pattern) for pattern in patterns]

    def read(self, name: str, raw: Callable[[str], torch.Tensor]) -> torch.Tensor:
        """One of the targets, from stored tensors as `raw` gives them."""
        converter = copy.deepcopy(self.converter)
        for pattern, stored in self.parts:
            converter.add_tensor(self.name, stored, pattern, raw(stored))
        whole = converter.convert(self.name, model=self.model, config=self.model.config)[name]
        tensor: torch.Tensor = whole[0] if isinstance(whole, list) else whole
        return tensor


def check_tensors(folder: Path, config: PreTrainedConfig) -> None:
    """Raise InputError, which names the tensor, if `fill` could not make this plain model of a folder's files."""
    model = empty_model(config, torch.float32)
    tensors = Tensors(folder, model.base_model_prefix)
    tensors.place(model)
    for name, place in model.state_dict().items():
        if tensors.has(name):
            tensors.read(name, place, ())
        elif name not in model.all_tied_weights_keys:
            raise InputError(f"{folder}: the tensor {name} is missing: download it again.")


def finite(tensor: torch.Tensor) -> bool:
    """Whether no value of a tensor is NaN or infinite; True for integers and 8-bit floats. Needs no memory."""
    if not tensor.is_floating_point() or tensor.element_size() < 2 or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # either is NaN if any value is
    return bool(torch.isfinite(low) & torch.isfinite(high))


def untied(folder: Path, head: str) -> str:
    """The sentence for an output head that is stored and is not the embedding, as config.json says it were."""
    return (
        f"{folder}: {head} differs from the embedding to which config.json ties it: set tie_word_embeddings to false "
        "there, or remove the tensor."
    )


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model without memory for its parameters, in eval mode; its buffers, such as rotary frequencies, are real."""
    config = copy.deepcopy(config)
    vars(config).pop("quantization_config", None)  # or transformers would look for a quantizer of its own
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def fill(
    module: torch.nn.Module, tensors: Tensors, device: torch.device, name: str = "", rule: Rule | None = None
) -> None:
    """Give the empty parameters of a module, and its packed Linears, their tensors; tie a tied output head.

    A tensor takes the dtype of the place it fills. What is not stored but has a value already (the `g_idx` of some
    packed checkpoints) keeps it.

    Args:
        module: an `empty_model`, or a part of one.
        tensors: where the tensors come from.
        device: where they go, and the module's buffers too.
        name: of the module in the model, if it is a part: "model.layers.3".
        rule: which part of each tensor; by default all of it.

    Raises InputError, which names the tensor, if one is missing, unfit (see `Tensors.read`), or no number.
    """
    tied = module if isinstance(module, PreTrainedModel) and module.config.tie_word_embeddings else None
    head = None if tied is None else tied.get_output_embeddings()
    missing = []
    for path, owner in module.named_modules(prefix=name):
        for part, place in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            full_name = f"{path}.{part}" if path else part
            is_parameter = isinstance(place, torch.nn.Parameter)
            packed = isinstance(owner, QuantLinear)
            stored = is_parameter or packed or part not in owner._non_persistent_buffers_set  # else it is computed
            slices = rule(full_name, owner, place.shape) if rule and stored else ()
            if slices is None or (owner is head and part == "weight"):
                continue
            if stored and tensors.has(full_name):
                tensor = tensors.read(full_name, place, slices)
            elif place.is_meta or (stored and not packed):
                missing.append(full_name)
                continue
            else:
                tensor = place[slices]
            tensor = tensor.to(device, place.dtype)
            if stored and not finite(tensor):
                raise InputError(f"{tensors.folder}: the tensor {full_name} holds NaN or infinity as {place.dtype}.")
            setattr(owner, part, torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{tensors.folder}: the tensor {missing[0]} is missing{more}.")
    if tied is not None:
        tied.get_output_embeddings().weight = tied.get_input_embeddings().weight
