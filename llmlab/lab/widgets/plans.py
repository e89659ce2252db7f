"""The plan explorer: devices, memory and bits moved by hand; memory and predicted time of every layout follow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from html import escape

import ipywidgets
from matplotlib.figure import Figure

from llmlab.lab.figures import sharding
from llmlab.lab.widgets.svg import inline
from llmlab.lab.widgets.view import Twin, View, dropdown, slider
from llmlab.model.card import ModelCard
from llmlab.model.load import model_card
from llmlab.sharding.plan import BITS, Plan, plan
from llmlab.sharding.predict import DEVICES

MODELS = ("llama-30b", "llama-7b", "llama-13b", "llama-65b", "opt-6.7b", "opt-30b", "opt-66b")
OWN = "as built"
MEMORY = (OWN, "8GiB", "16GiB", "24GiB", "32GiB", "40GiB", "48GiB", "80GiB", "141GB")
WORKLOADS = {"hellaswag": "all of HellaSwag", "decode": "one token"}


def plan_explorer(models: Sequence[str | ModelCard] = MODELS, *, name: str = "plan") -> View:
    """Memory and predicted time of every layout of a model.

    Controls: `model`, `device` and its `memory`, `devices` (1 to 8), `bits` of the weights, and the `workload`.

    Args:
        models: to choose from, the first one to begin with; cards or names as for `llmlab.model_card`.
        name: of the figure that stands in for the widget.

    Raises InputError for an unknown model.
    """
    cards = {model if isinstance(model, str) else model.name: model for model in models}

    @cache
    def card(name: str) -> ModelCard:
        model = cards[name]
        return model_card(model) if isinstance(model, str) else model

    def make() -> dict[str, ipywidgets.ValueWidget]:
        return {
            "model": dropdown("model", cards),
            "device": dropdown("device", ((about["name"], key) for key, about in DEVICES.items())),
            "memory": slider("memory", MEMORY),
            "devices": slider("devices", range(1, 9), value=4),
            "bits": slider("bits", BITS),
            "workload": dropdown("time for", ((job, key) for key, job in WORKLOADS.items())),
        }

    def planned(model: str, device: str, memory: str, devices: int, bits: int, workload: str) -> Plan:
        limit = None if memory == OWN else memory
        return plan(card(model), devices=devices, memory=limit, bits=bits, device=device, workload=workload)

    def draw(workload: str, **chosen: object) -> str:
        drawn = planned(workload=workload, **chosen)  # type: ignore[arg-type]  # a value of each control's kind
        return inline(_figure(drawn, workload), alt(drawn)) + f"<p>{escape(drawn.assumptions)}</p>"

    first = planned(next(iter(cards)), next(iter(DEVICES)), OWN, 4, BITS[0], "hellaswag")
    return View(make, draw, [Twin(name, alt(first), lambda: _figure(first, "hellaswag"))])


def _figure(shown: Plan, workload: str) -> Figure:
    return sharding.layouts(shown, title(shown), WORKLOADS[workload])


def title(shown: Plan) -> str:
    """What a plan comes to, in one line."""
    best = next((f"fastest: {layout.name}" for layout in shown.layouts if layout.fits), "nothing fits")
    memory = f"{shown.devices} x {shown.memory / 2**30:.4g} GiB"
    return f"{shown.card.name}, {shown.bits} bits, on {memory}, {best}"


def alt(shown: Plan) -> str:
    """The figure of a plan in words."""
    fitting = sum(layout.fits for layout in shown.layouts)
    drawn = f"Memory of the fullest device by part and predicted seconds of {len(shown.layouts)} layouts"
    return f"{drawn}, of which {fitting} fit. {title(shown)}."
