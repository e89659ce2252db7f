"""README's table of what works with which family holds what is measured here, on small random models of each.

`python tests/test_what_works.py` writes the table anew.
"""

import warnings

import pytest
import torch
from conftest import CHECKOUT
from test_rehearsal import PIPELINE
from transformers import AutoConfig, AutoModelForCausalLM

import llmlab
from llmlab import InputError
from llmlab.data import everyday
from llmlab.decoding.engine import Engine
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.model.card import card_from_config
from llmlab.model.lm import LM
from llmlab.model.matrices import is_matrix
from llmlab.quantization.grid import Scheme
from llmlab.sharding.cuts import Cuts
from llmlab.sharding.rehearsal import rehearse

README = CHECKOUT / "README.md"
BEGIN, END = "<!-- what works with what -->\n", "<!-- end -->"
QUESTIONS = everyday(limit=3)
PROMPT = "the cat sat on the mat. the cat sat on the mat. the cat sat"
HEAD = ["family", "score", "generate", "speculate", "quantize", "tensor", "pipeline"]


def small(family, tokenizer):
    """A small random model of a family, its matrices larger than usual so that its answers differ."""
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    if family == "deepseek_v3":
        sizes["num_key_value_heads"] = 4
    config = AutoConfig.for_model(family, **PIPELINE[family] | sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return LM(model, tokenizer, card_from_config(config, family, "fp32"), family)


def scored(lm):
    """ "shared", or "plain" where tries do not serve the family; the numbers are those of the plain forward pass."""
    result = llmlab.score(lm, QUESTIONS)
    for question, found in zip(QUESTIONS, result.log_probs, strict=True):
        start = len(lm.encode(question.context))
        for ending, log_prob in zip(question.endings, found, strict=True):
            ids = lm.encode(f"{question.context} {ending}")
            predictions = lm.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            assert log_prob == pytest.approx(
                sum(float(predictions[i - 1, ids[i]]) for i in range(start, len(ids))), abs=1e-3
            )
    return "shared" if result.settings["method"] == "shared" else "plain"


def generated(lm):
    """What serves generation, and whether speculation runs; the ids are those of transformers."""
    ids = lm.encode(PROMPT)
    settings = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 2}
    expected = lm.model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist()
    plain = llmlab.generate(lm, [PROMPT], max_new_tokens=16)
    drafted = llmlab.generate(lm, [PROMPT], max_new_tokens=16, draft=llmlab.PromptLookup())
    for result in (plain, drafted):
        length = min(len(expected), len(result.completions[0].ids))
        assert result.completions[0].ids[:length] == expected[:length]
    return ("static cache" if plain.cache == Engine.kind else "plain"), ("yes" if drafted.draft else "no")


def quantized(lm):
    """ "yes" if nine tenths of the layers' matrices are packed, else what share is."""
    try:
        packed = llmlab.quantize(lm, method="rtn", scheme=Scheme(4, 32, search=False))
    except InputError:
        return "no"
    head = packed.model.get_output_embeddings()
    sizes = {True: 0, False: 0}
    for module in packed.model.modules():
        if module is not head and (isinstance(module, QuantLinear) or is_matrix(module)):
            sizes[isinstance(module, QuantLinear)] += module.in_features * module.out_features
    share = sizes[True] / sum(sizes.values())
    return "yes" if share >= 0.9 else f"{share:.0%}"


def cut(lm, cuts):
    try:
        rehearse(lm.model.config, cuts, [(0, 1), (1, 3)] if cuts.pipeline == 2 else [(0, 3)])
    except InputError:
        return "no"
    return "yes"


def row(family, tokenizer):
    lm = small(family, tokenizer)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        return [family, scored(lm), *generated(lm), quantized(lm), cut(lm, Cuts(1, 2, 1)), cut(lm, Cuts(1, 1, 2))]


def table(tokenizer):
    rows = [HEAD, ["---"] * len(HEAD), *(row(family, tokenizer) for family in sorted(PIPELINE))]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


@pytest.mark.slow
def test_the_readme_tells_what_works(smollm2):
    assert README.read_text().split(BEGIN)[1].split(END)[0] == table(smollm2.tokenizer)


if __name__ == "__main__":
    before, rest = README.read_text().split(BEGIN)
    measured = table(llmlab.load("smollm2", device="cpu").tokenizer)
    README.write_text(before + BEGIN + measured + END + rest.split(END, 1)[1])
