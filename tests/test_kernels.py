"""Every kernel against the readable reference."""

import pytest
import torch

from llmlab.kernels import packed_linear as module
from llmlab.kernels.packed_linear import INT4_CPU, INT8_CPU, REFERENCE, QuantLinear
from llmlab.kernels.packing import Quantized
from llmlab.quantization.grid import Scheme, rtn


def packed(bits=4, group_size=64, symmetric=False, rows=96, columns=128, shuffle=False, bias=True):
    torch.manual_seed(bits)
    scheme = Scheme(bits, group_size, symmetric, search=False)
    made = rtn(torch.randn(rows, columns) / columns**0.5, scheme)
    if shuffle:  # groups as act-order leaves them: scattered over the columns
        order = torch.randperm(columns)
        made = Quantized(made.codes[:, order], made.scales, made.zeros, made.g_idx[order])
    return QuantLinear.pack(made, scheme.bits, torch.randn(rows) if bias else None)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 64), (4, 32), (4, 64), (4, 128)])
@pytest.mark.parametrize(
    ("n", "dtype"), [(1, torch.bfloat16), (5, torch.float32), (70, torch.bfloat16), (3, torch.float16)]
)
def test_int4_on_cpu_equals_the_reference(bits, group_size, shuffle, n, dtype):
    linear = packed(bits, group_size, shuffle=shuffle)
    linear.prepare(dtype)
    assert linear.kernel == INT4_CPU
    linear.limit = 1000  # the kernel, however many rows
    x = torch.randn(n, 128).to(dtype)
    exact = torch.nn.functional.linear(x.double(), linear.dequantize(torch.float32).double(), linear.bias.double())
    assert (linear(x).double() - exact).norm() < 0.01 * exact.norm()  # bf16 has 8 bits
    linear.limit = 0
    assert (linear(x).double() - exact).norm() < 0.01 * exact.norm()  # bf16 has 8 bits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_on_cpu_equals_the_reference(dtype):
    linear = packed(8, -1, symmetric=True)
    linear.prepare(dtype)
    assert linear.kernel == INT8_CPU
    x = torch.randn(3, 128).to(dtype)
    exact = torch.nn.functional.linear(x.double(), linear.dequantize(torch.float32).double(), linear.bias.double())
    assert (linear(x).double() - exact).norm() < 0.01 * exact.norm()  # bf16 has 8 bits


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"bits": 8}, torch.float32),
        ({"bits": 4, "group_size": -1, "columns": 96}, torch.float32),
    ],
)
def test_what_no_kernel_serves_is_dequantized(options, dtype):
    linear = packed(**options)
    linear.prepare(dtype)
    assert linear.kernel == REFERENCE
    x = torch.randn(2, 3, linear.in_features, dtype=dtype)
    exact = torch.nn.functional.linear(x, linear.dequantize(dtype), linear.bias.to(dtype))
    with pytest.warns(UserWarning, match="have no packed kernel"):
        assert torch.equal(linear(x), exact)


def test_the_crossover_is_measured_and_kept():
    module.crossover.cache_clear()
    case = (256, 128, 4, torch.float32, INT4_CPU, torch.device("cpu"))
    assert module.crossover(*case) in (1, 4, 16, 64, 256)
    assert module.crossover.cache_info().misses == 1
    module.crossover(*case)
    assert module.crossover.cache_info().hits == 1


@pytest.mark.parametrize("broken", [lambda x: torch.zeros(len(x), 64), lambda x: 1 / 0])
def test_a_kernel_that_gives_other_numbers_is_not_used(broken, monkeypatch):
    """It is tried once for each kind of matrix; then the plain product runs, and one warning says so."""
    module.agrees.cache_clear()
    monkeypatch.setattr(module, "choose_kernel", lambda linear: (INT4_CPU, broken))
    linears = [packed(4, 32, rows=64), packed(4, 32, rows=64)]
    with pytest.warns(UserWarning, match="torch int4 .CPU. .* for 4-bit weights in groups of 32") as caught:
        for linear in linears:
            linear.prepare(torch.float32)
    assert len(caught) == 1
    x = torch.randn(2, 128)
    for linear in linears:
        assert linear.kernel == REFERENCE
        with pytest.warns(UserWarning, match="have no packed kernel"):
            assert torch.equal(linear(x), linear.multiply_dequantized(x))
    module.agrees.cache_clear()


def test_packing_takes_a_scheme_for_its_bits():
    made = rtn(torch.randn(32, 64), Scheme(3, 32))
    assert torch.equal(QuantLinear.pack(made, Scheme(3, 32)).qweight, QuantLinear.pack(made, 3).qweight)
