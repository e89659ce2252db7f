"""The walk through a model: decoder layer by decoder layer, each Linear quantized with the inputs it really gets.

All calibration rows go through a layer at once. When they reach a Linear, a hook that runs before it sees every input
it will ever get, so the Linear is solved there and then, and the rows go on through its *quantized* weights. One pass
a layer gives what the reference implementation calls `true_sequential`.
"""

from __future__ import annotations

import copy
import hashlib
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict

import pandas as pd
import torch

from llmlab.base.errors import InputError, NumericalError
from llmlab.base.progress import progress
from llmlab.data import wikitext
from llmlab.kernels.packed_linear import QuantLinear, prepare
from llmlab.kernels.packing import Quantized
from llmlab.kernels.plain import fastest_matmuls
from llmlab.model.layerwise import ReadLayer
from llmlab.model.lm import LM, decoder_layers
from llmlab.quantization.calibration import calibration_rows, first_inputs
from llmlab.quantization.finished import FinishedLayers
from llmlab.quantization.gptq import Factor, Hessian, factorize, gptq
from llmlab.quantization.grid import Scheme, rtn
from llmlab.quantization.settings import quant_config

METHODS = ("gptq", "rtn")


class LinearReport(TypedDict):
    """What became of one Linear: relative output `error` on the calibration text (NaN for RTN), `damping` needed."""

    name: str
    rows: int
    columns: int
    error: float
    damping: float
    seconds: float


@dataclass
class Report:
    """What quantizing a model cost and lost.

    Attributes:
        linears: a `LinearReport` for each Linear in order of treatment.
        seconds: of the whole walk.
        tokens: of calibration text.
    """

    linears: list[LinearReport] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0

    def table(self) -> pd.DataFrame:
        """A row a Linear."""
        return pd.DataFrame(self.linears)


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
    report: Report | None = None,
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
        report: is filled in.

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
    report = Report() if report is None else report
    return Walk(lm, scheme, method, calibration, report).run()


class Alone:
    """How the walk adds up and solves in one process; ranks that share the calibration rows do it in other ways."""

    def add_up(self, total: torch.Tensor) -> None:
        """Make a sum over this process's rows one over all rows, in place."""

    def solve(self, weight: torch.Tensor, factor: Factor, scheme: Scheme) -> Quantized:
        """GPTQ on one Linear."""
        return gptq(weight, factor, scheme)


@dataclass
class Walk:
    """One job: what is quantized, how, and where layers come from and go.

    Attributes:
        lm, scheme, method: as for `quantize`.
        rows: token ids [rows, tokens] of the calibration text; None for RTN.
        report: is filled in.
        read_layer: gives decoder layer i with its weights; by default a copy of the model's own.
        keep: folder in which finished layers are kept: a killed job that is started again goes on behind them.
        workers: how processes that share the rows add up and solve.
    """

    lm: LM
    scheme: Scheme
    method: str = "gptq"
    rows: torch.Tensor | None = None
    report: Report = field(default_factory=Report)
    read_layer: ReadLayer | None = None
    keep: Path | None = None
    workers: Alone = field(default_factory=Alone)
    last: tuple[torch.Tensor, Factor] | None = field(default=None, init=False)  # the last Hessian's input and factor

    @torch.no_grad()
    def run(self) -> LM:
        """The quantized model."""
        begin, lm, bits = time.perf_counter(), self.lm, self.scheme.bits
        path, layers = decoder_layers(lm.model)
        finished = FinishedLayers(self.keep, self._identity()) if self.keep else None
        if self.rows is not None:
            self._start(self.rows)
        done = torch.nn.ModuleList()
        with progress(len(layers), f"{self.method} {bits} bits", "layer") as bar:
            for index in range(len(layers)):
                layer = self.read_layer(index) if self.read_layer else copy.deepcopy(layers[index])
                if finished and finished.has(index):
                    finished.read(index, layer, bits)
                    self._pass_through(layer)
                else:
                    self._solve_layer(layer, f"{path}.{index}")
                    if finished:
                        finished.write(index, layer)
                done.append(layer)
                if self.rows is not None and self.report.linears:
                    last = self.report.linears[-1]
                    bar.set_postfix_str(f"{last['name'].split('.')[-1]} error {last['error']:.1e}", refresh=False)
                bar.update(1)
        # Everything but the layers is copied from the original.
        model = copy.deepcopy(lm.model, {id(layers): done})
        model.config.quantization_config = quant_config(self.scheme, self.method)
        prepare(model, lm.model.dtype)
        self.report.seconds += time.perf_counter() - begin
        how = f"{self.method} {bits} bits, group {self.scheme.group_size}"
        how = how if lm.transformation == "none" else f"{lm.transformation}, {how}"
        return LM(model.requires_grad_(False), lm.tokenizer, lm.card, lm.name, lm.revision, how)

    def _start(self, rows: torch.Tensor) -> None:
        total = torch.tensor(rows.numel(), device=self.lm.device)
        self.workers.add_up(total)
        self.report.tokens = tokens = int(total)
        if tokens < (width := self.lm.card.intermediate_size):
            warnings.warn(
                f"{tokens} calibration tokens: the Hessian of an MLP's second Linear has rank {tokens} at most, but "
                f"{width} columns; give more text.",
                stacklevel=5,
            )
        self.hidden_states, self.arguments = first_inputs(self.lm, rows)

    def _pass_through(self, layer: torch.nn.Module) -> None:
        """All rows through a layer, if there are rows."""
        if self.rows is not None:
            with fastest_matmuls(layer):
                output = layer(self.hidden_states, **self.arguments)
            self.hidden_states = output[0] if isinstance(output, tuple) else output

    def _solve_layer(self, layer: torch.nn.Module, layer_name: str) -> None:
        """Quantize the Linears of a layer as the rows reach them; the rows go on through the quantized weights."""
        linears = _linears(layer)
        packed: dict[str, QuantLinear] = {}

        def solve(name: str, inputs: torch.Tensor | None) -> None:
            try:
                packed[name] = self._solve(f"{layer_name}.{name}", linears[name], inputs)
            except NumericalError as error:
                raise NumericalError(f"{layer_name}.{name}: {error}") from None

        if self.rows is None:
            for name in linears:
                solve(name, None)
        hooks = [
            linear.register_forward_pre_hook(lambda _, args, name=name: solve(name, args[0]))
            for name, linear in linears.items()
        ]
        try:
            self._pass_through(layer)
        finally:
            self.last = None
            for hook in hooks:
                hook.remove()
        for name, quant_linear in packed.items():
            layer.set_submodule(name, quant_linear)

    def _solve(self, name: str, linear: torch.nn.Linear, inputs: torch.Tensor | None) -> QuantLinear:
        """One Linear, by GPTQ for these inputs, or by rounding; notes what it lost."""
        begin, damping = time.perf_counter(), 0.0
        if inputs is None:
            quantized = rtn(linear.weight, self.scheme)
        else:
            factor = self._factor(inputs)
            quantized, damping = self.workers.solve(linear.weight, factor, self.scheme), factor.damping
            linear.weight = torch.nn.Parameter(quantized.dequantize().to(linear.weight.dtype), requires_grad=False)
        rows, columns = quantized.codes.shape
        seconds = time.perf_counter() - begin
        self.report.linears.append(
            {"name": name, "rows": rows, "columns": columns, "error": quantized.error, "damping": damping,
             "seconds": seconds}
        )  # fmt: skip
        return QuantLinear.pack(quantized, self.scheme.bits, linear.bias)

    def _factor(self, inputs: torch.Tensor) -> Factor:
        """The factor of the Hessian of these inputs; q, k and v read the same ones and share it."""
        if self.last is None or self.last[0] is not inputs:
            hessian = Hessian(inputs.shape[-1], inputs.device)
            hessian.add(inputs)
            self.workers.add_up(hessian.total)
            self.workers.add_up(hessian.tokens)
            self.last = inputs, factorize(hessian.matrix(), self.scheme)
        return self.last[1]

    def _identity(self) -> dict[str, object]:
        """What the finished layers depend on."""
        text = "" if self.rows is None else hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()[:16]
        model = [self.lm.name, self.lm.revision, self.lm.transformation, self.lm.dtype]
        return {"model": model, "scheme": asdict(self.scheme), "method": self.method, "calibration": text}


def _linears(layer: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: m for name, m in layer.named_modules() if type(m) is torch.nn.Linear}
