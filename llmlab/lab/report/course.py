"""What the course page says of a notebook. The notebook itself says it, all but how long it takes and what it needs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from nbformat import NotebookNode

from llmlab.lab.report.markup import from_markdown

# Minutes on 2 cores with the parameters as committed, and what a run takes besides llmlab.
COMMITTED: dict[str, tuple[int, str]] = {
    "00_start_here": (1, "the built-in model"),
    "01_where_time_goes": (1, "the built-in model, a quiet machine"),
    "02_sharding": (2, "the built-in model, four processes"),
    "03_quantization": (5, "the built-in model"),
    "04_speculative_decoding": (3, "the built-in model"),
    "05_shared_prefix_scoring": (2, "the built-in model, lm-evaluation-harness"),
    "06_trade_offs": (1, "the built-in model, the recorded grid in data/reference"),
    "07_challenge": (1, "the built-in model"),
    "08_why_papers_disagree": (2, "the built-in model"),
}


@dataclass(frozen=True)
class Lesson:
    """What one learns in a notebook.

    Attributes:
        question: the paragraph below the title, as HTML.
        written_out: headings of the sections that write an algorithm out and hold it against the library (tag toy).
        exercises: how many there are (tag exercise).
        minutes: about so many on 2 cores, None if unknown; needs: what a run takes, "" if unknown.
    """

    question: Markup
    written_out: list[str]
    exercises: int
    minutes: int | None
    needs: str


def lesson(content: NotebookNode, notebook: Path, pages: Mapping[Path, str] | None = None) -> Lesson:
    """Read a notebook's lesson; `pages` as for `from_markdown`."""
    texts = (cell.source for cell in content.cells if cell.cell_type == "markdown")
    first = next((text for text in texts if text.startswith("# ")), "")  # above it papermill may tell of an error
    paragraphs = re.split(r"\n\s*\n", first.partition("\n")[2].strip())
    heading, written_out, exercises = "", list[str](), 0
    for cell in content.cells:
        tags = cell.metadata.get("tags") or ()
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^##? (.*)$", cell.source, re.MULTILINE) or [heading])[-1]
        elif "toy" in tags and heading not in written_out:
            written_out.append(heading)
        exercises += "exercise" in tags
    question = from_markdown(paragraphs[0].removeprefix("**Question.** "), notebook.parent, pages)
    minutes, needs = COMMITTED.get(notebook.stem, (None, ""))
    return Lesson(question, written_out, exercises, minutes, needs)
