"""What GPUs run when they score: attention in one call a layer, the head part by part, few kernels a layer."""

import pytest
import torch
from test_selfcheck import SHARED, SIZES, definition, sequences, tiny_lm
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

import llmlab
from llmlab.bench.challenge import synthetic_sequences
from llmlab.kernels.fewrows import FewOpsRMSNorm
from llmlab.model import selfcheck
from llmlab.model.lm import LM
from llmlab.scoring import attention, shared
from llmlab.scoring.one_call import Flex, Slots
from llmlab.scoring.pack import take
from llmlab.scoring.trie import question_tries

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


def test_fillers_of_slots_are_counted_as_padding(monkeypatch):
    monkeypatch.setattr(shared, "sight_of", lambda _: Slots)
    lm, rows = tiny_lm(LlamaConfig(**SIZES)), sequences()
    lengths = sorted(len(trie) for trie in question_tries(rows))
    work = shared.log_probs(lm, rows, budget=10**6).work
    assert work.padding == pytest.approx(1 - sum(lengths) / (max(lengths) * len(lengths)))
    waiting = sorted(question_tries(rows), key=len)
    assert len(take(waiting, 2 * max(lengths) - 1, Slots)) == 1
    assert len(waiting) == len(lengths) - 1


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
    """Counts what is dispatched and is no view: on a GPU a kernel each."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        written = [x for x in (result if isinstance(result, tuple | list) else [result]) if isinstance(x, torch.Tensor)]
        fresh = any(x.untyped_storage()._cdata not in given for x in written)
        if fresh or func._schema.is_mutable:
            self.names.append(str(func))
        return result


def launches(config, questions, monkeypatch):
    """The kernels of a pass over so many questions, on torch's meta device: shapes of the GPU path, no memory."""
    # Numbers, by which an RMSNorm is found to be torch's, are not there.
    monkeypatch.setattr(attention, "rms_norm", lambda norm: FewOpsRMSNorm(norm.weight, norm.variance_epsilon))
    with torch.device("meta"):
        model = tiny_lm(config).model.half()
    lm = LM(model, None, llmlab.model_card("llama-30b"), "random")
    rows = synthetic_sequences(questions, config.vocab_size)
    counted = Launches()
    with torch.inference_mode(), attention.tries_attend(lm):
        batch = shared.in_a_row(lm, question_tries(rows), shared.sight_of(lm))
        with counted:
            lm.model(**batch.model)
    return counted.names


@pytest.mark.parametrize(("kv_heads", "most"), [(4, 25), (2, 27)])  # grouped heads: keys and values are repeated
def test_kernels_a_layer_do_not_grow_with_the_tries(monkeypatch, kv_heads, most):
    sizes = SIZES | {"num_key_value_heads": kv_heads}
    two, three, many = (
        launches(LlamaConfig(**sizes | {"num_hidden_layers": layers}), questions, monkeypatch)
        for layers, questions in ((2, 5), (3, 5), (2, 40))
    )
    assert len(many) == len(two)
    assert len(three) - len(two) <= most
    assert three.count("aten.scaled_dot_product_attention.default") == 3
