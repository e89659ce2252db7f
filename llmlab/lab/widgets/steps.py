"""The step viewer: a completion as it grew, pass by pass, with what was drafted, accepted and rejected."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

import ipywidgets
from transformers import PreTrainedTokenizerBase

from llmlab.base.errors import InputError
from llmlab.decoding.loop import Step
from llmlab.decoding.result import Completion
from llmlab.lab.figures import decoding
from llmlab.lab.figures.decoding import Pass
from llmlab.lab.widgets.view import DESCRIBED, Twin, View
from llmlab.model.lm import LM

WINDOW = 32  # earlier tokens that a token's text is read after: enough for spaces and characters of several tokens
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

    Control: `step`, the number of the pass; 0 is the one that read the prompt. A play button moves it. The completion
    is from `llmlab.generate`, the tokenizer its model's (or the LM); `name` is of the figure that stands in.

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
    branches = ["".join(_span("rejected", _visible(t).replace("\n", "")) for t in branch) for branch in now.rejected]
    text += _span("prompt", " | ").join(branches) + ("" if now.own is None else _span("own", _visible(now.own)))
    head = f"<b>Pass {step} of {len(passes) - 1}</b>: {escape(what)}. {so_far}"
    small = " ".join(_span(kind, meaning) for kind, meaning in legend.items())
    return f'<p>{head}</p><p style="font-size: .9em">{small}</p><div style="{TEXT}">{text}</div>'


def _span(kind: str, text: str) -> str:
    return f'<span style="{STYLES[kind]}" title="{kind}">{escape(text)}</span>'


def _visible(text: str) -> str:
    """A token with a sign for what would be invisible; ◦ is the beginning of a character."""
    return text.replace("\n", "⏎\n") or "◦"


def read_passes(completion: Completion, tokenizer: PreTrainedTokenizerBase | LM) -> list[Pass]:
    """The passes of a completion from `llmlab.generate` with their tokens as text; a character of several tokens stands
    at the last of them. The tokenizer is of its model, or the LM itself.

    Raises InputError if there are no steps or there is no tokenizer.
    """
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, LM) else tokenizer
    if tokenizer is None:
        raise InputError("a model with random weights has no tokenizer, so its tokens have no text: load a real model.")
    if not completion.steps:
        raise InputError("this completion has no steps: show one that llmlab.generate returned.")
    passes, before = [], list[int]()
    for step in completion.steps:
        texts = _pieces(tokenizer, before, step.tokens)
        rejected = [_pieces(tokenizer, before + above, branch) for above, branch in _rejected(step)]
        own = texts[step.accepted] if len(texts) > step.accepted else None
        passes.append(Pass(step.source, texts[: step.accepted], rejected, own))
        before = before + step.tokens
    return passes


def _pieces(tokenizer: PreTrainedTokenizerBase, before: list[int], ids: list[int]) -> list[str]:
    """The text that each token adds behind those before it; "" for one that only begins a character."""
    starts = [before[-WINDOW:] + ids[:end] for end in range(len(ids) + 1)]
    # A character that is not whole yet decodes to U+FFFD.
    texts = [str(tokenizer.decode(start, clean_up_tokenization_spaces=False)).rstrip("\ufffd") for start in starts]
    return [longer[len(shorter) :] for shorter, longer in pairwise(texts)]


def _rejected(step: Step) -> list[tuple[list[int], list[int]]]:
    """The branches of a drafted tree that were not accepted: the tokens above each and its own."""
    nodes = list(enumerate(zip(step.parents, step.drafted, strict=True)))
    accepted, branches, paths = [-1], list[tuple[list[int], list[int]]](), {-1: list[int]()}
    for token in step.tokens[: step.accepted]:
        accepted.append({pair: node for node, pair in nodes}[accepted[-1], token])
    open_ = dict[int, tuple[list[int], list[int]]]()  # a branch by its last node
    for node, (parent, token) in nodes:
        paths[node] = [*paths[parent], token]
        if node not in accepted:
            if parent not in open_:
                open_[parent] = paths[parent], []
                branches.append(open_[parent])
            open_[node] = open_.pop(parent)
            open_[node][1].append(token)
    return branches
