import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook

import llmlab
from llmlab import InputError
from llmlab.base.lock import locked
from llmlab.cli.main import main
from llmlab.lab.attempt import ATTEMPTS, MARK
from llmlab.lab.sweep import status, sweep
from llmlab.lab.sweep.grid import read_grid
from llmlab.lab.sweep.schedule import check_capacity
from llmlab.measure.record import merge, read_records, runs_file

pytestmark = pytest.mark.slow

RECORD = """
import os, random, time
from llmlab.measure.record import Record, append
from llmlab.base.stats import Metric
begin = time.perf_counter()
time.sleep(random.uniform(0.2, 0.6))
metrics = {"acc": Metric(x / 16, "", 0.0, 1.0), "seconds": Metric(time.perf_counter() - begin, "s")}
append(Record(
    task="test", metrics=metrics, n=1, model=name, revision=None, transformation="none", dtype="fp32", device="cpu",
    threads=int(os.environ["OMP_NUM_THREADS"]), track="exact", protocol=f"x={x}", data="none",
))
"""
# What can happen to a run, by x.
FATES = """
import os, time
if x == 1: print("fine")
if x == 2: raise ValueError(f"<b>{name}</b> on purpose")
if x == 3: os._exit(3)
if x == 4:
    while True: pass
if x == 5:
    held = bytearray(800 * 2**20)
    time.sleep(60)
if x == 6:
    import signal
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)
"""


def write(path, *cells, parameters='x = 1  # a number\nname = "m"  # of the model'):
    notebook = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    if parameters is not None:
        notebook.cells.insert(0, new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
    return str(path)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path / "home"))
    return tmp_path


def test_a_grid_is_the_product_and_the_list_without_what_is_excluded(home, monkeypatch):
    write(home / "n.ipynb", "x")
    file = home / "mine.yaml"
    file.write_text(
        yaml.safe_dump(
            {
                "notebook": "n.ipynb",  # beside the grid
                "grid": {"x": [1, 2, True], "name": ["a", "b"]},
                "list": [{"x": 7}, {"name": "a", "x": 2}],  # the second one is in the product already
                "exclude": [{"x": 1, "name": "b"}],
                "timeout": 5,
                "memory": "2GiB",
                "cores": 2,
            },
            sort_keys=False,
        )
    )
    grid = read_grid(file)
    pairs = [(c["x"], c.get("name")) for c in grid.combinations]
    assert pairs == [(1, "a"), (2, "a"), (2, "b"), (True, "a"), (True, "b"), (7, None)]  # 1 excludes no True
    assert (grid.timeout, grid.memory, grid.cores, grid.gpus) == (5, 2 * 2**30, 2, 0)
    assert grid.varying == ["x", "name"]
    assert grid.folder() == (home / "home" / "data" / "runs" / "sweeps" / "mine").resolve()
    (home / "home" / "notebooks").mkdir(parents=True)
    write(home / "home" / "notebooks" / "00_a.ipynb", "x")
    assert read_grid({"notebook": 0, "grid": {"x": [1]}}).name == "00_a"  # YAML reads 00 as a number
    monkeypatch.setattr("llmlab.lab.sweep.grid.usable", lambda here: [0, 1])  # two GPUs: a run gets one unless told
    gpus = [read_grid({"notebook": 0, "grid": {"x": [1]}} | more).gpus for more in ({}, {"gpus": 0}, {"gpus": 2})]
    assert gpus == [1, 0, 2]
    fixed = read_grid({"notebook": str(home / "n.ipynb"), "grid": {"x": [1, 2]}, "fixed": {"name": "c"}})
    assert fixed.combinations == [{"name": "c", "x": 1}, {"name": "c", "x": 2}]
    assert fixed.varying == ["x"]


def test_a_run_is_known_by_its_notebook_and_parameters(home, monkeypatch):
    path = write(home / "n.ipynb", "x")
    grid = {"notebook": path, "grid": {"x": [1, 2]}}

    def ids():
        return [run.id for run in read_grid(grid).runs(home)]

    first = ids()
    assert len(set(first)) == 2
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="an output")]
    nbformat.write(notebook, path)
    assert ids() == first
    grid["timeout"] = 9
    assert ids() == first
    monkeypatch.setattr("llmlab.lab.sweep.grid.code_version", lambda: "other code")
    assert not set(ids()) & set(first)
    monkeypatch.undo()
    write(home / "n.ipynb", "x + 1")
    assert not set(ids()) & set(first)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"colour": 1}, "unknown keys colour"),
        ({"notebook": None}, "names no notebook"),
        ({"notebook": "none.ipynb"}, "no notebook 'none.ipynb'"),
        ({"grid": {}}, "holds no combination"),
        ({"grid": {"x": []}}, r"`grid` of the grid is {'x': \[\]}: give parameter names, each with a list of values"),
        ({"grid": {"x": 3}}, "each with a list of values"),
        ({"grid": [1]}, r"`grid` of the grid is \[1\]: give parameter names"),
        ({"fixed": [1]}, r"`fixed` of the grid is \[1\]: give parameter names, each with its value"),
        ({"grid": {"y": [1]}}, r"n.ipynb has no parameter y: its parameters are x, name"),
        ({"exclude": [{"y": 1}]}, "has no parameter y"),
        ({"exclude": [{"x": 1}, {"x": 2}]}, "holds no combination"),
        ({"list": [3]}, r"`list` of the grid is \[3\]: give parameters as - {name: value}"),
        ({"fixed": {"x": 1}}, "x is both fixed and varied"),
        ({"grid": {1: [2]}}, "a parameter 1: a parameter's name is text"),
        ({"exclude": [{1: 2}]}, "a parameter 1: a parameter's name is text"),
        ({"grid": {"x": [float("nan")]}}, "a parameter is a number, text"),
        ({"timeout": 0}, "`timeout` of the grid is 0: give a positive number"),
        ({"timeout": True}, "`timeout` of the grid is True: give a positive number"),
        ({"memory": "much"}, "write it like 32GiB"),
        ({"cores": 0}, "`cores` of the grid is 0: give a whole number, at least 1"),
        ({"cores": True}, "`cores` of the grid is True: give a whole number"),
        ({"cores": 10_000}, "a run needs 10000 cores"),
        ({"gpus": 10_000}, "10000 GPUs"),
    ],
)
def test_a_wrong_grid_is_refused_before_anything_runs(home, change, expected):
    grid = {"notebook": write(home / "n.ipynb", "x"), "grid": {"x": [1, 2]}} | change
    with pytest.raises(InputError, match=expected):
        sweep(grid, output=home / "out")
    assert not (home / "out").exists()


def test_a_notebook_without_parameters_and_a_file_without_a_grid(home):
    path = write(home / "n.ipynb", "x = 1", parameters=None)
    with pytest.raises(InputError, match="no cell tagged parameters"):
        sweep({"notebook": path, "grid": {"x": [1]}})
    for text, expected in (("a: [", "is no YAML"), ("- 1", "holds no grid"), ("", "holds no grid")):
        (home / "grid.yaml").write_text(text)
        with pytest.raises(InputError, match=expected):
            sweep(home / "grid.yaml")
    with pytest.raises(InputError, match="cannot read the grid"):
        sweep(home / "none.yaml")


def test_executors_are_checked(home):
    grid = {"notebook": write(home / "n.ipynb", "x"), "grid": {"x": [1]}}
    for how, expected in (
        ({"executor": "slurm"}, "unknown executor 'slurm': choose local or ray"),
        ({"address": "head:6379"}, "give the executor ray"),
        ({"executor": "ray", "address": "127.0.0.1:1"}, "no Ray answers at '127.0.0.1:1'"),
        ({"executor": "ray", "address": "nonsense"}, "no Ray answers at 'nonsense'"),
    ):
        with pytest.raises(InputError, match=expected):
            sweep(grid, output=home / "out", **how)
    assert not (home / "out").exists()


def test_every_fate_is_one_sentence_and_concerns_no_other_run(home):
    path = write(home / "n.ipynb", FATES)
    grid = {"notebook": path, "grid": {"x": [4, 5, 2, 3, 6, 1]}, "fixed": {"name": "m"}, "timeout": 25}
    frame = sweep(grid | {"memory": "700MiB"}, output=home / "out").set_index("x")
    assert dict(frame["status"]) == {
        4: "failed", 5: "failed", 2: "failed", 3: "failed", 6: "interrupted", 1: "finished",
    }  # fmt: skip
    assert frame["error"][4] == "it ran longer than its timeout of 25 s and was ended."
    assert "more than its memory limit of 0.68 GiB, and was ended." in frame["error"][5]
    assert frame["error"][2] == "cell 3 raised ValueError: <b>m</b> on purpose"
    assert frame["error"][3].startswith("its kernel died")
    assert "was killed by SIGKILL" in frame["error"][6]
    assert pd.isna(frame["error"][1])
    assert all("\n" not in error for error in frame["error"].dropna())
    kept = json.loads((home / "out" / frame["run"][2] / "run.json").read_text())
    assert kept["parameters"] == {"x": 2, "name": "m"}
    assert "on purpose" in kept["traceback"]
    assert "\x1b" not in kept["traceback"]
    assert "fine" in (home / "out" / frame["run"][1] / "notebook.ipynb").read_text()
    assert not marked(home / "out")

    # Again: failures are kept, what was killed is waiting, nothing runs for the others, not even for one whose sweep
    # was killed between its end and its move to its place.
    assert dict(status(grid, output=home / "out").set_index("x")["status"])[6] == "waiting"
    only = {"notebook": path, "list": [{"x": 1, "name": "m"}, {"x": 2, "name": "m"}]}
    before = {file: file.stat().st_mtime_ns for file in (home / "out").rglob("run.json")}
    done = home / "out" / frame["run"][1]
    done.rename(home / "out" / ATTEMPTS / f"{done.name}-0123abcd")
    assert list(sweep(only, output=home / "out")["status"]) == ["finished", "failed"]
    assert before == {file: file.stat().st_mtime_ns for file in (home / "out").rglob("run.json")}
    assert list(sweep(only, output=home / "out", retry_failed=True)["status"]) == ["finished", "failed"]
    changed = {file for file in before if file.stat().st_mtime_ns != before[file]}
    assert changed == {home / "out" / frame["run"][2] / "run.json"}


def test_two_sweeps_do_not_share_a_folder(home):
    grid = {"notebook": write(home / "n.ipynb", "x"), "grid": {"x": [1]}}
    (home / "out").mkdir()
    with locked(home / "out" / ".lock", ""), pytest.raises(InputError, match="another sweep is at work"):
        sweep(grid, output=home / "out")


def test_the_command(home, monkeypatch, capsys):
    write(home / "n.ipynb", FATES)
    (home / "grid.yaml").write_text("notebook: n.ipynb\ngrid:\n  x: [1, 2]\nfixed: {name: '[red]m'}\n")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llmlab", "sweep", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return stop.value.code or 0, capsys.readouterr()

    file = home / "out.json"
    code, shown = run(home / "grid.yaml", "--dry-run", "--json", file)
    assert code == 0
    assert "2 waiting" in shown.out
    assert not (home / "home" / "data").exists()
    code, shown = run(home / "grid.yaml", "--json", file)
    assert code == 1
    assert "1 finished, 1 failed" in shown.out
    assert "[red]m" in shown.out
    rows = {row["x"]: row for row in json.loads(file.read_text())["runs"]}
    assert (rows[1]["status"], rows[2]["status"]) == ("finished", "failed")
    code, shown = run(home / "none.yaml")
    assert code == 2
    assert len(shown.err.strip().splitlines()) == 1
    code, shown = run("--help")
    assert "Example: llmlab sweep" in shown.out


def marked(folder):
    """Processes that belong to attempts in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK, "").startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def gone(folder):
    deadline = time.monotonic() + 60
    while marked(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not marked(folder)


def test_ctrl_c_ends_all(home):
    path = write(home / "n.ipynb", "import time; time.sleep(60)")
    grid = home / "grid.yaml"
    grid.write_text(f"notebook: {path}\ngrid: {{x: [1, 2, 3]}}\n")
    command = [sys.executable, "-m", "llmlab.cli.main", "sweep", str(grid), "--output", str(home / "out")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(marked(home / "out")) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert marked(home / "out")
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert "Traceback" not in process.stderr.read()
    assert not marked(home / "out")


def test_a_sweep_killed_at_five_moments_loses_nothing_and_repeats_nothing(home, monkeypatch):
    # A file of the package that is saved while this test runs would make new runs of them all.
    monkeypatch.setattr("llmlab.lab.sweep.grid.code_version", lambda: "fixed")
    path, out = write(home / "n.ipynb", RECORD), home / "out"
    grid = {"notebook": path, "grid": {"x": list(range(12))}, "fixed": {"name": "m"}}
    context, moments = multiprocessing.get_context("fork"), random.Random(7)

    def start():
        process = context.Process(target=sweep, args=(grid,), kwargs={"output": out})
        process.start()
        return process

    def wait_a_while(process):
        deadline = time.monotonic() + 20
        while not marked(out) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(moments.uniform(0.2, 3.5))

    process, kills = start(), []
    for victim in ("parent", "worker", "parent", "worker", "parent"):
        wait_a_while(process)
        if victim == "parent":
            kills.append(process.is_alive())
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert gone(out)  # the runs end with their sweep
            process = start()
        else:
            workers = [p for p in marked(out) if "llmlab.lab.execute" in p.cmdline()]
            kills.append(bool(workers))
            workers[0].kill()
    process.join(120)
    assert process.exitcode == 0
    assert kills == [True] * 5
    frame = sweep(grid, output=out)
    assert list(frame["status"]) == ["finished"] * 12
    assert sorted(llmlab.records()["acc"] * 16) == list(range(12))
    assert llmlab.records()["id"].is_unique
    assert sorted(frame["acc"] * 16) == list(range(12))
    assert frame.attrs["metrics"] == ["acc", "seconds (metric)"]
    results = [file.parent.name for file in out.glob("*/run.json")]
    assert sorted(results) == sorted(frame["run"])
    assert not list((out / ATTEMPTS).iterdir())


def test_local_and_ray_give_the_same_records(home, monkeypatch):
    path = write(home / "n.ipynb", RECORD)
    found = {}
    for executor in ("local", "ray"):
        monkeypatch.setenv("LLMLAB_HOME", str(home / executor))
        grid = {"notebook": path, "grid": {"x": [1, 2]}, "fixed": {"name": "m"}}
        assert list(sweep(grid, executor=executor)["status"]) == ["finished"] * 2
        assert not marked(home / executor)
        rows = sorted(read_records(runs_file()), key=lambda row: row["protocol"])
        for row in rows:
            assert row.pop("attempt")  # the folder of its run, with a tail of chance
            del row["id"], row["time"], row["metrics"]["seconds"]
        found[executor] = rows
    assert found["local"] == found["ray"]
    assert len(found["ray"]) == 2


def test_a_run_that_fits_on_no_node_of_a_ray_cluster_is_refused(home):
    grid = {"notebook": write(home / "n.ipynb", "x"), "grid": {"x": [1]}, "cores": 3, "gpus": 1}
    plan = read_grid(grid)
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 8.0, "GPU": 8.0}}]
    with pytest.raises(InputError, match=r"a run needs 3 cores and 1 GPUs, Ray's largest node has 2 and 0"):
        check_capacity(nodes, plan)
    check_capacity([*nodes, {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}}], plan)


def test_records_are_merged_once(home):
    from test_record import make

    from llmlab.measure.record import append

    one, two, store = home / "one.jsonl", home / "two.jsonl", home / "store.jsonl"
    append(make(1.0), one)
    append(make(2.0), two)
    append(make(3.0), store)
    assert merge([one], store) == 1
    assert merge([one, two, home / "none.jsonl"], store) == 1
    assert merge([one, two], store) == 0
    assert [row["metrics"]["acc"]["value"] for row in read_records(store)] == [3.0, 1.0, 2.0]


def test_each_run_draws_into_its_own_folder(home, monkeypatch):
    monkeypatch.setenv("LLMLAB_FIGURES", str(home / "another"))  # as in a notebook that a report runs
    folder = "from llmlab.base.paths import figures_folder\nfolder = figures_folder()"
    path = write(home / "n.ipynb", folder, "folder.mkdir(parents=True)\n(folder / str(x)).touch()")
    frame = sweep({"notebook": path, "grid": {"x": [1, 2]}}, output=home / "out")
    assert list(frame["status"]) == ["finished"] * 2
    assert sorted(file.name for file in (home / "out").glob("*/figures/*")) == ["1", "2"]
    assert not (home / "another").exists()
