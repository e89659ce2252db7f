"""Ranks start together, report together and die together; what they compute is what one process computes."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import rank_jobs
import torch
from conftest import CHECKOUT, reference_kernel

import llmlab
from llmlab import InputError, RankError
from llmlab.kernels.packed_linear import QuantLinear
from llmlab.quantization.calibration import calibration_rows
from llmlab.quantization.grid import Scheme, rtn
from llmlab.quantization.report import Report
from llmlab.quantization.walk import quantize
from llmlab.sharding.cuts import Cuts

pytestmark = pytest.mark.slow

TEXT = "\n".join(f"{q.context} {q.endings[q.label]}" for q in llmlab.data.everyday())


@pytest.fixture(autouse=True)
def import_jobs(monkeypatch):
    """Ranks import tests/rank_jobs.py."""
    monkeypatch.setenv("PYTHONPATH", f"{CHECKOUT}:{CHECKOUT / 'tests'}")


@pytest.fixture(scope="module")
def four():
    os.environ["PYTHONPATH"] = str(CHECKOUT / "tests")
    with llmlab.ranks(4, device="cpu") as group:
        yield group


@pytest.fixture(scope="module")
def questions():
    return llmlab.data.everyday(12)


def gone(pids):
    """Whether none of these processes is alive any more."""
    return not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids)


def test_ranks_meet_and_keep_what_they_hold(four):
    found = four.run(rank_jobs.where)
    assert [(index, size, total) for index, size, _, total in found] == [(k, 4, 6.0) for k in range(4)]
    assert len({pid for _, _, pid, _ in found}) == 4
    assert four.run(rank_jobs.count) == [1] * 4
    assert four.run(rank_jobs.count) == [2] * 4


def largest(a, b):
    return max(abs(x - y) for r, s in zip(a.log_probs, b.log_probs, strict=True) for x, y in zip(r, s, strict=True))


LAYOUTS = [
    ("llama", {"data": 4}), ("llama", {"pipeline": 2}), ("llama", {"tensor": 2}),
    ("llama", {"tensor": 2, "pipeline": 2}), ("opt", {"tensor": 4}),
    ("opt", {"pipeline": 2, "tensor": 2}), ("opt", {"pipeline": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("family", "sizes"), LAYOUTS, ids=str)
@pytest.mark.parametrize("schedule", ["micro-batches", "naive"])
def test_every_layout_scores_what_one_process_scores(four, tiny_folders, questions, family, sizes, schedule):
    folder = str(tiny_folders[family])
    alone = llmlab.score(llmlab.load(folder, dtype="fp32"), questions)
    together = four.score(folder, questions, **sizes, schedule=schedule, dtype="fp32")
    assert largest(alone, together) <= 5e-4
    assert together.predictions == alone.predictions
    assert (together.tokens, together.tokens_full) == (alone.tokens, alone.tokens_full)
    assert together.settings["ranks"] == "4" and together.settings["schedule"] == schedule
    assert all(f"{kind} {size}" in together.settings["layout"] for kind, size in sizes.items())
    assert together.memory_bytes > 0


@pytest.mark.parametrize("sizes", [{"pipeline": 4}, {"tensor": 2}], ids=str)
def test_the_real_model_too(four, smollm2, questions, sizes):
    """SmolLM2 has 3 KV heads: tensor 2 cuts them unevenly."""
    alone, together = llmlab.score(smollm2, questions[:4]), four.score("smollm2", questions[:4], **sizes, dtype="fp32")
    assert largest(alone, together) <= 5e-4
    assert together.predictions == alone.predictions


@pytest.mark.parametrize(
    ("family", "sizes"),
    [("llama", {"tensor": 2, "pipeline": 2}), ("opt", {"tensor": 2}), ("opt", {"pipeline": 2}), ("llama", {})],
    ids=str,
)
def test_generation_gives_the_same_ids(four, tiny_folders, family, sizes):
    folder = str(tiny_folders[family])
    prompts = ["The kettle boils and", "Once upon a time there was", "She opens", "In the morning the dog"]
    lm = llmlab.load(folder, dtype="fp32")
    alone = llmlab.generate(lm, prompts, max_new_tokens=12, batch_size=2)
    cuts = four.cuts(None, 0, sizes.get("tensor", 1), sizes.get("pipeline", 1))
    together = four.completions(folder, prompts, cuts, "fp32", {"max_new_tokens": 12, "batch_size": 2})
    assert [c.ids for c in together] == [c.ids for c in alone.completions]


@pytest.mark.parametrize("sizes", [{"pipeline": 2}, {"tensor": 2}, {"tensor": 2, "pipeline": 2}], ids=str)
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_quantized_models_are_cut_along_their_groups(four, tiny_folders, questions, tmp_path, family, sizes):
    lm = llmlab.load(str(tiny_folders[family]), dtype="fp32")
    quantized = quantize(lm, 4, 32, method="rtn")
    if family == "llama":  # and its output head, which OPT ties to the embedding
        head = rtn(quantized.model.get_output_embeddings().weight.float(), Scheme(4, 32))
        quantized.model.set_output_embeddings(QuantLinear.pack(head, 4))
    quantized.save(tmp_path / "q")
    loaded = llmlab.load(str(tmp_path / "q"), dtype="fp32")
    with reference_kernel(loaded):  # few rows are rounded to bf16 by some processors' kernels: here and in small passes
        alone = llmlab.score(loaded, questions)
    together = four.score(str(tmp_path / "q"), questions, **sizes, dtype="fp32", nodes=4096)
    assert largest(alone, together) <= 5e-4


@pytest.mark.parametrize("target", ["gptq", "qronos"])
def test_gptq_over_the_ranks_is_gptq(four, tiny_folders, tmp_path, target):
    folder = str(tiny_folders["llama"])
    lm = llmlab.load(folder, dtype="fp32")
    rows = calibration_rows(lm, TEXT, rows=8)
    scheme, report = Scheme(4, 32, target=target), Report()
    alone = quantize(lm, scheme=scheme, calibration=rows, report=report)
    found = four.quantize(folder, tmp_path / "q", TEXT, scheme=scheme, rows=8)
    for own, shared in zip(report.linears, found["linears"], strict=True):
        assert [shared["error"], shared["bound"]] == pytest.approx([own["error"], own["bound"]], rel=0.05)
    assert found["tokens"] == rows.numel() and found["seconds"] > 0
    together = llmlab.load(str(tmp_path / "q"), dtype="fp32")
    ours, theirs = alone.model.state_dict(), together.model.state_dict()
    packed = [name for name in ours if name.endswith("qweight")]
    same = [(ours[n] == theirs[n]).float().mean().item() for n in packed]
    assert len(packed) == 14 and min(same) > 0.98  # sums in another order move a few weights by a level


def test_a_rank_holds_its_part_and_one_tensor_at_a_time(four, smollm2):
    whole = smollm2.weight_bytes
    for part, biggest, peak in four.run(rank_jobs.shard_sizes, "smollm2", Cuts(pipeline=4)):
        assert part < 0.45 * whole  # the ends hold the embedding, a fifth of this small model
        assert biggest <= smollm2.model.get_input_embeddings().weight.nbytes
        assert peak is None or peak <= 1.1 * (part + biggest) + 64 * 2**20  # and what importing a tokenizer takes


def test_what_a_job_needs_is_checked_once(four, tiny_folders):
    folder, cuts = str(tiny_folders["llama"]), Cuts(1, 2, 2)
    job = four.job(folder, cuts, "fp32")
    assert four.job(folder, cuts, "fp32") is job
    assert four.job(folder, cuts, "bf16") != job != four.job(folder, Cuts(2, 1, 2), "fp32")


def test_a_shape_without_files_is_cut_like_a_model(four):
    card = llmlab.model_card("opt-125m", dtype="fp32")
    parts = [part for part, _, _ in four.run(rank_jobs.shard_sizes, "random:opt-125m", Cuts(tensor=2, pipeline=2))]
    assert max(parts) < 0.45 * card.bytes and sum(parts) >= card.bytes


@pytest.mark.parametrize("how", ["raise", "kill", "exit"])
@pytest.mark.parametrize("index", [0, 2])
def test_one_rank_fails_and_all_end(how, index):
    group = llmlab.ranks(3, device="cpu")
    pids = group.run(rank_jobs.pids)
    with pytest.raises(RankError) as error:
        group.run(rank_jobs.fail, index, how)
    assert error.value.rank == index
    expected = {"raise": f"no luck on {index}", "kill": "was killed by SIGKILL", "exit": "exit status 3"}[how]
    assert expected in str(error.value)
    assert gone(pids)
    with pytest.raises(InputError, match="the ranks have ended"):
        group.run(rank_jobs.pids)


def test_bad_input_on_a_rank_is_bad_input_here():
    with llmlab.ranks(2, device="cpu") as two, pytest.raises(InputError, match="seven is no size"):
        two.run(rank_jobs.fail, 1, "input")


def test_killed_from_outside_and_interrupted(tiny_folders):
    group = llmlab.ranks(2, device="cpu")
    pids = group.run(rank_jobs.pids)
    threading.Timer(1, os.kill, (pids[1], signal.SIGKILL)).start()
    with pytest.raises(RankError, match="rank 1 was killed by SIGKILL"):
        group.run(rank_jobs.sleep, 60)
    assert gone(pids)
    group = llmlab.ranks(2, device="cpu")
    pids = group.run(rank_jobs.pids)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        group.run(rank_jobs.sleep, 60)
    assert gone(pids)


def test_death_while_loading_and_gathering(tiny_folders):
    for job, arguments in [
        (rank_jobs.load_then_die, (str(tiny_folders["llama"]), 1, Cuts(pipeline=2))),
        (rank_jobs.die_in_gather, (1,)),
    ]:
        group = llmlab.ranks(2, device="cpu")
        pids = group.run(rank_jobs.pids)
        with pytest.raises(RankError, match="rank 1 was killed"):
            group.run(job, *arguments)
        assert gone(pids)


PARENT = """
import rank_jobs, llmlab
group = llmlab.ranks(2, device="cpu")
print(*group.run(rank_jobs.pids), flush=True)
group.run(rank_jobs.sleep, 60)
"""


def test_no_orphans_when_the_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2 and not gone(pids)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while not gone(pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(pids)


TORCHRUN = """
import sys, llmlab
with llmlab.ranks(device="cpu") as group:
    result = group.score(sys.argv[1], llmlab.data.everyday(6), pipeline=2, dtype="fp32")
    if group.rank == 0:
        print("PREDICTIONS", result.predictions)
"""


def test_torchrun_on_two_nodes(tiny_folders, tmp_path, questions):
    """Two agents on this machine, as on two nodes: the same script, the same result."""
    script = tmp_path / "job.py"
    script.write_text(TORCHRUN)
    with __import__("socket").socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder = str(tiny_folders["llama"])
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
             "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port), str(script), folder],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for node in range(2)
    ]  # fmt: skip
    said = [agent.communicate(timeout=240)[0] for agent in agents]
    assert all(agent.returncode == 0 for agent in agents), said
    alone = llmlab.score(llmlab.load(folder, dtype="fp32"), questions[:6])
    assert f"PREDICTIONS {alone.predictions}" in said[0]


def test_what_does_not_fit_is_said_at_once(four, tiny_folders, questions, monkeypatch):
    folder = str(tiny_folders["llama"])
    with pytest.raises(InputError, match="0 ranks"):
        llmlab.ranks(0)
    with pytest.raises(InputError, match="how many ranks"):
        llmlab.ranks()
    with pytest.raises(InputError, match="4 ranks need 4 GPUs"):
        llmlab.ranks(4, device="cuda")
    with __import__("socket").socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match="cannot be used"):
            llmlab.ranks(2, device="cpu", port=taken.getsockname()[1])
    with pytest.raises(InputError, match="unknown schedule"):
        four.score(folder, questions, schedule="fast")
    with pytest.raises(InputError, match="no questions"):
        four.score(folder, [])
    with pytest.raises(InputError, match="put it into a module"):
        four.run(lambda rank: 1)
    assert torch.distributed.is_available()


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ({"pipeline": 4}, "4 stages for 2 layers"),
        ({"tensor": 4}, "tensor 4 cannot cut 2 KV heads 4 ways; tensor 2 is the most"),
        ({"data": 3}, "takes 3 ranks"),
    ],
    ids=str,
)
def test_layouts_that_do_not_fit(four, tiny_folders, questions, sizes, complaint):
    with pytest.raises(InputError, match=complaint):
        four.score(str(tiny_folders["llama"]), questions, **sizes)
    assert [found[0] for found in four.run(rank_jobs.where)] == [0, 1, 2, 3]  # said before any rank worked on it
