"""The engine's passes equal transformers', whatever their shape, and keep what they are told to keep."""

import gc
import weakref

import pytest
import torch
from torch.jit._state import _python_cu

import llmlab
from llmlab import InputError
from llmlab.decoding.engine import Engine
from llmlab.kernels import fewrows
from llmlab.kernels.fewrows import PackedLinear, TwoWays, WidenedRows
from llmlab.kernels.native import native
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.kernels.plain import onednn_takes
from llmlab.kernels.replay import RECORD
from llmlab.quantization.grid import Scheme

PAST = [[5, 17, 99, 4], [200, 7], [31, 8, 1000, 12, 77]]


def plain(lm, ids):
    """transformers' logits behind each token."""
    with torch.inference_mode():
        return lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def started(lm, rows, **options):
    engine = Engine(lm, **options)
    engine.start(len(rows), 64)
    return engine, engine.prefill(rows)


def test_prefill_and_chains_of_ragged_rows_equal_transformers(tiny):
    engine, logits = started(tiny, PAST)
    for row, ids in enumerate(PAST):
        assert torch.allclose(logits[row], plain(tiny, ids)[-1], atol=1e-4)
    more = [[3, 9], [4], [6, 10, 2]]
    found = engine.forward(more)
    for row, (past, ids) in enumerate(zip(PAST, more, strict=True)):
        assert torch.allclose(found[row, : len(ids)], plain(tiny, past + ids)[len(past) :], atol=1e-4)


def test_a_long_prompt_is_read_in_chunks(tiny, monkeypatch):
    monkeypatch.setattr("llmlab.decoding.engine.CHUNK", 3)
    _, logits = started(tiny, PAST)
    for row, ids in enumerate(PAST):
        assert torch.allclose(logits[row], plain(tiny, ids)[-1], atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"compile": True}, marks=pytest.mark.slow)], ids=["recorded", "compiled"]
)
@pytest.mark.parametrize("rows", [1, 3])
def test_trees_see_their_ancestors_alone_and_kept_branches_stay(tiny_folders, rows, options):
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    past = PAST[:rows]
    engine, _ = started(lm, past, **options)
    # Behind the past: 50 and 60 side by side; 51 and 52 below 50, 61 below 60, 53 below 52.
    tokens, parents = [50, 60, 51, 52, 61, 53], [-1, -1, 0, 0, 1, 3]
    branches = {0: [50], 1: [60], 2: [50, 51], 3: [50, 52], 4: [60, 61], 5: [50, 52, 53]}
    for _ in range(RECORD + 2):  # eager, recorded, replayed
        found = engine.forward([tokens] * rows, [parents] * rows)
        for row, ids in enumerate(past):
            for node, branch in branches.items():
                assert torch.allclose(found[row, node], plain(lm, ids + branch)[-1], atol=1e-4)
    assert len(engine.recorder.replays) == 1
    engine.keep([[0, 3, 5]] * rows)  # the branch 50, 52, 53
    after = engine.forward([[70]] * rows)
    for row, ids in enumerate(past):
        assert torch.allclose(after[row, 0], plain(lm, [*ids, 50, 52, 53, 70])[-1], atol=1e-4)


def test_rows_that_end_leave_the_others_as_they_are(tiny):
    engine, _ = started(tiny, PAST)
    engine.cache.select([0, 2])
    found = engine.forward([[9], [9]])
    for place, row in enumerate((0, 2)):
        assert torch.allclose(found[place, 0], plain(tiny, [*PAST[row], 9])[-1], atol=1e-4)


def test_a_replay_gives_the_same_numbers_to_the_bit(smollm2):
    engine, _ = started(smollm2, [[5, 17, 99, 4]])
    runs = [engine.forward([[11, 12]]) for _ in range(RECORD + 3)]
    assert engine.recorder.replays and engine.recorder.seconds > 0
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_a_recording_ends_with_its_engine(tiny):
    """torch keeps what torch.jit.trace makes for good, tens of MB a recording of a real model."""
    kept = []
    for _ in range(2):  # what the first one compiles serves all others
        engine, _ = started(tiny, PAST)
        for _ in range(RECORD + 1):
            engine.forward([[3, 9]] * 3)
        assert engine.recorder.replays
        model = weakref.ref(engine.model)
        del engine
        gc.collect()
        assert model() is None
        kept.append(len(_python_cu.get_functions()))
    assert kept[0] == kept[1]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_with_joined_matrices_decode_like_themselves(smollm2, bits):
    scheme = Scheme(4, 64, search=False) if bits == 4 else Scheme(8, -1, symmetric=True, search=False)
    quantized = llmlab.with_dtype(llmlab.quantize(smollm2, method="rtn", scheme=scheme), "bf16")
    engine, logits = started(quantized, [[5, 17, 99, 4, 120, 3]])
    joined = [m for m in engine.model.modules() if isinstance(m, QuantLinear)]
    assert len(joined) < 7 * smollm2.card.layers  # q, k, v are one matrix, gate and up another
    expected = plain(quantized, [5, 17, 99, 4, 120, 3])[-1]
    assert torch.nn.functional.cosine_similarity(logits[0].float(), expected.float(), dim=0) > 0.999
    assert logits[0].argmax() == expected.argmax()


def test_the_profile_keeps_nothing_and_rises_with_the_width(tiny):
    engine, _ = started(tiny, PAST)
    before = list(engine.cache.lengths)
    found = engine.profile()
    assert engine.cache.lengths == before
    assert list(found.values()) == sorted(found.values())
    assert engine.seconds(4) == pytest.approx(engine.seconds(5))  # it is padded to five
    after = engine.forward([[9]] * len(PAST))  # replays what the profile recorded
    for row, ids in enumerate(PAST):
        assert torch.allclose(after[row, 0], plain(tiny, [*ids, 9])[-1], atol=1e-4)
    engine.cache.select([0])
    assert engine.seconds(1) <= found[1]  # fewer rows, less work


def test_a_cache_that_is_full_says_so(tiny):
    engine = Engine(tiny)
    engine.start(1, 10)
    engine.prefill([[1] * 128])  # capacities are rounded up
    with pytest.raises(InputError, match="129 tokens do not fit a cache of 128"):
        engine.forward([[1]])


HALF_TAKEN = [torch.bfloat16] if onednn_takes(torch.bfloat16) else []


@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TAKEN])
def test_both_layouts_of_a_matrix_give_its_product(dtype):
    check_both_ways(PackedLinear, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_way_of_fp32_gives_its_product(dtype):
    check_both_ways(WidenedRows, dtype)


def check_both_ways(kind, dtype):
    linear = torch.nn.Linear(96, 40, dtype=dtype)
    module = kind(linear)
    x = torch.randn(2, 3, 96, dtype=dtype)
    for few_rows in (6, 5):  # six rows are more than five
        module.few_rows = few_rows
        assert torch.allclose(module(x), linear(x), atol=1e-5 if dtype == torch.float32 else 2e-2)
    module.few_rows, module.read_once = 6, False
    assert torch.equal(module(x), linear(x))


@pytest.mark.parametrize(
    ("kernels", "gains", "expected"),
    [
        (True, {}, 17),
        (True, {17: 0.9, 1: 0.9}, 9),  # where they gain most, a slow moment cannot hide it
        (True, dict.fromkeys((1, 2, 3, 5, 9, 17), 0.9), 0),
        (False, {}, 0),  # a tie is not enough for torch's
        (False, {1: 2, 2: 2, 5: 2}, 2),
        (False, dict.fromkeys((1, 2, 3, 5, 9, 17), 2), 17),
    ],
)
def test_the_way_of_few_rows_is_the_one_measured_to_be_faster(kernels, gains, expected, monkeypatch):
    asked = []

    def faster(few, many, counted):
        asked.append(few.args[1])
        return gains.get(asked[-1], 1.0)

    if not kernels:
        monkeypatch.setattr(fewrows, "_read_once", lambda weight: False)
    elif native().problem:
        pytest.skip("no C++ kernels here")
    monkeypatch.setattr(fewrows, "_measured", {})
    monkeypatch.setattr(fewrows, "faster", faster)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    fewrows.prepare(model, torch.float32)
    fewrows.prepare(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(8, 8)), torch.float32)
    assert [module.few_rows for module in model] == [expected, expected]
    assert len(asked) == len(set(asked))  # once for these shapes


def test_no_way_that_this_processor_lacks_is_tried(monkeypatch):
    monkeypatch.setenv("LLMLAB_WITHOUT_BF16", "1")
    monkeypatch.setattr(fewrows, "slow_on_cpu", lambda dtype: dtype == torch.bfloat16)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8).bfloat16(), torch.nn.Linear(8, 4))
    fewrows.prepare(model, torch.bfloat16)
    assert [type(module) for module in model] == [WidenedRows, PackedLinear if native().problem else TwoWays]


def test_the_engine_holds_each_weight_once_and_the_model_stays_what_it_was(tiny_folders, tmp_path):
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    before, weights = plain(lm, PAST[0]), {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    first, second = Engine(lm), Engine(lm)
    assert lm.weight_bytes <= first.memory_bytes <= (2.0 if native().problem else 1.1) * lm.weight_bytes
    assert second.memory_bytes == first.memory_bytes
    assert torch.equal(plain(lm, PAST[0]), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in lm.model.state_dict().items())
    # Matrices that lie side by side are saved one by one.
    again = llmlab.load(str(lm.save(tmp_path / "saved")), dtype="fp32")
    assert again.model.state_dict().keys() == weights.keys()
    assert torch.equal(plain(again, PAST[0]), before)
    without_cache = first.memory_bytes
    first.start(2, 100)
    first.prefill([[5, 6], [7]])
    card = lm.card
    assert first.memory_bytes - without_cache == 2 * card.layers * 2 * card.kv_heads * 128 * card.head_dim * 4
