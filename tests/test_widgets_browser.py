"""Every widget driven by the keyboard in a real JupyterLab in a real Chromium."""

import html
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from conftest import CHECKOUT
from nbformat.v4 import new_code_cell, new_notebook

from llmlab.lab.report.pages import render

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install llmlab[dev]")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no Chromium on this machine", allow_module_level=True)

WIDGET = "application/vnd.jupyter.widget-view+json"
# Errors that JupyterLab itself puts on the console of a notebook without any widget.
JUPYTERLABS_OWN: set[str] = set()

WIDGETS = {
    "tradeoffs": """
frame = pd.DataFrame({
    "transformation": ["none", "gptq", "rtn", "<script>alert('record')</script>"],
    "acc": [0.40, 0.38, 0.30, 0.39], "acc_low": [0.37, 0.35, 0.27, 0.36], "acc_high": [0.43, 0.41, 0.33, 0.42],
    "tokens_per_second": [20.0, 60.0, 65.0, 30.0], "perplexity": [27.4, 29.7, 34.7, 30.0],
})
frame.attrs["units"] = {"tokens_per_second": "token/s"}
widgets.tradeoff_explorer(frame)""",
    "plans": "widgets.plan_explorer(['llama-7b', 'opt-125m'])",
    "tries": "widgets.trie_viewer(lm, llmlab.data.everyday(limit=5))",
    "steps": "widgets.step_viewer(completion, lm)",
}
SETUP = """
import pandas as pd
import llmlab
from llmlab.decoding.lookup import PromptLookup
from llmlab.lab import widgets
lm = llmlab.load("smollm2")
prompt = (
    "Repeat exactly: The cat sat on the mat. The dog sat on the log and <script>alert('prompt')</script>. Repeat:"
)
completion = llmlab.generate(lm, [prompt], max_new_tokens=24, draft=PromptLookup()).completions[0]
"""
PICK_NEXT = ("Space", "ArrowDown", "Enter")  # a closed dropdown leaves the arrow keys to the notebook
UNDER_THE_MOUSE = """point => {
  const box = point.getBoundingClientRect();
  const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
  return top.closest("g:has(> title)").querySelector("title").textContent == point.querySelector("title").textContent;
}"""
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is there, in view or not
}


def write_notebook(path):
    cells = [new_code_cell(source.strip()) for source in (SETUP, *WIDGETS.values())]
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """JupyterLab on a free port with folders of its own: (address of the notebook, its path)."""
    folder = tmp_path_factory.mktemp("lab")
    path = folder / "notebooks" / "widgets.ipynb"
    path.parent.mkdir()
    write_notebook(path)
    for name, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    own = {
        "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython",
        "LLMLAB_HOME": "home",
    }  # fmt: skip
    environment = os.environ | {name: str(folder / value) for name, value in own.items()}
    environment["PYTHONPATH"] = str(CHECKOUT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root",
        "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={path.parent}",
    ]  # fmt: skip
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/api/status?token={token}", process, log)
        yield f"{address}/lab/tree/{path.name}?token={token}", path
    finally:
        process.terminate()  # it ends its kernels
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:  # kernels end by themselves when their server is gone
            process.kill()
            process.wait()


def wait_for(url, process, log):
    for _ in range(240):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"JupyterLab did not answer: {log.read_text()}")


@pytest.fixture(scope="module")
def lab(server):
    """The notebook, all cells run: (page, errors on its console)."""
    address, _ = server
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        errors = []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(f"dialog: {dialog.message}") or dialog.dismiss())
        page.goto(address)
        page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=60_000)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        last = page.locator(".jp-CodeCell").nth(len(WIDGETS))
        last.locator(".widget-html-content").wait_for(timeout=120_000)
        yield page, errors
        browser.close()


def cell(page, name):
    return page.locator(".jp-CodeCell").nth(1 + list(WIDGETS).index(name))


def picture(page, name):
    return cell(page, name).locator(".widget-html-content").first


def press(page, name, control, *keys):
    """Press keys on a slider or dropdown, found by its label, and wait until the picture has changed."""
    shown = picture(page, name)
    before = shown.inner_html()
    row = cell(page, name).locator(".lm-Widget", has=page.get_by_text(control, exact=True)).last
    target = row.locator("select, [role=slider]").first
    target.focus()
    for key in keys:
        page.keyboard.press(key)
    deadline = time.monotonic() + 20
    while shown.inner_html() == before:
        assert time.monotonic() < deadline, f"{name}: {control} changed nothing"
        page.wait_for_timeout(50)


def test_tradeoff_explorer(lab):
    page, errors = lab
    shown = picture(page, "tradeoffs")
    points = shown.locator("g:has(> title)")
    assert len(set(points.locator("title").all_text_contents())) == 4
    for point in points.all():  # what lies under the mouse belongs to a point and has its text
        point.scroll_into_view_if_needed()
        assert point.evaluate(UNDER_THE_MOUSE)
    assert "<script>alert('record')</script>" in shown.inner_text()
    press(page, "tradeoffs", "y worse than best by at most", "ArrowLeft")
    press(page, "tradeoffs", "y worse than best by at most", "Home")
    assert "1 of 4 records within the budget" in shown.inner_text()
    press(page, "tradeoffs", "y", *PICK_NEXT)
    press(page, "tradeoffs", "transformation", *PICK_NEXT)
    assert set(errors) <= JUPYTERLABS_OWN


def test_plan_explorer(lab):
    page, errors = lab
    shown = picture(page, "plans")
    assert "llama-7b, 16 bits, on 4 x 32 GiB" in shown.inner_text()
    press(page, "plans", "devices", "ArrowRight")
    assert "on 5 x 32 GiB" in shown.inner_text()
    press(page, "plans", "bits", "ArrowRight")
    assert "llama-7b, 8 bits" in shown.inner_text()
    press(page, "plans", "memory", "ArrowRight")
    press(page, "plans", "device", *PICK_NEXT)
    press(page, "plans", "time for", *PICK_NEXT)
    press(page, "plans", "model", *PICK_NEXT)
    assert set(errors) <= JUPYTERLABS_OWN


def test_trie_viewer(lab):
    page, errors = lab
    assert picture(page, "tries").locator("svg").count() == 2
    press(page, "tries", "question", "ArrowRight")
    press(page, "tries", "question", "End")
    assert set(errors) <= JUPYTERLABS_OWN


def test_step_viewer(lab):
    page, errors = lab
    shown = picture(page, "steps")
    assert "Pass 0 of" in shown.inner_text()
    assert "<script>alert('prompt')</script>" in shown.inner_text()
    press(page, "steps", "pass", "ArrowRight")
    assert "Pass 1 of" in shown.inner_text()
    press(page, "steps", "pass", "End")
    press(page, "steps", "pass", "Home")
    cell(page, "steps").locator(".widget-play button").first.click()
    shown.get_by_text("Pass 2 of").wait_for(timeout=20_000)
    assert set(errors) <= JUPYTERLABS_OWN


def test_the_saved_notebook_shows_figures_where_no_widget_lives(lab, server):
    page, errors = lab
    page.keyboard.press("Escape")
    page.keyboard.press("Control+s")
    outputs = []
    for _ in range(100):
        try:
            notebook = nbformat.read(server[1], as_version=4)
        except nbformat.reader.NotJSONError:  # just being written
            notebook = new_notebook()
        outputs = [o for c in notebook.cells for o in c.outputs if "image/png" in o.get("data", {})]
        if len(outputs) == len(WIDGETS):
            break
        page.wait_for_timeout(100)
    assert len(outputs) == len(WIDGETS)
    assert all(o.metadata["image/png"]["alt"] for o in outputs)
    assert all(WIDGET in o.data for o in outputs)
    page_of_a_report = render(notebook, "widgets")
    assert WIDGET not in page_of_a_report
    assert all(f'alt="{html.escape(o.metadata["image/png"]["alt"])[:60]}' in page_of_a_report for o in outputs)
    assert set(errors) <= JUPYTERLABS_OWN
