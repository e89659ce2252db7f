"""Codes and scales after GPTQ: both steps against their definitions, one matrix entry after another."""

from dataclasses import replace

import pytest
import torch
from test_gptq import hessian_of, problem

from llmlab.quantization.gptq import damped_hessian, factorize, gptq
from llmlab.quantization.grid import Scheme, find_grid
from llmlab.quantization.refine import fit_scales, sweep

SCHEME = Scheme(3, 16, act_order=False)


def rounded(scheme=SCHEME):
    """Weights [columns, rows], their codes, scale and zero point a column, the group of each, and a damped Hessian."""
    weight, inputs = problem(rows=6, columns=64)
    hessian = damped_hessian(factorize(hessian_of(inputs), scheme))
    group_of = torch.arange(64) // 16
    scales, zeros = (part.T for part in find_grid(weight.view(6, 4, 16), scheme))
    codes = torch.clamp(torch.round(weight.T / scales[group_of]) + zeros[group_of], 0, scheme.levels)
    return weight.T.contiguous(), codes, scales, zeros, group_of, hessian


def loss(w, codes, scales, zeros, group_of, hessian):
    """tr(E H E^T) of each row, fp64."""
    lost = (w - (codes - zeros[group_of]) * scales[group_of]).double()
    return ((hessian.double() @ lost) * lost).sum(0)


def test_scales_are_those_of_least_loss():
    w, codes, scales, zeros, group_of, hessian = rounded()
    found = fit_scales(w, codes - zeros[group_of], scales, group_of, hessian)
    root = torch.linalg.cholesky(hessian.double()).T  # |root (w - C s)|^2
    for row in range(6):
        columns = torch.zeros(64, 4, dtype=torch.float64)
        columns[torch.arange(64), group_of] = (codes - zeros[group_of])[:, row].double()
        right = torch.linalg.lstsq(root @ columns, (root @ w[:, row].double())[:, None]).solution[:, 0]
        assert found[:, row] == pytest.approx(right.float(), rel=5e-3)  # held near the scales so far, and rounded
    before, after = (loss(w, codes, s, zeros, group_of, hessian) for s in (scales, found))
    assert (after <= before).all() and after.sum() < 0.95 * before.sum()


def test_a_sweep_takes_each_code_to_its_best_level_with_all_others_as_they_are():
    w, codes, scales, zeros, group_of, hessian = rounded()
    found = codes.clone()
    sweep(w, found, scales[group_of], zeros[group_of], hessian, SCHEME)
    expected = codes.clone()
    for k in range(64):
        tried = []
        for level in range(SCHEME.levels + 1):
            expected[k] = level
            tried.append(loss(w, expected, scales, zeros, group_of, hessian))
        expected[k] = torch.stack(tried).argmin(0).float()
    assert (found == expected).float().mean() > 0.99
    assert (found != codes).any()


@pytest.mark.parametrize("target", ["gptq", "gptaq", "qronos"])
@pytest.mark.parametrize("how", [{}, {"static_groups": False}, {"group_size": -1}, {"symmetric": True}], ids=str)
def test_every_sweep_loses_less(target, how):
    weight, inputs = problem(rows=96)
    errors = []
    for sweeps in (0, 1, 3):
        scheme = replace(Scheme(2, 32, sweeps=sweeps, target=target), **how)
        made = gptq(weight, factorize(hessian_of(inputs), scheme), scheme)
        assert (made.scales > 0).all() and made.codes.max() <= 3
        errors.append(made.error)
    assert errors[0] > errors[1] >= errors[2]
