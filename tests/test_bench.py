"""The ablation, the benchmark and the challenge run on small models and say what they should."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

import llmlab
from llmlab import InputError, Metric
from llmlab.bench.ablation import ablation
from llmlab.bench.bill import bills
from llmlab.bench.challenge import challenge, plan_here, synthetic_sequences
from llmlab.bench.decoders import Decoder, bytes_per_pass
from llmlab.bench.decoding import CASCADE, FREE_DRAFTS, Unit, _difference, bench_decoding, beside_plain, compare_rows
from llmlab.bench.quantization import BEST, bench_quantization, summary, variants
from llmlab.bench.scoring import bench_scoring, best_batch_size, fits_memory, own_matmul_flops, own_matmuls
from llmlab.bench.sharding import bench_sharding
from llmlab.data import ENDING_TOKENS, QUESTION_TOKENS
from llmlab.decoding.writer import Run
from llmlab.kernels.packed_linear import quant_linears
from llmlab.measure.energy import Energy
from llmlab.measure.memory import peak_bytes
from llmlab.measure.record import Measurement
from llmlab.model.convert import with_dtype
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.walk import quantize
from llmlab.scoring.trie import question_tries
from llmlab.sharding.cuts import Cuts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def half(tiny_folders):
    return llmlab.load(str(tiny_folders["llama"]), dtype="bf16")


@pytest.fixture(scope="module")
def llama(tiny_folders):
    return llmlab.load(str(tiny_folders["llama"]), dtype="fp32")


@pytest.mark.parametrize("onednn", [True, False])
def test_every_exact_step_of_the_ablation_gives_the_same_answers(llama, half, rows, onednn, monkeypatch):
    library = "oneDNN" if onednn else "torch"
    monkeypatch.setattr(
        "llmlab.kernels.plain.fastest_library", lambda dtype: library if dtype == torch.float32 else "torch"
    )
    steps = ablation(llama, half, rows[:6], {"fp32": 1e9, "bf16": 1e9}, min_runs=2)
    assert list(steps["step"]) == [
        "arrival order, batches of 8", "sorted by length", "length-profiled batches", "shared question", "token trie",
        "answer-only head", *["oneDNN matmuls"] * onednn, "bf16",
    ]  # fmt: skip
    assert (steps["max_abs_delta"][:-1] < 1e-3).all()
    assert steps["max_abs_delta"].iloc[-1] > 1e-3  # bf16 is another arithmetic
    assert steps["tokens"][0] > steps["tokens"][3] >= steps["tokens"][4] == steps["tokens"][6]
    assert (steps["padding"][3:] == 0).all()
    assert steps["padding"][1] <= steps["padding"][0]
    assert (steps["seconds"] > 0).all()


def test_the_ablation_leaves_out_a_half_precision_that_is_not_fast(llama, rows):
    steps = ablation(llama, None, rows[:2], {"fp32": 1e9}, min_runs=1)
    assert set(steps["dtype"]) == {"fp32"}


def test_own_matmuls_are_the_decoder_layers(llama):
    calls = []

    def matmul(x, weight):
        calls.append(x.shape[0] * weight.numel())
        return torch.nn.functional.linear(x, weight)

    own_matmuls(llama, matmul, rows=10)()
    assert 2 * sum(calls) == own_matmul_flops(llama, rows=10) == 2 * 10 * llama.card.linear_parameters


def test_bench_scoring_reports_what_it_promises(llama, half, rows):
    measured = bench_scoring(llama, half, rows[:4], repeats=2)
    result = measured.details
    assert result["prediction_agreement"] == 1.0
    assert result["max_abs_delta_log_prob"] < 5e-4
    assert result["tokens_shared"] < result["tokens_full"]
    assert result["lm_eval_batch_size"] in result["lm_eval_tuning_seconds"]
    assert {len(seconds) for seconds in result["seconds_all"].values()} == {2}
    assert set(result) >= {
        "speedup_vs_lm_eval", "speedup_bf16", "speedup_bf16_vs_lm_eval_fp32", "prediction_agreement",
        "max_abs_delta_log_prob", "mfu", "tokens_full", "tokens_shared", "ablation", "peak_bytes_above_weights",
    }  # fmt: skip
    json.dumps(result)
    assert measured.values["speedup_vs_lm_eval"].low <= measured.values["speedup_vs_lm_eval"].value
    assert result["speedup_vs_lm_eval_interval"][0] == measured.values["speedup_vs_lm_eval"].low


def test_bench_scoring_without_a_fast_half_precision_leaves_it_out_of_its_record(llama, rows):
    measured = bench_scoring(llama, None, rows[:2], repeats=1)
    result = measured.details
    assert not [name for name in result if "bf16" in name or "half" in name]
    assert measured.values["speedup_vs_lm_eval"].value == result["speedup_vs_lm_eval"]
    assert not [name for name in measured.values if "bf16" in name]


def test_the_baseline_is_tuned(llama, rows):
    size, seconds = best_batch_size(llama, rows[:3], min_runs=1)
    assert seconds[size] == min(seconds.values())
    assert set(seconds) == {1, 4, 8, 16, 32}


def test_a_batch_that_does_not_fit_the_memory_is_told():
    def too_large():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40.00 GiB.")

    assert fits_memory(lambda: None) and not fits_memory(too_large)


def test_peak_memory_sees_what_was_allocated():
    peak = peak_bytes(lambda: torch.ones(50_000_000).sum(), torch.device("cpu"))
    assert peak is None or 150e6 < peak < 400e6


def test_synthetic_lengths_follow_the_published_table():
    sequences = synthetic_sequences(2000, 32_000)
    contexts = np.array([s.n_context for s in sequences if s.ending == 0])
    endings = np.array([s.n_ending for s in sequences])
    for lengths, (low, high, mean, deviation) in ((contexts, QUESTION_TOKENS), (endings, ENDING_TOKENS)):
        assert low <= lengths.min() <= lengths.max() <= high
        assert lengths.mean() == pytest.approx(mean, rel=0.05)
        assert lengths.std() == pytest.approx(deviation, rel=0.1)
    whole = sum(map(len, question_tries(sequences))) / 2000
    assert whole == pytest.approx(189 - 4, rel=0.03)  # "question + its four endings" less the four last tokens


def test_challenge_without_weights_gives_the_speed_part():
    lm, measured = challenge("random:opt-125m", None, limit=3, layers=2)
    assert lm.card.layers == measured.details["layers"] == 2
    assert not [name for name in measured.values if name.startswith("acc")]
    assert (measured.settings, measured.seed) == ({"layers": "2"}, 0)
    assert measured.details["synthetic"]
    assert measured.values["seconds_total"].value > measured.values["seconds_inference"].value > 0
    assert measured.values["flops"].value > 0
    with pytest.raises(InputError, match="no questions"):
        challenge("smollm2", None)


def test_challenge_from_the_command_line(monkeypatch, capsys, tmp_path):
    from llmlab.cli.main import main

    out = tmp_path / "out.json"
    arguments = ["challenge", "--data", "everyday", "--limit", "2", "--output", str(tmp_path), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["llmlab", *arguments, "--price", "2"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    said = " ".join(capsys.readouterr().out.split())
    assert "track exact" in said
    assert "10,000,000 questions" in said and "2 an hour for each of 1" in said
    result = json.loads(out.read_text())
    assert result["n"] == 2
    assert result["track"] == "exact"
    assert result["seconds_total"] > result["seconds_inference"]
    assert {"acc", "acc_norm", "acc_norm_token", "record", "log_probs"} <= set(result)
    here, many = result["bills"]
    assert (here["questions"], many["questions"]) == (2, 10**7)
    assert here["money"] == pytest.approx(2 * here["seconds"] / 3600)
    page = (tmp_path / "challenge.html").read_text()
    assert "2 of 10,042 questions" in page
    assert "seconds_total" in page


def test_a_bill_is_measured_or_projected_and_says_which(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    values = {"seconds_total": Metric(36.0, "s"), "questions_per_second": Metric(4.0, "1/s")}
    job = Measurement("challenge", values, 100, "as measured")
    here, many = bills(job, Energy(7200.0, 35.9, "RAPL package-0"), cpu, price=3.0)
    assert (here.seconds, here.kwh, here.money) == (36.0, 0.002, pytest.approx(0.03))
    assert "measured: RAPL package-0" in here.how
    assert (many.questions, many.seconds) == (10**7, 2.5e6)
    assert many.kwh == pytest.approx(200 * 2.5e6 / 3.6e6)  # 200 W, as measured
    assert "projected from this job's 4 questions/s" in str(many)
    unread = Energy(None, 0.0, "no RAPL")
    assert bills(job, unread, cpu)[0].kwh == pytest.approx(8 * 5 * 36 / 3.6e6)
    assert "projected: 8 cores at work, 5 W each (assumed); no counter: no RAPL" in str(bills(job, unread, cpu)[0])
    four = bills(job, unread, gpu, devices=4, price=3.0)[0]
    assert four.kwh is None and "kWh unknown" in str(four)
    assert four.money == pytest.approx(4 * 3 * 36 / 3600)


def test_challenge_over_ranks_finds_the_same_answers(tiny_folders):
    questions = llmlab.data.everyday(4)
    folder = str(tiny_folders["llama"])
    _, alone = challenge(folder, questions, device="cpu")
    lm, together = challenge(folder, questions, device="cpu", devices=2)
    for name in ("predictions", "tokens", "tokens_full"):
        assert together.details[name] == alone.details[name]
    assert "data 2" in together.details["method"]
    assert 0 < together.values["seconds_inference"].value < together.values["seconds_total"].value
    record = llmlab.record(lm, together)
    assert record.metrics["acc"]
    assert record.settings == together.settings
    assert (record.settings["layout"], record.settings["layers"]) == ("data 2", str(lm.card.layers))


def test_challenge_over_ranks_needs_no_weights(tiny_folders, monkeypatch):
    """Synthetic questions through a shape's random weights; the layout is ours, as the whole model fits each rank."""
    best = SimpleNamespace(best=Cuts(pipeline=2))
    monkeypatch.setattr("llmlab.bench.challenge.plan_here", lambda lm, devices: best)
    shape = f"random:{tiny_folders['llama']}"
    lm, measured = challenge(shape, None, limit=5, device="cpu", layers=2, devices=2)
    assert (measured.n, measured.seed, measured.details["synthetic"]) == (5, 0, True)
    how = {"method": "shared", "ranks": "2", "layout": "pipeline 2", "schedule": "micro-batches", "layers": "2"}
    assert measured.settings == how
    assert not [name for name in measured.values if name.startswith("acc")]
    assert 0 < measured.values["seconds_inference"].value < measured.values["seconds_total"].value
    assert 0 <= measured.values["bubble"].value < 1
    _, alone = challenge(shape, None, limit=5, device="cpu", layers=2)
    assert measured.details["tokens"] == alone.details["tokens"]  # the same questions
    assert llmlab.record(lm, measured).weight_bytes == lm.weight_bytes == lm.card.bytes


def test_challenge_over_ranks_from_the_command_line(tiny_folders, monkeypatch, tmp_path):
    from llmlab.cli.main import main

    out, shape = tmp_path / "out.json", f"random:{tiny_folders['opt']}"
    arguments = ["challenge", "--model", shape, "--layers", "1", "--devices", "2", "--device", "cpu", "--limit", "3"]
    monkeypatch.setattr(sys, "argv", ["llmlab", *arguments, "--output", str(tmp_path), "--json", str(out)])
    with pytest.raises(SystemExit) as stop:
        main()
    result = json.loads(out.read_text())
    assert not stop.value.code and (result["n"], result["layers"], result["synthetic"]) == (3, 1, True)
    assert result["record"]["settings"]["layout"] == "data 2" and "bubble" in result["record"]["metrics"]
    assert (tmp_path / "challenge.html").exists()


def test_bench_sharding_reports_what_it_promises(tiny_folders, monkeypatch):
    questions = llmlab.data.everyday(8)
    folder = str(tiny_folders["llama"])
    lm = llmlab.load(folder, dtype="fp32")
    alone = llmlab.score(lm, questions)
    with llmlab.ranks(2, device="cpu") as two:
        measured = bench_sharding(two, lm, questions, alone, repeats=1)
        replica = next(layout for layout in plan_here(lm, 2).layouts if layout.name == "data 2").bytes
        machine = SimpleNamespace(total=4 * (replica - 1))  # two ranks; an fp32 number takes the place of two
        monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
        without = bench_sharding(two, lm, questions, alone, repeats=1).details
        machine.total = 2**30
        with pytest.raises(InputError, match=r"pipeline 2 needs .* all layouts are compared with it"):
            bench_sharding(two, lm, questions, alone)
    assert "data 2" not in [row["layout"] for row in without["layouts"]]
    assert re.match(r"left out: data 2 needs 1\.\d GiB a device, has ", without["left_out"])
    result = measured.details
    json.dumps(result)
    assert result["left_out"] == ""
    names = [(row["layout"], row["schedule"]) for row in result["layouts"]]
    assert names[0] == ("pipeline 2", "naive")
    assert set(names[1:]) == {(f"{how} 2", "micro-batches") for how in ("pipeline", "tensor", "data")}
    assert result["prediction_agreement"] == 1 and result["max_abs_delta_log_prob"] < 5e-4
    for row in result["layouts"]:
        assert row["seconds_measured"] > 0 and row["seconds_simulated"] > 0
        assert 0 <= row["bubble_simulated"] < 1 and 0 <= row["bubble_measured"] < 1
        assert (row["bytes_sent"] > 0) == ("data" not in row["layout"])
    assert 330 < result["projected_seconds_v100x4"] < 430
    assert measured.n == 8
    assert measured.values["speedup data 2"].value > 0


def test_bench_decoding_reports_what_it_promises(tiny_folders):
    folder = str(tiny_folders["llama"])
    lm, half = (llmlab.load(folder, dtype=dtype) for dtype in ("fp32", "bf16"))
    prompts = [llmlab.Prompt(kind, f"{kind} a b a b {n}") for kind in ("edit", "write") for n in range(4)]
    measured = bench_decoding(lm, half, prompts, new_tokens=8, per_kind=1, repeats=2, compile=False)
    result = measured.details
    json.dumps(result)
    assert result["greedy_equal"]
    assert result["int4_vs_llamacpp"] is None and result["llamacpp"] == "the model is no .gguf file"
    drafts = {row["draft"] for row in result["rows"] if row["engine"] == "llmlab"}
    assert drafts == {"", *FREE_DRAFTS, "self-4bit", "lookup, self-4bit", f"{CASCADE}, self-4bit"}
    assert result["head_bits"] == 8 and result["kernel"]
    assert set(result["cascade_speedup"]) == {row["kind"] for row in result["rows"]}
    assert {row["engine"] for row in result["rows"]} == {"llmlab", "transformers"}
    assert {row["batch"] for row in result["rows"]} == {1, 4}  # four prompts a kind make no batch of 8
    for row in result["rows"]:
        assert row["kind"] in ("edit", "write", "all")
        assert 0 < row["tokens_per_s_low"] <= row["tokens_per_s"] <= row["tokens_per_s_high"] * 1.001
        assert row["seconds_first_token"] > 0
        assert row["equal_to_reference"] == (row["first_difference"] is None)
    for name in ("plain_speedup_vs_transformers", "lookup_speedup_vs_plain", "self_draft_speedup", "cost_model_error"):
        assert result[name] > 0
    assert measured.n == 8
    assert measured.values["greedy_equal"].value == 1


def test_bench_quantization_reports_what_it_promises(tiny_folders, monkeypatch):
    monkeypatch.setattr("llmlab.bench.quantization.CONTEXT", 64)
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    text = " ".join(q.context for q in llmlab.data.everyday(20))
    ids, seen = calibration_rows(lm, text, rows=2, context=64), []
    measured = bench_quantization(
        lm, ids, text, llmlab.data.everyday(2), peers=False, repeats=1, on_row=lambda row: seen.append(row["variant"])
    )
    result = measured.details
    json.dumps(result)
    by_name = {row["variant"]: row for row in result["rows"]}
    assert (
        list(by_name) == seen == ["fp32", "rotated fp32", *(name for name, *_ in variants()), "best 2.27 bits, mixed"]
    )
    exact = by_name["fp32"]
    assert exact["kl"] == pytest.approx(0, abs=1e-6) and exact["kl_99"] == pytest.approx(0, abs=1e-6)
    assert (exact["top1"], exact["seconds"], exact["peak_bytes"]) == (1, 0, 0)
    for row in by_name.values():
        assert 0 <= row["top1"] <= 1 and row["kl"] <= row["kl_99"] + 1e-6
        assert row["byte_perplexity"] < row["perplexity"] < row["word_perplexity"]
        assert row["perplexity"] > 1 and row["bytes"] > 0 and row["group_size"] in (None, 32, 64, -1)
    gptq = by_name["GPTQ 4 bits"]
    assert gptq["bits_per_weight"] < 5 and gptq["seconds"] > 0 and gptq["decode_tokens_per_s"] > 0
    assert gptq["kl"] < by_name["RTN 3 bits"]["kl"] and gptq["top1"] > by_name["RTN 3 bits"]["top1"]
    for bits in (4, 3):
        assert result[f"best_{bits}bit_over_fp32"] > 0 and f"gptq_over_rtn_{bits}bit" in result
    best = by_name["best 2 bits"]
    assert (best["target"], best["grid"], by_name["RTN 4 bits"]["target"]) == ("qronos", BEST.grid, None)
    two = [
        np.log(row["perplexity"] / by_name["fp32"]["perplexity"])
        for name, row in by_name.items()
        if row["bits"] == 2 and "32" not in name
    ]
    assert result["excess_2bit_over_gptq"] == pytest.approx(min(two) / two[0])
    assert result["perplexity_vs_gptqmodel"] is result["seconds_vs_gptqmodel"] is None
    assert result["gptqmodel"] == "not asked for"
    peer = {"method": "gptqmodel", "bits": 4, "group_size": 64}
    peers = {f"peer {p}": peer | {"perplexity": p, "seconds": 10 * p} for p in (40.0, 30.0)}
    ratios = summary(by_name | peers)
    assert ratios["perplexity_vs_gptqmodel"] == gptq["perplexity"] / 30  # its best, and what that took
    assert ratios["seconds_vs_gptqmodel"] == gptq["seconds"] / 300
    low, high = result["decode_speedup_vs_fp32_interval"]
    assert low <= result["decode_speedup_vs_fp32"] <= high
    assert set(measured.values) >= {"best_4bit_over_fp32", "gptq_over_rtn_3bit", "decode_speedup_vs_fp32"}


def test_the_first_difference_is_found_with_its_gap(tiny_folders):
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32")
    right, wrong = (Decoder(engine, "", "fp32", lambda prompts: None, lm) for engine in ("right", "wrong"))
    unit = Unit("edit", [[5, 6]])
    ids = llmlab.generate(lm, ["x"], max_new_tokens=3).completions[0].ids
    unit.log = [(right.name, Run([ids], 2, 1.0, 1.0)), (wrong.name, Run([[ids[0], 7, 9]], 2, 1.0, 1.0))]
    found = _difference(unit, wrong.name, right)
    assert (found["position"], found["expected"], found["found"]) == (1, ids[1], 7)
    logits = lm.model(torch.tensor([[5, 6, ids[0]]])).logits[0, -1]
    assert found["logit_gap"] == pytest.approx(float(logits[ids[1]] - logits[7]), abs=1e-4)
    assert _difference(unit, right.name, right) is None


def test_a_speedup_is_told_against_the_nearest_plain_runs():
    """A machine that becomes three times slower halfway changes no ratio, where whole medians would say 3x or 1/3x."""
    plain, draft = (Decoder("llmlab", name, "fp32", lambda prompts: None) for name in ("", "lookup"))
    unit, seconds = Unit("edit", [[5]]), {plain.name: 2.0, draft.name: 1.0}
    for pace, turn in [(1, (plain, draft))] * 3 + [(3, (draft, plain))] * 2 + [(3, (draft, draft, plain))]:
        unit.log += [(d.name, Run([[1, 2, 3]], 2, 0.1, pace * seconds[d.name])) for d in turn]
    (row, _) = compare_rows(draft, [unit], 1, plain, 1e9, plain)
    assert row["speedup_vs_plain"] == row["speedup_low"] == row["speedup_high"] == 2
    (own, _) = compare_rows(plain, [unit], 1, plain, 1e9, plain)
    assert own["speedup_vs_plain"] == own["speedup_low"] == own["speedup_high"] == 1


def test_a_pass_over_packed_weights_reads_codes_and_grids_once(llama):
    q = with_dtype(quantize(llama, 4, 32, method="rtn"), "fp32")
    codes = sum(linear.in_features * linear.out_features for linear in quant_linears(q.model)) / 2
    rest = q.model.get_output_embeddings().weight.nbytes + sum(p.nbytes for p in q.model.parameters() if p.ndim == 1)
    assert codes + rest <= bytes_per_pass(q) <= 1.6 * codes + rest
    assert bytes_per_pass(q) < bytes_per_pass(llama)


def test_plain_decoding_stands_beside_every_draft():
    names = ["", "lookup", "suffix", "recycling", "self-4bit", "lookup, self-4bit"]
    fp32 = [Decoder("llmlab", name, "fp32", lambda prompts: None) for name in names]
    half = [Decoder("llmlab", name, "bf16", lambda prompts: None) for name in names[:3]]
    other = Decoder("transformers", "lookup", "fp32", lambda prompts: None)
    turn = beside_plain([other, *fp32, *half])
    assert [d.draft for d in turn if d.dtype == "fp32"] == ["lookup", *names[:3], "", *names[3:5], "", *names[5:]]
    assert turn[-3:] == half and set(turn) == {other, *fp32, *half}
