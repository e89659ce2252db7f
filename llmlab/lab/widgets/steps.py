"""The step viewer: a completion as it grew, pass by pass, with what was drafted, accepted and rejected."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import ipywidgets

from llmlab.decoding.result import Completion
from llmlab.lab.figures import decoding
from llmlab.lab.passes import Pass, read_passes
from llmlab.lab.widgets.view import DESCRIBED, Twin, View
from llmlab.model.lm import LM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tints that leave the page's own ink readable, light or dark; no cue by colour alone.
STYLES = {
    "accepted": "background: rgba(0, 158, 115, .35); border-radius: 3px",
    "rejected": "text-decoration: line-through 2px rgb(213, 94, 0); opacity: .75; background: rgba(128, 128, 128, .18)",
    "own": "border-bottom: 3px solid rgb(0, 114, 178); background: rgba(0, 114, 178, .12)",
    "prompt": "opacity: .6",
    "old": "background: rgba(0, 158, 115, .2)",
}
TEXT = (
    "white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; line-height: 1.7; max-width: 100ch;"
    " max-height: 26em; overflow-y: auto; padding: 6px 10px; border: 1px solid rgba(128, 128, 128, .4)"
)


def step_viewer(
    completion: Completion, tokenizer: PreTrainedTokenizerBase | LM, *, name: str = "speculation_steps"
) -> View:
    """The text as it grows: accepted tokens green, rejected ones struck out, the model's own underlined.

    Control: `step`, the number of the pass; 0 is the one that read the prompt. A play button moves it.

    Args:
        completion: from `llmlab.generate`, with or without a draft.
        tokenizer: of its model, or the LM itself.
        name: of the figure that stands in for the widget.

    Raises InputError if the completion has no steps or the model no tokenizer.
    """
    passes = read_passes(completion, tokenizer)
    last = len(passes) - 1

    def make() -> dict[str, ipywidgets.ValueWidget]:
        play = ipywidgets.Play(min=0, max=last, interval=600)
        step = ipywidgets.IntSlider(0, 0, last, description="pass", style=DESCRIBED, layout={"width": "420px"})
        ipywidgets.jslink((play, "value"), (step, "value"))
        return {"play": play, "step": step}

    title = f"{sum(len(step.tokens) for step in passes)} tokens in {len(passes)} passes"
    drafted, accepted = sum(step.drafted for step in passes), sum(len(step.accepted) for step in passes)
    alt = (
        f"The first passes of a completion, a row each: accepted tokens green, rejected ones struck out, the model's "
        f"own framed. In all {title}; {accepted} of {drafted} drafted tokens were accepted."
    )
    twin = Twin(name, alt, lambda: decoding.steps(passes, title))
    return View(make, lambda play, step: step_html(completion.prompt, passes, step), [twin])


def step_html(prompt: str, passes: Sequence[Pass], step: int) -> str:
    """One pass in its text, everything escaped."""
    now, before, tokens = passes[step], passes[:step], sum(len(done.tokens) for done in passes[: step + 1])
    if step == 0:
        what = "the model read the prompt and added its first token"
    elif not now.drafted:
        what = "nothing was drafted; the model added a token"
    else:
        ended = "" if now.own is not None else ", where the completion ended"
        what = f"{now.source} drafted {now.drafted}, {len(now.accepted)} accepted{ended}"
    so_far = f"So far {tokens} tokens in {step + 1} passes, {tokens / (step + 1):.2f} a pass." if step else ""
    unused = "rejected" if now.own is not None else "behind the end"
    legend = {"accepted": "accepted", "rejected": unused, "own": "the model's own", "old": "accepted earlier"}
    text = _span("prompt", prompt)
    text += "".join("".join(_span("old", t) for t in done.accepted) + escape(done.own or "") for done in before)
    text += "".join(_span("accepted", _visible(t)) for t in now.accepted)
    text += _span("prompt", " | ").join(
        "".join(_span("rejected", _visible(t).replace("\n", "")) for t in branch) for branch in now.rejected
    )
    text += "" if now.own is None else _span("own", _visible(now.own))
    head = f"<b>Pass {step} of {len(passes) - 1}</b>: {escape(what)}. {so_far}"
    small = " ".join(_span(kind, meaning) for kind, meaning in legend.items())
    return f'<p>{head}</p><p style="font-size: .9em">{small}</p><div style="{TEXT}">{text}</div>'


def _span(kind: str, text: str) -> str:
    return f'<span style="{STYLES[kind]}" title="{kind}">{escape(text)}</span>'


def _visible(text: str) -> str:
    """A token with a sign for what would be invisible; ◦ is the beginning of a character."""
    return text.replace("\n", "⏎\n") or "◦"
