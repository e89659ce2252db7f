"""A paper's protocol on a tiny random OPT with the paper's positions, and what is said where it cannot be run."""

import gzip
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

import llmlab
from llmlab import InputError
from llmlab.bench import reproduce as module
from llmlab.bench.reproduce import reproduce
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.grid import Scheme


@pytest.fixture(scope="module")
def opt(smollm2, tmp_path_factory):
    """A folder with it, and the built-in tokenizer."""
    config = OPTConfig(
        vocab_size=49152, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=32, max_position_embeddings=2048, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("opt")
    model.save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """Files in the place of WikiText-2's test part and of the calibration text; returns the latter."""
    contexts = [q.context for q in llmlab.data.everyday(200)]
    (tmp_path / "wikitext2_test.txt").write_text("\n\n".join(contexts[:55]))
    monkeypatch.setenv("LLMLAB_DATA", str(tmp_path))
    (tmp_path / "other.txt").write_text(" ".join(contexts[100:]))
    return tmp_path / "other.txt"


@pytest.mark.slow
def test_the_row_stands_beside_the_published_value(opt, texts):
    said, seen = [], []
    lm, measured = reproduce(
        "gptq-opt-125m", str(opt), calibration=texts, rows=2, device="cpu", say=said.append, on_row=seen.append
    )
    assert len(said) == 1 and "WikiText-2" in said[0] and "facebook" not in said[0] and "C4" not in said[0]
    rows = measured.details["rows"]
    json.dumps(measured.as_dict())
    assert rows == seen
    assert {(r["method"], r["bits"]): r["published"] for r in rows} == {
        ("fp16", 16): 27.65, ("RTN", 4): 37.28, ("GPTQ", 4): 31.12, ("RTN", 3): 1300, ("GPTQ", 3): 53.85,
    }  # fmt: skip
    assert all(r["ratio"] == r["perplexity"] / r["published"] and r["status"] == "checked" for r in rows)
    ours = {r["variant"]: r["perplexity"] for r in rows}
    text = llmlab.data.wikitext("test")
    assert ours["fp16 16 bits"] == pytest.approx(llmlab.perplexity(lm, text, protocol="gptq-2048").perplexity.value)
    ids = calibration_rows(lm, texts.read_text(), rows=2, context=2048)
    scheme = Scheme(4, -1, act_order=False, search=False)
    quantized = llmlab.quantize(lm, scheme=scheme, calibration=ids)
    again = llmlab.perplexity(quantized, text, protocol="gptq-2048").perplexity.value
    assert ours["GPTQ 4 bits"] == pytest.approx(again, rel=1e-4)
    assert measured.protocol.startswith(f"{opt} in the place of OPT-125M; gptq-2048: 1 windows of 2048 tokens")
    assert "2 x 2048 calibration tokens of other.txt" in measured.protocol
    assert measured.values["perplexity_gptq_4bit"].value == ours["GPTQ 4 bits"]


@pytest.mark.slow
def test_the_verb_writes_it(run_verb, opt, texts, tmp_path):
    out = tmp_path / "out.json"
    shown = run_verb("--reproduce", "gptq-opt-125m", "--model", opt, "--calibration", texts, "--rows", 1, "--json", out)
    assert "needs WikiText-2" in shown and "published 31.12" in shown
    written = json.loads(out.read_text())
    assert written["reproduced"] == "gptq-opt-125m" and len(written["rows"]) == 5
    assert written["record"]["task"] == "reproduce gptq-opt-125m"


@pytest.fixture
def run_verb(monkeypatch, capsys):
    from llmlab.cli.main import main

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["llmlab", "bench", "quantization", "--device", "cpu", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        shown = capsys.readouterr()
        assert not stop.value.code, shown.err
        return shown.out

    return call


def test_offline_it_says_what_it_would_download_and_ends(opt, texts, monkeypatch):
    said = []
    with pytest.raises(InputError, match="the Hugging Face Hub cannot be reached and 'facebook/opt-125m'"):
        reproduce("gptq-opt-125m", say=said.append)
    assert "the model facebook/opt-125m: 0.25 GB" in said[0]
    assert "C4's first file (allenai/c4): 0.32 GB" in said[0] and "is downloaded" in said[0]
    with pytest.raises(InputError, match=r"of allenai/c4 \(0.32 GB\) cannot be had"):
        reproduce("gptq-opt-125m", str(opt), say=said.append)
    monkeypatch.delenv("LLMLAB_DATA")
    with pytest.raises(InputError, match="cannot be reached for 'Salesforce/wikitext'"):
        reproduce("gptq-opt-125m", str(opt), calibration=texts, say=said.append)


@pytest.mark.parametrize(
    "changed, expected",
    [
        ({"name": "gptq-opt-1b"}, "unknown result 'gptq-opt-1b': choose gptq-opt-125m"),
        ({"rows": 0}, "0 calibration rows"),
        ({"rows": 10**9}, "GiB are free on cpu: give fewer calibration rows"),
    ],
)
def test_what_cannot_be_is_refused_first(opt, texts, changed, expected):
    given = {
        "name": "gptq-opt-125m",
        "model": str(opt),
        "calibration": texts,
        "device": "cpu",
        "say": lambda line: None,
    }
    with pytest.raises(InputError, match=expected):
        reproduce(**given | changed)


def test_c4_is_sampled_within_documents(opt, tmp_path):
    lm = llmlab.load(str(opt), dtype="fp32", device="cpu")
    contexts = [q.context for q in llmlab.data.everyday(250)]
    documents = [" ".join(contexts[:100]), "too short", " ".join(contexts[100:])]
    file = tmp_path / "c4.json.gz"
    with gzip.open(file, "wt") as written:
        written.writelines(json.dumps({"text": text}) + "\n" for text in documents)
    rows = module._from_c4(file, lm, 4)
    assert rows.shape == (4, 2048) and torch.equal(rows, module._from_c4(file, lm, 4))
    whole = [torch.tensor(lm.encode(documents[i])) for i in (0, 2)]
    for row in rows:
        assert any((ids.unfold(0, 2048, 1) == row).all(1).any() for ids in whole)
    with gzip.open(file, "wt") as written:
        written.write(json.dumps({"text": "too short"}) + "\n")
    with pytest.raises(InputError, match="too few documents of more than 2048 tokens"):
        module._from_c4(file, lm, 1)
