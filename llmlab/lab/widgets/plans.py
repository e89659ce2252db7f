"""The plan explorer: devices, memory and bits moved by hand; memory and predicted time of every layout follow."""

from collections.abc import Sequence
from html import escape
from typing import Any

import ipywidgets

from llmlab.lab.figures import sharding
from llmlab.lab.widgets.view import Twin, View, dropdown, slider
from llmlab.model.card import ModelCard
from llmlab.model.load import model_card
from llmlab.sharding.costs import DEVICES
from llmlab.sharding.plan import BITS, Plan, plan

MODELS = ("llama-30b", "llama-7b", "llama-13b", "llama-65b", "opt-6.7b", "opt-30b", "opt-66b")
OWN = "as built"
MEMORY = (OWN, "8GiB", "16GiB", "24GiB", "32GiB", "40GiB", "48GiB", "80GiB", "141GB")
WORKLOADS = {"hellaswag": "all of HellaSwag", "decode": "one token"}


def plan_explorer(models: Sequence[str | ModelCard] = MODELS, *, name: str = "plan") -> View:
    """Memory and predicted time of every layout of a model: a card or a name as for `llmlab.model_card`.

    Controls: `model`, `device` and its `memory`, `devices` (1 to 8), `bits` of the weights, and the `workload`. `name`
    is of the figure that stands in.

    Raises InputError for an unknown model.
    """
    cards = {card.name: card for card in (m if isinstance(m, ModelCard) else model_card(m) for m in models)}

    def make() -> dict[str, ipywidgets.ValueWidget]:
        return {
            "model": dropdown("model", cards),
            "device": dropdown("device", ((about["name"], key) for key, about in DEVICES.items())),
            "memory": slider("memory", MEMORY),
            "devices": slider("devices", range(1, 9), value=4),
            "bits": slider("bits", BITS),
            "workload": dropdown("time for", ((job, key) for key, job in WORKLOADS.items())),
        }

    def planned(model: str, device: str, memory: str, devices: int, bits: int, workload: str) -> tuple[Plan, Twin]:
        limit = None if memory == OWN else memory
        shown = plan(cards[model], devices=devices, memory=limit, bits=bits, device=device, workload=workload)
        best = next((f"fastest: {layout.name}" for layout in shown.layouts if layout.fits), "nothing fits")
        title = f"{model}, {bits} bits, on {devices} x {shown.memory / 2**30:.4g} GiB, {best}"
        drawn = f"Memory of the fullest device by part and predicted seconds of {len(shown.layouts)} layouts"
        alt = f"{drawn}, of which {sum(layout.fits for layout in shown.layouts)} fit. {title}."
        return shown, Twin(name, alt, lambda: sharding.layouts(shown, title, WORKLOADS[workload]))

    def draw(**chosen: Any) -> str:
        shown, twin = planned(**chosen)
        return f"{twin.svg()}<p>{escape(shown.assumptions)}</p>"

    first = planned(next(iter(cards)), next(iter(DEVICES)), OWN, 4, BITS[0], "hellaswag")[1]
    return View(make, draw, [first])
