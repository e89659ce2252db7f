"""What quantizing takes in memory, held against what it took."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, OPTConfig

import llmlab
from llmlab import InputError
from llmlab.measure.memory import peak_bytes
from llmlab.model.card import card_from_config
from llmlab.quantization.grid import Scheme
from llmlab.quantization.job import quantize_to
from llmlab.quantization.memory import Memory, check_memory, memory_needed

SIZES = {"vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=768, num_key_value_heads=2),
    "opt": OPTConfig(**SIZES, ffn_dim=1024, word_embed_proj_dim=256, dropout=0.0),
    "mixtral": MixtralConfig(**SIZES, intermediate_size=512, num_local_experts=8, num_key_value_heads=2),
}
SHORT, LONG = 0.8, 1.6  # the margin: what is foretold is between these multiples of what was measured


def foretold_and_measured(kind):
    """What a small model of that kind should take to quantize, and what it took."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(MODELS[kind], dtype=torch.float32).eval()
    lm, scheme = llmlab.LM(made, None, card_from_config(MODELS[kind], kind, "fp32"), kind), Scheme(4, 64)
    ids = torch.randint(1000, (48, 256), generator=torch.Generator().manual_seed(0))
    llmlab.quantize(lm, scheme=scheme, calibration=ids[:16])  # what a first run alone takes
    peak = peak_bytes(lambda: llmlab.quantize(lm, scheme=scheme, calibration=ids), lm.device)
    return memory_needed(lm.card, scheme, ids.numel(), loaded=True), peak


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_what_is_foretold_is_what_is_measured(kind):
    """In a process of its own: one that has run other tests takes what they gave back to its allocator."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        needed, peak = process.submit(foretold_and_measured, kind).result()
    if peak is None:
        pytest.skip("this system does not tell a process's peak")
    assert SHORT * peak <= needed.total <= LONG * peak, f"{needed}, measured {peak / 2**30:.2f} GiB"


def test_the_parts_are_the_equations():
    card, scheme = llmlab.model_card("llama-7b"), Scheme(4, 64)
    h, f, tokens = 4096, 11008, 128 * 2048
    needed = memory_needed(card, scheme, tokens, device="cuda")
    assert needed.activations == tokens * (3 * h + 3 * f) * 4
    assert memory_needed(card, scheme, tokens).activations == 1.5 * needed.activations
    assert needed.layer == 4 * card.linear_parameters // 32
    assert needed.solving == 4 * 7 * f**2
    assert needed.total == needed.model + needed.layer + needed.activations + needed.solving
    rest = card.parameters - card.linear_parameters
    assert needed.model - memory_needed(card, scheme, tokens, loaded=True).model == 4 * rest
    exact = memory_needed(card, scheme, tokens, device="cuda", exact=True)
    assert exact.activations - needed.activations == tokens * (4 * h + f) * 4
    half = memory_needed(card, scheme, tokens, "bf16", device="cuda")
    assert (half.layer, half.activations) == (needed.layer // 2, tokens * (6 * h + 13 * f))
    rounding = memory_needed(card, scheme, 0)
    assert rounding.activations == 0 and rounding.solving == 4 * 7 * h * f


def test_what_does_not_fit_is_refused(tiny_folders, tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    check_memory("small", Memory(1, 1, 1, 1), cpu)
    with pytest.raises(InputError, match=r"quantizing big takes about 1048576.00 GiB \(model .* are free on cpu: give"):
        check_memory("big", Memory(2**50, 0, 0, 0), cpu)
    text = " ".join(q.context for q in llmlab.data.everyday(60))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    with pytest.raises(InputError, match=r"0.00 GiB are free on cpu: give fewer calibration rows"):
        quantize_to(str(tiny_folders["llama"]), tmp_path / "q", text, Scheme(4, 32), rows=2, device="cpu")
    assert not list(tmp_path.iterdir())
