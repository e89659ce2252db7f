"""Bits a matrix, by what fewer of them would cost the model's predictions: a mean of 2.5, say.

Off by E = W - Q, a matrix moves its outputs by d = E x, and the model's distributions, to second order, by

    KL(exact || quantized) = 1/2 E[(g^T d)^2],    g = d log p(y) / d outputs,  y drawn from the model itself

a token: the Fisher information, for first-order terms vanish where the model is its own teacher. With gradients of
different outputs and tokens uncorrelated, and independent of the inputs x, whose mean of x x^T is GPTQ's H, that is

    loss_b = 1/2 sum_r E[g_r^2] (E_b H E_b^T)_rr    for what GPTQ makes of the matrix at b bits.

Losses of different matrices add up, so the choice is a knapsack: the least sum of losses whose bits are no more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch

from llmlab.base.errors import InputError
from llmlab.kernels.packing import Quantized
from llmlab.model.lm import LM, decoder_layers
from llmlab.model.matrices import matrices
from llmlab.quantization.fit import check_quantizable
from llmlab.quantization.gptq import Factor, gptq
from llmlab.quantization.grid import Scheme
from llmlab.quantization.walk import Alone, Walk

BITS = (2, 3, 4)
ROWS = 8  # of calibration, on which losses are measured
UNITS = 1 << 14  # in which the knapsack is weighed, at most


def mixed(lm: LM, mean: float, scheme: Scheme, calibration: torch.Tensor) -> Scheme:
    """The scheme with bits for each matrix, `mean` a weight at most (the scales come on top).

    Needs memory for the gradients of one row, and takes about as long as quantizing with 8 rows three times.

    Args:
        lm: the model as it will be quantized (rotated, if so), in fp32.
        mean: between 2 and 4.
        scheme: everything else.
        calibration: token ids [rows, tokens].

    Raises InputError for a mean out of range, and for a mixture of experts.
    """
    if not BITS[0] <= mean <= BITS[-1]:
        raise InputError(f"{mean} bits in the mean: choose {BITS[0]} to {BITS[-1]}.")
    if lm.card.active_parameters < lm.card.linear_parameters:
        raise InputError(f"{lm.name} is a mixture of experts, whose experts all get the same bits: choose 2, 3 or 4.")
    losses, sizes = sensitivities(lm, scheme, calibration[:ROWS])
    picked = knapsack(list(losses.values()), list(sizes.values()), mean)
    bits = Counter(picked).most_common(1)[0][0]
    differing = tuple((name, b) for name, b in zip(losses, picked, strict=True) if b != bits)
    return replace(scheme, bits=bits, mixed_bits=differing)


def sensitivities(lm: LM, scheme: Scheme, rows: torch.Tensor) -> tuple[dict[str, list[float]], dict[str, int]]:
    """loss_b of each matrix, nats a token, for each of `BITS`; and how many weights it has."""
    plain = replace(scheme, target="gptq", sweeps=0, head_bits=None)
    check_quantizable(lm, plain, "gptq")
    squares, measuring = output_gradients(lm, rows), Measuring()
    walk = Walk(lm, plain, "gptq", rows, workers=measuring)
    walk.run()
    linears, losses = walk.report.linears, dict[str, list[float]]()
    for linear, lost in zip(linears, measuring.lost, strict=True):
        losses[linear["name"]] = [float((squares[linear["name"]] * of_rows).sum() / 2) for of_rows in lost]
    return losses, {linear["name"]: linear["rows"] * linear["columns"] for linear in linears}


class Measuring(Alone):
    """Solves each matrix at all `BITS` and goes on with the most; `lost`: diag(E_b H E_b^T) [rows] of each."""

    def __init__(self) -> None:
        self.lost: list[list[torch.Tensor]] = []

    def solve(self, weight: torch.Tensor, factor: Factor, scheme: Scheme) -> Quantized:
        """GPTQ on one matrix."""
        results = [gptq(weight, factor, replace(scheme, bits=bits)) for bits in BITS]
        errors = [weight.float() - result.dequantize() for result in results]
        self.lost.append([((error @ factor.hessian) * error).sum(-1) for error in errors])
        return results[-1]


def output_gradients(lm: LM, rows: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """E[g_r^2] over the tokens of rows [rows, tokens] for the outputs r of every matrix of the layers, by name."""
    squares: dict[str, torch.Tensor] = {}
    generator = torch.Generator(lm.device).manual_seed(seed)

    def watch(name: str) -> Callable[..., None]:
        def add(gradient: torch.Tensor) -> None:
            squares[name] = squares.get(name, 0) + gradient.flatten(0, -2).float().square().sum(0) / rows.numel()

        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    path, layers = decoder_layers(lm.model)
    embedding = lm.model.get_input_embeddings()
    hooks = [embedding.register_forward_hook(lambda _, __, output: output.detach().requires_grad_())]
    for index, layer in enumerate(layers):
        hooks += [m.register_forward_hook(watch(f"{path}.{index}.{name}")) for name, m in matrices(layer).items()]
    try:
        for row in rows.to(lm.device):
            with torch.enable_grad():
                logits = lm.model(input_ids=row[None], use_cache=False).logits[0].float()
                drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
                logits.log_softmax(-1).gather(1, drawn).sum().backward()
    finally:
        for hook in hooks:
            hook.remove()
    return squares


def knapsack(losses: list[list[float]], sizes: list[int], mean: float) -> list[int]:
    """Bits for each of several matrices: the least sum of losses with `mean` bits a weight at most.

    Exact where the sizes' greatest common divisor is not below a 16,384th of what there is to give out beyond 2 bits.

    Args:
        losses: for each matrix at each of `BITS`.
        sizes: their weights.
    """
    spare = (mean - BITS[0]) * sum(sizes) + 1e-6  # bits to give out
    unit = max(math.gcd(*sizes), math.ceil(spare / UNITS))
    budget = int(spare // unit)
    least, picks = torch.zeros(budget + 1, dtype=torch.float64), []
    for lost, size in zip(losses, sizes, strict=True):
        costs = [-(-size * (bits - BITS[0]) // unit) for bits in BITS]
        ways = torch.full((len(BITS), budget + 1), torch.inf, dtype=torch.float64)
        for way, loss, cost in zip(ways, lost, costs, strict=True):
            way[cost:] = least[: max(0, budget + 1 - cost)] + loss
        least, pick = ways.min(0)
        picks.append((pick, costs))
    bits: list[int] = []
    for pick, costs in reversed(picks):
        choice = int(pick[budget])
        budget -= costs[choice]
        bits.append(BITS[choice])
    return bits[::-1]
