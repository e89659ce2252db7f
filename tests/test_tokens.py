"""Text to ids: BOS once, nothing behind the text, ids that have an embedding, and the harness's border."""

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

import llmlab
from llmlab import InputError, Question
from llmlab.jobs.harness import HarnessLM
from llmlab.model.tokens import encode, open_ended
from llmlab.scoring.score import METHODS

BOS, EOS = 256, 257  # behind the 256 bytes
QUESTION = Question("The kettle", ("boils", "sings a song", "is", "flew away"), 0)


def byte_tokenizer(around="$A", extra=()):
    """One token a byte, then <s>, </s> and `extra`; `around` says which special tokens a text gets."""
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", *extra])
    if isinstance(around, str):
        around = processors.TemplateProcessing(around, around + " $B", [("<s>", BOS), ("</s>", EOS)])
    backend.post_processor = around
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def merging_tokenizer():
    """Letters, and the merges ": " and ": C", which swallow the beginning of an ending."""
    letters = {letter: number for number, letter in enumerate("ABCDthe :.kl")}
    backend = Tokenizer(models.BPE(letters | {": ": 12, ": C": 13}, [(":", " "), (": ", "C")]))
    backend.add_special_tokens(["<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def save(folder, tokenizer, vocab_size=320):
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return llmlab.load(str(folder), dtype="fp32", device="cpu")


def harness_log_probs(lm, question):
    requests = [Instance("loglikelihood", {}, (question.context, " " + e), i) for i, e in enumerate(question.endings)]
    harness = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=4)
    return [value for value, _ in harness.loglikelihood(requests, disable_tqdm=True)]


def by_hand(lm, before, ending):
    ids = before + list(ending)
    log_probs = lm.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_probs[i - 1, ids[i]]) for i in range(len(before), len(ids)))


@pytest.mark.parametrize("context", ["The kettle", "<s>The kettle"])
@pytest.mark.parametrize("around", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
def test_bos_once_and_an_appended_eos_never(tmp_path, around, context):
    lm = save(tmp_path, byte_tokenizer(around))
    before = [BOS] * ("<s>" in around + context) + lm.tokenizer.encode("The kettle", add_special_tokens=False)
    assert lm.encode(context) == before
    expected = [by_hand(lm, before, lm.encode(" " + e, special_tokens=False)) for e in QUESTION.endings]
    question = Question(context, QUESTION.endings, 0)
    for method in METHODS:
        assert llmlab.score(lm, [question], method=method).log_probs[0] == pytest.approx(expected, abs=1e-4)
    assert harness_log_probs(lm, question) == pytest.approx(expected, abs=1e-4)
    pairs = [Instance("loglikelihood", {}, (context, " " + e), 0) for e in QUESTION.endings]
    assert [v for v, _ in HarnessLM(lm).loglikelihood(pairs)] == pytest.approx(expected, abs=1e-4)
    generated = llmlab.generate(lm, [context], max_new_tokens=3)
    assert generated.prompt_tokens == len(before)
    copy = llmlab.load(str(lm.save(tmp_path / "copy")), dtype="fp32", device="cpu")
    assert copy.encode(context) == before


@pytest.mark.parametrize(
    "around",
    [
        processors.BertProcessing(("</s>", EOS), ("<s>", BOS)),
        processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS)),
        processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing("<s> $A </s>", "$A $B", [("<s>", BOS), ("</s>", EOS)]),
            ]
        ),
    ],
)
def test_every_kind_of_processor_loses_what_it_appends(around):
    tokenizer = open_ended(byte_tokenizer(around))
    ids = tokenizer.encode("a")
    assert ids[0] == BOS and ids[1:] == tokenizer.encode("a", add_special_tokens=False) and len(ids) == 2


def test_add_eos_token_is_undone():
    tokenizer = byte_tokenizer()
    tokenizer.add_eos_token = True
    assert tokenizer.encode("a")[-1] == EOS
    assert EOS not in open_ended(tokenizer).encode("a")


def test_the_border_of_context_and_ending_is_the_harnesss(tmp_path):
    lm = save(tmp_path, merging_tokenizer(), 64)
    question = Question("the kettle:", ("Alll", "Blk", "Chet", "Del"), 2)
    assert lm.encode("the kettle: Chet")[10:] == [13, *lm.encode("het")]
    expected = harness_log_probs(lm, question)
    context = lm.encode(question.context)
    assert expected[2] == pytest.approx(by_hand(lm, context, lm.encode("het")), abs=1e-4)
    for method in METHODS:
        assert llmlab.score(lm, [question], method=method).log_probs[0] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(InputError, match="question 0: its ending 1 has no token of its own"):
        llmlab.score(lm, [Question("the kettle:", ("A", "C"), 0)])
    with pytest.raises(InputError, match=r"the kettle:.* has 0 tokens of its own"):
        HarnessLM(lm).loglikelihood([Instance("loglikelihood", {}, ("the kettle:", " C"), 0)])


def test_a_token_without_an_embedding_is_refused_before_the_weights(tmp_path):
    lm = save(tmp_path, byte_tokenizer(extra=[f"<|x{i}|>" for i in range(70)]))
    text = "The <|x69|> kettle"
    said = r"'<\|x69\|>', token 327, but .* embeddings for 320 tokens while its tokenizer knows 328"
    for job in (
        lambda: llmlab.score(lm, [Question(text, ("boils", "sings"), 0)]),
        lambda: llmlab.generate(lm, [text], max_new_tokens=2),
        lambda: llmlab.perplexity(lm, text * 9, context=16),
        lambda: HarnessLM(lm).loglikelihood([Instance("loglikelihood", {}, (text, " boils"), 0)]),
        lambda: llmlab.load(str(tmp_path), check=lambda unread: unread.input_ids(text)),
    ):
        with pytest.raises(InputError, match=said):
            job()
    assert llmlab.score(lm, [QUESTION]).n == 1


def test_harness_refuses_a_long_continuation_and_a_long_prompt(tmp_path):
    lm = save(tmp_path, byte_tokenizer("<s> $A"))
    with pytest.raises(InputError, match="has 130 tokens of its own: it must have 1 to 128"):
        HarnessLM(lm).loglikelihood([Instance("loglikelihood", {}, ("The", "x" * 130), 0)])
    fits = HarnessLM(lm).loglikelihood([Instance("loglikelihood", {}, ("The kettle", "x" * 128), 0)])
    theirs = HFLM(pretrained=lm.model, tokenizer=lm.tokenizer, batch_size=1)
    expected = theirs.loglikelihood([Instance("loglikelihood", {}, ("The kettle", "x" * 128), 0)], disable_tqdm=True)
    assert fits[0][0] == pytest.approx(expected[0][0], abs=1e-3)


def test_a_tokenizer_without_special_tokens_needs_none():
    plain = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer)
    assert plain.bos_token is None
    assert encode(plain, "ab") == encode(plain, "a") + encode(plain, "b")
