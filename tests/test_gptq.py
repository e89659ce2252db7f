"""Grids and GPTQ against their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmlab import InputError, NumericalError
from llmlab.kernels.packing import pack, unpack
from llmlab.quantization.gptq import Hessian, factorize, gptq, relative_error
from llmlab.quantization.grid import Scheme, codes_of, find_grid, group_grids, rtn

SCHEMES = [
    Scheme(bits, size, symmetric, act_order, static, search)
    for bits in (2, 3, 4, 8)
    for size, symmetric, act_order, static, search in (
        (32, False, True, True, True),
        (64, True, True, False, False),
        (-1, False, False, False, True),
        (32, False, False, False, False),
    )
]


def problem(rows=48, columns=128, tokens=600, seed=0):
    """Weights and strongly correlated inputs, as real layers have them."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs


def hessian_of(inputs):
    hessian = Hessian(inputs.shape[1], inputs.device)
    hessian.add(inputs)
    return hessian.matrix()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_scales_and_zeros_fit_the_format(scheme):
    weight, inputs = problem()
    for made in (rtn(weight, scheme), gptq(weight, factorize(hessian_of(inputs), scheme), scheme)):
        groups = 1 if scheme.group_size == -1 else 128 // scheme.group_size
        assert made.codes.dtype == torch.uint8 and made.codes.shape == weight.shape
        assert made.codes.max() <= scheme.levels
        assert made.scales.dtype == torch.float16 and made.scales.shape == (48, groups)
        assert made.zeros.min() >= 1 and made.zeros.max() <= scheme.levels  # stored minus one
        assert torch.isfinite(made.scales).all() and (made.scales > 0).all()
        assert sorted(made.g_idx.tolist()) == [k * groups // 128 for k in range(128)]
        if scheme.symmetric:
            assert (made.zeros == 2 ** (scheme.bits - 1)).all()
        if scheme.static_groups:
            assert made.g_idx.tolist() == sorted(made.g_idx.tolist())


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_gptq_loses_less_of_the_outputs_than_rounding(scheme):
    weight, inputs = problem()
    hessian = hessian_of(inputs)
    made = gptq(weight, factorize(hessian, scheme), scheme)
    assert made.error < relative_error(weight, rtn(weight, scheme), hessian)
    lost = (weight - made.dequantize()) @ inputs.T
    assert made.error == pytest.approx(float(lost.square().sum() / (weight @ inputs.T).square().sum()), rel=1e-3)


def test_gptq_equals_the_papers_recursion():
    """Equation 2 column by column in fp64, with the Hessian inverted anew for the columns that are left."""
    weight, inputs = problem(rows=5, columns=64)
    scheme = Scheme(3, 32, act_order=False, static_groups=False, search=False)
    hessian = hessian_of(inputs)
    made = gptq(weight, factorize(hessian, scheme), scheme)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(64, dtype=torch.float64)
    w, codes = weight.double().clone(), torch.empty(5, 64)
    for j in range(64):
        if j % 32 == 0:
            scales, zeros = find_grid(w[:, j : j + 32].float(), scheme)
        codes[:, j] = codes_of(w[:, j].float(), scales, zeros, scheme)
        error = w[:, j] - ((codes[:, j] - zeros) * scales).double()
        inverse = torch.linalg.inv(damped[j:, j:])
        w[:, j:] -= torch.outer(error / inverse[0, 0], inverse[0])
    assert (made.codes == codes).float().mean() > 0.99  # fp32 may tip a weight that lies between two levels


def test_rounding_is_to_the_nearest_level():
    weight = torch.randn(16, 64)
    scheme = Scheme(3, 32, search=False)
    scales, zeros = group_grids(weight, scheme)
    levels = (torch.arange(8)[None, None] - zeros[..., None]) * scales[..., None]  # [16, 2, 8]
    nearest = (weight.view(16, 2, 32, 1) - levels[:, :, None]).abs().amin(-1).view(16, 64)
    assert (weight - rtn(weight, scheme).dequantize()).abs() == pytest.approx(nearest, abs=1e-3)


def test_the_search_never_makes_a_grid_worse():
    weight = torch.randn(64, 32).pow(3)  # heavy tails
    importance = torch.rand(32)
    for symmetric in (False, True):
        errors = []
        for search in (False, True):
            scheme = Scheme(3, 32, symmetric, search=search)
            scales, zeros = find_grid(weight, scheme, importance)
            rounded = (codes_of(weight, scales[:, None], zeros[:, None], scheme) - zeros[:, None]) * scales[:, None]
            errors.append(((rounded - weight).square() * importance).sum(-1))
        assert (errors[1] <= errors[0] + 1e-6).all()
        assert errors[1].sum() < 0.95 * errors[0].sum()


def test_dead_columns_do_not_disturb():
    weight, inputs = problem()
    inputs[:, 5] = 0
    scheme = Scheme(4, 32)
    made = gptq(weight, factorize(hessian_of(inputs), scheme), scheme)
    assert torch.isfinite(made.dequantize()).all()
    assert made.error < relative_error(weight, rtn(weight, scheme), hessian_of(inputs))


def test_a_singular_hessian_gets_more_damping():
    direction = torch.randn(64, 1).double()
    hessian = (direction @ direction.T).float() - 0.05 * torch.eye(64) * direction.square().mean()
    factor = factorize(hessian, Scheme(4, 32))
    assert factor.damping > 0.01
    with pytest.raises(NumericalError, match="not positive definite, even damped"):
        factorize(hessian - 100 * torch.eye(64), Scheme(4, 32))


def test_bad_numbers_are_named():
    weight, inputs = problem()
    scheme = Scheme(4, 32)
    with pytest.raises(NumericalError, match="activations hold NaN"):
        Hessian(128, inputs.device).add(torch.full_like(inputs, float("nan")))
    with pytest.raises(NumericalError, match="weights hold NaN"):
        rtn(torch.full_like(weight, float("inf")), scheme)
    with pytest.raises(NumericalError, match="weights hold NaN"):
        gptq(torch.full_like(weight, float("nan")), factorize(hessian_of(inputs), scheme), scheme)
    with pytest.raises(NumericalError, match="inputs are all zero"):
        factorize(torch.zeros(8, 8), scheme)


def test_bad_schemes_say_what_would_do():
    with pytest.raises(InputError, match="5 bits: choose one of 2, 3, 4, 8"):
        Scheme(5).check()
    with pytest.raises(InputError, match="group size 0"):
        Scheme(4, 0).check()
    assert (
        Scheme(4, 128).misfit(64, 576)
        == "whose 576 input columns 128 does not divide: choose groups of 16, 32, 64 or -1"
    )
    assert "packs 32 weights at a time" in Scheme(4, -1).misfit(64, 40)
    assert Scheme(4, -1).misfit(64, 96) is None
    with pytest.raises(InputError, match="damping"):
        Scheme(4, damping=0).check()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_packing_is_undone(bits, blocks, m, seed):
    values = torch.randint(0, 2**bits, (32 * blocks, m), generator=torch.Generator().manual_seed(seed))
    words = pack(values, bits)
    assert words.shape == (blocks * bits, m) and words.dtype == torch.int32
    assert torch.equal(unpack(words, bits).long(), values)


def test_packing_is_autogptqs():
    """The first word at 4 bits holds eight values, low first; at 3 bits value 10 straddles words 0 and 1."""
    values = torch.arange(32) % 16
    words = pack(values[:, None], 4).numpy().view(np.uint32)
    assert words[0, 0] == sum(k << (4 * k) for k in range(8))
    threes = torch.zeros(32, 1, dtype=torch.long)
    threes[10] = 0b101
    words = pack(threes, 3).numpy().view(np.uint32)
    assert (words[:, 0] == [0b01 << 30, 0b1, 0]).all()
