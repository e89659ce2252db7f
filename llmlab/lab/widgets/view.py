"""View: controls above a picture that follows them, and figures that stand in where nothing would answer."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ipywidgets
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure

from llmlab.base.errors import InputError
from llmlab.lab import figures

WIDE = {"width": "auto", "min_width": "280px"}
DESCRIBED = {"description_width": "initial"}


@dataclass(frozen=True)
class Twin:
    """A figure that stands in for a widget: its name among the figures, its alt text and how to draw it."""

    name: str
    alt: str
    draw: Callable[[], Figure]


class View:
    """What a widget function returns; shown as the last line of a cell.

    Where a person works in the notebook (JupyterLab, Notebook 7) the controls appear, and the file keeps a
    figure for those who read it later. Where the notebook is executed (papermill, nbconvert, `llmlab report`) the
    figures alone appear, and no widget is made.

    Attributes:
        controls: name -> ipywidgets control; set its `value` to move it by code.
        picture: the HTML that follows them.
    """

    def __init__(
        self,
        make: Callable[[], dict[str, Any]],
        draw: Callable[..., str],
        twins: Sequence[Twin],
        buttons: Callable[[dict[str, Any]], list[Any]] = lambda controls: [],
    ) -> None:
        """Nothing is made or drawn before it is needed.

        Args:
            make: the controls by name.
            draw: their values, by name, to HTML; its text is escaped. An InputError is shown in its place.
            twins: the figures, the most telling one first.
            buttons: further widgets that move the controls.
        """
        self._make, self._draw, self._buttons = make, draw, buttons
        self.twins = list(twins)

    @cached_property
    def controls(self) -> dict[str, Any]:
        """The controls by name."""
        return self._make()

    @cached_property
    def picture(self) -> Any:
        """The HTML widget that follows the controls."""
        picture = ipywidgets.HTML(self._drawn())
        for control in self.controls.values():
            control.observe(lambda change: setattr(picture, "value", self._drawn()), "value")
        return picture

    @cached_property
    def box(self) -> Any:
        """Controls and picture as one widget."""
        row = ipywidgets.Layout(flex_flow="row wrap", align_items="center")
        controls = ipywidgets.Box([*self._buttons(self.controls), *self.controls.values()], layout=row)
        return ipywidgets.VBox([controls, self.picture])

    def _drawn(self) -> str:
        try:
            drawn = self._draw(**{name: control.value for name, control in self.controls.items()})
        except InputError as error:
            drawn = f"<p>{html.escape(str(error))}</p>"
        # As wide as the cell, however wide a drawing in it is.
        return f'<div style="width: 0; min-width: 100%">{drawn}</div>'

    def _ipython_display_(self) -> None:
        images = [figures.show(twin.draw(), twin.name, twin.alt) for twin in self.twins]
        if not live():
            for image in images:
                display(image)
            return
        # A front end shows the richest form it knows; the figure is for whoever reads the saved notebook.
        data, metadata = images[0]._repr_mimebundle_()
        view = self.box._repr_mimebundle_() | {"text/plain": self.twins[0].alt}
        display(view | data, metadata=metadata, raw=True)


def live() -> bool:
    """Whether a person runs this cell in a front end that can show controls.

    Such front ends name the cell in their request, which nbclient, and with it papermill and nbconvert, does not do.
    """
    kernel = getattr(get_ipython(), "kernel", None)
    return kernel is not None and "cellId" in kernel.get_parent("shell").get("metadata", {})
