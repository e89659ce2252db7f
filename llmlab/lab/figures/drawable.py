"""Text of models and records, made fit for matplotlib."""

from __future__ import annotations

from functools import cache
from typing import Any

from matplotlib import font_manager

MARKS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


def drawable(text: str) -> str:
    """Text that matplotlib draws as it is: no formula between dollar signs, no line break, no warning for a glyph.

    Characters that the lab's font lacks become □. Escaped for `Text`; not meant for `parse_math=False`.
    """
    shown = (MARKS.get(c, c) for c in text)
    return "".join(c if _font().get_char_index(ord(c)) else "□" for c in shown).replace("$", r"\$")


@cache
def _font() -> Any:
    return font_manager.get_font(font_manager.findfont("DejaVu Sans"))
