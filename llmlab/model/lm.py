"""LM: a model, its tokenizer and its card."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from huggingface_hub import save_torch_state_dict

from llmlab.base.errors import InputError
from llmlab.base.paths import atomic_folder, new_folder
from llmlab.kernels import fast
from llmlab.kernels.cuda import advice, nvidia, usable
from llmlab.kernels.packed_linear import quant_linears
from llmlab.model.card import ModelCard
from llmlab.model.matrices import stored_names
from llmlab.model.tokens import encode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = fast.DTYPES
DTYPE_ALIASES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}


@dataclass
class LM:
    """A decoder-only language model ready to run.

    Attributes:
        model: the transformers model, in eval mode, on its device.
        tokenizer: its tokenizer; None for random weights.
        card: sizes and costs, from the config.
        name: what load() was asked for.
        revision: Hub commit, or a fingerprint of the local files.
        transformation: what was done to the weights ("none", "bitsandbytes-nf4", ...).
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    card: ModelCard
    name: str
    revision: str | None = None
    transformation: str = "none"

    @property
    def device(self) -> torch.device:
        """Where the input ids go."""
        return self.model.get_input_embeddings().weight.device  # type: ignore[no-any-return]  # transformers is untyped

    @property
    def dtype(self) -> str:
        """Dtype of the activations: "fp32", "bf16" or "fp16"."""
        return next(name for name, dtype in DTYPES.items() if dtype == self.model.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights occupy now, packed ones as packed; tied tensors count once."""
        tensors = list(self.model.parameters())
        for linear in quant_linears(self.model):  # whose weights are buffers, of their kernels, too
            tensors += linear.buffers()
        return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())

    def save(self, folder: str | Path) -> Path:
        """Write the model, quantized or not, and its tokenizer, as transformers reads them (GPTQModel too, if packed).

        The folder appears when it is complete. Raises InputError if it exists already or cannot be written, and for
        real zero points, which no checkpoint holds.
        """
        if any(linear.qzeros.is_floating_point() for linear in quant_linears(self.model)):
            raise InputError("real zero points fit into no GPTQ checkpoint: quantize with integer ones to save it.")
        target = new_folder(folder)
        with atomic_folder(target) as staging:
            config = self.model.config
            config.save_pretrained(staging)
            if getattr(self.model, "generation_config", None) is not None:
                self.model.generation_config.save_pretrained(staging)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(staging)
            settings = getattr(config, "quantization_config", None)
            if settings is not None and not quant_linears(self.model):  # another quantizer's, which transformers writes
                try:
                    self.model.save_pretrained(staging)
                except NotImplementedError:
                    raise InputError(
                        f"{self.name} ({self.transformation}) cannot be saved again by transformers "
                        f"{transformers.__version__}: use the folder it came from."
                    ) from None
            else:
                stored = stored_names(self.model)
                tensors = {stored(name): _alone(tensor) for name, tensor in self.model.state_dict().items()}
                if config.tie_word_embeddings:
                    tensors.pop(stored("lm_head.weight"), None)
                save_torch_state_dict(tensors, staging, metadata={"format": "pt"})
                if settings:
                    (staging / "quantize_config.json").write_text(json.dumps(settings, indent=2))
        return target

    def encode(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that this tokenizer puts before a text: once, or not at all."""
        tokenizer = self._tokenizer()
        return encode(tokenizer, text) if special_tokens else list(tokenizer.encode(text, add_special_tokens=False))

    def input_ids(self, text: str, *, special_tokens: bool = True) -> list[int]:
        """The same for the model to read. Raises InputError if it has no embedding for one of them."""
        ids = self.encode(text, special_tokens=special_tokens)
        if (largest := max(ids, default=0)) >= self.card.vocab_size:
            raise InputError(
                f"the text holds {self._tokenizer().decode([largest])!r}, token {largest}, but {self.name} has "
                f"embeddings for {self.card.vocab_size} tokens while its tokenizer knows {len(self._tokenizer())}: "
                "leave it out."
            )
        return ids

    def decode(self, ids: list[int], *, special: bool = False) -> str:
        """Text of token ids, without special tokens unless `special`."""
        return str(self._tokenizer().decode(ids, skip_special_tokens=not special))

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts can be put as a user's turn (see `chat`)."""
        return self.tokenizer is not None and bool(self.tokenizer.chat_template)

    def chat(self, prompt: str) -> str:
        """The prompt as one user turn in this model's chat template.

        Raises InputError if the model has no chat template.
        """
        tokenizer = self._tokenizer()
        if not tokenizer.chat_template:
            raise InputError(f"{self.name} has no chat template: generate from the plain prompt instead.")
        turn = [{"role": "user", "content": prompt}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise InputError(f"{self.name} has random weights and no tokenizer: give token ids, or load a real model.")
        return self.tokenizer


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """Contiguous and with memory of its own: parts of a larger tensor (see `kernels.stacking`) cannot be saved."""
    is_part = tensor.nbytes < tensor.untyped_storage().nbytes()
    return tensor.clone(memory_format=torch.contiguous_format) if is_part else tensor.contiguous()


def decoder_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """The decoder layers of a transformers model and their name in it ("model.layers", "model.decoder.layers")."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_hidden_layers:
            return name, module
    raise InputError(f"cannot find the decoder layers of a {model.config.model_type} model.")


def check_dtype(dtype: str | None, device: torch.device) -> str:
    """A dtype's short name; chosen for the device when None. Raises InputError for an unknown one."""
    if dtype is None:
        return fast.default_dtype(device)
    short = DTYPE_ALIASES.get(dtype, dtype)
    if short not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}.")
    if short == "bf16" and device.type == "mps":
        raise InputError("bf16 is not for Apple's GPUs: choose fp16 or fp32.")
    return short


def check_device(device: str | torch.device | None) -> torch.device:
    """The torch device meant; the first GPU that torch can use when None, else the CPU.

    Warns when None and the GPUs that are here cannot be used. Raises InputError for a device that is not here or that
    this build of torch or the driver does not serve, with the command that helps.
    """
    good = usable(nvidia())
    if device is None:
        if good:
            return torch.device("cuda", good[0]) if good[0] else torch.device("cuda")
        if nvidia().cuda is not None and (why := advice()):  # a build for CPUs was chosen on purpose
            warnings.warn(f"{why} Here llmlab runs on the CPU.", stacklevel=3)
        return torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise InputError(f"unknown device {device!r}: choose cpu, cuda, cuda:N or mps.") from None
    if wanted.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"unsupported device {device!r}: choose cpu, cuda, cuda:N or mps.")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("there is no device 'mps' here: that is the GPU of Apple silicon, under macOS.")
    index = wanted.index or 0
    if wanted.type == "cuda" and index >= len(nvidia().cards):
        raise InputError(f"there is no device {str(device)!r} here: torch sees {len(good)} GPUs.")
    if wanted.type == "cuda" and index not in good:
        raise InputError(f"the device {str(device)!r} cannot be used: {advice()}")
    return wanted
