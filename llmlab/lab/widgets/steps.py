"""The step viewer: a completion as it grew, pass by pass, with what was drafted, accepted and rejected."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import ipywidgets

from llmlab.decoding.result import Completion
from llmlab.lab.figures import decoding
from llmlab.lab.passes import Pass, read_passes
from llmlab.lab.widgets.view import DESCRIBED, Twin, View

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


def step_viewer(completion: Completion, tokenizer: Any, *, name: str = "speculation_steps") -> View:
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

    def make() -> dict[str, Any]:
        wide = ipywidgets.Layout(width="420px")
        return {"step": ipywidgets.IntSlider(0, 0, last, description="pass", style=DESCRIBED, layout=wide)}

    def play(controls: dict[str, Any]) -> list[Any]:
        button = ipywidgets.Play(min=0, max=last, interval=600)
        ipywidgets.jslink((button, "value"), (controls["step"], "value"))
        return [button]

    count = sum(len(one.tokens) for one in passes)
    title = f"{count} tokens in {len(passes)} passes"
    drafted, accepted = sum(p.drafted for p in passes), sum(len(p.accepted) for p in passes)
    alt = (
        f"The first passes of a completion, a row each: accepted tokens green, rejected ones struck out, the model's "
        f"own framed. In all {title}; {accepted} of {drafted} drafted tokens were accepted."
    )
    twin = Twin(name, alt, lambda: decoding.steps(passes, title))
    return View(make, lambda step: step_html(completion.prompt, passes, step), [twin], play)


def step_html(prompt: str, passes: Sequence[Pass], step: int) -> str:
    """One pass in its text, everything escaped."""
    now, done = passes[step], passes[: step + 1]
    tokens = sum(len(one.tokens) for one in done)
    if step == 0:
        what = "the model read the prompt and added its first token"
    elif not now.drafted:
        what = "nothing was drafted; the model added a token"
    else:
        ended = "" if now.own is not None else ", where the completion ended"
        what = f"{now.source} drafted {now.drafted}, {len(now.accepted)} accepted{ended}"
    so_far = f"So far {tokens} tokens in {step + 1} passes, {tokens / (step + 1):.2f} a pass." if step else ""
    head = f"<b>Pass {step} of {len(passes) - 1}</b>: {escape(what)}. {so_far}"
    legend = " ".join(_span(kind, text) for kind, text in _legend(now))
    before = "".join("".join(_span("old", t) for t in one.accepted) + escape(one.own or "") for one in passes[:step])
    kept = "".join(_span("accepted", _visible(t)) for t in now.accepted)
    dropped = _span("prompt", " | ").join(
        "".join(_span("rejected", _visible(t).replace("\n", "")) for t in branch) for branch in now.rejected
    )
    own = "" if now.own is None else _span("own", _visible(now.own))
    text = _span("prompt", prompt) + before + kept + dropped + own
    return f'<p>{head}</p><p style="font-size: .9em">{legend}</p><div style="{TEXT}">{text}</div>'


def _legend(now: Pass) -> list[tuple[str, str]]:
    unused = "rejected" if now.own is not None else "behind the end"
    return [("accepted", "accepted"), ("rejected", unused), ("own", "the model's own"), ("old", "accepted earlier")]


def _span(kind: str, text: str) -> str:
    return f'<span style="{STYLES[kind]}" title="{kind}">{escape(text)}</span>'


def _visible(text: str) -> str:
    """A token that would be invisible gets a sign."""
    if not text:
        return "◦"  # the beginning of a character
    return text.replace("\n", "⏎\n")
