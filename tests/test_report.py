import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from bs4 import BeautifulSoup
from conftest import CHECKOUT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

import llmlab
from llmlab import InputError
from llmlab.base.lock import locked
from llmlab.lab.notebooks import check_parameters, command, find_notebooks
from llmlab.lab.redraw import FIGURES, redraw, roofline
from llmlab.lab.report import report
from llmlab.lab.report.build import check_copies, page_names
from llmlab.lab.report.course import COMMITTED, lesson
from llmlab.lab.report.markup import from_markdown, sanitized
from llmlab.lab.report.pages import render, write_challenge_page
from llmlab.measure.record import Record


def write(folder, name, *cells, parameters="x = 1  # a number", title=None):
    notebook = new_notebook(cells=[new_markdown_cell(f"# {title or f'About {name}'}")])
    if parameters is not None:
        notebook.cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    notebook.cells += [new_code_cell(source) for source in cells]
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = Path(folder) / f"{name}.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LLMLAB_HOME", str(tmp_path))
    (tmp_path / "notebooks").mkdir()
    return tmp_path


FIGURE = """
import matplotlib.pyplot as plt
from llmlab.lab import figures
figure, axes = plt.subplots()
axes.plot([x, 2])
figures.show(figure, "line", "A line from <x> to 2.")
"""


@pytest.mark.slow
def test_notebooks_become_pages_and_a_failure_stops_nothing(home):
    ok = write(home / "notebooks", "00_fine", FIGURE, "print('<script>alert(1)</script>', x)")
    bad = write(home / "notebooks", "01_fails", "print('before')", "1 / 0", "print('after')")
    last = write(home / "notebooks", "02_last", "x + 1")
    ended = []
    runs = report([ok, bad, last], output=home / "report", parameters={"x": 7}, on_end=ended.append)
    assert [run.failed for run in runs] == [False, True, False]
    assert runs == ended
    assert "ZeroDivisionError" in runs[1].error
    failed = nbformat.read(home / "report" / "notebooks" / "01_fails.ipynb", as_version=4)
    outputs = [o for cell in failed.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any(o.output_type == "error" and o.ename == "ZeroDivisionError" for o in outputs)
    page = (home / "report" / "00_fine.html").read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt; 7" in page
    assert "<script>alert" not in page
    assert 'alt="A line from &lt;x&gt; to 2."' in page
    index = (home / "report" / "index.html").read_text()
    assert "About 00_fine" in index
    assert "ZeroDivisionError" in index
    assert "x = 7" in index
    assert 'alt="A line from &lt;x&gt; to 2."' in index
    assert (home / "report" / "figures" / "line.png").exists()
    assert (home / "report" / "figures" / "line.svg").exists()
    assert not (home / "figures").exists()  # tracked in a checkout
    for text in (page, index):
        assert 'src="http' not in text
        assert "cdnjs" not in text


NOTEBOOKS = sorted((CHECKOUT / "notebooks").glob("[0-9]*.ipynb"))
EQUATION = r"\$\$.+?\$\$|\$[^$]+\$"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_equation_of_a_notebook_is_drawn_by_the_browser(path):
    content = nbformat.read(path, as_version=4)
    text = "\n\n".join(cell.source for cell in content.cells if cell.cell_type == "markdown")
    equations = re.findall(EQUATION, re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL), re.DOTALL)
    page = BeautifulSoup(render(content, path.stem, path.parent), "html.parser")
    assert len(page.find_all("math")) == len(equations) > 0
    assert len(page.find_all("math", display="block")) == sum(equation.startswith("$$") for equation in equations)
    assert not page.select("merror, math script")
    for code in page.select("code"):
        code.decompose()
    shown = " ".join(cell.text for cell in page.select(".jp-MarkdownCell"))
    assert not re.findall(r"\$|\\[a-zA-Z]+", shown)


def test_equations_become_mathml_and_nothing_else():
    page = BeautifulSoup(from_markdown(r"So $a < b$, $$\frac{1}{2}$$ and `$c$`."), "html.parser")
    inline, block = page.find_all("math")
    assert inline.text == "a<b" and "display" not in inline.attrs
    assert block["display"] == "block" and [number.text for number in block.mfrac.find_all("mn")] == ["1", "2"]
    assert page.code.text == "$c$"
    aligned = from_markdown(r"\begin{align*} a &= b \\ &= c \end{align*}")
    assert len(BeautifulSoup(aligned, "html.parser").math.find_all("mtr")) == 2
    for wrong in (r"$\unknown{<b>}$", "$$<i>a_b_c</i>$$"):  # no LaTeX: as it was written
        assert BeautifulSoup(from_markdown(wrong), "html.parser").text.strip() == wrong
    hit = attack(1)
    for hostile in (f"$\\text{{{hit}}}$", f'<span class="equation block">\\text{{{hit}}}</span>', f"$$\\{hit}$$"):
        page = BeautifulSoup(from_markdown(hostile), "html.parser")
        assert not page.find_all(lambda tag: tag.name == "script" or any(name.startswith("on") for name in tag.attrs))
    output = new_output("display_data", {"text/latex": "$x^2$", "text/plain": "x**2"})
    page = render(new_notebook(cells=[new_code_cell("x", outputs=[output])]), "00_a")
    assert BeautifulSoup(page, "html.parser").find("msup").text == "x2"


def test_long_code_folds_and_the_lesson_stays_open():
    long = "# Draws a figure\n" + "x = 1\n" * 12
    tags = [[], ["toy"], ["exercise"], ["parameters"], ["colab"]]
    cells = [new_code_cell(long, metadata={"tags": tag} if tag else {}) for tag in tags]
    page = BeautifulSoup(render(new_notebook(cells=[*cells, new_code_cell("x = 1\n" * 12)]), "00_a"), "html.parser")
    assert [bool(code.find("details")) for code in page.select(".jp-CodeCell")] == [
        True,
        False,
        False,
        False,
        True,
        False,
    ]
    assert page.summary.text == "13 lines of code: Draws a figure"
    assert page.details.pre.text.strip() == long.strip()


def test_the_course_page_knows_every_notebook(home):
    assert set(COMMITTED) == {path.stem for path in NOTEBOOKS}, "say in course.py how long it takes and what it needs"
    for path in NOTEBOOKS:
        about = lesson(nbformat.read(path, as_version=4), path)
        assert "?" in about.question and "Question." not in about.question
        assert about.written_out and about.exercises >= 2
    cells = [
        new_markdown_cell("# Title\n\n**Question.** Why $x$,\nand *how*? [Next](b.ipynb).\n\n**The idea.** None."),
        new_markdown_cell("## By hand\n\ntext"), new_code_cell("1", metadata={"tags": ["toy"]}),
        new_code_cell("2", metadata={"tags": ["toy"]}), new_code_cell("3", metadata={"tags": ["exercise"]}),
    ]  # fmt: skip
    about = lesson(new_notebook(cells=cells), home / "a.ipynb")
    question = BeautifulSoup(about.question, "html.parser")
    assert " ".join(question.text.split()) == "Why x, and how? Next."
    assert question.math and question.em and question.a["href"] == "b.html"
    assert (about.written_out, about.exercises, about.minutes, about.needs) == (["By hand"], 1, None, "")
    empty = lesson(new_notebook(), home / "a.ipynb")
    assert (empty.question, empty.written_out, empty.exercises) == ("", [], 0)


BUSY = """
import subprocess, sys
# Its last words when the kernel is interrupted would be its own.
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stderr=subprocess.DEVNULL,
    start_new_session=True)  # out of reach of a signal to the notebook's own session
print(child.pid, file=open(place, "w"), flush=True)
child.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_report_says_so_in_one_line_and_leaves_no_process(home, stop):
    write(home / "notebooks", "00_fine", "x")
    write(home / "notebooks", "01_busy", f"place = {str(home / 'pid')!r}" + BUSY)
    write(home / "notebooks", "02_never", "x")
    command = [sys.executable, "-m", "llmlab.cli.main", "report", "--output", str(home / "report")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (home / "pid").exists() or not (home / "pid").read_text().strip():
        assert time.monotonic() < deadline and run.poll() is None, run.communicate()
        time.sleep(0.1)
    children = psutil.Process(run.pid).children(recursive=True)
    assert int((home / "pid").read_text()) in [child.pid for child in children]
    os.killpg(run.pid, stop)  # as a terminal does
    out, complaint = run.communicate(timeout=30)
    assert run.returncode == 130
    assert re.fullmatch(
        r"llmlab: interrupted in 01_busy after \d+ s; 1 of 3 notebooks are in .*index\.html\.\n", complaint
    )
    assert out.splitlines()[-1].startswith("2 of 3, 01_busy: running, 1 to come")
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    index = (home / "report" / "index.html").read_text()
    assert "About 00_fine" in index and "About 01_busy" not in index


def test_two_reports_do_not_share_a_folder(home):
    (home / "report").mkdir()
    with locked(home / "report" / ".lock", ""), pytest.raises(InputError, match="another report is at work"):
        report([write(home / "notebooks", "00_fine", "x")], output=home / "report")


def test_parameters_are_held_against_the_cell(home):
    path = write(home / "notebooks", "00_fine", "x")
    check_parameters(path, {"x": 3})
    with pytest.raises(InputError, match=r"00_fine\.ipynb has no parameter y: its parameters are x"):
        report([path], output=home / "report", parameters={"y": 3})
    untagged = write(home / "notebooks", "01_untagged", "y = 1", parameters=None)
    with pytest.raises(InputError, match="no cell tagged parameters"):
        check_parameters(untagged, {"y": 1})
    (home / "notebooks" / "02_broken.ipynb").write_text("{")
    with pytest.raises(InputError, match="cannot read the notebook"):
        check_parameters(home / "notebooks" / "02_broken.ipynb", {})
    assert not (home / "report").exists()


PARAMETERS = """%matplotlib inline
equation = "a=b"
compare = 1 == 1  # a comment with = in it
first, (second, *rest) = 1, (2, 3)
listed: list[int] = [
    number for number in (1, 2)
]
table["key"] = 1
def helper(argument=1): local = 2
"""


def test_parameters_are_found_whatever_their_default(home):
    path = write(home / "notebooks", "00_fine", "x", parameters=PARAMETERS)
    check_parameters(path, ["equation", "compare", "first", "second", "rest", "listed"])
    for name in ("number", "table", "helper", "argument", "local", "a"):
        with pytest.raises(InputError, match="its parameters are equation, compare, first, second, rest, listed"):
            check_parameters(path, [name])
    with pytest.raises(InputError, match=r"cannot read the notebook .*01_odd\.ipynb"):
        check_parameters(write(home / "notebooks", "01_odd", "x", parameters="x = = 1"), [])


def named(path, kernelspec):
    """A notebook with another kernel's name."""
    content = nbformat.read(path, as_version=4)
    content.metadata = {"kernelspec": kernelspec} if kernelspec else {}
    nbformat.write(content, path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("default::UserWarning")
def test_a_notebook_runs_in_this_python_whatever_kernel_it_names(home, monkeypatch):
    kernels = home / "jupyter" / "kernels" / "python3"
    kernels.mkdir(parents=True)
    broken = {"argv": ["/bin/false", "{connection_file}"], "display_name": "gone", "language": "python"}
    (kernels / "kernel.json").write_text(json.dumps(broken))
    monkeypatch.setenv("JUPYTER_PATH", str(home / "jupyter"))  # before all others
    same = f"import sys\nassert (sys.executable, x) == ({sys.executable!r}, 7)"
    (home / "{odd} folder").mkdir()
    own = write(home / "{odd} folder", "own é#1", same)
    foreign = named(write(home, "foreign", same), {"name": "conda-env-llm-py", "display_name": "Python [conda]"})
    none = named(write(home, "none", same), None)
    with pytest.warns(UserWarning) as told:
        runs = report([own, foreign, none], output=home / "report", parameters={"x": 7})
    assert [run.error for run in runs] == [None] * 3
    assert [str(warning.message) for warning in told] == [
        "foreign.ipynb asks for the kernel 'conda-env-llm-py': it runs in the Python of this environment.",
        "none.ipynb names no kernel: it runs in the Python of this environment.",
    ]
    index = BeautifulSoup((home / "report" / "index.html").read_text(), "html.parser")
    assert index.find("a", href="own%20%C3%A9%231.html") and (home / "report" / "own é#1.html").exists()


def test_a_notebook_in_another_language_is_refused(home):
    path = named(write(home / "notebooks", "00_r", "x"), {"name": "ir", "language": "R", "display_name": "R"})
    with pytest.raises(InputError, match=r"00_r\.ipynb is in R: only Python notebooks can run here"):
        check_parameters(path, [])
    path.write_text(path.read_text().replace('"language": "R"', '"language": null'))
    with pytest.warns(UserWarning, match="asks for the kernel 'ir'"):
        check_parameters(path, [])


def test_a_report_overwrites_no_notebook(home):
    path = write(home / "notebooks", "00_fine", "x")
    for source in (path, write(home, "00_fine", "x")):  # the source itself; another one of its name
        before = path.read_bytes()
        with pytest.raises(InputError, match=r"executed copies would go to .*notebooks, where 00_fine\.ipynb is"):
            report([source], output=home)
        assert path.read_bytes() == before
    (home / "link").mkdir()
    (home / "link" / "notebooks").symlink_to(home / "notebooks")
    with pytest.raises(InputError, match="give another --output"):
        report([path], output=home / "link")
    content = nbformat.read(path, as_version=4)
    content.metadata["papermill"] = {}  # an earlier report's copy may be replaced, unless it is what is to be run
    nbformat.write(content, path)
    check_copies(home / "notebooks", [home / "00_fine.ipynb"])
    with pytest.raises(InputError):
        check_copies(home / "notebooks", [path])


def test_every_notebook_has_a_page_of_its_own():
    names = ["a/run.ipynb", "b/run.ipynb", "c/Run.ipynb", "d/index.ipynb", "é.ipynb", "e/e\u0301.ipynb", 'x:"y?.ipynb']
    pages = page_names(map(Path, names))
    assert list(pages.values()) == ["run", "run-2", "Run-3", "index-2", "é", "e\u0301-2", "x__y_"]


def test_links_between_notebooks_lead_to_their_pages(home):
    links = {
        "01_b.ipynb": "01_b.html", "my%20b%23.ipynb#part": "my%20b%23-2.html#part", "<my b.ipynb>": "my%20b.html",
        "../other/é.ipynb": "%C3%A9.html", "../elsewhere/c.ipynb": "../elsewhere/c.ipynb",
        "https://example.org/01_b.ipynb": "https://example.org/01_b.ipynb",
    }  # fmt: skip
    content = new_notebook(cells=[new_markdown_cell(" ".join(f"[link]({link})" for link in links))])
    pages = {home / "notebooks" / "my b#.ipynb": "my b#-2.html", home / "other" / "é.ipynb": "é.html"}
    page = BeautifulSoup(render(content, "00_a", home / "notebooks", pages), "html.parser")
    assert [link["href"] for link in page.find_all("a", string="link")] == list(links.values())


@pytest.mark.slow
def test_a_kernel_that_dies_is_reported(home):
    path = write(home / "notebooks", "00_dies", "import os; os._exit(3)")
    runs = report([path, write(home / "notebooks", "01_fine", "x")], output=home / "report")
    assert "died" in runs[0].error.lower()
    assert not runs[1].failed


def test_notebooks_are_found_by_name_number_and_path(home):
    first, second = (write(home / "notebooks", name, "x") for name in ("00_a", "01_b"))
    assert find_notebooks() == [first, second]
    assert find_notebooks(["01", "00_a"]) == [second, first]
    assert find_notebooks([str(first), "00"]) == [first]
    assert command([second, write(home / "notebooks", "mine", "x")], {}).endswith(
        "01_b " + str(home / "notebooks/mine.ipynb")
    )
    with pytest.raises(InputError, match=r"no notebook 'c': give the path of an \.ipynb file or one of 00_a, 01_b"):
        find_notebooks(["c"])


@pytest.mark.slow
def test_the_command_says_by_its_status_that_a_notebook_failed(home, monkeypatch, capsys):
    from llmlab.cli.main import main

    write(home / "notebooks", "00_fails", "raise RuntimeError('on purpose')")
    monkeypatch.setattr(sys, "argv", ["llmlab", "report", "--output", str(home / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "on purpose" in capsys.readouterr().out
    assert (home / "out" / "index.html").exists()


RECORD = """
from llmlab import Metric
from llmlab.measure.record import Record, append
about = dict(task="everyday", metrics={"seconds": Metric(2.0, "s"), "acc": Metric(0.3, "", 0.2, 0.4)}, n=4,
    revision=None, transformation="gptq-4bit", dtype="bf16", device="cpu", threads=2, track="open",
    protocol="p", data="d")
append(Record(model="another's, written meanwhile", attempt=None, **about))
append(Record(model="m", **about))
"""


@pytest.mark.slow
def test_figures_and_records_belong_to_the_notebook_that_wrote_them(home):
    (home / "report" / "figures").mkdir(parents=True)
    (home / "report" / "figures" / "old.png").write_bytes(b"from another day")
    first = write(home / "notebooks", "00_draws", FIGURE, RECORD)
    second = write(home / "notebooks", "01_draws_too", FIGURE.replace('"line"', '"other"'))
    elsewhere = write(home, "mine", "x")
    runs = report([first, second, elsewhere], output=home / "report", parameters={"x": 7})
    assert [run.figures for run in runs] == [["line"], ["other"], []]
    assert [[record["model"] for record in run.records] for run in runs] == [["m"], [], []]
    assert runs[2].command == f"llmlab report {elsewhere} -p x=7"
    index = BeautifulSoup((home / "report" / "index.html").read_text(), "html.parser")
    line, other = index.select("figure")
    assert line.pre.text == "llmlab report 00_draws -p x=7"
    assert other.pre.text == "llmlab report 01_draws_too -p x=7"
    assert line.img["src"].startswith("data:image/png;base64,")
    page = BeautifulSoup((home / "report" / "00_draws.html").read_text(), "html.parser")
    assert page.figcaption.code.text == "llmlab report 00_draws -p x=7"
    assert (home / "report" / page.figcaption.a["href"]).is_file()
    assert [item.code.text for item in index.select(".course li")] == [run.command for run in runs]
    (row,) = [row for row in index.select("tr") if "gptq-4bit" in row.text]
    assert [item.text for item in row.select("dl div")] == ["acc0.3 [0.2, 0.4]", "seconds2 s"]
    for cell in index.select("td a, figure a"):
        assert (home / "report" / cell["href"]).is_file()


def test_the_command_gives_parameters_back_as_they_were(home):
    given = {"limit": 40, "dtypes": ["fp32", "bf16"], "name": "40", "text": "it's <b>", "none": None, "share": 0.5}
    parts = shlex.split(command(["05"], given))
    assert parts[:3] == ["llmlab", "report", "05"]
    read = {}
    for name, value in (pair.split("=", 1) for pair in parts[4::2]):  # as -p reads them
        try:
            read[name] = json.loads(value)
        except ValueError:
            read[name] = value
    assert read == given


def test_a_pdf_without_a_browser_is_refused_before_anything_runs(home, monkeypatch):
    path = write(home / "notebooks", "00_fine", "x")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match="a PDF needs Chromium or Chrome"):
        report([path], output=home / "report", pdf=True)
    assert not (home / "report").exists()


def attack(number):
    """Sets a global of the page if any of it is taken for markup that runs."""
    return f"<script>window.hit = {number}</script><img src=x onerror='window.hit = {number}'>"


HOSTILE = """
import sys
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import HTML, Markdown, display
from llmlab import Metric
from llmlab.lab import figures
from llmlab.measure.record import Record, append

def attack(number):
    return f"<script>window.hit = {number}</script><img src=x onerror='window.hit = {number}'>"

pd.options.display.max_colwidth = None
print(attack(1))
print(attack(2), file=sys.stderr)
display(pd.DataFrame({attack(3): [attack(4)]}))
display(attack(5))
display(Markdown(attack(6)))
append(Record(task=attack(7), metrics={attack(8): Metric(1.0, attack(9))}, n=1, model=attack(10), revision=None,
    transformation=attack(11), dtype=attack(12), device="cpu", threads=1, track="open", protocol="p", data="d"))
figure, axes = plt.subplots()
display(figures.show(figure, "hostile", attack(13)))
raise RuntimeError(attack(14))
"""


def hostile_report(folder):
    """Markup in everything that a report shows; returns its pages."""
    path = write(folder / "notebooks", "00_hostile", HOSTILE, title=f"{attack(15)}\n\n**Question.** {attack(19)}")
    (run,) = report([path], output=folder / "report", parameters={"x": attack(16)})
    assert "RuntimeError" in run.error
    record = Record(
        task="challenge", metrics={}, n=1, model=attack(17), revision=attack(18), transformation="none", dtype="fp32",
        device="cpu", threads=1, track="exact", protocol="p", data="d", settings={"layers": "2"},
    )  # fmt: skip
    write_challenge_page(record.as_dict(), folder / "report")
    return [folder / "report" / name for name in ("index.html", "00_hostile.html", "challenge.html")]


@pytest.mark.slow
def test_markup_in_what_is_shown_is_text(home):
    index, notebook, challenge = (BeautifulSoup(page.read_text(), "html.parser") for page in hostile_report(home))
    for page, numbers in (
        (index, (7, 8, 9, 10, 11, 12, 13, 14, 15, 16)),
        (notebook, (1, 2, 3, 4, 5, 14, 16)),
        (challenge, (17, 18)),
    ):
        assert not page.find_all("script")
        assert not [tag for tag in page.find_all(True) if any(name.startswith("on") for name in tag.attrs)]
        assert "default-src 'none'" in page.find("meta", {"http-equiv": "Content-Security-Policy"})["content"]
        for number in numbers:
            assert attack(number) in page.text, number
    assert "<script>window.hit = 6</script>" in notebook.text  # Markdown may hold an image, but not its handler
    assert "<script>window.hit = 19</script>" in index.text
    assert notebook.find("img", alt=attack(13))
    assert index.find("img", alt=attack(13))


def test_markdown_keeps_its_own_marks():
    kept = '<h2 id="a">b</h2><p><em>c</em> <a href="d.html">e</a> <img alt="f" src="data:image/png;base64,AA=="></p>'
    assert sanitized(kept) == kept
    assert sanitized('<a href="javascript:alert(1)" onclick="alert(2)">x</a>') == "<a>x</a>"
    assert sanitized("<iframe src=x></iframe>") == "&lt;iframe src=x&gt;&lt;/iframe&gt;"


def test_the_readme_figures_are_drawn_again_from_the_reference(tmp_path):
    drawn = redraw(folder=tmp_path)
    readme = (CHECKOUT / "README.md").read_text()
    assert [path.stem for path in drawn] == [name for name, *_ in FIGURES]
    assert all(f"figures/{path.stem}.png" in readme for path in drawn)
    assert all(path.stat().st_size > 10_000 and path.with_suffix(".svg").exists() for path in drawn)
    svg = (tmp_path / "roofline.svg").read_text()
    assert "fp32: 187 GFLOP/s" in svg
    assert "memory: 35 GB/s" in svg
    assert "decode (28%)" in svg
    with pytest.raises(InputError, match="there are no records in"):
        redraw(reference=tmp_path, folder=tmp_path)
    with pytest.raises(InputError, match="no record of a phase"):
        roofline(llmlab.records(tmp_path / "none.jsonl"))
