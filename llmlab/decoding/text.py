"""The text of new tokens, as it reads behind the prompt, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence

from llmlab.model.lm import LM

BEFORE = 8  # tokens of the prompt that the decoder sees


def continuation(lm: LM, prompt: list[int], new: list[int], *, special: bool = False) -> str:
    """Text of new tokens behind a prompt; special tokens are left out unless `special`.

    Decoded alone, a text loses its first space in Llama's (SentencePiece's) decoder, and would be glued to the prompt:
    so it is decoded behind the prompt's last tokens.
    """
    before = lm.decode(prompt[-BEFORE:], special=special)
    text = lm.decode(prompt[-BEFORE:] + new, special=special)
    return text[len(before) :] if text.startswith(before) else lm.decode(new, special=special)


def text_until(lm: LM, prompt: list[int], new: list[int], stop: Sequence[str]) -> tuple[str, bool]:
    """Text of new tokens up to the first stop string, and whether there is one; it may hold special tokens."""
    text = continuation(lm, prompt, new)
    places = [text.find(end) for end in stop if end in text]
    if places:
        return text[: min(places)], True
    whole = continuation(lm, prompt, new, special=True) if stop else ""
    places = [whole.find(end) for end in stop if end in whole]
    if not places:
        return text, False
    text = whole[: min(places)]
    for token in lm.tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text, True
