"""The plan explorer: devices, memory and bits moved by hand; memory and predicted time of every layout follow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape
from typing import Any

import ipywidgets
from matplotlib.figure import Figure

from llmlab.lab.figures import sharding
from llmlab.lab.widgets.svg import inline
from llmlab.lab.widgets.view import DESCRIBED, WIDE, Twin, View
from llmlab.model.card import ModelCard
from llmlab.model.load import model_card
from llmlab.sharding.plan import BITS, Plan, plan
from llmlab.sharding.predict import DEVICES

MODELS = ("llama-30b", "llama-7b", "llama-13b", "llama-65b", "opt-6.7b", "opt-30b", "opt-66b")
OWN = "as built"
MEMORY = (OWN, "8GiB", "16GiB", "24GiB", "32GiB", "40GiB", "48GiB", "80GiB", "141GB")
WORKLOADS = {"all of HellaSwag": "hellaswag", "one token": "decode"}


def plan_explorer(models: Sequence[str | ModelCard] = MODELS, *, name: str = "plan") -> View:
    """Memory and predicted time of every layout of a model.

    Controls: `model`, `device` and its `memory`, `devices` (1 to 8), `bits` of the weights, and the `workload`.

    Args:
        models: to choose from, the first one to begin with; cards or names as for `llmlab.model_card`.
        name: of the figure that stands in for the widget.

    Raises InputError for an unknown model.
    """
    cards = {model if isinstance(model, str) else model.name: model for model in models}
    first = next(iter(cards))

    @cache
    def card_of(name: str) -> ModelCard:
        given = cards[name]
        return model_card(given) if isinstance(given, str) else given

    def make() -> dict[str, Any]:
        return {
            "model": ipywidgets.Dropdown(options=list(cards), description="model", layout=WIDE),
            "device": ipywidgets.Dropdown(
                options=[(about["name"], key) for key, about in DEVICES.items()], description="device", layout=WIDE
            ),
            "memory": ipywidgets.SelectionSlider(options=MEMORY, description="memory", continuous_update=False),
            "devices": ipywidgets.IntSlider(4, 1, 8, description="devices", continuous_update=False),
            "bits": ipywidgets.SelectionSlider(options=BITS, description="bits", continuous_update=False),
            "workload": ipywidgets.Dropdown(options=list(WORKLOADS.items()), description="time for", style=DESCRIBED),
        }

    def planned(model: str, device: str, memory: str, devices: int, bits: int, workload: str) -> Plan:
        return plan(
            card_of(model), devices=devices, memory=None if memory == OWN else memory, bits=bits, device=device,
            workload=workload,
        )  # fmt: skip

    def figure(found: Plan, workload: str) -> Figure:
        return sharding.layouts(found, title(found), next(job for job, key in WORKLOADS.items() if key == workload))

    def draw(**chosen: Any) -> str:
        found = planned(**chosen)
        return inline(figure(found, chosen["workload"]), alt(found)) + f"<p>{escape(found.assumptions)}</p>"

    begin = {"device": next(iter(DEVICES)), "memory": OWN, "devices": 4, "bits": BITS[0], "workload": "hellaswag"}
    found = planned(model=first, **begin)  # type: ignore[arg-type]  # a value of each control's kind
    return View(make, draw, [Twin(name, alt(found), lambda: figure(found, "hellaswag"))])


def title(found: Plan) -> str:
    """What a plan comes to, in one line."""
    fitting = [layout for layout in found.layouts if layout.fits]
    best = f"fastest: {fitting[0].name}" if fitting else "nothing fits"
    return f"{found.card.name}, {found.bits} bits, on {found.devices} x {found.memory / 2**30:.4g} GiB, {best}"


def alt(found: Plan) -> str:
    """The figure of a plan in words."""
    fitting = sum(layout.fits for layout in found.layouts)
    return (
        f"Memory of the fullest device by part and predicted seconds of {len(found.layouts)} layouts, of which "
        f"{fitting} fit. {title(found)}."
    )
