"""load(): an LM from anywhere: built in, a Hub id, a folder (plain or quantized), a .gguf file, or random weights."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmlab.base.errors import InputError
from llmlab.kernels.fast import packed_dtype
from llmlab.model.card import ModelCard, card_from_config
from llmlab.model.gguf import converted
from llmlab.model.gptq_checkpoint import read_model, settings_of
from llmlab.model.lm import DTYPES, LM, check_device, check_dtype
from llmlab.model.sources import Source, fingerprint, read_config, resolve, shape_config
from llmlab.model.weights import local_folder

BITSANDBYTES = ("int8", "nf4", "fp4")


def load(
    name: str,
    *,
    dtype: str | None = None,
    device: str | torch.device | None = None,
    bitsandbytes: str | None = None,
    layers: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    check: Callable[[LM], object] | None = None,
) -> LM:
    """Load a model for inference.

    Args:
        name: "smollm2" (built in), a Hub id ("facebook/opt-30b"), a folder, a .gguf file, or "random:llama-30b" for a
            shipped shape with random weights (speed work).
        dtype: "fp32", "bf16" or "fp16"; by default fp32 on CPU, bf16 on CUDA from compute capability 8.0, fp16 below;
            for GPTQ checkpoints on CPU bf16 where this processor multiplies it fast, which was measured, else fp32.
        device: "cpu", "cuda", "cuda:1"...; by default CUDA where there is a GPU.
        bitsandbytes: "int8" (LLM.int8(), arXiv 2208.07339), "nf4" or "fp4" (arXiv 2305.14314), quantized at load.
        layers: keep this many decoder layers; for random weights only.
        seed: of the random weights.
        revision: Hub branch, tag or commit.
        trust_remote_code: run code that comes with a Hub model; off unless asked.
        check: called with the LM when its tokenizer and card are there but no weight has been read (`model` is None);
            it may raise InputError for texts that do not fit this model.

    Raises:
        InputError: before any weight is read, if the name, a file, the dtype, the device or an option is unusable.
    """
    where = check_device(device)
    asked, dtype = dtype, check_dtype(dtype, where)
    _check_bitsandbytes(bitsandbytes)
    source = resolve(name, revision=revision)
    if layers is not None and (source.kind != "random" or layers < 1):
        raise InputError(f"layers={layers}: a positive number of layers can be kept of random:SHAPE models only.")
    if source.kind == "random" and bitsandbytes:
        raise InputError("bitsandbytes quantizes at load: random weights are not loaded, choose a real model.")
    local_revision = fingerprint(source)
    if source.kind == "gguf":
        with _quiet_loading():
            source = converted(source)
    config = read_config(source, revision=revision, trust_remote_code=trust_remote_code)
    if layers is not None:
        config.num_hidden_layers = layers
    settings = settings_of(config)
    if settings and bitsandbytes:
        raise InputError(f"{name} is quantized with GPTQ already: load it without bitsandbytes.")
    if settings and asked is None:
        dtype = packed_dtype(where)
    card = card_from_config(config, name, dtype)
    if source.kind == "random":
        return LM(_random_model(config, dtype, where, seed), None, card, name, revision=f"seed:{seed}")
    with _quiet_loading(unless=card.bytes >= 4e9):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                **source.transformers_args, revision=revision, trust_remote_code=trust_remote_code
            )
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise InputError(f"{name} has no tokenizer that transformers can read: {reason}") from None
        lm = LM(
            None,
            tokenizer,
            card,
            name,
            revision=getattr(config, "_commit_hash", None) or local_revision,
            transformation=_transformation(settings, bitsandbytes),
        )
        if check:
            check(lm)
        if settings:
            model = read_model(local_folder(source), config, DTYPES[dtype], where)
        else:
            model = _read_weights(source, dtype, where, bitsandbytes, revision, trust_remote_code)
    lm.model = model.eval().requires_grad_(False)
    return lm


def model_card(name: str, *, dtype: str = "fp16") -> ModelCard:
    """The card of a model by name, from its config alone: no weight is read, shipped shapes need no network.

    Raises InputError if the name means nothing.
    """
    dtype = check_dtype(dtype, torch.device("cpu"))
    config = shape_config(name.removeprefix("random:"))
    if config is None:
        source = resolve(name)
        config = read_config(converted(source, create=False) if source.kind == "gguf" else source)
    return card_from_config(config, name, dtype)


def _transformation(settings: dict[str, Any] | None, bitsandbytes: str | None) -> str:
    if settings:
        return f"gptq {settings['bits']} bits, group {settings['group_size']}"
    return f"bitsandbytes-{bitsandbytes}" if bitsandbytes else "none"


def _check_bitsandbytes(method: str | None) -> None:
    if method is None:
        return
    if method not in BITSANDBYTES:
        raise InputError(f"unknown bitsandbytes method {method!r}: choose one of {', '.join(BITSANDBYTES)}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("bitsandbytes is not installed: run pip install 'llmlab[gpu]'.")


def _read_weights(
    source: Source, dtype: str, device: torch.device, bitsandbytes: str | None, revision: str | None, trust: bool
) -> Any:
    options: dict[str, Any] = {"dtype": DTYPES[dtype], "device_map": {"": device}, "use_safetensors": True}
    if bitsandbytes:
        options["quantization_config"] = _bitsandbytes_config(bitsandbytes, dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(
            **source.transformers_args, revision=revision, trust_remote_code=trust, **options
        )
    except OSError as error:
        # The config was readable, so what is missing are weights in the one format that cannot run code.
        raise InputError(
            f"{source.location} has no readable safetensors weights, and llmlab unpickles nothing: convert them with "
            f"transformers' save_pretrained first ({' '.join(str(error).split())[:160]})."
        ) from error


def _bitsandbytes_config(method: str, dtype: str) -> Any:
    if method == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    # Double quantization also avoids a bug of bitsandbytes 0.50.2 on CPUs with AVX512-BF16, where a state_dict()
    # after a forward pass corrupts plain scales.
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=method,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[dtype],
    )


def _random_model(config: Any, dtype: str, device: torch.device, seed: int) -> Any:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet_loading(*, unless: bool = False) -> Iterator[None]:
    """No loading bars of transformers, unless the model takes long: they would leave clutter in reports."""
    if unless:
        yield
        return
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    silent = functools.partial(tqdm, disable=True)  # the GGUF reader has a bar of its own that no setting turns off
    try:
        with mock.patch("transformers.modeling_gguf_pytorch_utils.tqdm", silent):
            yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


class _Once(logging.Filter):
    """Lets each message of a logger through once: bitsandbytes repeats one warning per Linear and forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = str(record.msg) not in self.seen
        self.seen.add(str(record.msg))
        return new


logging.getLogger("bitsandbytes.autograd._functions").addFilter(_Once())
