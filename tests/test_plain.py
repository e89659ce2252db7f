"""Plain matmuls by every library: the same numbers, and the model is left as it was."""

import pytest
import torch

from llmlab.kernels import plain


@pytest.mark.parametrize("shape", [(1, 1, 576, 192), (1, 300, 1536, 576), (2, 7, 33, 65)])
def test_onednn_equals_fp64_to_rounding(shape):
    batch, rows, width, out = shape
    torch.manual_seed(0)
    x, weight, bias = torch.randn(batch, rows, width), torch.randn(out, width), torch.randn(out)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    error = (plain.onednn_linear(x, weight, bias).double() - exact).abs().max()
    assert error < 1e-5 * width**0.5 * 3  # a sum of `width` products of unit variance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 9])
def test_widened_half_precision_is_rounded_once(dtype, rows, monkeypatch):
    monkeypatch.setattr(plain, "WIDENED_AT_ONCE", 500)  # several parts
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((2, rows, 96), (65, 96), (65,)))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    product = plain.widened_linear(x, weight, bias)
    assert product.dtype == dtype
    spacing = torch.finfo(dtype).eps * exact.abs().clamp(min=1)
    assert ((product.double() - exact).abs() <= 0.51 * spacing).all()  # half a unit in the last place


@pytest.mark.parametrize(("fp32", "bf16"), [("oneDNN", "torch"), ("torch", "widened"), ("oneDNN", "widened")])
def test_linears_are_swapped_within_the_block_alone(fp32, bf16, monkeypatch):
    fastest = {torch.float32: fp32, torch.bfloat16: bf16}
    monkeypatch.setattr(plain, "fastest_library", fastest.get)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2).bfloat16())
    expected = [plain.LIBRARIES[fp32], plain.LIBRARIES[bf16]]
    with pytest.raises(KeyError), plain.fastest_matmuls(model):
        assert [type(m) for m in model] == expected
        raise KeyError
    assert [type(m) for m in model] == [torch.nn.Linear, torch.nn.Linear]


def test_the_fastest_library_is_one_that_this_processor_has():
    for dtype in (torch.float32, *plain.HALF):
        assert plain.fastest_library(dtype, rows=8, width=64) in plain.libraries(dtype)
    assert not plain.slow_on_cpu(torch.float32)


def test_bf16_can_be_reported_absent(monkeypatch):
    monkeypatch.setenv("LLMLAB_WITHOUT_BF16", "1")
    assert not plain.onednn_takes(torch.bfloat16)
