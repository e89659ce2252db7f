"""Markdown to HTML that a browser draws by itself: equations as MathML, links between pages, nothing that runs."""

import html
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from urllib.parse import quote, unquote

import bleach  # type: ignore[import-untyped]  # has no types
from bleach.css_sanitizer import CSSSanitizer  # type: ignore[import-untyped]  # as above
from markupsafe import Markup
from math_core import LatexError, LatexToMathML
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

# What Markdown may hold besides its own marks; other tags show as text.
TAGS = bleach.ALLOWED_TAGS | {
    "br", "caption", "dd", "del", "details", "div", "dl", "dt", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "img", "kbd",
    "p", "pre", "s", "small", "span", "sub", "summary", "sup", "table", "tbody", "td", "th", "thead", "tr", "u",
}  # fmt: skip
ATTRIBUTES = {"*": ["align", "class", "id", "style", "title"], "a": ["href"], "img": ["alt", "height", "src", "width"]}
PROTOCOLS = ("http", "https", "mailto", "data")  # data: embedded images; browsers open no page from such a link
EQUATION = re.compile(r'<span class="equation (inline|block)">([^<]*)</span>')


class Renderer(IPythonRenderer):  # type: ignore[misc]  # nbconvert has no types
    """nbconvert's Markdown with each equation's LaTeX in an element of its own, as text."""

    def inline_math(self, body: str) -> str:
        """$body$."""
        return f'<span class="equation inline">{html.escape(body)}</span>'

    def block_math(self, body: str) -> str:
        """$$body$$."""
        return f'<span class="equation block">{html.escape(body)}</span>'

    def latex_environment(self, name: str, body: str) -> str:
        """An environment on its own, such as align."""
        return self.block_math(f"\\begin{{{name}}}{body}\\end{{{name}}}")


def from_markdown(
    source: str,
    folder: Path = Path(),
    pages: Mapping[Path, str] | None = None,
    attachments: Mapping[str, object] | None = None,
) -> Markup:
    """Markdown as clean HTML.

    `folder` is the notebook's, to which images and links are relative. A link to another notebook leads to that one's
    page: from `pages`, by resolved path, or NAME.html for one in the same folder. `attachments`: as a cell has them.
    """
    renderer = Renderer(escape=False, attachments=attachments, embed_images=True, path=str(folder))
    clean = sanitized(MarkdownWithMath(renderer=renderer).render(source))
    linked = re.sub(r'href="([^":#?]+\.ipynb)((?:#[^"]*)?)"', partial(_linked, folder, pages or {}), clean)
    return Markup(EQUATION.sub(_as_mathml, linked))  # MathML comes after the cleaning, from LaTeX that is text


def sanitized(text: str) -> str:
    """HTML with what is not on the list (`TAGS`, `ATTRIBUTES`, `PROTOCOLS`) turned into text or dropped."""
    styles = CSSSanitizer()
    return str(bleach.clean(text, tags=TAGS, attributes=ATTRIBUTES, protocols=PROTOCOLS, css_sanitizer=styles))


def _linked(folder: Path, pages: Mapping[Path, str], match: re.Match[str]) -> str:
    path = (folder / unquote(html.unescape(match[1]))).resolve()
    beside = f"{path.stem}.html" if path.parent == folder.resolve() else None
    page = pages.get(path, beside)
    return f'href="{quote(page)}{match[2]}"' if page else match[0]


def _as_mathml(match: re.Match[str]) -> str:
    """The equation for browsers, which draw MathML without help; what is no LaTeX stays as it was written."""
    latex, block = html.unescape(match[2]), match[1] == "block"
    try:
        mathml = LatexToMathML().convert_with_local_state(latex, displaystyle=block)
    except LatexError:
        return f"$${match[2]}$$" if block else f"${match[2]}$"
    return f'<span class="equation">{mathml}</span>' if block else mathml
