"""load(): an LM from anywhere: built in, a Hub id, a folder (plain or quantized), a .gguf file, or random weights.

Packed checkpoints are read by `fill`. Plain weights are left to transformers: it also renames the tensors of old
checkpoints, merges experts, and quantizes with bitsandbytes on the way.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from llmlab.base.errors import InputError
from llmlab.kernels.fast import packed_dtype
from llmlab.model.card import ModelCard, card_from_config
from llmlab.model.fill import local_folder
from llmlab.model.gguf import converted
from llmlab.model.gptq_checkpoint import GPTQSettings, read_model, settings_of
from llmlab.model.lm import DTYPES, LM, check_device, check_dtype
from llmlab.model.sources import Source, fingerprint, read_config, resolve, shape_config

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
    short = check_dtype(dtype, where)
    source = replace(resolve(name, revision=revision), trust_remote_code=trust_remote_code)
    _check_options(source, bitsandbytes, layers)
    if source.kind == "random":
        return _random(source, short, where, layers, seed)
    local_revision = fingerprint(source)
    if source.kind == "gguf":
        with _quiet():
            source = converted(source)
    config = read_config(source)
    settings = settings_of(config)
    if settings and bitsandbytes:
        raise InputError(f"{name} is quantized with GPTQ already: load it without bitsandbytes.")
    if settings and dtype is None:
        short = packed_dtype(where)
    card = card_from_config(config, name, short)
    with _quiet(unless=card.bytes >= 4e9):
        commit = getattr(config, "_commit_hash", None) or local_revision
        lm = LM(None, _tokenizer(source), card, name, commit, _transformation(settings, bitsandbytes))
        if check:
            check(lm)
        if settings:
            model = read_model(local_folder(source), config, settings, DTYPES[short], where)
        else:
            model = _read_weights(source, DTYPES[short], where, bitsandbytes)
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


def _tokenizer(source: Source) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(**source.transformers_args)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{source.name} has no tokenizer that transformers can read: {reason}") from None


def _transformation(settings: GPTQSettings | None, bitsandbytes: str | None) -> str:
    if settings:
        return settings.transformation
    return f"bitsandbytes-{bitsandbytes}" if bitsandbytes else "none"


def _check_options(source: Source, bitsandbytes: str | None, layers: int | None) -> None:
    if layers is not None and (source.kind != "random" or layers < 1):
        raise InputError(f"layers={layers}: a positive number of layers can be kept of random:SHAPE models only.")
    if bitsandbytes is None:
        return
    if bitsandbytes not in BITSANDBYTES:
        raise InputError(f"unknown bitsandbytes method {bitsandbytes!r}: choose one of {', '.join(BITSANDBYTES)}.")
    if source.kind == "random":
        raise InputError("bitsandbytes quantizes at load: random weights are not loaded, choose a real model.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("bitsandbytes is not installed: run pip install 'llmlab[gpu]'.")


def _read_weights(
    source: Source, dtype: torch.dtype, device: torch.device, bitsandbytes: str | None
) -> PreTrainedModel:
    options: dict[str, object] = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True}
    if bitsandbytes:
        options["quantization_config"] = _bitsandbytes_config(bitsandbytes, dtype)
    try:
        return AutoModelForCausalLM.from_pretrained(**source.transformers_args, **options)
    except OSError as error:
        # The config was readable, so what is missing are weights in the one format that cannot run code.
        raise InputError(
            f"{source.location} has no readable safetensors weights, and llmlab unpickles nothing: convert them with "
            f"transformers' save_pretrained first ({' '.join(str(error).split())[:160]})."
        ) from error


def _bitsandbytes_config(method: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if method == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    # Double quantization also avoids a bug of bitsandbytes 0.50.2 on CPUs with AVX512-BF16, where a state_dict()
    # after a forward pass corrupts plain scales.
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=method, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _random(source: Source, dtype: str, device: torch.device, layers: int | None, seed: int) -> LM:
    config = read_config(source)
    if layers is not None:
        config.num_hidden_layers = layers
    card = card_from_config(config, source.name, dtype)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    return LM(model.eval().requires_grad_(False), None, card, source.name, f"seed:{seed}")


@contextmanager
def _quiet(*, unless: bool = False) -> Iterator[None]:
    """No loading bars of transformers, unless the model takes long: they would leave clutter in reports."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    if not unless:
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()


_logged: set[str] = set()


def _first_time(record: logging.LogRecord) -> bool:
    """Lets each message of a logger through once: bitsandbytes repeats one warning per Linear and forward pass."""
    new = str(record.msg) not in _logged
    _logged.add(str(record.msg))
    return new


logging.getLogger("bitsandbytes.autograd._functions").addFilter(_first_time)
