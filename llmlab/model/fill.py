"""An empty model filled with tensors by name: the reader of every way to load that is not transformers' own.

An empty model has names, shapes and dtypes, but no memory (torch's meta device). `fill` reads its tensors one by one,
whole or in part, and puts each on its device at once: no more than one tensor is in memory beside the model. Packed
checkpoints, decoder layers on demand and a rank's shard differ only in the modules they fill and in the `Rule` that
says which part of a tensor goes where.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from llmlab.base.errors import InputError
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.model.gguf import converted
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
    files = ["*.safetensors", "*.json", "*.txt", "*.model"]
    return Path(
        snapshot_download(
            source.location, revision=source.revision, allow_patterns=files, local_files_only=source.offline
        )
    )


class Tensors:
    """The tensors of a folder's safetensors files.

    Attributes:
        folder: that folder.
        files: stored name -> its file. Some files leave the model's prefix, such as "model.", out of the names.
        largest: bytes of the largest piece that was read at once.

    Raises InputError if the folder holds no safetensors file, or one that cannot be read.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self.folder, self.prefix, self.largest = folder, f"{prefix}.", 0
        self.files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as opened:
                    self.files |= dict.fromkeys(opened.keys(), file)
            except SafetensorError as error:
                raise InputError(f"cannot read {file}, it may be truncated: {error}.") from None
        if not self.files:
            raise InputError(f"{folder} holds no safetensors file, and llmlab unpickles nothing.")

    def stored_name(self, name: str) -> str:
        """How the files call what the model calls `name`."""
        return name if name in self.files else name.removeprefix(self.prefix)

    def has(self, name: str) -> bool:
        """Whether a tensor is stored."""
        return self.stored_name(name) in self.files

    def read(self, name: str, like: torch.Tensor, part: Slices) -> torch.Tensor:
        """A part of a tensor that must be as `like` as a whole; its file is open for it alone, so nothing else stays.

        Raises InputError, which names the tensor, if it has another shape, or integers for floats.
        """
        stored = self.stored_name(name)
        with safe_open(self.files[stored], framework="pt") as opened:
            view = opened.get_slice(stored)
            if view.get_shape() != list(like.shape):
                raise InputError(f"{self.folder}: the tensor {name} is {view.get_shape()}, expected {[*like.shape]}.")
            tensor: torch.Tensor = view[part] if part else opened.get_tensor(stored)
        if tensor.is_floating_point() != like.is_floating_point():
            raise InputError(f"{self.folder}: the tensor {name} is {tensor.dtype}, expected {like.dtype}.")
        self.largest = max(self.largest, tensor.nbytes)
        return tensor.contiguous()  # a view would keep the whole tensor in memory, and slow kernels down


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

    Raises InputError, which names the tensor, if one is missing or unfit (see `Tensors.read`).
    """
    tied = module if isinstance(module, PreTrainedModel) and module.config.tie_word_embeddings else None
    head = None if tied is None else tied.get_output_embeddings()
    missing = []
    for path, owner in module.named_modules(prefix=name):
        for part, place in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            full_name = f"{path}.{part}" if path else part
            is_parameter = isinstance(place, torch.nn.Parameter)
            wanted = is_parameter or isinstance(owner, QuantLinear)  # other buffers are no weights
            slices = rule(full_name, owner, place.shape) if rule and wanted else ()
            if slices is None or (owner is head and part == "weight"):
                continue
            if wanted and tensors.has(full_name):
                tensor = tensors.read(full_name, place, slices)
            elif place.is_meta:
                missing.append(full_name)
                continue
            else:
                tensor = place[slices]
            tensor = tensor.to(device, place.dtype)
            setattr(owner, part, torch.nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{tensors.folder}: the tensor {missing[0]} is missing{more}.")
    if tied is not None:
        tied.get_output_embeddings().weight = tied.get_input_embeddings().weight
