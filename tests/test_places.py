"""Where things are kept: file systems without locks, leftovers, modes of files, a full disk."""

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import llmlab
from llmlab import InputError
from llmlab.base import paths
from llmlab.base.lock import locked
from llmlab.lab.attempt import alone
from llmlab.measure.record import append, describe

TAKE = fcntl.LOCK_EX | fcntl.LOCK_NB


@pytest.fixture(params=["ENOLCK", "ENOSYS", "EOPNOTSUPP"])
def no_locks(request, monkeypatch):
    """flock as NFS without a lock daemon, Lustre and FUSE answer it."""

    def flock(*_):
        number = getattr(errno, request.param)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def test_records_and_sweeps_work_where_there_are_no_locks(no_locks, tiny, rows, tmp_path):
    result = llmlab.score(tiny, rows[:1])
    store = tmp_path / "records.jsonl"
    (tmp_path / "records.jsonl.lock").touch()  # which an earlier version left there
    for _ in range(2):
        with pytest.warns(UserWarning, match="has no locks"):
            append(describe(tiny, result), store)
    assert len(llmlab.records(store)) == 2
    (tmp_path / ".lock").touch()
    with pytest.warns(UserWarning, match="let no two processes write there"), alone(tmp_path, "sweep"):
        pass


def test_a_lock_that_stays_held_is_one_sentence(tmp_path):
    with (tmp_path / "file").open("wb") as holder:
        fcntl.flock(holder, TAKE)
        with pytest.raises(InputError, match="busy"), locked(tmp_path / "file", "busy", seconds=0.1):
            pass
    with locked(tmp_path / "file", "busy", seconds=0) as file:  # closing it gave it back
        file.write(b"line")
    assert (tmp_path / "file").read_bytes() == b"line"


def test_a_lock_file_that_cannot_be_opened_is_one_sentence(tmp_path):
    (tmp_path / "file").mkdir()  # as root everything else can be opened
    with pytest.raises(InputError, match=r"cannot write to .*file \(Is a directory\)"), locked(tmp_path / "file", ""):
        pass


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_are_what_the_umask_says(tiny_folders, tmp_path, umask):
    lm = llmlab.load(str(tiny_folders["llama"]), dtype="fp32", device="cpu")
    before = os.umask(umask)
    try:
        folder = lm.save(tmp_path / "saved")
        with paths.atomic(tmp_path / "layer.safetensors") as file:
            save_file({"a": torch.ones(2)}, file)
    finally:
        os.umask(before)
    files = [*folder.iterdir(), tmp_path / "layer.safetensors"]
    assert {path.name for path in files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~umask


def _with_little_disk(path: str, target: str) -> None:
    """Save a model where a file can have 1000 bytes, as on a disk that becomes full."""
    lm = llmlab.load(path, dtype="fp32", device="cpu")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        lm.save(target)
    except InputError as error:
        print("refused:", error)


def test_a_full_disk_leaves_no_half_model(tiny_folders, tmp_path):
    code = f"import test_places; test_places._with_little_disk({str(tiny_folders['llama'])!r}, {str(tmp_path / 'q')!r})"
    where = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | where, capture_output=True, text=True, timeout=120)
    assert "refused: cannot write" in done.stdout and "make room there" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_make_a_folder_the_first_ones_stays(tmp_path):
    with paths.atomic_folder(tmp_path / "folder") as slow:
        (slow / "who").write_text("slow")
        with paths.atomic_folder(tmp_path / "folder") as quick:
            (quick / "who").write_text("quick")
    assert (tmp_path / "folder" / "who").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_cache_that_cannot_be_written_costs_nothing_else(tiny, rows, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLMLAB_CACHE", str(tmp_path / "file" / "cache"))  # no folder can be made in a file
    expected = llmlab.score(tiny, rows[:3], method="reference").log_probs
    for ours, theirs in zip(llmlab.score(tiny, rows[:3]).log_probs, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
