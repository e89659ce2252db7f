"""Families over two ranks give the numbers of transformers' plain forward pass, or are refused before ranks work."""

import pytest
import rank_jobs
import torch
from conftest import CHECKOUT
from transformers import AutoConfig, AutoModelForCausalLM

import llmlab
from llmlab import InputError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def two():
    """Two ranks, started where a scheduler's variables were left over: which are named, not waited for."""
    left_over = {"RANK": "0", "WORLD_SIZE": "4", "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'tests'}"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in left_over.items():
            patch.setenv(name, value)
        with pytest.warns(UserWarning, match="RANK and WORLD_SIZE are set, but not torchrun's"):
            group = llmlab.ranks(2, device="cpu")
    with group:
        yield group


@pytest.fixture(scope="module")
def questions():
    return llmlab.data.everyday(2)


V = 49152
GPT = {"vocab_size": V, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}
BASE = {
    "vocab_size": V, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES = {
    "gemma3_text": BASE | {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 4,
                           "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": GPT, "phi3": BASE | {"pad_token_id": 2}, "cohere2": BASE | {"sliding_window": 8, "pad_token_id": 2},
    "bloom": {"vocab_size": V, "hidden_size": 64, "n_layer": 3, "n_head": 4},
    "mamba": {"vocab_size": V, "hidden_size": 64, "num_hidden_layers": 3, "state_size": 8},
}  # fmt: skip
ELSEWHERE = [("gemma3_text", {"pipeline": 2}), ("gpt2", {"pipeline": 2}), ("phi3", {"tensor": 2}),
             ("cohere2", {"pipeline": 2}), ("bloom", {"pipeline": 2}), ("mamba", {"pipeline": 2})]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is scored by the reference path")
@pytest.mark.parametrize(("family", "sizes"), ELSEWHERE, ids=str)
def test_other_families_are_transformers_plain_forward_pass(two, smollm2, tmp_path, questions, family, sizes):
    """Scores and greedy ids, with windows, learned positions, fused matrices, scaled logits, ALiBi and no attention."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]), dtype=torch.float32)
    for parameter in model.eval().parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(tmp_path / family)
    smollm2.tokenizer.save_pretrained(tmp_path / family)
    question, prompt = questions[0], smollm2.encode("The cat sat on the mat. The cat sat on the mat. The cat")
    with torch.inference_mode():
        first = [len(smollm2.encode(question.context))] * len(question.endings)
        rows = [smollm2.encode(f"{question.context} {ending}") for ending in question.endings]
        logits = [model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1) for ids in rows]
        ids = list(prompt)
        for _ in range(6):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = [
        sum(float(row[i - 1, ids[i]]) for i in range(start, len(ids)))
        for start, ids, row in zip(first, rows, logits, strict=True)
    ]
    scored = two.score(str(tmp_path / family), [question], **sizes, dtype="fp32")
    assert scored.log_probs[0] == pytest.approx(expected, abs=1e-3)
    cuts = two.cuts(None, 0, sizes.get("tensor", 1), sizes.get("pipeline", 1))
    text = smollm2.decode(prompt)
    if family in ("bloom", "mamba"):  # no static cache serves them
        with pytest.raises(InputError, match="cannot generate over stages or parts"):
            two.completions(str(tmp_path / family), [text], cuts, "fp32", {"max_new_tokens": 6})
        return
    [completion] = two.completions(str(tmp_path / family), [text], cuts, "fp32", {"max_new_tokens": 6})
    assert completion.ids == ids[len(prompt) :][: len(completion.ids)] and completion.ids


def test_a_family_that_cannot_be_cut_is_refused_and_the_ranks_live(two, tmp_path, smollm2, questions):
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **GPT)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(InputError, match="no plan to cut the layers of gpt2: use data or pipeline"):
        two.score(str(tmp_path / "gpt2"), questions, tensor=2)
    assert [found[0] for found in two.run(rank_jobs.where)] == [0, 1]
