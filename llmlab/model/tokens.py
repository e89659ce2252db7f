"""Text to token ids, as lm-evaluation-harness does it: BOS once, and nothing behind the text."""

from __future__ import annotations

import json

from tokenizers import processors
from tokenizers.processors import PostProcessor
from transformers import PreTrainedTokenizerBase

from llmlab.base.errors import InputError

SAMPLE = "a"


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids with the tokenizer's own special tokens; without them if the text begins with its BOS already."""
    first = tokenizer.bos_token or tokenizer.eos_token
    return list(tokenizer.encode(text, add_special_tokens=not (first and text.startswith(first))))


def open_ended(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same tokenizer, which from now on appends no token to a text.

    Some fine-tunes leave `add_eos_token` on. To a decoder-only model an appended </s> says that the text is over: it
    must not stand between a context and its ending, nor behind a prompt.

    Raises:
        InputError: it appends one by code of its own.
    """
    if not _appends(tokenizer):
        return tokenizer
    if tokenizer.is_fast:
        backend = tokenizer.backend_tokenizer
        backend.post_processor = _without_suffix(backend.post_processor)
    else:
        tokenizer.add_eos_token = False
    if _appends(tokenizer):
        last = tokenizer.decode(tokenizer.encode(SAMPLE)[-1:])
        raise InputError(f"it appends {last!r} to every text, which would end what is to be continued.")
    return tokenizer


def _appends(tokenizer: PreTrainedTokenizerBase) -> bool:
    return bool(tokenizer.encode(SAMPLE)[-1:] != tokenizer.encode(SAMPLE, add_special_tokens=False)[-1:])


def _without_suffix(processor: PostProcessor) -> PostProcessor:
    """What puts special tokens around a text, without those after it."""
    state = json.loads(processor.__getstate__())
    if isinstance(processor, processors.Sequence):
        return processors.Sequence([_without_suffix(processor[i]) for i in range(len(state["processors"]))])
    if "cls" in state:  # BERT's and RoBERTa's: [CLS] text [SEP]
        text, number = state["cls"]
        return processors.TemplateProcessing([text, "$A"], [text, "$A", "$B"], [(text, number)])
    if "single" in state:  # a template of pieces, one of which is the text: {"Sequence": {"id": "A"}}
        while "SpecialToken" in state["single"][-1]:
            state["single"].pop()
        processor.__setstate__(json.dumps(state).encode())
    return processor
