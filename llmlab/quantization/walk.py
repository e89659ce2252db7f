"""The walk through a model: decoder layer by decoder layer, each Linear quantized with the inputs it really gets.

All calibration rows go through a layer at once. When they reach a Linear, a hook that runs before it sees every input
it will ever get, so the Linear is solved there and then, and the rows go on through its *quantized* weights. One pass
a layer gives what the reference implementation calls `true_sequential`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from llmlab.base.errors import InputError, NumericalError
from llmlab.base.paths import atomic
from llmlab.base.progress import progress
from llmlab.data import wikitext
from llmlab.kernels.packed_linear import QuantLinear, prepare, replace_linears
from llmlab.kernels.packing import Quantized
from llmlab.kernels.plain import fastest_matmuls
from llmlab.model.lm import LM, decoder_layers
from llmlab.quantization.gptq import Factor, Hessian, factorize, gptq
from llmlab.quantization.grid import Scheme, rtn
from llmlab.quantization.settings import quant_config

METHODS = ("gptq", "rtn")
Solve = Callable[[torch.Tensor, Factor, Scheme], Quantized]
ROWS, CONTEXT = 64, 512  # calibration rows and their tokens


@dataclass
class Report:
    """What quantizing a model cost and lost.

    Attributes:
        linears: a dictionary for each Linear in order of treatment: `name`, `rows`, `columns`, relative output `error`
            on the calibration text (NaN for RTN), `damping`, `seconds`.
        seconds: of the whole walk.
        tokens: of calibration text.
    """

    linears: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    def table(self) -> pd.DataFrame:
        """A row a Linear."""
        return pd.DataFrame(self.linears)


def calibration_rows(lm: LM, text: str, *, rows: int = ROWS, context: int = CONTEXT) -> torch.Tensor:
    """The first `rows` x `context` tokens of a text, [rows, context]; fewer rows if the text is shorter, and shorter
    ones where the model has fewer positions.

    Raises InputError if the text has not a single full row.
    """
    context = min(context, lm.card.context_length)
    ids = torch.tensor(lm.encode(text))
    whole = min(rows, len(ids) // context)
    if whole < 1:
        raise InputError(f"the calibration text has {len(ids)} tokens: give at least one row of {context}.")
    return ids[: whole * context].view(whole, context)


def check_quantizable(lm: LM, scheme: Scheme, method: str) -> None:
    """Raise InputError for settings that make no sense or do not fit a layer; reads no weight."""
    scheme.check()
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}.")
    name, layers = decoder_layers(lm.model)
    linears = {f"{name}.{i}.{n}": linear for i, layer in enumerate(layers) for n, linear in _linears(layer).items()}
    if not linears:
        raise InputError(f"{lm.name} has no plain Linears ({lm.transformation}): quantize the original model.")
    scheme.check(linears)


def quantize(
    lm: LM,
    bits: int = 4,
    group_size: int = 64,
    *,
    method: str = "gptq",
    calibration: torch.Tensor | str | None = None,
    scheme: Scheme | None = None,
    read_layer: Callable[[int], torch.nn.Module] | None = None,
    keep: Path | None = None,
    report: Report | None = None,
    reduce: Callable[[torch.Tensor], None] | None = None,
    solve: Solve = gptq,
) -> LM:
    """A copy of the model whose decoder layers' Linears hold packed weights.

    Embeddings, norms and the output head stay as they are. Needs memory for one decoder layer in fp32, the packed
    layers, and the activations of all calibration rows in one layer: about 4 bytes x tokens x (5 hidden + 4 MLP
    widths).

    Args:
        lm: a model in fp32 (best) or half precision; it is not changed.
        bits: 2, 3, 4 or 8.
        group_size: input columns that share a grid; -1 for a whole row.
        method: "gptq" (arXiv 2210.17323) or "rtn" (round-to-nearest, needs no calibration).
        calibration: a text, or token ids [rows, tokens] from `calibration_rows`; by default the first 64 x 512 tokens
            of WikiText-2's validation part. RTN needs none.
        scheme: all settings at once, instead of `bits` and `group_size`.
        read_layer: gives decoder layer i with its weights; by default a copy of the model's own.
        keep: folder in which finished layers are kept: a killed job that is started again goes on behind them.
        report: is filled in.
        reduce: called with each sum over calibration tokens, in place: for ranks that share the rows.
        solve: in the place of `gptq`: for ranks that share the solving.

    Raises:
        InputError: settings that make no sense, or do not fit a layer; before anything is computed.
        NumericalError: NaN in weights or activations, or a Hessian that cannot be inverted; names the Linear.
    """
    scheme = scheme or Scheme(bits, group_size)
    check_quantizable(lm, scheme, method)
    if method == "rtn":
        calibration = None
    elif not isinstance(calibration, torch.Tensor):
        calibration = calibration_rows(lm, wikitext("valid") if calibration is None else calibration)
    path, layers = decoder_layers(lm.model)
    report = report if report is not None else Report()
    begin = time.perf_counter()
    walk = None
    if calibration is not None:
        report.tokens = calibration.numel()
        walk = _Walk(lm, calibration, scheme, report, reduce, solve)
    finished = _Finished(keep, _identity(lm, scheme, method, calibration)) if keep else None
    done = torch.nn.ModuleList()
    with torch.no_grad(), progress(len(layers), f"{method} {scheme.bits} bits", "layer") as bar:
        for index in range(len(layers)):
            layer = read_layer(index) if read_layer else copy.deepcopy(layers[index])
            if finished and finished.has(index):
                finished.read(index, layer, scheme.bits)
                if walk:
                    walk.through(layer)
            else:
                name = f"{path}.{index}"
                packed = walk.solve(layer, name) if walk else _round(layer, name, scheme, report)
                replace_linears(layer, packed)
                if finished:
                    finished.write(index, layer, report)
            done.append(layer)
            if walk and report.linears:
                last = report.linears[-1]
                bar.set_postfix_str(f"{last['name'].split('.')[-1]} error {last['error']:.1e}", refresh=False)
            bar.update(1)
        # Everything but the layers is copied from the original.
        model = copy.deepcopy(lm.model, {id(layers): done})
        model.config.quantization_config = quant_config(scheme, method)
    prepare(model, lm.model.dtype)
    report.seconds += time.perf_counter() - begin
    how = f"{method} {scheme.bits} bits, group {scheme.group_size}"
    return LM(
        model.requires_grad_(False),
        lm.tokenizer,
        lm.card,
        lm.name,
        lm.revision,
        how if lm.transformation == "none" else f"{lm.transformation}, {how}",
    )


class _Walk:
    """The calibration rows on their way through the layers."""

    def __init__(
        self,
        lm: LM,
        rows: torch.Tensor,
        scheme: Scheme,
        report: Report,
        reduce: Callable[[torch.Tensor], None] | None,
        solve: Solve,
    ) -> None:
        self.scheme, self.report, self.reduce, self.gptq = scheme, report, reduce, solve
        self.hidden, self.kwargs = _first_inputs(lm, rows)
        if len(rows.flatten()) < lm.card.intermediate_size:
            warnings.warn(
                f"{rows.numel()} calibration tokens: the Hessian of an MLP's second Linear has rank {rows.numel()} at "
                f"most, but {lm.card.intermediate_size} columns; give more text.",
                stacklevel=3,
            )

    @torch.no_grad()
    def through(self, layer: torch.nn.Module) -> None:
        """All rows through a layer."""
        with fastest_matmuls(layer):
            output = layer(self.hidden, **self.kwargs)
        self.hidden = output[0] if isinstance(output, tuple) else output

    def solve(self, layer: torch.nn.Module, layer_name: str) -> dict[str, QuantLinear]:
        """Quantize the Linears of a layer as the rows reach them; the rows go on through the quantized weights."""
        packed: dict[str, QuantLinear] = {}
        shared: list[Any] = [None, None]  # the last input and its factor: q, k and v read the same one

        def before(name: str) -> Callable[[torch.nn.Module, tuple[torch.Tensor]], None]:
            def hook(module: torch.nn.Module, args: tuple[torch.Tensor]) -> None:
                linear = cast(torch.nn.Linear, module)
                begin = time.perf_counter()
                try:
                    if shared[0] is not args[0]:
                        shared[:] = args[0], self._factor(args[0])
                    factor: Factor = shared[1]
                    quantized = self.gptq(linear.weight, factor, self.scheme)
                except NumericalError as error:
                    raise NumericalError(f"{layer_name}.{name}: {error}") from None
                packed[name] = QuantLinear.pack(quantized, self.scheme.bits, linear.bias)
                linear.weight = torch.nn.Parameter(quantized.dequantize().to(linear.weight.dtype), requires_grad=False)
                _note(self.report, f"{layer_name}.{name}", quantized, factor.damping, begin)

            return hook

        hooks = [linear.register_forward_pre_hook(before(name)) for name, linear in _linears(layer).items()]
        try:
            self.through(layer)
        finally:
            for hook in hooks:
                hook.remove()
        return packed

    def _factor(self, inputs: torch.Tensor) -> Factor:
        hessian = Hessian(inputs.shape[-1], inputs.device)
        hessian.add(inputs)
        if self.reduce:
            self.reduce(hessian.total)
        return factorize(hessian.matrix(), self.scheme)


def _round(layer: torch.nn.Module, layer_name: str, scheme: Scheme, report: Report) -> dict[str, QuantLinear]:
    packed = {}
    for name, linear in _linears(layer).items():
        begin = time.perf_counter()
        try:
            quantized = rtn(linear.weight, scheme)
        except NumericalError as error:
            raise NumericalError(f"{layer_name}.{name}: {error}") from None
        packed[name] = QuantLinear.pack(quantized, scheme.bits, linear.bias)
        _note(report, f"{layer_name}.{name}", quantized, 0.0, begin)
    return packed


def _note(report: Report, name: str, quantized: Quantized, damping: float, begin: float) -> None:
    rows, columns = quantized.codes.shape
    seconds = time.perf_counter() - begin
    report.linears.append(
        {
            "name": name,
            "rows": rows,
            "columns": columns,
            "error": quantized.error,
            "damping": damping,
            "seconds": seconds,
        }
    )


def _linears(layer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: m for name, m in layer.named_modules() if type(m) is torch.nn.Linear}


class _Reached(Exception):  # no error: how a forward pass ends when its inputs are known
    pass


@torch.no_grad()
def _first_inputs(lm: LM, rows: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Hidden states [rows, tokens, hidden] and keyword arguments with which the model calls its first layer."""
    caught: list[Any] = []

    def catch(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.extend((args[0] if args else kwargs.pop("hidden_states"), dict(kwargs)))
        raise _Reached

    hook = decoder_layers(lm.model)[1][0].register_forward_pre_hook(catch, with_kwargs=True)
    try:
        lm.model(input_ids=rows.to(lm.device), use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    return caught[0], caught[1]


class _Finished:
    """Finished layers in a folder, one safetensors file each, written atomically."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        settings = folder / "settings.json"
        if settings.exists() and json.loads(settings.read_text()) != identity:
            raise InputError(
                f"{folder} holds layers of another job (other model, settings or calibration text): remove it."
            )
        with atomic(settings) as path:
            path.write_text(json.dumps(identity))

    def has(self, index: int) -> bool:
        return self._file(index).exists()

    def write(self, index: int, layer: torch.nn.Module, report: Report) -> None:
        with atomic(self._file(index)) as path:
            save_file({k: v.contiguous() for k, v in layer.state_dict().items()}, path)

    def read(self, index: int, layer: torch.nn.Module, bits: int) -> None:
        tensors = load_file(self._file(index))
        packed = {}
        for name, linear in _linears(layer).items():
            groups = tensors[f"{name}.scales"].shape[0]
            packed[name] = QuantLinear(linear.in_features, linear.out_features, bits, groups, linear.bias is not None)
        replace_linears(layer, packed)
        layer.load_state_dict(tensors)

    def _file(self, index: int) -> Path:
        return self.folder / f"layer-{index:03d}.safetensors"


def _identity(lm: LM, scheme: Scheme, method: str, calibration: torch.Tensor | None) -> dict[str, Any]:
    text = "" if calibration is None else hashlib.sha256(calibration.numpy().tobytes()).hexdigest()[:16]
    model = [lm.name, lm.revision, lm.transformation, lm.dtype]
    return {"model": model, "scheme": asdict(scheme), "method": method, "calibration": text}
