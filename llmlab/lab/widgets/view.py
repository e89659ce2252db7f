"""View: controls above a picture that follows them, and figures that stand in where nothing would answer."""

import html
import io
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple
from xml.etree import ElementTree

import ipywidgets
import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from llmlab.base.errors import InputError
from llmlab.lab import figures

DESCRIBED = {"description_width": "initial"}
SVG = "http://www.w3.org/2000/svg"
ElementTree.register_namespace("", SVG)
ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")


def dropdown(label: str, options: Iterable[object], **how: object) -> ipywidgets.Dropdown:
    """A control with a choice of values, as wide as they need."""
    layout = {"width": "auto", "min_width": "280px"}
    return ipywidgets.Dropdown(options=list(options), description=label, style=DESCRIBED, layout=layout, **how)


def slider(label: str, options: Iterable[object], **how: object) -> ipywidgets.SelectionSlider:
    """A control with values in an order; it acts when it is let go."""
    how = {"options": list(options), "description": label, "continuous_update": False} | how
    return ipywidgets.SelectionSlider(style=DESCRIBED, layout={"width": "400px"}, **how)


class Twin(NamedTuple):
    """A figure that stands in for a widget: its name among the figures, its alt text and how to draw it."""

    name: str
    alt: str
    draw: Callable[[], Figure]

    def svg(self, hover: Mapping[str, str] | None = None, *, shrink: bool = True) -> str:
        """It as an <svg> element, whose text can be read aloud, narrower where the page is if it may `shrink`.

        `hover`: gid of artists -> the text that appears under the mouse.
        """
        out, figure = io.BytesIO(), self.draw()
        with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llmlab"}):
            figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
        root = ElementTree.fromstring(out.getvalue())
        for parent in list(root.iter()):
            for child in list(parent):
                # matplotlib's style sheet would reach every drawing of the page it is put into.
                if child.tag in (f"{{{SVG}}}metadata", f"{{{SVG}}}style"):
                    parent.remove(child)
            if text := (hover or {}).get(parent.get("id", "")):
                parent.insert(0, title := ElementTree.Element(f"{{{SVG}}}title"))
                title.text = text
        fit = "max-width: 100%; height: auto" if shrink else "max-width: none; flex: none"
        style = f"stroke-linejoin: round; stroke-linecap: butt; background: white; {fit}"
        root.attrib |= {"role": "img", "aria-label": self.alt, "style": style}
        return ElementTree.tostring(root, encoding="unicode")


@dataclass
class View:
    """What a widget function returns; shown as the last line of a cell.

    Where a person works in the notebook (JupyterLab, Notebook 7) the controls appear, and the file keeps a
    figure for those who read it later. Where the notebook is executed (papermill, nbconvert, `llmlab report`) the
    figures alone appear, and no widget is made.

    Attributes:
        make: the controls by name, when they are needed.
        draw: their values, by name, to HTML; its text is escaped. An InputError is shown in its place.
        twins: the figures, the most telling one first.
    """

    make: Callable[[], dict[str, ipywidgets.ValueWidget]]
    draw: Callable[..., str]
    twins: list[Twin]

    @cached_property
    def controls(self) -> dict[str, ipywidgets.ValueWidget]:
        """The controls by name; set the `value` of one to move it by code."""
        return self.make()

    @cached_property
    def picture(self) -> ipywidgets.HTML:
        """The HTML widget that follows the controls."""
        picture = ipywidgets.HTML(self._drawn())
        for control in self.controls.values():
            control.observe(lambda change: setattr(picture, "value", self._drawn()), "value")
        return picture

    @cached_property
    def box(self) -> ipywidgets.VBox:
        """Controls and picture as one widget."""
        row = {"flex_flow": "row wrap", "align_items": "center"}
        return ipywidgets.VBox([ipywidgets.Box(list(self.controls.values()), layout=row), self.picture])

    def _drawn(self) -> str:
        try:
            drawn = self.draw(**{name: control.value for name, control in self.controls.items()})
        except InputError as error:
            drawn = f"<p>{html.escape(str(error))}</p>"
        # As wide as the cell, however wide a drawing in it is.
        return f'<div style="width: 0; min-width: 100%">{drawn}</div>'

    def _ipython_display_(self) -> None:
        images = [figures.show(twin.draw(), twin.name, twin.alt) for twin in self.twins]
        if live():
            # A front end shows the richest form it knows; the figure is for whoever reads the saved notebook.
            data, metadata = images[0]._repr_mimebundle_()
            view = self.box._repr_mimebundle_() | {"text/plain": self.twins[0].alt}
            display(view | data, metadata=metadata, raw=True)
        else:
            display(*images)


def live() -> bool:
    """Whether a person runs this cell in a front end that can show controls.

    Such front ends name the cell in their request, which nbclient, and with it papermill and nbconvert, does not do.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and "cellId" in kernel.get_parent("shell").get("metadata", {})
