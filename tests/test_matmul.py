"""fp32 matmuls through oneDNN: the same numbers, and the model is left as it was."""

import pytest
import torch

from llmlab import matmul


@pytest.mark.parametrize("shape", [(1, 1, 576, 192), (1, 300, 1536, 576), (2, 7, 33, 65)])
def test_onednn_equals_fp64_to_rounding(shape):
    batch, rows, width, out = shape
    torch.manual_seed(0)
    x, weight, bias = torch.randn(batch, rows, width), torch.randn(out, width), torch.randn(out)
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    error = (matmul.onednn_linear(x, weight, bias).double() - exact).abs().max()
    assert error < 1e-5 * width**0.5 * 3  # a sum of `width` products of unit variance


def test_linears_are_swapped_within_the_block_alone(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2).bfloat16())
    with pytest.raises(KeyError), matmul.fastest_matmuls(model):
        assert [type(m) for m in model] == [matmul.OneDNNLinear, torch.nn.Linear]  # bf16 is oneDNN's already
        raise KeyError
    assert [type(m) for m in model] == [torch.nn.Linear, torch.nn.Linear]


def test_nothing_is_swapped_where_it_does_not_help(monkeypatch):
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: False)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    with matmul.fastest_matmuls(model):
        assert type(model[0]) is torch.nn.Linear
