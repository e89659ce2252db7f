"""What GPUs run when they score: attention in one call a layer, the head part by part, few kernels a layer."""

from pathlib import Path

import pytest
import torch
from test_selfcheck import SHARED, SIZES, definition, sequences, tiny_lm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

import llmlab
from llmlab.bench.challenge import synthetic_sequences
from llmlab.kernels.fewops import FewOpsRMSNorm
from llmlab.model import selfcheck
from llmlab.model.lm import LM
from llmlab.scoring import attention, shared
from llmlab.scoring.one_call import Flex, Slots, repeated
from llmlab.scoring.pack import GPU_BUDGETS, Profile, fitting, take
from llmlab.scoring.trie import question_tries
from llmlab.sharding import costs

UNCAPPED = {name: config for name, config in SHARED.items() if name not in ("soft-caps", "sinks")}  # Flex leaves them


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(selfcheck, "_outcomes", {})


@pytest.mark.parametrize(
    ("sight", "family"), [*((Slots, name) for name in SHARED), *((Flex, name) for name in UNCAPPED)]
)
def test_one_call_gives_the_definition(monkeypatch, sight, family):
    monkeypatch.setattr(shared, "sight_of", lambda _: sight)
    lm, rows = tiny_lm(SHARED[family]), sequences()
    scores = shared.log_probs(lm, rows, budget=150)
    assert scores.settings == {"method": "shared"}
    assert scores.log_probs == pytest.approx(definition(lm, rows), abs=1e-3)
    assert scores.work.tokens == sum(map(len, question_tries(rows)))


def test_what_flex_does_not_serve_is_found_by_its_check():
    outcome = shared._check(tiny_lm(SHARED["sinks"]), shared.FLEX, Flex)
    assert not outcome.passed
    assert "FlexAttention with capped scores or sinks" in outcome.reason


def test_a_copy_on_cpu_is_checked_with_the_slots_of_gpus_that_are_here(monkeypatch, tmp_path):
    lm = tiny_lm(SHARED["a window in all layers"])
    monkeypatch.setattr(Slots, "under", lambda self, _: torch.zeros(len(self.tries), 1, 1, 1))  # all see all
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert shared.trie_check(lm).passed
    monkeypatch.setattr(selfcheck, "_outcomes", {})
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "differs from the plain forward pass" in shared.trie_check(lm).reason


def test_fillers_of_slots_are_counted_as_padding(monkeypatch):
    monkeypatch.setattr(shared, "sight_of", lambda _: Slots)
    lm, rows = tiny_lm(LlamaConfig(**SIZES)), sequences()
    lengths = sorted(len(trie) for trie in question_tries(rows))
    work = shared.log_probs(lm, rows, budget=10**6).work
    assert work.padding == pytest.approx(1 - sum(lengths) / (max(lengths) * len(lengths)))
    waiting = sorted(question_tries(rows), key=len)
    assert len(take(waiting, 2 * max(lengths) - 1, Slots)) == 1
    assert len(waiting) == len(lengths) - 1


def test_passes_that_would_not_fit_a_gpu_are_not_tried():
    card = llmlab.model_card("llama-7b")
    assert fitting(card, 40 * 2**30) == GPU_BUDGETS
    assert fitting(card, 3 * 2**29) == (2048, 4096)  # of a T4 that holds the weights in fp16
    assert fitting(card, 0) == (2048,)
    assert Profile(Path("none"), (2048,)).budget() == 2048


@pytest.mark.parametrize(("kv_heads", "value_size"), [(4, 8), (1, 8), (2, 6)])
def test_keys_and_values_are_repeated_by_group(kv_heads, value_size):
    key, value = torch.randn(11, kv_heads, 8).transpose(0, 1), torch.randn(kv_heads, 11, value_size)
    for many, few in zip(repeated(key, value, 3), (key, value), strict=True):
        assert torch.equal(many, few.repeat_interleave(3, dim=0))
    assert all(a is b for a, b in zip(repeated(key, value, 1), (key, value), strict=True))


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_the_head_works_part_by_part_behind_layers_that_run_once(tiny, monkeypatch, rows):
    monkeypatch.setattr(shared, "head_rows", lambda *_: rows)
    assert shared.trie_check(tiny).passed
    decoder, calls = tiny.model.get_decoder(), []
    handle = decoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        scores = shared.log_probs(tiny, sequences(), budget=10**6)
    finally:
        handle.remove()
    assert scores.log_probs == pytest.approx(definition(tiny, sequences()), abs=1e-3)
    assert len(calls) == scores.work.passes == 1
    assert "forward" not in vars(decoder)


class Launches(TorchDispatchMode):
    """Counts what is dispatched and is no view, on a GPU a kernel each, and what all but matmuls read and write."""

    def __init__(self):
        super().__init__()
        self.names, self.bytes = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        run = attended if func is torch.ops.aten.scaled_dot_product_attention.default else func
        result = run(*args, **(kwargs or {}))
        read, written = tensors(args), tensors([result])
        given = {x.untyped_storage()._cdata for x in read}
        if func._schema.is_mutable or any(x.untyped_storage()._cdata not in given for x in written):
            self.names.append(str(func))
            if not any(name in str(func) for name in ("linear", "matmul", "scaled_dot_product")):
                self.bytes += sum(x.nbytes for x in [*read, *written] if 0 not in x.stride())
        return result


def attended(q, k, v, mask=None, dropout=0.0, causal=False, scale=None):
    """As a GPU's memory-efficient kernel lays it out, which takes masked calls of equal heads: heads join uncopied."""
    assert q.shape[1] == k.shape[1]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, mask, False, dropout, causal, scale=scale)[0]


def tensors(values):
    flat = (x for value in values for x in (value if isinstance(value, tuple | list) else [value]))
    return [x for x in flat if isinstance(x, torch.Tensor)]


def on_meta(layers, kv_heads=16, attention="sdpa"):
    """A LLaMA on torch's meta device: shapes of the GPU path, no memory."""
    sizes = SIZES | {"num_key_value_heads": kv_heads, "num_hidden_layers": layers}
    sizes |= {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.half, attn_implementation=attention)


def scored(monkeypatch, layers, questions, kv_heads=16):
    """What a pass over so many questions dispatches, and its tokens."""
    # Numbers, by which an RMSNorm is found to be torch's, are not there.
    monkeypatch.setattr(attention, "rms_norm", lambda norm: FewOpsRMSNorm(norm.weight, norm.variance_epsilon))
    lm = LM(on_meta(layers, kv_heads), None, llmlab.model_card("llama-30b"), "random")
    with torch.inference_mode(), attention.tries_attend(lm):
        batch = shared.in_a_row(lm, question_tries(synthetic_sequences(questions, 512)), shared.sight_of(lm))
        with Launches() as counted:
            lm.model(**batch.model)
    return counted, batch.nodes + batch.padding


@pytest.mark.parametrize(("kv_heads", "most"), [(16, 24), (4, 25)])  # grouped heads: keys and values are repeated
def test_kernels_a_layer_do_not_grow_with_the_tries(monkeypatch, kv_heads, most):
    (two, _), (three, _), (many, _) = (scored(monkeypatch, *sizes, kv_heads) for sizes in ((2, 5), (3, 5), (2, 40)))
    assert len(many.names) == len(two.names)
    assert len(three.names) - len(two.names) <= most
    assert three.names.count("aten.scaled_dot_product_attention.default") == 3


def test_the_planner_counts_the_kernels_that_run(monkeypatch):
    (two, tokens), (three, _) = (scored(monkeypatch, layers, 8) for layers in (2, 3))
    assert len(three.names) - len(two.names) == costs.FUSED.launches
    # One kernel of attention reads q, k and v and writes as much: 4 of `hidden`.
    assert (three.bytes - two.bytes) / tokens == pytest.approx(
        2 * ((costs.FUSED.hidden - 4) * 1024 + 5 * 3072), rel=0.02
    )


@pytest.mark.parametrize(("kernels", "name"), [(costs.FAMILY, "sdpa"), (costs.EAGER, "eager")])
def test_the_planner_counts_transformers_own_kernels(kernels, name):
    rows, length, runs = 4, 64, []
    ids, mask = torch.zeros(rows, length, dtype=torch.long), torch.zeros(rows, 1, length, length, dtype=torch.half)
    given = {"input_ids": ids.to("meta"), "attention_mask": mask.to("meta"), "position_ids": ids.to("meta")}
    for layers in (2, 3):
        model = on_meta(layers, attention=name)
        with torch.inference_mode(), Launches() as counted:
            model(**given, use_cache=False)
        runs.append(counted)
    assert len(runs[1].names) - len(runs[0].names) == kernels.launches
    # The matmuls of eager attention, which are not counted, write and read the scores once more.
    values = (
        (kernels.hidden - 4) * 1024
        + kernels.intermediate * 3072
        + (kernels.scores and kernels.scores - 2) * 16 * length
    )
    assert (runs[1].bytes - runs[0].bytes) / (rows * length) == pytest.approx(2 * values, rel=0.02)
