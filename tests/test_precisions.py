"""Every precision with every draft, on whatever processor this is: it runs, and gives what the plain model gives."""

import pytest
import torch

import llmlab
from llmlab.jobs.own_draft import named_drafts
from llmlab.quantization.grid import Scheme

PROMPTS = ["The cat sat on the mat. The cat sat on", "Water boils at"]
IDS = torch.tensor([[5, 17, 99, 4, 120, 3]])


@pytest.fixture(scope="module", params=["fp32", "bf16", "fp16"])
def lm(request, tiny_folders):
    return llmlab.load(str(tiny_folders["llama"]), dtype=request.param)


@pytest.fixture(scope="module")
def exact(tiny_folders):
    return llmlab.load(str(tiny_folders["llama"]), dtype="fp32")


def near(logits, exact, tolerance):
    return (logits.float() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("names", ["", "lookup", "self-4bit", "suffix,recycling,self-4bit"])
def test_every_draft_decodes_in_every_precision(lm, names):
    drafts = named_drafts(lm, names) if names else None
    result = llmlab.generate(lm, PROMPTS, max_new_tokens=6, draft=drafts, batch_size=2)
    assert [len(c.ids) for c in result.completions] == [6, 6]
    if lm.dtype == "fp32":
        plain = llmlab.generate(lm, PROMPTS, max_new_tokens=6)
        assert [c.ids for c in result.completions] == [c.ids for c in plain.completions]


def test_the_engine_computes_what_the_model_does_in_every_precision(lm, exact):
    engine = llmlab.Engine(lm)
    engine.start(1, 64)
    ids = IDS[0].tolist()
    logits = engine.prefill([ids[:-1]])
    more = engine.forward([ids[-1:]])
    with torch.inference_mode():
        expected = exact.model(input_ids=IDS).logits[0]
    tolerance = {"fp32": 1e-4, "bf16": 0.05, "fp16": 0.01}[lm.dtype]  # 24, 8 and 11 bits
    assert near(logits[0], expected[-2], tolerance)
    assert near(more[0, 0], expected[-1], tolerance)


def test_scores_are_those_of_fp32_up_to_rounding(lm, exact):
    questions = llmlab.data.everyday(4)
    scores, expected = (torch.tensor(llmlab.score(m, questions).log_probs) for m in (lm, exact))
    assert near(scores, expected, {"fp32": 1e-5, "bf16": 0.02, "fp16": 0.01}[lm.dtype])


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_width_of_weights_decodes_in_every_precision(lm, bits):
    scheme = Scheme(8, -1, symmetric=True) if bits == 8 else Scheme(bits, 32)
    quantized = llmlab.quantize(lm, method="rtn", scheme=scheme)
    plain = llmlab.generate(quantized, PROMPTS, max_new_tokens=4)
    assert [len(c.ids) for c in plain.completions] == [4, 4]
    drafted = llmlab.generate(quantized, PROMPTS, max_new_tokens=4, draft=llmlab.PromptLookup())
    assert [len(c.ids) for c in drafted.completions] == [4, 4]
