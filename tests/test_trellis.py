"""The trellis code against its definition and brute force, and the scalar codes against Max's table."""

import itertools

import pytest
import torch

from llmlab import InputError
from llmlab.quantization.trellis import Trellis, gaussian_errors, lloyd_max, one_mad, scalar_error, uniform

MAX_1960 = {1: (0.3634, 0.3634), 2: (0.1175, 0.1188), 3: (0.03454, 0.03744), 4: (0.009497, 0.01154)}  # tables I, II


def walked(trellis, bits):
    """C of the states that the bits lead to, one after another from state 0, as the recursion says."""
    values, codes = [], one_mad(torch.arange(2**trellis.L)).tolist()
    for row in bits.tolist():
        state = 0
        for b in row:
            state = (state * 2**trellis.k + b) % 2**trellis.L
            values.append(codes[state])
    return torch.tensor(values).view(bits.shape)


@pytest.mark.parametrize("k, L", [(1, 6), (2, 12), (2, 5), (3, 7), (4, 12)])
def test_decoding_is_the_walk(k, L):
    trellis = Trellis(k, L)
    bits = torch.randint(2**k, (3, 40), generator=torch.Generator().manual_seed(k), dtype=torch.uint8)
    assert torch.equal(trellis.decode(bits), walked(trellis, bits))


@pytest.mark.parametrize("k, L, length", [(1, 4, 9), (2, 4, 5), (2, 3, 5), (3, 5, 3)])
def test_viterbi_finds_the_best_of_all_walks(k, L, length):
    trellis = Trellis(k, L)
    samples = torch.randn(4, length, generator=torch.Generator().manual_seed(L))
    walks = torch.tensor(list(itertools.product(range(2**k), repeat=length)), dtype=torch.uint8)
    errors = (samples[:, None] - walked(trellis, walks)).square().sum(-1)  # [samples, walks]
    chosen = trellis.encode(samples)
    assert chosen.dtype == torch.uint8 and chosen.max() < 2**k
    error = (samples - trellis.decode(chosen)).square().sum(-1)
    assert torch.allclose(error, errors.amin(1), atol=1e-5)


def test_1mad_is_close_to_a_gaussian():
    values = Trellis(2, 16).values
    assert abs(float(values.mean())) < 0.01 and abs(float(values.std()) - 1) < 0.01
    within = (values.abs() < 1).float().mean()
    assert abs(float(within) - 0.6827) < 0.02


def test_two_bits_come_close_to_what_is_published():
    samples = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0))
    trellis = Trellis(2, 12)
    assert float((samples - trellis.decode(trellis.encode(samples))).square().mean()) <= 0.080


@pytest.mark.slow
def test_a_trellis_beats_every_scalar_code_and_no_code_beats_the_bound():
    table = gaussian_errors(sequences=4, length=1024).pivot(index="bits", columns="code", values="mse")
    assert (table["bound"] < table["trellis"]).all()
    assert (table["trellis"] < table["Lloyd-Max"]).all() and (table["Lloyd-Max"] <= table["uniform"] + 1e-9).all()
    assert table.loc[2, "bound"] == 0.0625


@pytest.mark.parametrize("k", MAX_1960)
def test_scalar_codes_are_those_of_max(k):
    best, even = MAX_1960[k]
    assert scalar_error(lloyd_max(k)) == pytest.approx(best, rel=2e-3)
    assert scalar_error(uniform(k)) == pytest.approx(even, rel=2e-3)
    samples = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nearest = (samples[:, None] - lloyd_max(k)).square().amin(1)
    assert scalar_error(lloyd_max(k)) == pytest.approx(float(nearest.mean()), rel=0.03)


@pytest.mark.parametrize("k, L", [(0, 12), (2, 2), (2, 17)])
def test_trellises_that_make_no_sense(k, L):
    with pytest.raises(InputError, match="choose k of 1 to 8"):
        Trellis(k, L)
