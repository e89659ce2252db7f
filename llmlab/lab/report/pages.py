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
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bleach  # type: ignore[import-untyped]  # has no types
import jinja2
from bleach.css_sanitizer import CSSSanitizer  # type: ignore[import-untyped]  # as above
from nbconvert import HTMLExporter
from PIL import Image
from traitlets.config import Config

from llmlab.bench.challenge import Submission
from llmlab.measure.environment import cpu_name, energy, git_commit, gpus, hardware, versions
from llmlab.measure.record import Record
from llmlab.base.paths import PACKAGE, atomic
from llmlab.base.stats import Metric
from llmlab.lab.leaderboard import BOARD

if TYPE_CHECKING:
    from llmlab.lab.report.report import Run

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
PRIORITY = ("text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain")


def render(content: Any, name: str, title: str | None = None) -> str:
    """A notebook as one HTML page that asks nothing of the network and runs nothing.

    Args:
        content: the notebook, from nbformat; its links to other notebooks become links to their pages.
        name: its file name without suffix.
        title: of the page; by default the name.
    """
    for cell in content.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.html)", cell.source)
    content.metadata.pop("widgets", None)  # their state would only be carried along
    content.metadata["title"] = title or name
    exporter = HTMLExporter(
        template_name="llmlab",
        extra_template_basedirs=[str(TEMPLATES)],
        embed_images=True,
        config=Config({"NbConvertBase": {"display_data_priority": list(PRIORITY)}}),
    )

    @jinja2.pass_context
    def markdown2html(context: Any, source: str) -> str:
        return sanitized(exporter.markdown2html(context, source))

    exporter.register_filter("markdown2html", markdown2html)
    body, _ = exporter.from_notebook_node(content, resources={"metadata": {"name": name}})
    return str(body)


def sanitized(html: str) -> str:
    """HTML with what is not on the list (`TAGS`, `ATTRIBUTES`, `PROTOCOLS`) turned into text or dropped."""
    cleaned = bleach.clean(
        html, tags=TAGS, attributes=ATTRIBUTES, protocols=PROTOCOLS, css_sanitizer=CSSSanitizer(), strip_comments=True
    )
    return str(cleaned)


def write_page(output: Path, template: str, **values: Any) -> Path:
    """Render `template`.html.j2 into `output`/`template`.html, whole or not at all; every value is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
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
        environment=environment_rows(),
        time=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        command=command,
    )


def write_challenge_page(submission: Submission, record: Record, output: Path) -> Path:
    """One page about one run of the challenge's job: challenge.html in `output`."""
    return write_page(output, "challenge", submission=submission, record=record, board=BOARD)


def main_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Names and values of a record's first metrics, those with an interval before the others."""
    found = {name: Metric(**metric) for name, metric in metrics.items()}
    order = sorted(found, key=lambda name: found[name].low is None)
    return [(name, str(found[name])) for name in order[:SHOWN_METRICS]]


def environment_rows() -> list[tuple[str, str]]:
    """What the report was made on, as rows for people."""
    machine = hardware()
    cards = ", ".join(f"{gpu['name']} ({gpu['memory'] / 2**30:.0f} GiB)" for gpu in gpus()) or "none"
    rows = [
        ("processor", f"{cpu_name()}, {machine['cores']} cores, {machine['cpu_capability']}"),
        ("memory", f"{machine['memory'] / 2**30:.1f} GiB"),
        ("GPUs", cards),
        *((device, why if usable else f"not measured here: {why}") for device, usable, why in energy()),
        ("system", machine["system"]),
        ("llmlab commit", git_commit() or "not a checkout"),
        ("python", platform.python_version()),
    ]
    return rows + list(versions(("torch", "transformers", "numpy", "papermill", "nbconvert")).items())


def _figures(runs: Sequence[Run], output: Path) -> list[dict[str, Any]]:
    """The figures of the runs, which drew them into `output`/figures, each with the run that drew it last."""
    drawn = {name: run for run in runs for name in run.figures}
    found = []
    for name, run in sorted(drawn.items()):
        png = output / "figures" / f"{name}.png"
        if not png.exists():  # a later notebook took it away
            continue
        with Image.open(png) as image:
            alt = str(image.info.get("Description", name))
        files = [file for file in (png, png.with_suffix(".svg")) if file.exists()]
        data = base64.b64encode(png.read_bytes()).decode()
        links = [(file.suffix[1:].upper(), f"figures/{file.name}") for file in files]
        found.append({"name": name, "alt": alt, "data": f"data:image/png;base64,{data}", "files": links, "run": run})
    return found
