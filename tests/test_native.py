"""The C++ kernels: each operation against torch's, at each level of instructions; and their making."""

import math
import os
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from llmlab.decoding.engine import Engine
from llmlab.kernels import fewrows
from llmlab.kernels import native as module
from llmlab.kernels.choose import NATIVE
from llmlab.kernels.native import compiler, level, native
from llmlab.kernels.native_packed import NativeProduct, tiles, untiled
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.kernels.packing import Quantized
from llmlab.kernels.stacking import in_a_row
from llmlab.model.selfcheck import plain_logits
from llmlab.quantization.grid import Scheme, rtn
from llmlab.quantization.walk import quantize

HALF = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
needs_compiler = pytest.mark.skipif(compiler() is None or sys.platform != "linux", reason="no C++ compiler here")
LEVELS = {"portable C++": "default", "AVX2": "avx2"}


def matrix(bits, size, outputs=96, columns=256, seed=0, order=None):
    torch.manual_seed(seed)
    groups = torch.arange(columns).int() // size
    return QuantLinear.pack(
        Quantized(
            torch.randint(0, 1 << bits, (outputs, columns), dtype=torch.uint8),
            torch.rand(outputs, columns // size).half() / 16,
            torch.randint(1, 1 << bits, (outputs, columns // size), dtype=torch.uint8),
            groups if order is None else groups[order],
        ),
        bits,
        torch.randn(outputs),
    )


def rounded(x):
    """Activations as the kernel rounds them: int8, 32 to a scale."""
    blocks = x.double().unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / scale).round() * scale).flatten(-2)


@needs_compiler
def test_products_with_real_zero_points_equal_those_of_rounded_activations():
    torch.manual_seed(0)
    linear = QuantLinear.pack(rtn(torch.randn(40, 256) + 0.3, Scheme(4, 32, search=False, zero_points="real")), 4)
    weight = linear.dequantize(torch.float32)
    assert linear.zeros.is_floating_point() and (linear.zeros % 1 != 0).any()
    linear.prepare(torch.float32)
    assert linear.kernel == NATIVE
    x = torch.randn(3, 256)
    torch.testing.assert_close(linear(x).double(), rounded(x) @ weight.double().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(linear.dequantize(torch.float32), weight)


@needs_compiler
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("bits", "size", "outputs"), [(2, 32, 96), (3, 64, 96), (4, 32, 40), (4, 128, 96), (8, 256, 96)]
)
def test_products_equal_those_of_rounded_activations(bits, size, outputs, act_order):
    order = torch.randperm(256) if act_order else None
    linear = matrix(bits, size, outputs, order=order)
    weight, saved = linear.dequantize(torch.float32), {k: v.clone() for k, v in linear.state_dict().items()}
    for dtype in HALF:
        linear.prepare(dtype)
        assert linear.kernel == NATIVE and not linear.qweight.numel()  # the codes are held once
        for rows in (1, 2, 3, 5, 9, 17):
            x = torch.randn(2, rows, 256).to(dtype)
            in_groups = x if linear.order is None else x[..., linear.order]
            columns = weight if linear.order is None else weight[:, linear.order]
            exact = rounded(in_groups) @ columns.double().T
            product = linear.fast(in_groups)
            assert product.dtype == dtype and product.shape == (2, rows, outputs)
            assert (product.double() - exact).norm() < max(
                2e-3, ROUNDING[dtype]
            ) * exact.norm()  # a tie that falls the other way
            plain = x.double() @ weight.double().T + linear.bias.double()
            assert (linear(x).double() - plain).norm() < 0.02 * plain.norm()
    assert torch.equal(linear.dequantize(torch.float32), weight)
    assert all(torch.equal(linear.state_dict()[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_hold_every_code(bits):
    codes = torch.randint(0, 1 << bits, (48, 96), dtype=torch.uint8)
    assert tiles(codes, bits).numel() == codes.numel() * bits // 8
    assert torch.equal(untiled(tiles(codes, bits)), codes)


@needs_compiler
def test_joined_matrices_hold_their_codes_once():
    parts = [matrix(4, 32, outputs, seed=outputs) for outputs in (96, 32, 64)]
    weights = [part.dequantize(torch.float32) for part in parts]
    for part in parts:
        part.prepare(torch.float32)
    x = torch.randn(3, 256)
    products = [part.fast(x) for part in parts]
    joined = fewrows._joined(parts)
    joined.prepare(torch.float32)
    assert torch.equal(joined.fast(x), torch.cat(products, dim=1))
    assert all(torch.equal(part.fast(x), product) for part, product in zip(parts, products, strict=True))
    assert len({m.fast.codes.untyped_storage().data_ptr() for m in [joined, *parts]}) == 1
    assert torch.equal(joined.dequantize(torch.float32), torch.cat(weights))
    odd = [matrix(4, 32, 40), matrix(4, 32, 96)]
    for part in odd:
        part.prepare(torch.float32)
    assert fewrows._joined(odd) is None  # 40 outputs are no whole number of tiles


@needs_compiler
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(40, 64), (97, 100), (1, 7)])  # whole blocks and registers, and not
def test_plain_products_equal_torchs(dtype, shape):
    assert native().problem == ""
    torch.manual_seed(0)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    for rows in (*range(1, 12), 17, 40):
        x = torch.randn(rows, shape[1]).to(dtype)
        for shift in (bias, None):
            expected = torch.nn.functional.linear(
                x.double(), weight.double(), None if shift is None else shift.double()
            )
            result = torch.ops.llmlab.dense_rows(x, weight, shift)
            torch.testing.assert_close(result.double(), expected, rtol=ROUNDING[dtype], atol=10 * ROUNDING[dtype])
            together = torch.ops.llmlab.dense_rows(x.view(1, rows, -1), weight, shift)
            assert together.shape == (1, rows, shape[0]) and torch.equal(together[0], result)
    transposed = torch.randn(rows, shape[1], 2).to(dtype)[..., 0]  # not contiguous
    expected = torch.nn.functional.linear(transposed.double(), weight.double())
    result = torch.ops.llmlab.dense_rows(transposed, weight, None)
    torch.testing.assert_close(result.double(), expected, rtol=ROUNDING[dtype], atol=10 * ROUNDING[dtype])


@needs_compiler
@pytest.mark.parametrize("dtype", HALF)
def test_norms_equal_torchs(dtype):
    assert native().problem == ""
    torch.manual_seed(0)
    ops, tolerance = torch.ops.llmlab, {"rtol": ROUNDING[dtype], "atol": ROUNDING[dtype]}
    x, weight = torch.randn(2, 3, 72).to(dtype), torch.randn(72).to(dtype)
    torch.testing.assert_close(
        ops.rms_norm(x, weight, 1e-5), torch.nn.functional.rms_norm(x, (72,), weight, 1e-5), **tolerance
    )


@needs_compiler
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("seen", [1, 7, 700])
def test_one_tokens_attention_equals_torchs_and_writes_into_the_cache(dtype, seen):
    assert native().problem == ""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, heads, 1, 24).to(dtype) for heads in (6, 2, 2))
    keys, values = torch.randn(1, 2, 800, 24).to(dtype), torch.randn(1, 2, 800, 24).to(dtype)
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[:, :, seen - 1], expected_values[:, :, seen - 1] = key[:, :, 0], value[:, :, 0]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), expected_keys[:, :, :seen].double(), expected_values[:, :, :seen].double(), scale=0.3,
        enable_gqa=True,
    )  # fmt: skip
    result = torch.ops.llmlab.attend_few(query, key, value, keys, values, torch.tensor(seen - 1), None, 0.3)
    torch.testing.assert_close(
        result, expected.transpose(1, 2).to(dtype), rtol=10 * ROUNDING[dtype], atol=ROUNDING[dtype]
    )
    assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)


@needs_compiler
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kv_heads, d", [(1, 16), (2, 24), (6, 40)])
def test_attention_of_few_tokens_equals_torchs_under_any_mask(dtype, kv_heads, d):
    assert native().problem == ""
    torch.manual_seed(0)
    batch, heads, width, seen = 3, 6, 5, 50
    query = torch.randn(batch, width, heads, d).to(dtype).transpose(1, 2)  # as projections give them
    key, value = torch.randn(2, batch, width, kv_heads, d).to(dtype).transpose(2, 3)
    keys, values = torch.randn(2, batch, kv_heads, 80, d).to(dtype)
    slots = torch.stack([torch.randperm(seen)[:width] for _ in range(batch)])
    mask = torch.rand(batch, 1, width, seen) < 0.5
    mask.scatter_(3, slots[:, None, :, None], True)  # each token sees itself
    expected_keys, expected_values = keys.clone(), values.clone()
    for row in range(batch):
        expected_keys[row, :, slots[row]], expected_values[row, :, slots[row]] = key[row], value[row]
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.double(), expected_keys[:, :, :seen].double(), expected_values[:, :, :seen].double(), attn_mask=mask,
        scale=0.3, enable_gqa=True,
    )  # fmt: skip
    masks = mask.repeat(1, 1, heads // kv_heads, 1)
    result = torch.ops.llmlab.attend_few(query, key, value, keys, values, slots, masks, 0.3)
    torch.testing.assert_close(
        result, expected.transpose(1, 2).to(dtype), rtol=10 * ROUNDING[dtype], atol=ROUNDING[dtype]
    )
    assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)
    with pytest.raises(RuntimeError):  # a slot that the cache does not have
        torch.ops.llmlab.attend_few(query, key, value, keys, values, slots + 80, masks, 0.3)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", LEVELS)
def test_levels_below_this_processors_give_the_same_products(name):
    """In a process that is limited to it."""
    if name == level():
        pytest.skip("this process is at that level")  # where all tests of this file try it
    linear = matrix(4, 64)
    linear.prepare(torch.float32)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    script = f"""
import torch
from llmlab.kernels.native import native
assert (native().level, native().problem) == ({name!r}, ""), native()
product, x = torch.load("matrix.pt", weights_only=False), torch.load("x.pt")
plain = [torch.ops.llmlab.dense_rows(x.to(dtype), x.to(dtype), None).float() for dtype in {HALF}]
print(*torch.cat([product(x), *plain], dim=1).flatten().tolist())
"""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(linear.fast, f"{folder}/matrix.pt")
        torch.save(x, f"{folder}/x.pt")
        path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False,
            env=os.environ | {"ATEN_CPU_CAPABILITY": LEVELS[name], "PYTHONPATH": path},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = torch.tensor([float(number) for number in done.stdout.split()]).view(5, -1)
    torch.testing.assert_close(theirs[:, :96], linear.fast(x), rtol=1e-4, atol=1e-5)
    plain = torch.cat([(x.to(dtype) @ x.to(dtype).T).float() for dtype in HALF], dim=1)
    torch.testing.assert_close(theirs[:, 96:], plain, rtol=2e-2, atol=0.2)


@pytest.fixture
def tiny_source(monkeypatch, tmp_path):
    """A file that compiles in a second, and an empty cache folder."""
    source = tmp_path / "source.cpp"
    source.write_text("int nothing() { return 0; }\n")
    monkeypatch.setattr(module, "SOURCE", source)
    monkeypatch.setattr(module, "SHAPES", {})
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    native.cache_clear()
    yield tmp_path / "cache" / "native"
    native.cache_clear()


@needs_compiler
def test_it_is_compiled_once(tiny_source):
    assert native().problem == ""
    (file,) = tiny_source.iterdir()
    when = file.stat().st_mtime_ns
    native.cache_clear()
    assert native().problem == "" and file.stat().st_mtime_ns == when


@needs_compiler
def test_a_broken_file_in_the_cache_is_replaced(tiny_source):
    file = tiny_source / f"kernels-{module._key(compiler(), level())}.so"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half of one")
    assert native().problem == "" and file.stat().st_size > 1000


@needs_compiler
def test_a_cache_folder_that_cannot_be_written_costs_time_alone(tiny_source):
    tiny_source.parent.write_text("a file where the folder should be")
    assert native().problem == ""


@needs_compiler
def test_two_at_once_both_get_it(tiny_source):
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: native.__wrapped__(), range(2)))
    assert [made.problem for made in both] == ["", ""]
    assert [file.suffix for file in tiny_source.iterdir()] == [".so"]


def test_no_compiler_is_told_and_a_broken_one_warned_of(tiny_source, monkeypatch):
    with warnings.catch_warnings(action="error"):
        monkeypatch.setenv("CXX", "no-such-compiler")
        assert "no C++ compiler" in native().problem
        native.cache_clear()
        monkeypatch.setenv("LLMLAB_NATIVE", "0")
        assert "LLMLAB_NATIVE" in native().problem
    monkeypatch.delenv("LLMLAB_NATIVE")
    native.cache_clear()
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.warns(UserWarning, match="could not be compiled, so packed weights use torch's"):
        assert native().problem.startswith("the compiler failed")


def test_the_level_follows_the_limits_of_the_environment():
    script = "from llmlab.kernels.native import level; print(level())"
    for capability in ("default", "avx2"):
        if capability.upper() != "DEFAULT" and level() == "portable C++":
            continue
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.strip() == {"default": "portable C++", "avx2": "AVX2"}[capability]


@needs_compiler
def test_fake_tensors_know_the_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert native().problem == ""
    linear = matrix(4, 64)
    linear.prepare(torch.float32)
    product = linear.fast
    assert isinstance(product, NativeProduct)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 3, 256)
        assert product(x).shape == (2, 3, 96)
        assert torch.ops.llmlab.rms_norm(x, torch.empty(256), 1e-5).shape == x.shape
    assert math.prod(linear.fast(torch.randn(1, 256)).shape) == 96


@needs_compiler
@pytest.mark.parametrize("dtype", HALF)
def test_what_the_operators_say_of_themselves_is_so(dtype):
    """Shapes, strides and what is written into: torch.compile and recordings believe it."""
    assert native().problem == ""
    linear, ops = matrix(4, 64, outputs=40), torch.ops.llmlab
    linear.prepare(dtype)
    x, one, cos = torch.randn(2, 3, 256).to(dtype), torch.randn(1, 4, 1, 16).to(dtype), torch.rand(2, 1, 16).to(dtype)
    several = torch.randn(2, 5, 4, 16).to(dtype).transpose(1, 2)
    keys, values = torch.randn(2, 2, 2, 32, 16).to(dtype)
    slots, mask = torch.arange(10).view(2, 5), torch.ones(2, 1, 10, 20, dtype=torch.bool)
    product = linear.fast
    for operator, arguments in [
        (ops.packed_rows, (x, product.codes, product.scales, product.zeros, 40)),
        (ops.dense_rows, (x, torch.randn(40, 256).to(dtype), torch.randn(40).to(dtype))),
        (ops.rms_norm, (x, torch.randn(256).to(dtype), 1e-5)),
        (ops.gated, tuple(x.split(128, dim=-1))),
        (ops.rotate, (several[:, :, :1], several[:, :2, :1], cos, cos)),
        (ops.attend_few, (one, one[:, :2], one[:, :2], keys[:1], values[:1], torch.tensor(3), None, 0.3)),
        (ops.attend_few, (several, several[:, :2], several[:, :2], keys, values, slots, mask, 0.3)),
    ]:
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_tensors_move_one_behind_another_with_their_numbers():
    tensors = [torch.randn(4, 3), torch.randn(5), torch.randn(2, 2, 2)]
    before, view = [tensor.clone() for tensor in tensors], tensors[0]
    in_a_row(tensors)
    assert all(map(torch.equal, tensors, before)) and view is tensors[0]
    places = [tensor.data_ptr() for tensor in tensors]
    assert places == [places[0], places[0] + 48, places[0] + 68]
    in_a_row(tensors)
    assert [tensor.data_ptr() for tensor in tensors] == places
    in_a_row([])


@needs_compiler
def test_an_engine_reads_packed_matrices_in_one_stretch_and_holds_them_once(tiny):
    lm = quantize(tiny, method="rtn", scheme=Scheme(4, 32, search=False))
    held, before = Engine(lm).memory_bytes, plain_logits(lm)
    codes = sorted((m.fast.codes for m in lm.model.modules() if isinstance(m, QuantLinear)), key=torch.Tensor.data_ptr)
    assert len({tensor.untyped_storage().data_ptr() for tensor in codes}) == 1
    assert [tensor.data_ptr() for tensor in codes[1:]] == [t.data_ptr() + t.nbytes for t in codes[:-1]]
    assert Engine(lm).memory_bytes == held
    assert torch.equal(plain_logits(lm), before)
