"""Perplexity over sliding windows, with the protocol beside the number."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from llmlab.base.errors import InputError, NumericalError
from llmlab.base.progress import progress
from llmlab.base.stats import Z95, Metric
from llmlab.data import ids_fingerprint
from llmlab.kernels.plain import fastest_matmuls
from llmlab.model.lm import LM

CONTEXT = 512  # tokens of a window, unless another number or a protocol is asked for
PROTOCOLS = {"gptq-2048": 2048}  # all whole non-overlapping windows of so many tokens, as in opt.py of GPTQ's code


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a text.

    Attributes:
        window_nll: mean negative log-likelihood (nats a token) of the scored tokens of each window.
        window_tokens: how many tokens each window scores.
        context: tokens a window holds; stride: tokens between the starts of two windows.
        text_tokens, text_words, text_bytes: of the whole text: its tokens without special ones, what white space
            separates, and its length in UTF-8.
        named: the protocol that was asked for by its name.
        token_ids: a fingerprint of the text's, special ones included.
    """

    window_nll: list[float]
    window_tokens: list[int]
    context: int
    stride: int
    batch_size: int
    seconds_inference: float
    seconds_total: float
    text_tokens: int
    text_words: int
    text_bytes: int
    named: str | None = None
    token_ids: str = ""
    task: str = "perplexity"
    data: str = "text"
    memory_bytes: int | None = None  # the weights alone
    seed: int | None = None  # nothing is drawn

    @property
    def settings(self) -> dict[str, str]:
        """How the text was cut and run."""
        return {name: str(getattr(self, name)) for name in ("context", "stride", "batch_size", "token_ids")}

    @property
    def n(self) -> int:
        """Scored tokens."""
        return sum(self.window_tokens)

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood of a scored token, in nats."""
        return float(np.average(self.window_nll, weights=self.window_tokens))

    @property
    def perplexity(self) -> Metric:
        """exp(nll) with a 95 % interval from the spread between windows (none for a single window)."""
        return self._perplexity_of(1)

    @property
    def word_perplexity(self) -> Metric:
        """exp(nll x tokens / words): of two models with different tokenizers it can be compared, a token's cannot.

        lm-evaluation-harness's word_perplexity, with the mean over the scored tokens in the place of those that the
        windows leave out.
        """
        return self._perplexity_of(self.text_tokens / max(1, self.text_words))

    @property
    def byte_perplexity(self) -> Metric:
        """The same for a byte of UTF-8: exp(nll x tokens / bytes)."""
        return self._perplexity_of(self.text_tokens / self.text_bytes)

    def _perplexity_of(self, tokens: float) -> Metric:
        """exp(nll x tokens), for a unit of text that has so many of them; at most e^700, where floats end."""

        def raised(nll: float) -> float:
            return math.exp(min(700.0, nll * tokens))

        windows = len(self.window_nll)
        if windows < 2:
            return Metric(raised(self.nll))
        half = Z95 * float(np.std(self.window_nll, ddof=1)) / math.sqrt(windows)
        return Metric(raised(self.nll), "", raised(self.nll - half), raised(self.nll + half))

    @property
    def protocol(self) -> str:
        """How the number came about, in one line: perplexities under other protocols cannot be compared with it."""
        if self.stride == self.context:
            scored = f"non-overlapping, {self.context - 1} tokens of each scored (its first has no context)"
        else:
            scored = f"stride {self.stride}, each window scores its last {self.stride} tokens (the first window all)"
        name = f"{self.named}: " if self.named else ""
        windows = f"{len(self.window_nll)} windows of {self.context} tokens"
        return f"{name}{windows}, {scored}; {self.n} tokens; log-soft-max in fp32"

    def metrics(self) -> dict[str, Metric]:
        """The measurements with their units, for a Record."""
        return {
            "perplexity": self.perplexity,
            "word_perplexity": self.word_perplexity,
            "byte_perplexity": self.byte_perplexity,
            "nll": Metric(self.nll, "nat/token"),
            "seconds_inference": Metric(self.seconds_inference, "s"),
            "seconds_total": Metric(self.seconds_total, "s"),
        }

    def as_dict(self) -> dict[str, object]:
        """Everything, ready for JSON."""
        ppl = self.perplexity
        values = {"n": self.n, "perplexity": ppl.value, "perplexity_interval": [ppl.low, ppl.high], "nll": self.nll}
        values |= {"word_perplexity": self.word_perplexity.value, "byte_perplexity": self.byte_perplexity.value}
        own = {"windows": len(self.window_nll), "settings": self.settings, "protocol": self.protocol}
        return values | asdict(self) | own


def perplexity(
    lm: LM,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    batch_size: int = 1,
    protocol: str | None = None,
) -> PerplexityResult:
    """Perplexity of `text` under the model, of a token, a word and a byte.

    Windows of `context` tokens start every `stride` tokens; a token is scored once, in the first window that holds it
    with a predecessor. By default stride = context (non-overlapping windows, as in the GPTQ papers); a shorter stride
    gives each token more context and a lower number. What does not fill a last window is left out unless it is the
    only one.

    Args:
        lm: the model.
        text: long enough for two tokens.
        context: tokens in a window, at most the model's context length; 512 by default.
        stride: 1 .. context.
        max_windows: stop after this many windows.
        batch_size: windows a forward pass.
        protocol: "gptq-2048" sets all but the batch size as the code of arXiv 2210.17323 has it: all whole windows of
            2,048 tokens of the text, side by side (`llmlab.data.wikitext` joins its lines with "\\n\\n" as that does).

    Raises:
        InputError: a protocol that makes no sense, or too short a text.
        NumericalError: a window's likelihood is not finite.
    """
    context, stride = check_protocol(lm, context, stride, max_windows, batch_size, protocol)
    begin = time.perf_counter()
    ids = torch.tensor(lm.input_ids(text))  # [tokens]
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens: perplexity needs at least two.")
    if protocol and len(ids) < context:
        raise InputError(f"the text has {len(ids)} tokens: {protocol} needs at least one window of {context}.")
    starts = list(range(0, max(1, len(ids) - context + 1), stride))[:max_windows]
    windows = [ids[start : start + context] for start in starts]
    window_nll: list[float] = []
    window_tokens: list[int] = []
    begin_inference = time.perf_counter()
    with progress(len(windows), "perplexity", "window") as bar, fastest_matmuls(lm.model):
        for first in range(0, len(windows), batch_size):
            batch = torch.stack(windows[first : first + batch_size]).to(lm.device)  # [batch, context]
            for row, nll in enumerate(_token_nll(lm, batch)):
                scored = nll if first + row == 0 or stride == context else nll[-stride:]
                window_nll.append(float(scored.mean()))
                window_tokens.append(scored.numel())
            if not math.isfinite(sum(window_nll)):
                raise NumericalError(
                    f"a window from {first} on has a likelihood that is not finite in {lm.dtype}: try fp32."
                )
            so_far = math.exp(float(np.average(window_nll, weights=window_tokens)))
            bar.set_postfix_str(f"ppl {so_far:.2f}", refresh=False)
            bar.update(len(batch))
    end = time.perf_counter()
    sizes = len(lm.encode(text, special_tokens=False)), len(text.split()), len(text.encode())
    how, seconds = (protocol, ids_fingerprint([ids.tolist()])), (end - begin_inference, end - begin)
    return PerplexityResult(window_nll, window_tokens, context, stride, batch_size, *seconds, *sizes, *how)


@torch.inference_mode()
def _token_nll(lm: LM, batch: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of every token but the first: [batch, length] ids to [batch, length-1] nats on CPU."""
    logits = lm.model(input_ids=batch, use_cache=False).logits[:, :-1].float()  # [batch, length-1, vocabulary]
    # Flat, so that the vocabulary is the last dimension: over a strided one torch's fp32 sum is off by 1e-4 nats.
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1).cpu()


def check_protocol(
    lm: LM,
    context: int | None,
    stride: int | None,
    max_windows: int | None,
    batch_size: int,
    protocol: str | None = None,
) -> tuple[int, int]:
    """Context and stride that are meant; raises InputError for windows that make no sense for this model.

    Needs no weights.
    """
    if protocol is not None:
        if protocol not in PROTOCOLS:
            raise InputError(f"unknown protocol {protocol!r}: choose {' or '.join(PROTOCOLS)}, or none.")
        if (context, stride, max_windows) != (None, None, None):
            raise InputError(f"{protocol} sets context, stride and windows: leave them out, or the protocol.")
        context = PROTOCOLS[protocol]
    context = CONTEXT if context is None else context
    stride = context if stride is None else stride
    if not 2 <= context <= lm.card.context_length:
        raise InputError(f"context {context}: choose 2 to {lm.card.context_length} tokens, the context of {lm.name}.")
    if not 1 <= stride <= context:
        raise InputError(f"stride {stride}: choose 1 to {context} tokens, the context.")
    if max_windows is not None and max_windows < 1:
        raise InputError(f"{max_windows} windows: give a positive number, or none for all.")
    if batch_size < 1:
        raise InputError(f"batch size {batch_size}: give a positive number.")
    return context, stride
