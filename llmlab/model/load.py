"""load(): an LM from anywhere: built in, a Hub id, a folder (plain or quantized), a .gguf file, or random weights.

Packed checkpoints are read by `fill`. Plain weights are left to transformers: it also renames the tensors of old
checkpoints, merges experts, and quantizes with bitsandbytes on the way. What it says about tensors that are missing,
superfluous or misshapen is an error here: it would draw random weights and go on.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from llmlab.base.errors import InputError
from llmlab.kernels.fast import packed_dtype
from llmlab.model.card import ModelCard, card_from_config
from llmlab.model.fill import Tensors, check_tensors, finite, local_folder, untied
from llmlab.model.gguf import config_alone, converted
from llmlab.model.gptq_checkpoint import read_model, settings_of
from llmlab.model.harmless import harmless
from llmlab.model.lm import DTYPES, LM, check_device, check_dtype
from llmlab.model.prequantized import check_readable, quantizer_of
from llmlab.model.sources import Source, fingerprint, read_config, read_tokenizer, resolve, shape_config

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

    Weights come from safetensors files, else from torch's .bin files, which are unpickled without running code and
    mapped into memory: the peak is the model in `dtype` and a few tensors, beside pages of the files that the system
    may drop. (.bin files from before torch 1.6 cannot be mapped: there it is the model and all files. `llmlab.convert`,
    which writes safetensors once, takes one of them at a time.)

    Args:
        name: "smollm2" (built in), a Hub id ("facebook/opt-30b", "owner/name@revision"), a folder, a .gguf file (of a
            split one any part; all are read), or "random:llama-30b" for a shipped shape with random weights (speed
            work).
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
        InputError: before any weight is read, if the name, a file, the dtype, the device or an option is unusable;
            and if a tensor is missing, superfluous, misshapen or no number, which is named.
    """
    where = check_device(device)
    short = check_dtype(dtype, where)
    source = replace(resolve(name, revision=revision), trust_remote_code=trust_remote_code)
    _check_options(source, bitsandbytes, layers)
    if source.kind == "random":
        return _random(source, short, where, layers, seed)
    original = source
    if source.kind == "gguf":
        with _quiet():
            source = converted(source)
    config = read_config(source)
    settings = settings_of(config)
    how = settings.transformation if settings else quantizer_of(config)
    if how and bitsandbytes:
        by = "GPTQ" if settings else how
        raise InputError(f"{name} is quantized with {by} already: load it without bitsandbytes.")
    if how and not settings:
        check_readable(config, name, str(where))
    if settings and dtype is None:
        short = packed_dtype(where)
    card = card_from_config(config, name, short)
    with _quiet(unless=card.bytes >= 4e9):
        transformation = f"bitsandbytes-{bitsandbytes}" if bitsandbytes else how or "none"
        lm = LM(None, read_tokenizer(source), card, name, None, transformation)
        if check:
            check(lm)
        lm.revision = fingerprint(original)
        if settings:
            model = read_model(local_folder(source), config, settings, DTYPES[short], where)
        else:
            more = {"quantization_config": _bitsandbytes_config(bitsandbytes, DTYPES[short])} if bitsandbytes else {}
            model = _read_weights(source, config, DTYPES[short], where, more)
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
        config = config_alone(source) if source.kind == "gguf" else read_config(source)
    return card_from_config(config, name, dtype)


def check_layers(source: Source, layers: int) -> None:
    """Raise InputError if a model cannot have so many layers."""
    if source.kind != "random" or layers < 1:
        raise InputError(f"layers={layers}: a positive number of layers can be kept of random:SHAPE models only.")


def _check_options(source: Source, bitsandbytes: str | None, layers: int | None) -> None:
    if layers is not None:
        check_layers(source, layers)
    if bitsandbytes is None:
        return
    if bitsandbytes not in BITSANDBYTES:
        raise InputError(f"unknown bitsandbytes method {bitsandbytes!r}: choose one of {', '.join(BITSANDBYTES)}.")
    if source.kind == "random":
        raise InputError("bitsandbytes quantizes at load: random weights are not loaded, choose a real model.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("bitsandbytes is not installed: run pip install 'llmlab[gpu]'.")


def _read_weights(
    source: Source, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, more: dict[str, object]
) -> PreTrainedModel:
    folder = local_folder(source)
    tensors = Tensors(folder, "")  # every file can be read
    file = next(iter(tensors.files.values()))
    options: dict[str, object] = {"dtype": dtype, "device_map": {"": device}} | more
    options["use_safetensors"] = file.suffix == ".safetensors"
    if options["use_safetensors"]:  # else transformers would take model.safetensors before the index
        index = folder / "model.safetensors.index.json"
        config.transformers_weights = index.name if index.exists() else file.name
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=source.trust_remote_code,
            ignore_mismatched_sizes=True,  # not ignored: it is in the report
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # it raises all kinds; a quantizer of others that is not here is one
        if getattr(config, "quantization_config", None) is None:
            check_tensors(folder, config)  # says which tensor it was
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(f"transformers cannot load {source.location}: {reason}.") from error
    vars(model.config).pop("transformers_weights", None)
    tensors.prefix = f"{model.base_model_prefix}."
    _check_report(model, report, tensors)
    return model


def _check_report(model: PreTrainedModel, report: dict[str, Any], tensors: Tensors) -> None:
    """Raise InputError, which names the tensor, for what transformers reports, and for weights that are no numbers."""
    folder, kind = tensors.folder, model.config.model_type
    if missing := sorted(map(str, report["missing_keys"])):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(f"{folder}: the tensor {missing[0]}{more} of this {kind} model is missing: download it again.")
    for name, stored, expected in sorted(report["mismatched_keys"], key=str):
        raise InputError(f"{folder}: the tensor {name} is {[*stored]}, expected {[*expected]}.")
    for name in sorted(map(str, report["unexpected_keys"])):
        stored = tensors.stored_name(name)  # not among the files if transformers renamed it
        if not harmless(name, partial(tensors.raw, stored) if stored in tensors.files else None):
            raise InputError(f"{folder}: the tensor {name} has no place in a {kind} model.")
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and not finite(tensor):
            raise InputError(f"{folder}: the tensor {name} holds NaN or infinity as {tensor.dtype}.")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and model.config.tie_word_embeddings and head.weight is not embedding.weight:
        raise InputError(untied(folder, "the output head"))


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
    """No table of what transformers found (it is checked) and no bars, unless the model takes long."""
    log = transformers.utils.logging
    shown, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.set_verbosity_error()
    if not unless:
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shown:
            log.enable_progress_bar()


_logged: set[str] = set()


def _first_time(record: logging.LogRecord) -> bool:
    """Lets each message of a logger through once: bitsandbytes repeats one warning per Linear and forward pass."""
    new = str(record.msg) not in _logged
    _logged.add(str(record.msg))
    return new


logging.getLogger("bitsandbytes.autograd._functions").addFilter(_first_time)
