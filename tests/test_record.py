import dataclasses
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import pytest

import llmlab
from llmlab import InputError, Measurement, Metric
from llmlab.measure.record import Record, append, describe, read_records, records, runs_file


def make(value=1.0, **fields):
    plain = {
        "task": "test", "metrics": {"acc": Metric(value, "", 0.5, 1.5), "seconds": Metric(2.0, "s")}, "n": 3,
        "model": "m", "revision": None, "transformation": "none", "dtype": "fp32", "device": "cpu", "threads": 2,
        "track": "exact", "protocol": "by hand", "data": "none",
    }  # fmt: skip
    return Record(**(plain | fields))


def test_a_record_says_everything_needed_to_trust_it(tiny, rows):
    result = llmlab.score(tiny, rows[:3])
    record = llmlab.record(tiny, result, warmup=1, repeats=3)
    row = json.loads(runs_file().read_text().splitlines()[-1])
    assert row["id"] == record.id
    assert row["model"] == tiny.name
    assert row["revision"] == tiny.revision
    assert (row["dtype"], row["track"], row["n"], row["warmup"], row["repeats"]) == ("fp32", "exact", 3, 1, 3)
    assert row["metrics"]["acc"]["low"] <= row["metrics"]["acc"]["value"]
    assert row["metrics"]["seconds_inference"]["unit"] == "s"
    assert row["data"].startswith("sha256:")
    assert row["libraries"]["torch"]
    assert row["hardware"]["cores"] >= 1
    assert row["commit"]
    assert row["settings"] == result.settings
    assert row["settings"]["method"] == "shared"
    assert row["weight_bytes"] == tiny.weight_bytes
    assert row["schema"] == 3


def test_a_result_of_ones_own_tells_its_settings_its_seed_and_its_memory(tiny):
    measured = Measurement(
        "speed", {"seconds": Metric(1.0, "s")}, 1, "one run", settings={"batch_size": "8"}, seed=3, memory_bytes=99
    )
    record = describe(tiny, measured)
    assert (record.settings, record.seed, record.memory_bytes) == ({"batch_size": "8"}, 3, 99)
    assert describe(tiny, measured, seed=4).seed == 4


def test_a_record_tells_which_run_of_a_notebook_measured_it(tmp_path, monkeypatch):
    monkeypatch.delenv("LLMLAB_ATTEMPT", raising=False)
    assert make().attempt is None
    monkeypatch.setenv("LLMLAB_ATTEMPT", "/reports/.attempts/00_start_here-1a2b3c4d")
    append(make(), tmp_path / "records.jsonl")
    assert read_records(tmp_path / "records.jsonl")[0]["attempt"] == "00_start_here-1a2b3c4d"


def test_changed_weights_are_the_open_track(tiny):
    packed = dataclasses.replace(tiny, transformation="bitsandbytes-nf4")
    measured = Measurement("speed", {"seconds": Metric(1.0, "s")}, 1, "one run")
    assert describe(tiny, measured).track == "exact"
    assert describe(packed, measured).track == "open"


def test_records_become_a_data_frame(tmp_path):
    path = tmp_path / "records.jsonl"
    assert len(records(path)) == 0
    append(make(0.7, task="hellaswag"), path)
    append(make(0.8, task="generate"), path)
    frame = records(path)
    assert list(frame.query("task == 'hellaswag'")["acc"]) == [0.7]
    assert list(frame["acc_low"]) == [0.5, 0.5]
    assert frame.attrs["units"]["seconds"] == "s"
    assert str(frame["time"].dt.tz) == "UTC"


def test_settings_become_columns(tmp_path):
    append(make(0.7, settings={"batch_size": "1"}), tmp_path / "records.jsonl")
    append(make(0.8, settings={"batch_size": "8", "draft": "lookup"}), tmp_path / "records.jsonl")
    frame = records(tmp_path / "records.jsonl")
    assert list(frame["batch_size"]) == ["1", "8"]
    assert list(frame["draft"].fillna("none")) == ["none", "lookup"]


@pytest.mark.parametrize(
    ("task", "protocol", "settings"),
    [
        (
            "trade-off", "precision 4 bits; method rotated gptq; sharding data 2; draft none; log p; batch size 1",
            {"precision": "4 bits", "method": "rotated gptq", "sharding": "data 2", "draft": ""},
        ),
        (
            "generate", "greedy, batch size 8, static KV cache, draft: lookup, self-4bit, tokens counted from ids",
            {"temperature": "0", "draft": "lookup, self-4bit", "batch_size": "8"},
        ),
        (
            "generate", "temperature 0.7, top-p 0.9, batch size 1, KV cache, tokens counted from ids",
            {"temperature": "0.7", "top_p": "0.9", "draft": "", "batch_size": "1"},
        ),
        (
            "everyday", "log p(ending | context), split as lm-evaluation-harness; reference path, longest first, "
            "batch size 8", {"method": "reference", "batch_size": "8"},
        ),
        (
            "everyday", "log p(ending | context), split as x; shared, data 2 path, longest first, 74 passes",
            {"method": "shared", "layout": "data 2"},
        ),
        ("bench sharding", "4 ranks, median of 3 interleaved runs", {"ranks": "4"}),
        ("bench scoring", "from text, best of batch sizes 1, 4, 8", {}),
    ],
)  # fmt: skip
def test_records_of_the_first_schema_are_read_with_the_settings_that_they_told(tmp_path, task, protocol, settings):
    path = tmp_path / "records.jsonl"
    old = make(task=task, protocol=protocol).as_dict() | {"schema": 1, "baseline": None}
    del old["settings"], old["memory_bytes"], old["weight_bytes"]
    path.write_text(json.dumps(old) + "\n")
    (row,) = read_records(path)
    assert row["settings"] == settings
    assert len(records(path)) == 1


def _append_many(path, worker):
    for number in range(25):
        append(make(worker * 100 + number), path)


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / "records.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_append_many, args=(path, w)) for w in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    values = sorted(r["metrics"]["acc"]["value"] for r in read_records(path))
    assert values == sorted(float(w * 100 + n) for w in range(4) for n in range(25))


def test_a_torn_last_line_is_reported_and_skipped_and_closed(tmp_path):
    path = tmp_path / "records.jsonl"
    append(make(1.0), path)
    append(make(2.0), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])  # the crash
    with pytest.warns(UserWarning, match="line 2 is no whole record"):
        assert [r["metrics"]["acc"]["value"] for r in read_records(path)] == [1.0]
    append(make(3.0), path)
    with pytest.warns(UserWarning, match="line 2"):
        assert [r["metrics"]["acc"]["value"] for r in read_records(path)] == [1.0, 3.0]


def test_records_of_a_newer_schema_are_reported_and_skipped(tmp_path):
    path = tmp_path / "records.jsonl"
    append(make(1.0), path)
    path.write_text(path.read_text() + json.dumps(make(2.0).as_dict() | {"schema": 99}) + "\n")
    with pytest.warns(UserWarning, match="newer than 3"):
        assert len(read_records(path)) == 1


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import llmlab
from test_record import append, make
path = Path({path!r})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, resource.RLIM_INFINITY))
try:
    append(make(2.0), path)
except llmlab.InputError as error:
    print("refused:", error)
"""


@pytest.mark.slow
def test_a_full_disk_loses_no_earlier_record(tmp_path):
    """A file size limit makes the write fail half-way, as a full disk does."""
    path = tmp_path / "records.jsonl"
    append(make(1.0), path)
    before = path.read_bytes()
    code = FULL_DISK.format(tests=str(Path(__file__).parent), path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "refused: cannot append" in done.stdout, done.stderr
    assert path.read_bytes() == before
    append(make(3.0), path)
    assert [r["metrics"]["acc"]["value"] for r in read_records(path)] == [1.0, 3.0]


def test_a_store_that_cannot_be_written_is_bad_input(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="cannot write to the folder"):
        append(make(), tmp_path / "file" / "records.jsonl")


def test_nan_never_gets_into_the_store(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        append(make(float("nan")), tmp_path / "records.jsonl")
    assert read_records(tmp_path / "records.jsonl") == []
