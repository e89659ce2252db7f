"""The pages of a report: notebooks through nbconvert, everything else through jinja2, all of them self-contained.

Text of models, prompts, records and parameters shows as text. Behind that stands a content security policy in every
page: no script runs and nothing is fetched, whatever HTML an output holds.
"""

import base64
import datetime
import io
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.runtime import Context
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from PIL import Image
from traitlets.config import Config

from llmlab.base.paths import PACKAGE, atomic
from llmlab.base.stats import Metric
from llmlab.data import FULL_SET
from llmlab.lab.leaderboard import BOARD
from llmlab.lab.report.course import Lesson
from llmlab.lab.report.markup import from_markdown
from llmlab.measure.environment import energy, git_commit, hardware, versions

TEMPLATES = PACKAGE / "lab" / "report" / "templates"
SHOWN_METRICS = 5  # of each record; the ones with an interval come first

# No JavaScript and no widget: a report is read, and an output's static twin says the same.
PRIORITY = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/latex", "text/plain"]


@dataclass(frozen=True)
class Run:
    """One executed notebook.

    Attributes:
        name, title, lesson: of its page, its first heading, and what the course page says of it.
        command: runs it again, alone, with the same parameters; `seconds`: that it ran.
        page: its HTML beside the index, if it came so far; error: one line if it failed.
        figures, records: names of the figures that it drew, and the records that were written while it ran.
    """

    name: str
    title: str
    lesson: Lesson
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


def render(
    content: NotebookNode,
    name: str,
    folder: Path = Path(),
    pages: Mapping[Path, str] | None = None,
    redone_by: Mapping[str, str] | None = None,
) -> str:
    """A notebook as one HTML page that asks nothing of the network and runs nothing.

    `folder` and `pages` as for `from_markdown`. `redone_by`: the command for each figure in the report's figures/.
    """

    @jinja2.pass_context
    def markdown2html(context: Context, source: str) -> Markup:
        return from_markdown(source, folder, pages, context.get("cell", {}).get("attachments"))

    content.metadata["title"] = title(content, name)
    content.metadata.pop("widgets", None)  # their state would only be carried along
    config = Config({"NbConvertBase": {"display_data_priority": PRIORITY}})
    own = {"template_name": "llmlab", "extra_template_basedirs": [str(TEMPLATES)]}
    exporter = HTMLExporter(config=config, **own)
    exporter.register_filter("markdown2html", markdown2html)
    exporter.register_filter("png_name", png_name)
    resources = {"metadata": {"name": name}, "redone_by": redone_by or {}}
    return str(exporter.from_notebook_node(content, resources=resources)[0])


def png_name(encoded: str) -> str:
    """The name under which `figures.save` saved a PNG (base64); "" for other images."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            return str(image.info.get("Title", ""))
    except (OSError, ValueError):  # no PNG: the browser will say so
        return ""


def write_page(output: Path, template: str, **values: object) -> Path:
    """Render `template`.html.j2 into `output`/`template`.html, whole or not at all; all but Markup is escaped."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    page = environment.get_template(f"{template}.html.j2").render(**values)
    with atomic(output / f"{template}.html") as path:
        path.write_text(page, encoding="utf-8")
    return output / f"{template}.html"


def write_index(runs: Sequence[Run], output: Path, *, seconds: float, command: str) -> Path:
    """The page that ties a report together: runs, figures with their commands, records, environment."""
    libraries = versions(("torch", "transformers", "numpy", "papermill", "nbconvert"))
    return write_page(
        output, "index", runs=runs, seconds=seconds, figures=_figures(runs, output), machine=hardware(),
        records=[(run, record, main_metrics(record["metrics"])) for run in runs for record in run.records],
        energy=energy(), commit=git_commit(), libraries={"python": platform.python_version()} | libraries,
        time=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"), command=command,
    )  # fmt: skip


def write_challenge_page(record: Mapping[str, Any], output: Path) -> Path:
    """One page about the record of one run of the challenge's job: challenge.html in `output`."""
    metrics = {name: Metric(**metric) for name, metric in record["metrics"].items()}
    return write_page(output, "challenge", record=record, metrics=metrics, board=BOARD, questions=FULL_SET)


def main_metrics(metrics: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Names and values of a record's first metrics, those with an interval before the others."""
    read = sorted(((name, Metric(**metric)) for name, metric in metrics.items()), key=lambda pair: pair[1].low is None)
    return [(name, str(metric)) for name, metric in read[:SHOWN_METRICS]]


def _figures(runs: Sequence[Run], output: Path) -> list[dict[str, object]]:
    """The figures of the runs, which are in `output`/figures, each with the run that drew it last."""
    figures = []
    for name, run in sorted({name: each for each in runs for name in each.figures}.items()):
        png = output / "figures" / f"{name}.png"
        with Image.open(png) as image:
            alt = str(image.info.get("Description", name))
        links = [(f.suffix[1:].upper(), f"figures/{f.name}") for f in (png, png.with_suffix(".svg")) if f.exists()]
        data = f"data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}"
        figures.append({"name": name, "alt": alt, "data": data, "files": links, "run": run})
    return figures
