"""View: controls above a picture that follows them, and figures that stand in where nothing would answer."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import ipywidgets
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from llmlab.base.errors import InputError
from llmlab.lab import figures

DESCRIBED = {"description_width": "initial"}


def dropdown(label: str, options: Iterable[object], **how: object) -> ipywidgets.Dropdown:
    """A control with a choice of values, as wide as they need."""
    layout = {"width": "auto", "min_width": "280px"}
    return ipywidgets.Dropdown(options=list(options), description=label, style=DESCRIBED, layout=layout, **how)


def slider(label: str, options: Iterable[object], **how: object) -> ipywidgets.SelectionSlider:
    """A control with values in an order; it acts when it is let go."""
    how = {"options": list(options), "description": label, "continuous_update": False} | how
    return ipywidgets.SelectionSlider(style=DESCRIBED, layout={"width": "400px"}, **how)


@dataclass(frozen=True)
class Twin:
    """A figure that stands in for a widget: its name among the figures, its alt text and how to draw it."""

    name: str
    alt: str
    draw: Callable[[], Figure]


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
