"""The walk through a model: decoder layer by decoder layer, each Linear quantized with the inputs it really gets.

All calibration rows go through a layer at once. When they reach a Linear, a hook that runs before it sees every input
it will ever get, so the Linear is solved there and then, and the rows go on through its *quantized* weights. One pass
a layer gives what the reference implementation calls `true_sequential`.

Where the target asks what the exact model's inputs are, its rows go beside them, through each layer before it is
quantized: a second pass a layer, and the inputs of its Linears are held until those are solved.
"""

from __future__ import annotations

import copy
import hashlib
import time
import warnings
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llmlab.base.errors import NumericalError
from llmlab.base.progress import progress
from llmlab.data import wikitext
from llmlab.kernels.packed_linear import QuantLinear, prepare
from llmlab.kernels.packing import Quantized
from llmlab.kernels.plain import fastest_matmuls
from llmlab.model.layerwise import ReadLayer
from llmlab.model.lm import LM, decoder_layers
from llmlab.model.matrices import Experts, expert_names, matrix_of, set_matrix, split_experts, stored_names
from llmlab.quantization.beside import Beside
from llmlab.quantization.calibration import calibration_rows, layer_calls
from llmlab.quantization.finished import FinishedLayers
from llmlab.quantization.fit import NOT_CALLED, check_quantizable, fitting
from llmlab.quantization.gptq import Factor, Hessian, factorize, gptq
from llmlab.quantization.grid import Scheme, rtn
from llmlab.quantization.head import quantize_head
from llmlab.quantization.memory import check_job
from llmlab.quantization.report import Report
from llmlab.quantization.settings import quant_config


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
    """A copy of the model whose decoder layers' matrices hold packed weights.

    Those are Linears, GPT-2's Conv1D, and every expert of a mixture, with the tokens that are routed to it. Embeddings,
    norms, routers and the output head stay as they are. So do matrices whose shape cannot be packed: a warning, the
    report and the checkpoint's settings name them, and where they hold more than a tenth of the layers' weights
    (`Scheme.at_least`) the model is refused. Needs memory for one decoder layer in fp32, the packed
    layers, and the activations of all calibration rows in one layer: about 4 bytes x tokens x (5 hidden + 4 MLP
    widths); with a target that looks at the exact model's inputs, 4 bytes x tokens x (7 hidden + 1 MLP width) more.

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
    check_job(lm, scheme, calibration)
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
    beside: Beside | None = field(default=None, init=False)  # the exact model, if the target asks for it
    bar: tqdm[Any] | None = field(default=None, init=False)  # counts weights
    # The last Hessian's inputs, how many tokens they are over all workers, and its factor.
    last: tuple[torch.Tensor, int, Factor | None] | None = field(default=None, init=False)

    @torch.no_grad()
    def run(self) -> LM:
        """The quantized model."""
        begin, lm = time.perf_counter(), self.lm
        path, layers = decoder_layers(lm.model)
        names = expert_names(lm.model)
        finished = FinishedLayers(self.keep, self._identity()) if self.keep else None
        if self.rows is not None:
            self._start(self.rows)
        done = torch.nn.ModuleList()
        ends = list(accumulate(sum(p.numel() for p in layer.parameters()) for layer in layers))  # in weights
        with progress(ends[-1], f"{self.method} {self.scheme.bits} bits", "weight") as self.bar:
            # What is left is told by the mean speed so far: matrices of a layer differ in theirs.
            self.bar.bar_format = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self.bar.smoothing = 0
            for index in range(len(layers)):
                layer = self.read_layer(index) if self.read_layer else copy.deepcopy(layers[index])
                split_experts(layer, names)
                fits, kept = fitting(layer, self.scheme)
                if self.beside:
                    self.beside.pass_through(layer, self.calls[index], fits)
                if finished and finished.has(index):
                    finished.read(index, layer)
                    self._pass_through(layer, index)
                    kept |= {name: NOT_CALLED for name in fits if layer.get_submodule(name) is fits[name]}
                else:
                    kept |= self._solve_layer(layer, index, fits, f"{path}.{index}")
                    if finished:
                        finished.write(index, layer)
                self.report.kept |= {f"{path}.{index}.{name}": reason for name, reason in kept.items()}
                done.append(layer)
                self.bar.update(ends[index] - self.bar.n)  # norms, and what is kept or was finished
        # Everything but the layers is copied from the original.
        model = copy.deepcopy(lm.model, {id(layers): done})
        stored = stored_names(model)
        mixed_bits = [(stored(name), bits) for name, bits in self.scheme.mixed_bits]
        method = self.scheme.target if self.method == "gptq" else self.method
        model.config.quantization_config = quant_config(self.scheme, method, map(stored, self.report.kept), mixed_bits)
        prepare(model, lm.model.dtype)
        self.report.seconds += time.perf_counter() - begin
        self.report.warn()
        how = f"{method} {self.scheme.bits} bits, group {self.scheme.group_size}"
        how += ", mixed" if self.report.kept or mixed_bits else ""
        how = how if lm.transformation == "none" else f"{lm.transformation}, {how}"
        quantized = LM(model.requires_grad_(False), lm.tokenizer, lm.card, lm.name, lm.revision, how)
        head_bits = self.scheme.head_bits
        return quantized if head_bits is None else quantize_head(quantized, head_bits, self.scheme.group_size)

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
        self.hidden_states, self.calls = layer_calls(self.lm, rows)
        self.beside = None if self.scheme.target == "gptq" else Beside(self.hidden_states)

    def _pass_through(self, layer: torch.nn.Module, index: int) -> None:
        """All rows through a layer, if there are rows."""
        if self.rows is not None:
            with fastest_matmuls(layer):
                self.hidden_states = self.calls[index](layer, self.hidden_states)

    def _solve_layer(
        self, layer: torch.nn.Module, index: int, linears: dict[str, torch.nn.Linear], layer_name: str
    ) -> dict[str, str]:
        """Quantize matrices of a layer as the rows reach them; the rows go on through the quantized weights.

        Returns the names of those that no row can reach, with the reason.
        """
        experts = [m for m in layer.modules() if isinstance(m, Experts)]
        packed: dict[str, QuantLinear] = {}

        def solve(name: str, inputs: torch.Tensor | None) -> None:
            if name in packed:  # called a second time: its weights are on the grid already
                return
            try:
                off = self.beside.off(name, inputs) if self.beside else []
                packed[name] = self._solve(f"{layer_name}.{name}", linears[name], inputs, off)
            except NumericalError as error:
                raise NumericalError(f"{layer_name}.{name}: {error}") from None

        if self.rows is None:
            for name in linears:
                solve(name, None)
        hooks = [
            linear.register_forward_pre_hook(lambda _, args, name=name: solve(name, args[0]))
            for name, linear in linears.items()
        ]
        hooks += self.beside.watch(self.hidden_states, linears) if self.beside else []
        try:
            for module in experts:
                module.visit_all = True
            self._pass_through(layer, index)
        finally:
            self.last = None
            for module in experts:
                module.visit_all = False
            for hook in hooks:
                hook.remove()
        for name, quant_linear in packed.items():
            layer.set_submodule(name, quant_linear)
        return dict.fromkeys(linears.keys() - packed.keys(), NOT_CALLED)

    def _solve(
        self, name: str, linear: torch.nn.Linear, inputs: torch.Tensor | None, off: list[torch.Tensor]
    ) -> QuantLinear:
        """One Linear, by GPTQ for these inputs, `off` the exact model's, or by rounding; notes what it lost."""
        begin, damping, weight = time.perf_counter(), 0.0, matrix_of(linear)
        tokens, factor = (0, None) if inputs is None else self._factor(inputs, off)
        scheme = self.scheme.of(name)
        if factor is None:
            quantized = rtn(weight, scheme)
        else:
            quantized, damping = self.workers.solve(weight, factor, scheme), factor.damping
        set_matrix(linear, quantized.dequantize().to(weight.dtype))
        rows, columns = quantized.codes.shape
        seconds = time.perf_counter() - begin
        self.report.linears.append(
            {"name": name, "rows": rows, "columns": columns, "error": quantized.error, "bound": quantized.bound,
             "damping": damping, "seconds": seconds, "tokens": tokens}
        )  # fmt: skip
        if self.bar is not None:
            if factor is not None:
                lost = f"error {quantized.error:.1e}, bound {quantized.bound:.1e}"
                self.bar.set_postfix_str(f"{name.split('.')[-1]} {lost}", refresh=False)
            self.bar.update(rows * columns)
        return QuantLinear.pack(quantized, scheme.bits, linear.bias)

    def _factor(self, inputs: torch.Tensor, off: list[torch.Tensor]) -> tuple[int, Factor | None]:
        """How many tokens there are, and the factor of their Hessian (None if there are none).

        q, k and v read the same inputs and share it.
        """
        if self.last is None or self.last[0] is not inputs:
            hessian = Hessian(inputs.shape[-1], inputs.device)
            hessian.add(inputs, off)
            for total in hessian.sums():
                self.workers.add_up(total)
            tokens = int(hessian.tokens)
            factor = factorize(hessian.matrix(), self.scheme, hessian.drift()) if tokens else None
            self.last = inputs, tokens, factor
        return self.last[1:]

    def _identity(self) -> dict[str, object]:
        """What the finished layers depend on."""
        text = "" if self.rows is None else hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()[:16]
        model = [self.lm.name, self.lm.revision, self.lm.transformation, self.lm.dtype]
        return {"model": model, "scheme": asdict(self.scheme), "method": self.method, "calibration": text}
