"""A figure as SVG inside a page: its text can be read aloud, and its points say what they are under the mouse."""

from __future__ import annotations

import io
from collections.abc import Mapping
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def inline(figure: Figure, alt: str, hover: Mapping[str, str] | None = None, *, shrink: bool = True) -> str:
    """An <svg> element of a figure; the figure is closed.

    Args:
        figure: what to draw.
        alt: what it shows, for those who do not see it.
        hover: gid of artists -> the text that appears under the mouse.
        shrink: make it narrower where the page is; otherwise it keeps its size.
    """
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmlab"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    root = ElementTree.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style sheet would reach every drawing of the page it is put into.
            if child.tag == f"{{{SVG}}}metadata" or child.tag == f"{{{SVG}}}style":
                parent.remove(child)
    for element in root.iter():
        if text := (hover or {}).get(element.get("id", "")):
            title = ElementTree.Element(f"{{{SVG}}}title")
            title.text = text
            element.insert(0, title)
    root.set("role", "img")
    root.set("aria-label", alt)
    fit = "max-width: 100%; height: auto" if shrink else "max-width: none; flex: none"
    root.set("style", f"stroke-linejoin: round; stroke-linecap: butt; background: white; {fit}")
    return ElementTree.tostring(root, encoding="unicode")
