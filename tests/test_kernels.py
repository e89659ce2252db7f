"""Every kernel against the readable reference."""

import pytest
import torch

from llmlab.kernels import choose, fewrows
from llmlab.kernels import packed_linear as module
from llmlab.kernels.choose import INT4_CPU, INT8_CPU, REFERENCE
from llmlab.kernels.native import Native
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.kernels.packing import Quantized, pack, unpack
from llmlab.quantization.grid import Scheme, rtn


def packed(bits=4, group_size=64, symmetric=False, rows=96, columns=128, shuffle=False, bias=True):
    torch.manual_seed(bits)
    scheme = Scheme(bits, group_size, symmetric, search=False)
    made = rtn(torch.randn(rows, columns) / columns**0.5, scheme)
    if shuffle:  # groups as act-order leaves them: scattered over the columns
        order = torch.randperm(columns)
        made = Quantized(made.codes[:, order], made.scales, made.zeros, made.g_idx[order])
    return QuantLinear.pack(made, scheme.bits, torch.randn(rows) if bias else None)


@pytest.fixture
def without_native(monkeypatch):
    """As on a machine without a C++ compiler."""
    monkeypatch.setattr(choose, "native", lambda: Native("AVX2", "there is no compiler"))
    yield
    module.agrees.cache_clear()
    module.crossover.cache_clear()


@pytest.mark.usefixtures("without_native")
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


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_on_cpu_equals_the_reference(dtype):
    linear = packed(8, -1, symmetric=True)
    linear.prepare(dtype)
    assert linear.kernel == INT8_CPU
    x = torch.randn(3, 128).to(dtype)
    exact = torch.nn.functional.linear(x.double(), linear.dequantize(torch.float32).double(), linear.bias.double())
    assert (linear(x).double() - exact).norm() < 0.01 * exact.norm()  # bf16 has 8 bits


@pytest.mark.usefixtures("without_native")
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


@pytest.mark.parametrize("bits", [3, 4])
def test_groups_that_act_order_scattered_are_sorted_for_a_gpu_and_saved_as_they_were(bits):
    linear = packed(bits, 32, shuffle=True)
    saved = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    weight, x = linear.dequantize(torch.float32), torch.randn(2, 128)
    product = linear.multiply_dequantized(x)
    linear.sort_groups()
    assert linear.sequential and torch.equal(linear.g_idx, torch.arange(128).int() // 32)
    assert not torch.equal(linear.qweight, saved["qweight"])
    assert torch.equal(linear.dequantize(torch.float32), weight)
    assert torch.equal(linear.unpacked().dequantize(), weight)
    assert torch.allclose(linear.multiply_dequantized(x), product, atol=1e-5)
    after = linear.state_dict()
    assert after.keys() == saved.keys() and all(torch.equal(after[name], saved[name]) for name in saved)
    again = QuantLinear(128, 96, bits, 4, bias=True)
    again.load_state_dict(after)
    assert torch.equal(again.dequantize(torch.float32), weight)


def test_groups_of_different_sizes_stay_as_they_are():
    linear = packed(4, 32, shuffle=True)
    linear.g_idx[linear.g_idx == 3] = 2
    linear.sort_groups()
    assert linear.order is None and not linear.sequential


@pytest.mark.parametrize("shuffle", [False, True])
def test_joined_matrices_hold_their_packed_weights_once(shuffle):
    """Those that were joined become views, for whoever holds their tensors, and give what they gave."""
    parts = [packed(4, 32, rows=rows) for rows in (96, 32, 64)]
    if shuffle:
        order = torch.randperm(128)
        for part in parts:
            part.qweight = pack(unpack(part.qweight, 4)[order], 4)
            part.g_idx = part.g_idx[order]
            part.sort_groups()
    weights, words = [part.dequantize(torch.float32) for part in parts], parts[1].qweight
    joined = fewrows._joined(parts)
    assert torch.equal(joined.dequantize(torch.float32), torch.cat(weights))
    assert all(torch.equal(part.dequantize(torch.float32), weight) for part, weight in zip(parts, weights, strict=True))
    for name in ("qweight", "qzeros", "scales"):
        memory = {getattr(m, name).untyped_storage().data_ptr() for m in [joined, *parts]}
        assert len(memory) == 1 and getattr(joined, name).is_contiguous()
    assert words.untyped_storage().data_ptr() == joined.qweight.data_ptr()
    again = fewrows._joined(parts)  # a second engine's
    assert again.qweight.data_ptr() == joined.qweight.data_ptr() and torch.equal(again.qweight, joined.qweight)


def test_matrices_with_other_orders_of_their_inputs_are_not_joined():
    parts = [packed(4, 32, shuffle=True), packed(4, 32)]
    parts[0].sort_groups()
    assert torch.equal(parts[0].g_idx, parts[1].g_idx)
    assert fewrows._joined(parts) is None
