"""The pages of a report: notebooks through nbconvert, everything else through jinja2, all of them self-contained.

Text of models, prompts, records and parameters shows as text. Behind that stands a content security policy in every
page: no script runs and nothing is fetched, whatever HTML an output holds.
"""

from __future__ import annotations

import base64
import datetime
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bleach  # type: ignore[import-untyped]  # has no types
import jinja2
from bleach.css_sanitizer import CSSSanitizer  # type: ignore[import-untyped]  # as above
from jinja2.runtime import Context
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

from llmlab.base.paths import PACKAGE, atomic
from llmlab.base.stats import Metric
from llmlab.bench.challenge import Submission
from llmlab.data import FULL_SET
from llmlab.lab.leaderboard import BOARD
from llmlab.measure.environment import energy, git_commit, hardware, versions
from llmlab.measure.record import Record

TEMPLATES = PACKAGE / "lab" / "report" / "templates"
SHOWN_METRICS = 5  # of each record; the ones with an interval come first

# What Markdown may hold besides its own marks; other tags show as text.
TAGS = {
    "a", "abbr", "b", "blockquote", "br", "caption", "code", "dd", "del", "details", "div", "dl", "dt", "em", "h1",
    "h2", "h3", "h4", "h5", "h6", "hr", "i", "img", "kbd", "li", "ol", "p", "pre", "s", "small", "span", "strong",
    "sub", "summary", "sup", "table", "tbody", "td", "th", "thead", "tr", "u", "ul",
}  # fmt: skip
ATTRIBUTES = {"*": ["align", "class", "id", "style", "title"], "a": ["href"], "img": ["alt", "height", "src", "width"]}
PROTOCOLS = ("http", "https", "mailto", "data")  # data: embedded images; browsers open no page from such a link

# No JavaScript and no widget: a report is read, and an output's static twin says the same.
PRIORITY = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain"]


@dataclass(frozen=True)
class Run:
    """One executed notebook.

    Attributes:
        name, title: its file name without suffix and its first heading.
        seconds: that it ran.
        command: runs it again, alone, with the same parameters.
        page: its HTML beside the index, if it came so far; error: one line if it failed.
        figures, records: names of the figures that it drew, and the records that were written while it ran.
    """

    name: str
    title: str
    seconds: float
    command: str
    parameters: dict[str, object]
    page: str | None
    error: str | None
    figures: list[str]
    records: list[dict[str, Any]]

    @property
    def failed(self) -> bool:
        """Whether a cell raised or the kernel died."""
        return self.error is not None


def title(content: NotebookNode, name: str) -> str:
    """A notebook's first heading, or its name."""
    lines = [cell.source.splitlines()[0] for cell in content.cells if cell.cell_type == "markdown" and cell.source]
    return next((str(line.removeprefix("# ")) for line in lines if line.startswith("# ")), name)


def render(content: NotebookNode, name: str) -> str:
    """A notebook as one HTML page that asks nothing of the network and runs nothing.

    Args:
        content: the notebook, from nbformat; its links to other notebooks become links to their pages.
        name: its file name without suffix.
    """
    content.metadata["title"] = title(content, name)
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.html)", cell.source)
    content.metadata.pop("widgets", None)  # their state would only be carried along
    config = Config({"NbConvertBase": {"display_data_priority": PRIORITY}})
    exporter = HTMLExporter(
        template_name="llmlab", extra_template_basedirs=[str(TEMPLATES)], embed_images=True, config=config
    )

    @jinja2.pass_context
    def markdown2html(context: Context, source: str) -> str:
        return sanitized(exporter.markdown2html(context, source))

    exporter.register_filter("markdown2html", markdown2html)
    body, _ = exporter.from_notebook_node(content, resources={"metadata": {"name": name}})
    return str(body)


def sanitized(html: str) -> str:
    """HTML with what is not on the list (`TAGS`, `ATTRIBUTES`, `PROTOCOLS`) turned into text or dropped."""
    styles = CSSSanitizer()
    return str(bleach.clean(html, tags=TAGS, attributes=ATTRIBUTES, protocols=PROTOCOLS, css_sanitizer=styles))


def write_page(output: Path, template: str, **values: object) -> Path:
    """Render `template`.html.j2 into `output`/`template`.html, whole or not at all; every value is escaped."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template(f"{template}.html.j2").render(**values)
    with atomic(output / f"{template}.html") as path:
        path.write_text(page, encoding="utf-8")
    return output / f"{template}.html"


def write_index(runs: Sequence[Run], output: Path, *, seconds: float, command: str) -> Path:
    """The page that ties a report together: runs, figures with their commands, records, environment."""
    return write_page(
        output,
        "index",
        runs=runs,
        seconds=seconds,
        figures=_figures(runs, output),
        records=[(run, record, main_metrics(record["metrics"])) for run in runs for record in run.records],
        machine=hardware(),
        energy=energy(),
        commit=git_commit(),
        libraries={"python": platform.python_version()}
        | versions(("torch", "transformers", "numpy", "papermill", "nbconvert")),
        time=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        command=command,
    )


def write_challenge_page(submission: Submission, record: Record, output: Path) -> Path:
    """One page about one run of the challenge's job: challenge.html in `output`."""
    return write_page(output, "challenge", submission=submission, record=record, board=BOARD, questions=FULL_SET)


def main_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Names and values of a record's first metrics, those with an interval before the others."""
    read = [(name, Metric(**metric)) for name, metric in metrics.items()]
    read.sort(key=lambda pair: pair[1].low is None)
    return [(name, str(metric)) for name, metric in read[:SHOWN_METRICS]]


def _figures(runs: Sequence[Run], output: Path) -> list[dict[str, object]]:
    """The figures of the runs, which are in `output`/figures, each with the run that drew it last."""
    figures = []
    latest = {name: run for run in runs for name in run.figures}
    for name, run in sorted(latest.items()):
        png = output / "figures" / f"{name}.png"
        with Image.open(png) as image:
            alt = str(image.info.get("Description", name))
        files = [file for file in (png, png.with_suffix(".svg")) if file.exists()]
        links = [(file.suffix[1:].upper(), f"figures/{file.name}") for file in files]
        data = f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
        figures.append({"name": name, "alt": alt, "data": data, "files": links, "run": run})
    return figures
