"""Figures, a file a subject: numbers in, Figure out, drawn in one style.

`figures.show(figures.scoring.endings(...), name, alt)`; a subject is imported when it is first named. The `title` of
every figure is its message.
"""

from importlib import import_module
from types import ModuleType

from llmlab.lab.figures.draw import drawable as drawable
from llmlab.lab.figures.draw import save as save
from llmlab.lab.figures.draw import show as show
from llmlab.lab.figures.draw import style as style

SUBJECTS = ("challenge", "decoding", "quantization", "scoring", "sharding", "speed", "tradeoffs")


def __getattr__(name: str) -> ModuleType:
    if name not in SUBJECTS:
        raise AttributeError(f"there are no figures of {name!r}: choose one of {', '.join(SUBJECTS)}.")
    return import_module(f"{__name__}.{name}")
