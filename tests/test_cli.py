import json
import os
import shutil
import sys

import pytest

import llmlab
from llmlab.cli.main import main
from llmlab.measure.record import read_records

ROW = {
    "ctx": "She fills the kettle and",
    "endings": ["turns it on.", "eats it.", "paints it.", "reads it."],
    "label": 0,
}


@pytest.fixture
def rows_file(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(ROW) + "\n" for _ in range(3)))
    return file


def test_score_writes_its_result_and_its_record(run, rows_file, tmp_path):
    out = tmp_path / "out.json"
    before = len(read_records())
    status, shown, _ = run("score", "--model", "smollm2", "--data", rows_file, "--limit", 2, "--json", out)
    assert status == 0
    assert "acc_norm_token" in shown
    result = json.loads(out.read_text())
    assert result["n"] == 2
    assert result["predictions"] == [0, 0]
    assert result["acc"] == 1.0
    assert len(result["log_probs"]) == 2
    assert result["seconds_total"] > result["seconds_inference"] > 0
    assert set(result) >= {"acc", "acc_norm", "acc_norm_token", "acc_interval", "predictions_norm", "seconds_load"}
    assert result["record"] == read_records()[-1]
    assert len(read_records()) == before + 1


def test_perplexity(run, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The kettle boils and the cat sleeps on the warm stove. " * 20)
    out = tmp_path / "out.json"
    status, shown, _ = run(
        "perplexity", "--text", text, "--context", 64, "--max-windows", 2, "--dtype", "bf16", "--json", out
    )
    assert status == 0
    assert "2 windows of 64 tokens" in " ".join(shown.split())
    assert json.loads(out.read_text())["perplexity"] > 1
    status, _, complaint = run("perplexity", "--text", text, "--context", 64, "--protocol", "gptq-2048")
    assert status == 2 and "gptq-2048 sets context" in complaint


def test_generate(run, tmp_path):
    out = tmp_path / "out.json"
    status, shown, _ = run("generate", "--prompt", "The capital of France is", "--max-new-tokens", 4, "--json", out)
    assert status == 0
    assert "Paris" in shown
    result = json.loads(out.read_text())
    assert result["completions"][0]["ids"]
    assert result["new_tokens"] == 4


@pytest.mark.slow
def test_generate_with_a_draft_writes_the_same_ids(run, tiny_folders, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"a b a b a {n}", "kind": "edit"}) + "\n" for n in range(2)))
    common = ["generate", "--model", tiny_folders["llama"], "--prompts", file, "--max-new-tokens", 12]
    ids = []
    for draft in (None, "lookup", "self-4bit"):
        out = tmp_path / "out.json"
        status, shown, _ = run(*common, *(("--draft", draft) if draft else ()), "--json", out)
        result = json.loads(out.read_text())
        ids.append([completion["ids"] for completion in result["completions"]])
        assert status == 0
        assert "energy:" in shown  # measured, or why not
        assert ("cost model" in shown) == ("acceptance_rate" in result) == (draft is not None)
        assert "decode_tokens_per_second" in result["record"]["metrics"]
    assert ids[0] == ids[1] == ids[2]


def test_generate_takes_sampling_options_and_records_those_that_are_not_default(run, tiny_folders, tmp_path):
    out = tmp_path / "out.json"
    common = ["generate", "--model", tiny_folders["llama"], "--prompt", "a b", "--max-new-tokens", 6, "--json", out]
    status, _, _ = run(*common, "--logit-bias", "300=1000", "--repetition-penalty", "1.5", "--top-k", 7)
    result = json.loads(out.read_text())
    assert status == 0
    assert result["completions"][0]["ids"] == [300] * 6
    recorded = result["record"]["settings"]
    assert {name: recorded[name] for name in ("logit_bias", "repetition_penalty", "top_k")} == {
        "logit_bias": "{300: 1000.0}", "repetition_penalty": "1.5", "top_k": "7",
    }  # fmt: skip
    assert "min_p" not in recorded
    for options, message in (
        (("--logit-bias", "x"), "--logit-bias takes ID=BIAS"),
        (("--logit-bias", "49152=1"), "bias of token 49152"),
        (("--min-p", "2"), "min-p 2"),
        (("--seed", str(2**64)), "64 bits"),
    ):
        status, _, shown = run(*common, *options)
        assert status == 2 and message in shown


def test_plan_shows_sixteen_and_four_bits(run, tmp_path):
    out = tmp_path / "plan.json"
    status, shown, _ = run("plan", "--model", "opt-30b", "--devices", 4, "--memory", "32GiB", "--json", out)
    assert status == 0
    assert "best: data 2 x pipeline 2" in shown
    assert "best: data 4" in shown
    assert "quantizing it to 4 bits, layer by layer in fp32, 64 x 512 calibration tokens: " in " ".join(shown.split())
    written = json.loads(out.read_text())
    assert [p["bits"] for p in written["plans"]] == [16, 4]
    assert written["quantizing"]["4"]["cpu"] > written["quantizing"]["4"]["gpu"] > 0


def test_plan_of_many_nodes_fits_a_terminal_and_states_energy_and_money(run, tmp_path):
    out = tmp_path / "plan.json"
    options = ("--devices", 1024, "--per-node", 8, "--questions", 10**7, "--price", 2.5, "--bits", 16, "--json", out)
    status, shown, _ = run("plan", "--model", "llama-30b", "--device", "h100", "--workload", "hellaswag", *options)
    assert status == 0
    assert "best: data 1024, 175.1 s and 34.9 kWh, projected, 124.51 at 2.5 a device an hour" in shown
    assert "more layouts in --json" in shown
    assert len(json.loads(out.read_text())["layouts"]) == 66


def test_doctor(run, tmp_path):
    out = tmp_path / "doctor.json"
    status, shown, _ = run("doctor", "--json", out)
    assert status == 0
    assert "SmolLM2" in shown
    assert json.loads(out.read_text())["hardware"]["cores"] >= 1


def test_every_verb_has_help_with_an_example(run):
    for verb in (
        "score",
        "perplexity",
        "generate",
        "plan",
        "bench scoring",
        "bench quantization",
        "bench sharding",
        "bench decoding",
        "sweep",
        "compare",
        "quantize",
        "challenge",
        "report",
        "gpu-check",
        "doctor",
    ):
        status, shown, _ = run(*verb.split(), "--help")
        assert status == 0
        assert f"Example: llmlab {verb}" in shown


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("score", "--model", "gpt-5"), "unknown model 'gpt-5'"),
        (("score", "--model", "someone/some-model"), "cannot be reached"),
        (("score", "--model", "none.gguf"), "no such model file"),
        (("score", "--data", "none.jsonl"), "none.jsonl"),
        (("score", "--limit", "0"), "limit 0"),
        (("score", "--dtype", "int3"), "unknown dtype"),
        (("score", "--json", "/proc/nowhere/out.json"), "cannot write to the folder"),
        (("score", "--json", "."), "is a folder"),
        (("score", "--limit", "two"), "--limit"),
        (("score", "--no-such-option"), "--no-such-option"),
        (("sing",), "sing"),
        (("perplexity", "--text", "none.txt"), "none.txt"),
        (("generate", "--prompt", ""), "prompt 0 is empty"),
        (("generate", "--prompt", "a", "--prompts", "b"), "not both"),
        (("generate", "--prompt", "a", "--temperature", "-1"), "temperature -1"),
        (("generate", "--prompt", "a", "--draft", "nothing"), "unknown model 'nothing'"),
        (("generate", "--prompt", "a", "--k", "99"), "k = 99 drafted tokens"),
        (("generate", "--prompt", "a", "--stop", ""), "empty stop string"),
        (("bench", "decoding", "--per-kind", "0"), "give positive numbers"),
        (("sweep", "none.yaml"), "none.yaml"),
        (("compare", "none.jsonl", "none.jsonl"), "none.jsonl"),
        (("plan", "--model", "opt-31b"), "unknown model 'opt-31b'"),
        (("plan", "--model", "opt-30b", "--memory", "much"), "write it like 32GiB"),
        (("plan",), "--model"),
        (("score", "--method", "fast"), "unknown method 'fast'"),
        (("bench", "scoring", "--repeats", "0"), "0 repeats"),
        (("challenge", "--model", "random:gpt-5"), "known shapes"),
        (("challenge", "--model", "random:opt-125m", "--limit", "0"), "limit 0"),
        (("report", "nothing"), "no notebook 'nothing'"),
        (("report", "-p", "limit"), "write NAME=VALUE"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, arguments, expected):
    status, _, errors = run(*arguments)
    assert status == 2
    assert expected in errors
    assert errors.startswith("llmlab: ")
    assert len(errors.strip().splitlines()) == 1


def test_a_bad_row_names_its_line(run, rows_file):
    rows_file.write_text(rows_file.read_text() + json.dumps(ROW | {"label": 7}) + "\n")
    status, _, errors = run("score", "--data", rows_file)
    assert status == 2
    assert "line 4: the label must be 0, 1, 2 or 3, got 7" in errors


@pytest.fixture
def without_weights(tiny_folders, tmp_path):
    """A model folder whose weights are gone: what is refused from it was refused before they were read."""
    folder = tmp_path / "without-weights"
    shutil.copytree(tiny_folders["llama"], folder)
    (folder / "model.safetensors").unlink()
    return folder


def test_a_row_longer_than_the_context_is_refused_before_the_weights_are_read(run, rows_file, without_weights):
    rows_file.write_text(json.dumps(ROW | {"ctx": "word " * 400}) + "\n")
    status, _, errors = run("score", "--model", without_weights, "--data", rows_file)
    assert status == 2
    assert "question 0" in errors
    assert "more than the context of 256 tokens" in errors


def test_prompts_and_windows_are_checked_before_the_weights_are_read(run, without_weights, tmp_path):
    status, _, errors = run("generate", "--model", without_weights, "--prompt", "word " * 400)
    assert status == 2
    assert "prompt 0 has" in errors
    (tmp_path / "text.txt").write_text("some text")
    status, _, errors = run(
        "perplexity", "--model", without_weights, "--text", tmp_path / "text.txt", "--context", 9999
    )
    assert status == 2
    assert "choose 2 to 256 tokens" in errors


def test_records_that_cannot_be_written_stop_the_run_before_it_starts(run, rows_file, monkeypatch, tmp_path):
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path / "home"))
    status, _, errors = run("score", "--data", rows_file)
    assert status == 2
    assert "cannot write to the folder" in errors
    assert os.environ["LLMLAB_HOME"] == str(tmp_path / "home")


def test_quantize_writes_a_checkpoint_that_score_reads(run, tiny_folders, rows_file, tmp_path):
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("\n".join(f"{q.context} {q.endings[q.label]}" for q in llmlab.data.everyday()))
    small = ["--model", tiny_folders["llama"], "--group-size", 32, "--rows", 2, "--calibration", text]
    status, shown, _ = run("quantize", *small, "--bits", 4, "--output", tmp_path / "q", "--json", out)
    assert status == 0 and "bits_per_weight" in shown
    found = json.loads(out.read_text())
    assert found["record"]["transformation"] == "gptq 4 bits, group 32"
    assert len(found["linears"]) == 14
    status, _, _ = run("score", "--model", tmp_path / "q", "--data", rows_file, "--limit", 2)
    assert status == 0
    newer = ["--bits", 3, "--target", "qronos", "--grid", "neuqi", "--json", out]
    status, _, _ = run("quantize", *small, *newer, "--output", tmp_path / "newer")
    assert status == 0
    found = json.loads(out.read_text())
    assert found["record"]["transformation"] == "qronos 3 bits, group 32"
    assert all(linear["bound"] > 0 for linear in found["linears"])
    status, _, _ = run("quantize", *small, "--bits", 2.5, "--output", tmp_path / "mixed", "--json", out)
    found = json.loads(out.read_text())
    assert status == 0 and found["record"]["transformation"].endswith("bits, group 32, mixed")
    assert 3.4 < found["record"]["metrics"]["bits_per_weight"]["value"] < 3.6  # 2.5, scales and g_idx
    status, _, complaint = run("quantize", *small, "--target", "awq", "--output", tmp_path / "r")
    assert status == 2 and "unknown target 'awq': choose one of gptq, gptaq, qronos" in complaint
    status, _, complaint = run("quantize", *small, "--bits", 5, "--output", tmp_path / "r")
    assert status == 2 and "5 bits: choose one of 2, 3, 4, 8" in complaint
    status, _, complaint = run("quantize", *small, "--bits", 4, "--output", tmp_path / "q")
    assert status == 2 and "exists already" in complaint


def test_an_interrupted_verb_says_so_in_one_line(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("llmlab.measure.environment.inventory", interrupt)
    monkeypatch.setattr(sys, "argv", ["llmlab", "doctor"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "llmlab: interrupted.\n"
