"""Grids by search against every grid there is, and against GPTQ's own loss."""

from dataclasses import replace

import pytest
import torch
from test_gptq import hessian_of, problem

from llmlab import InputError
from llmlab.quantization.gptq import factorize, gptq, group_factor
from llmlab.quantization.grid import Scheme, codes_of, find_grid, rtn
from llmlab.quantization.neuqi import SCALES, SMALLEST, gptq_loss


def weighted_loss(weight, scales, zeros, scheme, importance):
    grid = (scales[..., None], zeros[..., None])
    levels = (codes_of(weight, *grid, scheme) - grid[1]) * grid[0]
    return ((levels - weight).square() * importance).sum(-1)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_neuqi_finds_the_best_of_all_scales_and_zero_points(bits):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(40, 32, generator=generator) + torch.linspace(-1, 1, 40)[:, None]  # some far from zero
    weight[:10] = weight[:10].pow(3)  # heavy tails
    importance = torch.rand(32, generator=generator).square()
    scheme = Scheme(bits, 32, grid="neuqi")
    scales, zeros = find_grid(weight, scheme, importance)
    found = weighted_loss(weight, scales, zeros, scheme, importance)
    spread = weight.amax(-1).clamp(min=0) - weight.amin(-1).clamp(max=0)
    least = torch.full((40,), float("inf"))
    for step in range(SCALES):
        scale = (spread * (1 - step * (1 - SMALLEST) / SCALES) / scheme.levels).half().float()
        for zero in range(1, scheme.levels + 1):
            loss = weighted_loss(weight, scale, torch.full((40,), float(zero)), scheme, importance)
            least = torch.minimum(least, loss)
    assert torch.allclose(found, least)
    shrunk = weighted_loss(weight, *find_grid(weight, replace(scheme, grid="shrink"), importance), scheme, importance)
    assert found.sum() < 0.97 * shrunk.sum()


def test_the_loss_of_a_group_is_what_gptq_loses_in_it():
    """The first columns of a matrix, the others left free: how the loss grows when those are rounded, in fp64."""
    weight, inputs = problem(rows=6, columns=64)
    scheme = Scheme(3, 32, act_order=False)
    hessian = hessian_of(inputs)
    factor = factorize(hessian, scheme)
    grid = find_grid(weight[:, :32], scheme)
    upper = group_factor(factor.upper, torch.arange(32))
    assert torch.allclose(upper, factor.upper[:32, :32], rtol=1e-3, atol=1e-5)
    loss = gptq_loss(weight[:, :32], grid, scheme.levels, upper)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(64, dtype=torch.float64)
    w = weight.double().clone()
    for j in range(32):
        scales, zeros = grid
        level = (codes_of(w[:, j].float(), scales, zeros, scheme) - zeros) * scales
        inverse = torch.linalg.inv(damped[j:, j:])
        w[:, j:] -= torch.outer((w[:, j] - level) / inverse[0, 0], inverse[0])
    lost = w - weight
    assert loss == pytest.approx(((lost @ damped) * lost).sum(1), rel=1e-2)


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("bits", [2, 3])
def test_grids_lose_less_than_shrunken_ranges(bits, static):
    weight, inputs = problem(rows=96)
    errors = {}
    for grid in ("shrink", "neuqi", "gptq"):
        scheme = Scheme(bits, 32, static_groups=static, grid=grid)
        errors[grid] = gptq(weight, factorize(hessian_of(inputs), scheme), scheme).error
    assert errors["gptq"] < errors["shrink"] and errors["neuqi"] < 1.02 * errors["shrink"]


def test_symmetric_grids_keep_their_zero_point():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    made = rtn(weight, Scheme(3, 32, symmetric=True, grid="neuqi"))
    assert (made.zeros == 4).all() and torch.equal(made.scales, rtn(weight, Scheme(3, 32, symmetric=True)).scales)


def test_rounding_has_no_gptq_to_judge_its_grids():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    judged, plain = (rtn(weight, Scheme(3, 32, grid=grid)) for grid in ("gptq", "neuqi"))
    assert torch.equal(judged.codes, plain.codes)


def test_bad_choices_are_refused():
    with pytest.raises(InputError, match="unknown grid 'best': choose one of shrink, neuqi, gptq"):
        Scheme(grid="best").check()
    with pytest.raises(InputError, match="unknown target 'awq'"):
        Scheme(target="awq").check()
